"""Networks in bfloat16 on the cpu backend: within their bound, and only where the machine has the instructions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from checks import ISAS, exported, randn, reference, relative
from torch import nn

import fastinv
from fastinv import _core
from fastinv.benchmark import DECODERS
from fastinv.errors import BackendError
from fastinv.inverters import RMLE
from fastinv.models import make_decoder

BOUND = 2e-2

needs_bfloat16 = pytest.mark.skipif(
    not _core.has_bfloat16("") or "avx512" not in ISAS, reason="this machine does not multiply bfloat16 numbers"
)


def strided(channels: int, kernel: int, depth: int) -> nn.Sequential:
    """A decoder of strided layers whose activations neither grow nor shrink: rounding errors reach the end."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.ConvTranspose2d(channels, channels, kernel, 2, 1, output_padding=kernel % 2), nn.ReLU()]
    layers.append(nn.Conv2d(channels, 3, 3, padding=1))
    for layer in layers:
        if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
            taps = kernel**2 / 4 if isinstance(layer, nn.ConvTranspose2d) else 9
            nn.init.normal_(layer.weight, std=(2 / (channels * taps)) ** 0.5)
    return nn.Sequential(*layers).eval()


@needs_bfloat16
@pytest.mark.parametrize("name", list(DECODERS))
def test_decoders_keep_the_bound(name: str) -> None:
    torch.manual_seed(0)
    shape, *_ = DECODERS[name]
    network = exported(shape, make_decoder(*DECODERS[name]))
    engine = fastinv.compile(network, backend="cpu", precision="bfloat16")
    x = np.maximum(randn(5, *shape), 0)
    error = relative(engine(x), reference(network, x))
    rounded = [row["kernel"] for row in engine.describe() if "bfloat16" in row["kernel"]]
    assert engine.precision == ("bfloat16" if rounded else "float32")
    gains = ["CIFAR ReLU22", "CIFAR ReLU32"] + (["MNIST ReLU2", "CIFAR conv11"] if _core.has_tiles("") else [])
    assert bool(rounded) == (name in gains)
    assert error < (BOUND if rounded else 1e-5)
    if rounded:  # and it does round
        assert error > 1e-4


@needs_bfloat16
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_bound_holds_for_any_depth(kernel: int, depth: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        network = exported((64, 4, 4), strided(64, kernel, depth))
        engine = fastinv.compile(network, backend="cpu", precision="bfloat16")
        x = np.maximum(randn(2, 64, 4, 4), 0)
        assert engine.precision == "bfloat16"
        assert relative(engine(x), reference(network, x)) < BOUND


@needs_bfloat16
@pytest.mark.parametrize("channels", [(64, 64), (65, 40), (33, 130), (128, 17)])
@pytest.mark.parametrize("size", [(5, 7), (1, 6), (2, 2)])
def test_ragged_shapes(channels: tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = exported((channels[0], *size), nn.ConvTranspose2d(*channels, 4, 2, 1))
    for batch in (0, 1, 3):
        x = randn(batch, channels[0], *size)
        y = fastinv.compile(network, backend="cpu", precision="bfloat16")(x)
        assert relative(y, reference(network, x)) < BOUND


@needs_bfloat16
def test_results_depend_on_the_image_alone() -> None:
    torch.manual_seed(0)
    network = exported((64, 8, 8), strided(64, 3, 2))
    x = randn(37, 64, 8, 8)
    alone, shared = (fastinv.compile(network, backend="cpu", precision="bfloat16", threads=n) for n in (1, 2))
    y = alone(x)
    assert np.array_equal(y, shared(x))
    for i in (0, 5, 36):
        assert np.array_equal(y[i : i + 1], alone(x[i : i + 1]))
        assert np.array_equal(y[i : i + 1], shared(x[i : i + 1]))


@needs_bfloat16
def test_auto_takes_it_where_it_is_faster_and_for_networks_only() -> None:
    torch.manual_seed(0)
    network = exported((64, 8, 8), strided(64, 3, 1))
    assert fastinv.compile(network, backend="cpu", precision="auto").precision == "bfloat16"
    assert fastinv.compile(network, backend="cpu").precision == "float32"
    edge = exported((3, 8, 8), nn.Conv2d(3, 8, 3))
    assert fastinv.compile(edge, backend="cpu", precision="auto").precision == "float32"
    recipe = RMLE(edge, (3, 8, 8), steps=1)
    for precision in ("auto", "bfloat16"):  # of a solver that may, and one that can gain nothing
        assert fastinv.compile(recipe, backend="cpu", precision=precision).precision == "float32"
    for method in ("lbfgs", "exact"):
        refused = dataclasses.replace(recipe, optimizer=method, clamp=None)
        with pytest.raises(BackendError, match=rf"no precision bfloat16 for solvers by {method} here, only float32"):
            fastinv.compile(refused, backend="cpu", precision="bfloat16")
        with pytest.warns(UserWarning, match=f"slow torch backend .*for solvers by {method} here"):
            assert fastinv.compile(refused, precision="bfloat16").backend == "torch"


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "avx512"])
def test_elsewhere_it_is_refused_and_auto_is_float32(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINV_ISA", isa)
    network = exported((64, 4, 4), strided(64, 3, 1))
    assert not _core.has_bfloat16(isa)
    assert fastinv.compile(network, backend="cpu", precision="auto").precision == "float32"
    with pytest.raises(BackendError, match="'cpu': it has no precision bfloat16 here, only float32"):
        fastinv.compile(network, backend="cpu", precision="bfloat16")
