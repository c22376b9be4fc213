"""Convolutions product by product, with few outputs or few inputs, against the torch reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, reference_gradient, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton.direct import DirectConvolution, reach
from fastinv.kernels.triton.geometry import Geometry, correlation, transposed
from interpreter import DEVICE, check_features, forward, gradient, network_on

from fastinv import tensors
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.network import Network

TOLERANCES = {"float32": 1e-5, "float16": 5e-3}  # relative

LAYERS: dict[str, tuple[tuple[int, ...], tuple[nn.Module, ...]]] = {
    "few outputs": ((20, 9, 7), (nn.Conv2d(20, 3, 3, padding=1), nn.Sigmoid())),
    "one output": ((8, 7, 6), (nn.Conv2d(8, 1, 5, padding=4), nn.ReLU())),
    "one input": ((1, 9, 12), (nn.Conv2d(1, 8, 5), nn.ReLU())),
    "few inputs": ((3, 5, 13), (nn.Conv2d(3, 11, 3, padding=1), nn.Tanh())),
    "one of each": ((1, 6, 5), (nn.Conv2d(1, 1, (2, 3)),)),
    "as many of each": ((12, 6, 5), (nn.Conv2d(12, 12, 3, padding=1), nn.SiLU())),
    "strided": ((5, 11, 10), (nn.Conv2d(5, 2, 3, stride=(2, 3), padding=1),)),
    "strided over what is not read": ((4, 9, 10), (nn.Conv2d(4, 6, 1, stride=2),)),
    "dilated": ((6, 12, 13), (nn.Conv2d(6, 2, 3, padding=2, dilation=(2, 3)),)),
    "transposed": ((16, 5, 6), (nn.ConvTranspose2d(16, 8, 5), nn.ReLU())),
    "all phases": ((8, 5, 4), (nn.ConvTranspose2d(8, 1, 6, 2), nn.Sigmoid())),
    "phases of other sizes": ((6, 3, 4), (nn.ConvTranspose2d(6, 2, (2, 4), (3, 2), (0, 1)),)),
    "phases without taps": ((3, 3, 4), (nn.ConvTranspose2d(3, 5, 1, 2, output_padding=1),)),
    "dilated phases": ((4, 4, 3), (nn.ConvTranspose2d(4, 2, 3, 2, 1, dilation=3),)),
    "an image of one pixel": ((7, 1, 1), (nn.Conv2d(7, 4, 3, padding=1),)),
}


def kernel_of(network: Network, precision: str = "float32") -> object:
    return Lowering(network, DEVICE, PRECISIONS[precision]).nodes[0].kernel


def launches(network: Network) -> int:
    return len(network_on(network)._arena.stages)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_between_layers(name: str, precision: str) -> None:
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    assert isinstance(kernel_of(network, precision), DirectConvolution)
    for images in (1, 3):
        x = randn(images, *shape)
        assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("name", LAYERS)
def test_gradient(name: str) -> None:
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    z = randn(2, *shape, seed=1)
    features = (reference(network, z) + randn(2, *network.output_shape, seed=2)).astype(np.float32)
    assert relative(gradient(network, z, features), reference_gradient(network, z, features)) < 1e-5


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_first_layer(name: str, precision: str) -> None:
    """Features in the user's order, in batches that are full or not, and in none."""
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    x = randn(3, *shape)
    out = np.empty((3, *network.output_shape), np.float32)
    network_on(network, precision, most=2).run(x, out)
    assert relative(out, reference(network, x)) < TOLERANCES[precision]
    network_on(network, precision).run(x[:0], out[:0])


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(2, 6, 3)], ids=["outputs", "inputs"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8"])
def test_features_of_any_type(dtype: str, layer: nn.Module) -> None:
    network = exported((2, 6, 8), layer)
    assert launches(network) == 1
    check_features(network, dtype)


def test_bytes_to_bytes() -> None:
    network = exported((5, 6, 7), nn.ConvTranspose2d(5, 3, 4, 2, 1), nn.Sigmoid())
    x = (40 * randn(3, 5, 6, 7) + 128).clip(0, 255).astype(np.uint8)
    source = tensors.source(torch.from_numpy(x), network.input_shape, scale=[0.05] * 5, zero_point=[128] * 5)
    out = np.empty((3, *network.output_shape), np.uint8)
    assert network_on(network).run_raw(source, out)
    assert np.abs(out - np.rint(255 * reference(network, source.chunk(0, 3)))).max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity times a weight of 0
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["strided", "strided over what is not read", "few inputs", "phases without taps"])
def test_what_is_not_finite_is_seen(name: str, value: float) -> None:
    """Wherever it lies, also where no output sees it."""
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    compiled, out = network_on(network), np.empty((2, *network.output_shape), np.float32)
    x = randn(2, *shape)
    assert compiled.run_raw(tensors.source(x, shape), out)
    channels, height, width = shape
    for row, column in ((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 2)):
        bad = x.copy()
        bad[1, channels - 1, row, column] = value
        assert not compiled.run_raw(tensors.source(bad, shape), out)
    assert compiled.run_raw(tensors.source(x, shape), out)


