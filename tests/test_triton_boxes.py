"""Convolutions whose pixels come in boxes, by tensor descriptors, against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, reference_gradient, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton import convolution
from fastinv.kernels.triton.boxes import box_for, turned
from fastinv.kernels.triton.convolution import Tile
from fastinv.kernels.triton.geometry import correlation
from fastinv.kernels.triton.launch import copies_boxes
from interpreter import DEVICE, forward, gradient, network_on

from fastinv import tensors
from fastinv.backends.cuda import ops as cuda_ops
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering

# Relative. The interpreter computes tf32 products in float32.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-5 if DEVICE == "cpu" else 5e-3, "float16": 5e-3}

LAYERS: dict[str, tuple[tuple[int, ...], tuple[nn.Module, ...]]] = {
    "padded": ((16, 7, 9), (nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())),
    "channels that fill no tile": ((72, 4, 5), (nn.Conv2d(72, 20, (1, 3)), nn.Tanh())),
    "dilated": ((16, 9, 8), (nn.Conv2d(16, 16, 3, padding=2, dilation=2),)),
    "wider than a tile": ((16, 3, 140), (nn.Conv2d(16, 16, (2, 1)),)),
    "all phases": ((16, 5, 6), (nn.ConvTranspose2d(16, 20, 3, 2, 1, output_padding=1), nn.ReLU())),
    "phases of other sizes": ((16, 3, 4), (nn.ConvTranspose2d(16, 12, (2, 4), (3, 2), (0, 1)),)),
    "more channels": ((32, 5, 5), (nn.Conv2d(32, 72, 3, padding=1), nn.ReLU())),
    "more channels, all phases": ((16, 4, 9), (nn.ConvTranspose2d(16, 40, 3, 2, 1), nn.ReLU())),
    "one after the other": ((16, 6, 6), (nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid(), nn.Conv2d(16, 32, 1))),
    "dense": ((80,), (nn.Linear(80, 33), nn.LeakyReLU(0.1))),
}


@pytest.fixture(params=["few pixels", "lasting"])
def in_boxes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """All convolutions that can take boxes do, in tiles of 64 pixels, or in lasting ones where there are; those tiles.

    The tiles that they have by default are in all other tests.
    """
    found: list[Tile] = []

    def choose(kernel: convolution.Convolution, device: torch.device) -> convolution.Convolution:
        if not kernel.tile.boxes:
            return kernel
        found.append(kernel.candidates[1 if request.param == "few pixels" else -1])
        return kernel.with_tile(found[-1])

    monkeypatch.setattr(cuda_ops, "tuned", choose)
    monkeypatch.setattr(convolution, "processors", lambda device: 3)
    return found


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name: str, precision: str, in_boxes: list[Tile]) -> None:
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    for images in (1, 3):
        x = randn(images, *shape)
        assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]
    assert in_boxes


def tiles_of(layer: nn.Module, precision: str, shape: tuple[int, ...] = (16, 8, 8)) -> tuple[Tile, ...]:
    """Those of the only layer, the one it has by default first."""
    (node,) = Lowering(exported(shape, layer), "cpu", PRECISIONS[precision]).nodes
    kernel = getattr(node.kernel, "other", node.kernel)  # of CUDA C++'s, the one of Triton whose place it takes
    assert kernel.tile == kernel.candidates[0]
    return kernel.candidates


def test_boxes_are_the_default() -> None:
    """What was fastest on an H100; what stands in for a GPU is one."""
    wide = nn.ConvTranspose2d(128, 128, 3, 2, 1, 1)
    first, *_ = tiles_of(wide, "bfloat16", (128, 8, 8))
    assert first == Tile(128, 128, 64, 4, 3, boxes=True)
    first, *_ = tiles_of(wide, "tf32", (128, 8, 8))
    assert first == Tile(128, 128, 32, 4, 3, boxes=True)
    first, *_ = tiles_of(wide, "float32", (128, 8, 8))
    assert first == Tile(128, 64, 32, 4, 3, boxes=True)


@pytest.mark.parametrize(
    ("capability", "boxes"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), True)]
)
def test_the_gpu_decides(capability: tuple[int, int], boxes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert copies_boxes("cuda:0") == boxes


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_older_gpus_have_no_boxes(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "copies_boxes", lambda device: False)
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    nodes = Lowering(network, "cpu", PRECISIONS[precision]).nodes
    assert not any(tile.boxes for node in nodes for tile in node.kernel.candidates)
    x = randn(2, *shape)
    assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


def test_candidates() -> None:
    """All that the kernel has branches for is among them, and all have as many products at a time."""

    def kinds(layer: nn.Module, precision: str) -> list[tuple[int, bool, bool]]:
        tiles = tiles_of(layer, precision)
        assert len({tile.k for tile in tiles}) == 1
        return [(tile.m, turned(tile.n, PRECISIONS[precision].dot), tile.lasting) for tile in tiles]

    plain, up = nn.Conv2d(16, 64, 3, padding=1), nn.ConvTranspose2d(16, 64, 3, 2, 1)
    some = [(128, True, False), (64, True, False), (128, False, False), (128, True, False)]
    assert kinds(plain, "float16") == [*some, (128, True, True)]
    assert kinds(up, "float16") == [*some, (128, True, False)]
    assert not any(turned for _, turned, _ in kinds(plain, "float32"))


@pytest.mark.parametrize("name", LAYERS)
def test_gradient(name: str, in_boxes: list[Tile]) -> None:
    shape, layers = LAYERS[name]
    network = exported(shape, *layers)
    z = randn(2, *shape, seed=1)
    features = (reference(network, z) + randn(2, *network.output_shape, seed=2)).astype(np.float32)
    assert relative(gradient(network, z, features), reference_gradient(network, z, features)) < 1e-5
    assert in_boxes


def test_bytes_in_the_users_order(in_boxes: list[Tile]) -> None:
    network = exported((16, 5, 6), nn.ConvTranspose2d(16, 12, 4, 2, 1), nn.Sigmoid())
    x = randn(3, 16, 5, 6)
    out = np.empty((3, *network.output_shape), np.uint8)
    assert network_on(network).run_raw(tensors.Source(x, "float32", False), out)
    assert np.abs(out - np.rint(255 * reference(network, x))).max() <= 1
    assert in_boxes


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(22, 16, 3),
        nn.Conv2d(66, 16, 3),
    ],
    ids=["strided", "grouped", "few channels", "channels in no 16 bytes"],
)
def test_what_boxes_cannot_do(layer: nn.Conv2d, in_boxes: list[Tile]) -> None:
    network = exported((layer.in_channels, 6, 6), layer)
    x = randn(2, *network.input_shape)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    assert in_boxes == []


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((16, 16), (1, 8, 16)),
        ((8, 8), (2, 8, 8)),
        ((12, 12), (8, 4, 4)),
        ((1, 1), (128, 1, 1)),
        ((1, 256), (1, 1, 128)),
        ((56, 56), (2, 8, 8)),
    ],
)
def test_box(size: tuple[int, int], box: tuple[int, int, int]) -> None:
    assert box_for(correlation(size, size, (1, 1), (1, 1), (0, 0), (1, 1)), 128) == box


@pytest.mark.parametrize("size", [(3, 5), (7, 7), (13, 20), (14, 14), (24, 24)])
def test_no_other_box_makes_fewer_tiles(size: tuple[int, int]) -> None:
    def tiles(images: int, rows: int, columns: int) -> float:
        return -(-size[0] // rows) * -(-size[1] // columns) / images

    best = tiles(*box_for(correlation(size, size, (1, 1), (1, 1), (0, 0), (1, 1)), 64))
    others = [(64 // (y * x), y, x) for y in (1, 2, 4, 8, 16) for x in (1, 2, 4, 8, 16) if y * x <= 64]
    assert best == min(tiles(*box) for box in others)
