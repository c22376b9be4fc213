"""Convolutions on tiles of bfloat16 numbers: with AMX where there is that, and everywhere in the portable kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from amx import BOUND, PLACES, compiled, layer, rounded, use, with_rounded_weights
from checks import (
    ACTIVATIONS,
    exported,
    kernels,
    randn,
    reference,
    relative,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastinv
from fastinv.benchmark import DECODERS
from fastinv.models import make_decoder
from fastinv.network import Network, Step
from fastinv.ops.add import Add
from fastinv.ops.conv2d import Conv2d


def check(network: Network, batch: int = 3, bound: float = BOUND) -> list[str]:
    """Against float64, where there is one layer alone of the factors as they are rounded; images alone, and shared by
    threads, to the bit. What ran."""
    x = randn(batch, *network.input_shape)
    found = compiled(network)(x)
    ran = kernels(network, "bfloat16")
    if len(network.steps) == 1 and any(name.startswith("amx") for name in ran):
        same, bound = Network(network.input_shape, tuple(map(with_rounded_weights, network.steps))), 1e-5
        error = relative(found, reference(same, rounded(x)))
    else:
        error = relative(found, reference(network, x))
    assert error < bound, f"relative error {error:.2g}"
    for threads in (2, 5):
        assert np.array_equal(found, compiled(network, threads)(x))
    assert np.array_equal(found[-1:], compiled(network, 3)(x[-1:]))
    return ran


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [
    (1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (5, 3, 2, 1), (3, 1, 2, 2), (3, 1, 0, 1),
    ((3, 5), (1, 2), (0, 2), (2, 1)), ((2, 1), (3, 4), 0, 1),
])  # fmt: skip
def test_geometries(tiles: str, transposed: bool, kernel, stride, padding, dilation) -> None:
    torch.manual_seed(0)
    found = []
    for shape in ((64, 8, 8), (40, 7, 33), (33, 19, 16)):
        made = layer(transposed, shape[0], 48, kernel, stride, padding, dilation=dilation)
        found += check(exported(shape, made, nn.ReLU()))
    # Of layers with less than a tap for a pixel the cost model thinks otherwise, with real vectors beside real tiles.
    assert any(name.startswith("amx") for name in found) or (tiles, kernel) == ("avx512", (2, 1)), found


@pytest.mark.parametrize("channels", [(32, 16), (32, 17), (31, 33), (64, 49), (130, 70), (256, 8), (50, 96)])
def test_channels(tiles: str, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = exported((channels[0], 9, 17), nn.Conv2d(*channels, 3, padding=1))
    assert any(name.startswith("amx") for name in check(network))


@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3), (1, 3), (4, 1), (7, 7)])
def test_few_outputs_are_row_major(tiles: str, outputs: int, kernel: tuple[int, int]) -> None:
    """Rows of taps share a tile where they fit; images of more rows than are summed at once, and of half a tile."""
    torch.manual_seed(0)
    stacked = []
    for shape in ((64, 40, 32), (96, 13, 41), (64, 33, 24)):
        made = nn.Conv2d(shape[0], outputs, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
        found = check(exported(shape, made, nn.Sigmoid()))
        stacked += [name.startswith("amx stacked") for name in found if name.startswith("amx")]
    assert set(stacked) <= {kernel[0] > 1 and kernel[0] * outputs <= 16}
    assert stacked or outputs < 3 or kernel[0] == 1  # which the kernels for rows of pixels may do faster


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (6, 15), (5, 1)])
def test_small_images_go_together(tiles: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    found = []
    for made in (nn.Conv2d(64, 64, 3, padding=1), nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.Conv2d(64, 64, 1)):
        network = exported((64, *size), made, nn.ReLU(), nn.Conv2d(64, 40, 3, padding=1))
        found += check(network, batch=37, bound=2 * BOUND)
    assert any(name.startswith("amx") for name in found)


@pytest.mark.parametrize("padding", [(2, 9), (9, 2), (20, 20)])
def test_taps_wholly_in_the_padding(tiles: str, padding: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check(exported((64, 6, 7), nn.Conv2d(64, 32, 3, padding=padding)))
    check(exported((64, 46, 47), nn.ConvTranspose2d(64, 32, 3, padding=padding)))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
@pytest.mark.parametrize("outputs", [3, 40])
def test_what_is_added_goes_in_before_the_activation(tiles: str, activation, outputs: int) -> None:
    rng = np.random.default_rng(0)

    def step(inputs: int, source: int, **options) -> Step:
        weight = rng.normal(size=(outputs, inputs, 3, 3)) / (3 * inputs**0.5)
        weights = {"weight": weight.astype(np.float32), "bias": rng.normal(size=outputs).astype(np.float32)}
        return Step(Conv2d(padding=(1, 1, 1, 1)), (source,), weights, **options)

    steps = (step(64, 0), step(64, 0), Step(Add(), (2, 1), activation=activation))
    found = check(Network((64, 9, 32), steps))
    assert any("add" in name and name.startswith("amx") for name in found), found


def test_images_larger_than_the_cache_go_in_strips_and_bands(tiles: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 72, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(72, 40, 4, 2, 1), nn.ReLU()]
    network = exported((64, 60, 70), *layers, nn.Conv2d(40, 3, 3, padding=1))
    assert compiled(network).describe()[0]["strips"] > 1
    assert all(name.startswith(("amx", "layout")) for name in check(network, batch=2, bound=2 * BOUND))


@pytest.mark.parametrize(("size", "first", "activation", "second"), [
    ((9, 33), "plain", nn.ReLU(), nn.Conv2d(64, 48, 3, padding=1)),  # rows in tiles of their own, part empty
    ((6, 5), "plain", nn.Sigmoid(), nn.Conv2d(64, 48, 3, padding=1)),  # through the zeros between rows and images
    ((6, 5), "transposed", nn.ReLU(), nn.ConvTranspose2d(64, 64, 3, 2)),
    ((8, 16), "transposed", nn.Sigmoid(), nn.Conv2d(64, 3, 3, padding=1)),  # stacked, [C, H, W]
    ((4, 10), "transposed", nn.ReLU(), nn.ConvTranspose2d(64, 40, 4, 2, 1)),
    ((12, 18), "plain", nn.ReLU(), nn.Conv2d(64, 40, 3, 2, dilation=2, padding=(0, 5))),
    ((5, 1), "plain", nn.Sigmoid(), nn.Conv2d(64, 64, (3, 1), padding=(9, 0))),
    ((1, 31), "plain", nn.ReLU(), nn.Conv2d(64, 64, (1, 3))),  # no zeros at all
    ((52, 60), "plain", nn.ReLU(), nn.Conv2d(64, 48, (3, 2))),  # in strips
    ((20, 16), "transposed", nn.ReLU(), nn.ConvTranspose2d(64, 64, 3, 2, padding=1)),
])  # fmt: skip
def test_what_is_handed_over_is_what_would_be_rounded(tiles: str, size, first, activation, second) -> None:
    """Two layers on tiles to the bit as one after the other, for images alone, together and shared by threads."""
    torch.manual_seed(0)
    made = nn.Conv2d(40, 64, 3, padding=1) if first == "plain" else nn.ConvTranspose2d(40, 64, 3, 2, 1)
    both, one = exported((40, *size), made, activation, second), exported((40, *size), made, activation)
    names = kernels(both, "bfloat16")
    assert [" in place" in name for name in names if name.startswith("amx")] == [False, True], names
    assert all(name.startswith(("amx", "layout")) for name in kernels(one, "bfloat16"))
    x = randn(3, 40, *size)
    between = compiled(one)(x)
    expected = compiled(exported(between.shape[1:], second))(between)
    for threads in (1, 3):
        engine = compiled(both, threads)
        assert engine.describe()[0]["strips"] > 1 or math.prod(between.shape[1:]) < 100_000
        for begin, end in ((0, 3), (0, 1), (1, 3)):
            assert np.array_equal(engine(x[begin:end]), expected[begin:end])


def test_what_is_handed_over_before_linear_layers(tiles: str) -> None:
    """Strips begin behind them; images in blocks go as far."""
    torch.manual_seed(0)
    before = [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.Flatten()]
    after = [nn.Unflatten(1, (32, 13, 15)), nn.ConvTranspose2d(32, 64, 4, 4), nn.ReLU(), nn.Conv2d(64, 48, 1)]
    network = exported((64, 4, 4), *before, nn.Linear(512, 32 * 13 * 15), *after)
    assert compiled(network).describe()[0]["strips"] > 1
    places = [" in place" in name for name in check(network, batch=5, bound=3 * BOUND) if name.startswith("amx")]
    assert places == [False, True, False, True]


def test_what_two_read_is_not_handed_over(tiles: str) -> None:
    def step(source: int, **options) -> Step:
        weight = np.random.default_rng(source).normal(size=(64, 64, 3, 3)) / 24
        weights = {"weight": weight.astype(np.float32), "bias": np.zeros(64, np.float32)}
        return Step(Conv2d(padding=(1, 1, 1, 1)), (source,), weights, **options)

    residual = Network((64, 9, 32), (step(0), step(1), Step(Add(), (2, 1)), step(3)))
    assert ["in place" in name for name in check(residual, bound=2 * BOUND) if "amx" in name] == [False, False, True]


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [
    (2, 256, 256), (5, 64, 48), (16, 40, 33), (65, 130, 3), (197, 64, 96), (64, 192, 192),
])  # fmt: skip
def test_linear_layers_of_rows(tiles: str, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    ran = check(exported((rows, inputs), nn.Linear(inputs, outputs), nn.ReLU()))
    assert rows < 16 or inputs * outputs < 3000 or any(name.startswith("amx") for name in ran), ran


def test_what_linear_layers_of_rows_hand_over(tiles: str) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(48, 64), nn.Linear(64, 40)
    both, one = exported((37, 48), first, nn.GELU(), second), exported((37, 48), first, nn.GELU())
    assert [" in place" in name for name in kernels(both, "bfloat16") if name.startswith("amx")] == [False, True]
    x = randn(5, 37, 48)
    between = compiled(one)(x)
    for threads in (1, 3):
        np.testing.assert_array_equal(compiled(both, threads)(x), compiled(exported((37, 64), second))(between))


def test_of_no_images_there_are_no_results(tiles: str) -> None:
    network = exported((64, 8, 8), nn.Conv2d(64, 64, 3))
    assert compiled(network)(np.empty((0, 64, 8, 8), np.float32)).shape == (0, 64, 6, 6)


@given(
    transposed=st.booleans(),
    channels=st.tuples(st.integers(20, 80), st.integers(1, 80)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 36)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    batch=st.integers(1, 3),
)
@settings(max_examples=40)
def test_any_shape(transposed, channels, size, kernel, stride, padding, batch) -> None:
    made = layer(transposed, *channels, kernel, stride, padding)
    for n, k, s, p in zip(size, kernel, stride, padding, strict=True):
        assume(n * s + k > s + 2 * p if transposed else n + 2 * p >= k)  # something is left of the image
    network = exported((channels[0], *size), made)
    with pytest.MonkeyPatch.context() as patch:
        for isa in PLACES:
            use(isa, patch)
            check(network, batch, 2e-2)  # of a single result


@pytest.mark.parametrize("name", ["MNIST ReLU2", "CIFAR conv11", "CIFAR ReLU22"])
def test_decoders(tiles: str, name: str) -> None:
    torch.manual_seed(0)
    shape, image = DECODERS[name]
    network = exported(shape, make_decoder(shape, image))
    x = np.maximum(randn(4, *shape), 0)
    engine = compiled(network)
    assert engine.precision == "bfloat16"
    assert 1e-4 < relative(engine(x), reference(network, x)) < 5e-3


def test_float32_is_not_rounded(tiles: str) -> None:
    network = exported((64, 8, 8), nn.Conv2d(64, 64, 3))
    assert not any(name.startswith("amx") for name in kernels(network))


def test_values_that_overflow_are_not_taken_for_input_that_is_not_finite(tiles: str) -> None:
    network = exported((64, 4, 4), nn.Conv2d(64, 64, 1))
    x = np.full((1, 64, 4, 4), np.finfo(np.float32).max)  # infinite, once rounded
    assert not np.isfinite(compiled(network)(x)).all()
    x[0, 3, 2, 1] = np.nan
    with pytest.raises(fastinv.FeatureError):
        fastinv.invert(x, fastinv.InverseNetwork(network, mean=(0.0,), std=(1.0,)), backend="cpu", precision="bfloat16")


@pytest.mark.skipif("avx512" not in PLACES, reason="this machine has no AMX, or does not let it be used")
def test_both_give_the_same() -> None:
    """But for the order of sums."""
    torch.manual_seed(0)
    network = exported((64, 20, 20), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1))
    x = randn(2, 64, 20, 20)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for isa in ("avx512", "portable"):
            use(isa, patch)
            results.append(compiled(network)(x))
    assert relative(*results) < 1e-4  # where a value between the layers is rounded the other way
