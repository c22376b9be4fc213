"""Depthwise convolutions: a filter for each channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import check_gradient, exported, kernels, randn, reference, relative, run
from torch import nn

Pair = tuple[int, int]


def check(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Against float64, forward and back, and one image at a time to the bit; whether the kernel under test ran, and not
    that for rows of pixels, which some shapes prefer."""
    network = exported(shape, layer, nn.ReLU())
    x = randn(3, *shape)
    found = run(network, x)
    assert relative(found, reference(network, x)) < 1e-6
    assert np.array_equal(found, np.concatenate([run(network, row[None], threads=2) for row in x]))
    check_gradient(network)
    return any(kernel.startswith("depthwise") for kernel in kernels(network))


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 31])
def test_kernels(isa: str, taps: int) -> None:
    """Runs of taps of every length, in rows of every number of pixels that a tile may have."""
    torch.manual_seed(0)
    padding = (1, taps // 2)
    layer = nn.Conv2d(19, 19, (3, taps), 1, padding, groups=19)  # whole vectors and a part of one
    widths = [width for width in (1, 2, 3, 5, 8, 13, 16) if taps <= width + 2 * padding[1]]
    found = [check(layer, (19, 5, width)) for width in widths]
    assert any(found)


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (4, 5)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_steps(isa: str, stride: int | Pair, dilation: int | Pair, transposed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d if transposed else nn.Conv2d
    found = []
    for kernel, padding in ((3, 1), ((2, 5), 2), ((7, 4), (0, 3))):
        for shape in ((9, 13, 14), (16, 14, 19)):
            made = layer(shape[0], shape[0], kernel, stride, padding, dilation=dilation, groups=shape[0])
            found.append(check(made, shape))
    assert any(found)


@pytest.mark.parametrize("padding", [(0, 0), (2, 9), (9, 2), (40, 40)])
def test_taps_wholly_in_the_padding(isa: str, padding: Pair) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Conv2d(24, 24, 3, padding=padding, groups=24, bias=bias)
        assert check(layer, (24, 6, 7))


def test_taps_that_nothing_reads(isa: str) -> None:
    """A transposed convolution with stride beyond its kernel leaves pixels that are its bias alone."""
    torch.manual_seed(0)
    assert check(nn.ConvTranspose2d(9, 9, 2, 4, output_padding=3, groups=9), (9, 3, 4))
    assert check(nn.ConvTranspose2d(9, 9, 3, 3, 4, groups=9), (9, 4, 4))


def test_added_values(isa: str) -> None:
    """What a residual connection adds goes in before the activation."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(6, 21, 1)
            self.depthwise = nn.Conv2d(21, 21, 3, padding=1, groups=21)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return torch.tanh(y + self.depthwise(y))

    torch.manual_seed(0)
    network = exported((6, 7, 9), Residual())
    assert any(kernel.startswith("depthwise") and ", add" in kernel for kernel in kernels(network))
    x = randn(4, 6, 7, 9)
    assert relative(run(network, x), reference(network, x)) < 1e-6
    check_gradient(network)
