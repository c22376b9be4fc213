"""float32 products by halves: that nothing of a factor is lost, and what is lost of a product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

import triton
import triton.language as tl
from fastinv.kernels.triton import convolution
from fastinv.kernels.triton.halves import add_product, halved, halves
from interpreter import DEVICE, forward

from fastinv.backends.cuda.lowering import PRECISIONS, Lowering

SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-11, 1 + 2**-10, -1 - 2**-23, 2 - 2**-23, 1 / 3, 2.0**-126, 2.0**-149, 3e38, 65504.0]


@triton.jit
def _halves(x, hi, lo, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    a, b = halves(tl.load(x + place))
    tl.store(hi + place, a)
    tl.store(lo + place, b)


@triton.jit
def _product(x, w, out, SIZE: tl.constexpr):
    """out = 1 + x · w, of halves of w."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    w_hi, w_lo = tl.load(w + place), tl.load(w + SIZE * SIZE + place)
    sums = tl.full((SIZE, SIZE), 1.0, tl.float32)
    tl.store(out + place, add_product(sums, tl.load(x + place), w_hi, w_lo, "tf32x3"))


def values() -> np.ndarray:
    """Some that need all 24 bits, of all sizes, and special ones."""
    rng = np.random.default_rng(0)
    some = rng.uniform(1, 2, 1024 - len(SPECIAL)) * 2.0 ** rng.integers(-60, 60, 1024 - len(SPECIAL))
    return np.concatenate([np.float32(some) * rng.choice([-1, 1], some.size), SPECIAL]).astype(np.float32)


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By the kernel."""
    given = torch.from_numpy(x).to(DEVICE)
    hi, lo = torch.empty_like(given), torch.empty_like(given)
    _halves[(1,)](given, hi, lo, COUNT=x.size)
    return hi.cpu().numpy(), lo.cpu().numpy()


def test_nothing_of_a_value_is_lost() -> None:
    x = values()
    hi, lo = split(x)
    assert (hi.view(np.int32) & 0x1FFF == 0).all()  # of 23 bits behind the point tf32 has 10
    np.testing.assert_array_equal(hi.astype(np.float64) + lo, x)
    assert (np.abs(lo) <= np.abs(x) * 2.0**-11 + 2.0**-137).all()


def test_weights_are_halved_alike() -> None:
    x = values()
    hi, lo = halved(x)
    np.testing.assert_array_equal(hi, split(x)[0])
    assert ((hi.view(np.int32) | lo.view(np.int32)) & 0x1FFF == 0).all()
    assert (np.abs(hi.astype(np.float64) + lo - x) <= np.abs(x) * 2.0**-22 + 2.0**-137).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of the interpreter
def test_what_is_not_finite_does_not_become_finite() -> None:
    x = values()
    x[:3] = np.nan, np.inf, -np.inf
    hi, lo = split(x)
    assert not np.isfinite(hi[:3] + lo[:3]).any()
    assert np.isfinite(hi[3:] + lo[3:]).all()


def test_a_product_is_as_exact_as_float32() -> None:
    """As tensor cores take them: of what they are given the last 13 bits are not looked at."""
    x, w = randn(32, 32), randn(32, 32, seed=1)
    factors = torch.from_numpy(x).to(DEVICE), torch.from_numpy(halved(w)).to(DEVICE)
    out = torch.empty(32, 32, device=DEVICE)
    _product[(1,)](*factors, out, SIZE=32)
    exact = 1 + x.astype(np.float64) @ w.astype(np.float64)
    assert relative(out.cpu().numpy(), exact) < 1e-6

    def taken(values: np.ndarray) -> np.ndarray:
        return (values.view(np.int32) & -0x2000).view(np.float32).astype(np.float64)

    (hi, lo), (w_hi, w_lo) = map(taken, split(x.ravel())), map(taken, halved(w))
    hi, lo = hi.reshape(x.shape), lo.reshape(x.shape)
    assert relative(1 + lo @ w_hi + hi @ w_lo + hi @ w_hi, exact) < 5e-7
    assert relative(1 + hi @ w_hi, exact) > 1e-5


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((32, 5, 6), nn.Conv2d(32, 72, 3, padding=1)),
        ((40, 4, 3), nn.ConvTranspose2d(40, 20, 3, 2, 1)),
        ((3, 7, 6), nn.Conv2d(3, 72, 3, 2)),  # of fewer outputs it would go product by product
        ((32, 6, 5), nn.Conv2d(32, 80, 3, groups=2)),
        ((80,), nn.Linear(80, 33)),
    ],
    ids=["plain", "all phases", "few channels, strided", "grouped", "dense"],
)
def test_layers(shape: tuple[int, ...], layer: nn.Module, boxes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, closer than one tf32 product would be."""
    monkeypatch.setattr(convolution, "copies_boxes", lambda device: boxes)
    network = exported(shape, layer)
    (node,) = Lowering(network, DEVICE, PRECISIONS["float32"]).nodes
    assert len(node.kernel.weight) == 2 * node.kernel.halfway
    for images in (1, 3):
        x = randn(images, *shape)
        assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-6
