"""Winograd's F(4×4, 3×3) and F(2×2, 5×5), against float64, over sizes that leave tiles ragged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import check_gradient, exported, gradient_solver, kernels, randn, reference, relative, run
from torch import nn

from fastinv.models import shadow_edge

TILES = {3: "winograd 4x4", 5: "winograd 2x2"}


def check(shape: tuple[int, int, int], *layers: nn.Module) -> None:
    """Right, by Winograd's form, whatever the batch and the number of threads."""
    network = exported(shape, *layers)
    taps = layers[0].kernel_size[0]
    assert any(kernel.startswith(TILES[taps]) for kernel in kernels(network))
    x = randn(3, *shape)
    whole = run(network, x)
    assert relative(whole, reference(network, x)) < 1e-5
    np.testing.assert_array_equal(run(network, x[1:2], threads=2), whole[1:2])
    assert run(network, x[:0]).shape == (0, *network.output_shape)


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("size", [(13, 18), (9, 8), (9, 9)])
@pytest.mark.parametrize("channels", [(64, 64), (40, 72)])
def test_sizes(isa: str, taps: int, size: tuple[int, int], channels: tuple[int, int]) -> None:
    for padding in (0, taps // 2, taps - 1):
        check((channels[0], *size), nn.Conv2d(*channels, taps, padding=padding))
        check((channels[0], *size), nn.ConvTranspose2d(*channels, taps, padding=padding, bias=False))


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(0.1), nn.Hardtanh(-0.3, 0.4)])
def test_activations(isa: str, taps: int, activation: nn.Module) -> None:
    check((64, 11, 9), nn.Conv2d(64, 70, taps, padding=1), activation)


@pytest.mark.parametrize("taps", [3, 5])
def test_addition(isa: str, taps: int) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(64, 64, taps, padding=taps // 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x) + x)

    network = exported((64, 10, 11), Residual())
    assert any(kernel.startswith(TILES[taps]) and kernel.endswith("add") for kernel in kernels(network))
    x = randn(2, 64, 10, 11)
    assert relative(run(network, x), reference(network, x)) < 1e-5


@pytest.mark.parametrize("taps", [3, 5])
def test_gradients(isa: str, taps: int) -> None:
    check_gradient(exported((48, 9, 10), nn.Conv2d(48, 64, taps, padding=1), nn.LeakyReLU(0.2)))


def test_shadows_of_five_taps_use_it(isa: str) -> None:
    network = exported((3, 32, 32), shadow_edge("ReLU22"))
    assert any(kernel.startswith(TILES[5]) for kernel in kernels(network))


SHRINKING = [
    lambda channels, taps: nn.Conv2d(*channels, taps),
    lambda channels, taps: nn.Conv2d(*channels, taps, padding=(taps // 2, 0)),
    lambda channels, taps: nn.ConvTranspose2d(*channels, taps, padding=taps - 1),
]


@pytest.mark.parametrize("taps", [3, 5])
@pytest.mark.parametrize("make", SHRINKING)
@pytest.mark.parametrize(("size", "channels"), [((13, 10), (8, 16)), ((10, 18), (40, 72)), ((13, 18), (20, 24))])
def test_gradients_of_what_shrinks_an_image(isa: str, taps: int, make, size: tuple, channels: tuple) -> None:
    network = exported((channels[0], *size), make(channels, taps), nn.Tanh())
    (kernel,) = (name for name in gradient_solver(network).kernels if "back" in name)
    assert f"back winograd adjoint {TILES[taps].split()[1]}" in kernel
    check_gradient(network)


@pytest.mark.parametrize("taps", [3, 5])
def test_gradients_that_are_added_to_others(isa: str, taps: int) -> None:
    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(40, 48, taps), nn.Conv2d(40, 48, taps)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.first(x)) * self.second(x)

    check_gradient(exported((40, 11, 13), TwoWays()))