def test_features_that_are_not_all_seen_have_a_launch_of_their_own() -> None:
    assert launches(exported((4, 9, 10), nn.Conv2d(4, 2, 3, stride=2))) == 2  # the last column
    assert launches(exported((4, 9, 9), nn.Conv2d(4, 2, 3, stride=2))) == 1
    assert launches(exported((4, 9, 9), nn.Conv2d(4, 2, 1, stride=2))) == 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + x


def test_features_that_others_read_have_a_launch_of_their_own() -> None:
    network = exported((4, 6, 5), Twice(), nn.Conv2d(4, 4, 1))
    x, out = randn(2, 4, 6, 5), np.empty((2, 4, 6, 5), np.float32)
    network_on(network).run(x, out)
    assert relative(out, reference(network, x)) < 1e-5
    assert launches(network) == 3


def test_which_convolutions() -> None:
    """Those whose matrix product would be mostly empty, and that can be written out."""

    def direct(precision: str, inputs: int, outputs: int, size: int = 3, **options: int) -> bool:
        network = exported((inputs, 16, 16), nn.Conv2d(inputs, outputs, size, **options))
        return isinstance(kernel_of(network, precision), DirectConvolution)

    assert direct("bfloat16", 64, 4)
    assert not direct("float32", 64, 5)
    assert direct("bfloat16", 16, 8)
    assert not direct("float32", 16, 9)
    assert direct("bfloat16", 15, 16)
    assert not direct("bfloat16", 3, 64)
    assert direct("float32", 3, 64)
    assert not direct("float32", 3, 65)
    assert direct("float32", 3, 2, 11)
    assert not direct("float32", 4, 4, 11)


GEOMETRIES = {
    "padded": correlation((9, 8), (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": correlation((11, 10), (5, 4), (3, 2), (2, 3), (0, 1), (1, 1)),
    "dilated": correlation((9, 12), (5, 6), (3, 3), (1, 1), (0, 0), (2, 3)),
    "phases": transposed((4, 5), (9, 10), (3, 4), (2, 2), (1, 1), (1, 1)),
    "dilated phases": transposed((4, 5), (13, 19), (3, 3), (2, 3), (0, 0), (3, 2)),
}


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_reach(geometry: Geometry, rows: int) -> None:
    """Every tap of every output finds the input that it reads, and all inputs are checked."""
    for axis in (0, 1):
        found = reach(geometry, axis, rows)
        begins = [cell * rows * geometry.stride[axis] for cell in range(found.cells)]
        taps = iter(range(len(found.taps)))
        for phase, part in enumerate(geometry.axes[axis]):
            for t, entry in enumerate(part.taps):
                tap = next(taps)
                assert (found.phases[tap], found.taps[tap]) == (phase, entry)
                for cell, row in itertools.product(range(found.cells), range(rows)):
                    read = begins[cell] + found.offsets[found.entries[tap * rows + row]]
                    i = cell * rows + row
                    assert read == i * geometry.stride[axis] + part.first + t * geometry.spacing[axis]
        for offset, free in zip(found.offsets, found.free, strict=True):
            assert free == all(0 <= begin + offset < geometry.inputs[axis] for begin in begins)
        through = [o for o, checked in zip(found.offsets, found.checked, strict=True) if checked]
        seen = {begin + offset for begin in begins for offset in through} & set(range(geometry.inputs[axis]))
        assert found.whole == (len(seen) == geometry.inputs[axis])
