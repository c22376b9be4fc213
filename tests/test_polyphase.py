"""Transposed convolutions of stride 2 by minimal filtering of their four phases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import check_gradient, exported, kernels, randn, reference, relative, run
from torch import nn

from fastinv.models import make_decoder

TOLERANCE = 1e-5


def check(shape: tuple[int, ...], *layers: nn.Module, batches: tuple[int, ...] = (3,)) -> str:
    network = exported(shape, *layers)
    for batch in batches:
        x = randn(batch, *shape)
        y = run(network, x)
        assert y.shape == (batch, *network.output_shape)
        assert relative(y, reference(network, x)) < TOLERANCE
    return next(kernel for kernel in kernels(network) if kernel != "layout")


@pytest.mark.parametrize("kernel", [2, 3, 4, (3, 4), (4, 2)])
@pytest.mark.parametrize("padding", [0, 1, 2, (2, 1)])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_geometry(isa: str, kernel: int | tuple[int, int], padding: int | tuple[int, int], output_padding: int) -> None:
    found = [
        check((70, h, w), nn.ConvTranspose2d(70, 40, kernel, 2, padding, output_padding))
        for h, w in ((5, 7), (16, 16), (9, 3))
    ]
    if kernel in (3, 4):
        assert found[1] == "polyphase winograd 4x4"
    if kernel == 2:  # every phase has one tap
        assert not any("polyphase" in name for name in found)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (3, 3), (8, 8), (4, 13)])
def test_ragged_tiles(isa: str, size: tuple[int, int]) -> None:
    for kernel, output_padding in ((3, 1), (4, 0)):
        check((128, *size), nn.ConvTranspose2d(128, 64, kernel, 2, 1, output_padding), batches=(0, 1, 3))


def test_both_tiles_are_used(isa: str) -> None:
    layer = nn.ConvTranspose2d(128, 64, 3, 2, 1, 1)
    assert check((128, 2, 2), layer) == "polyphase winograd 2x2"
    assert check((128, 8, 8), layer) == "polyphase winograd 4x4"


@pytest.mark.parametrize("channels", [(1, 64), (64, 1), (3, 17), (17, 3), (64, 64), (70, 65), (40, 200)])
def test_channels(isa: str, channels: tuple[int, int]) -> None:
    check((channels[0], 6, 8), nn.ConvTranspose2d(*channels, 4, 2, 1))
    check((channels[0], 6, 8), nn.ConvTranspose2d(*channels, 3, 2, 1, 1, bias=False))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.LeakyReLU(0.1), nn.Hardtanh(-0.3, 0.4)])
def test_activation(isa: str, activation: nn.Module) -> None:
    assert "polyphase" in check((64, 7, 9), nn.ConvTranspose2d(64, 50, 3, 2, 1, 1), activation)
    assert "polyphase" in check((128, 2, 2), nn.ConvTranspose2d(128, 50, 3, 2, 1, 1), activation)


@pytest.mark.parametrize("size", [(15, 16), (34, 9)])
@pytest.mark.parametrize("padding", [0, 1])
def test_gradient_of_a_strided_convolution(isa: str, size: tuple[int, int], padding: int) -> None:
    """Its adjoint is a transposed convolution, whose last rows may have no taps inside."""
    for kernel in (3, 4):
        check_gradient(exported((48, *size), nn.Conv2d(48, 64, kernel, 2, padding)))


def test_gradient_is_added(isa: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(48, 64, 3, 2, 1)
            self.skip = nn.Conv2d(48, 64, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(x) + self.skip(x)

    check_gradient(exported((48, 12, 14), Both()))


def test_an_image_has_one_answer(isa: str) -> None:
    """Bit for bit, whatever the batch, the place in it, its cut and the number of threads."""
    for size, kernel, tile in (((9, 8), 4, "4x4"), ((8, 8), 3, "4x4"), ((2, 2), 3, "2x2")):
        network = exported((128, *size), nn.ConvTranspose2d(128, 72, kernel, 2, 1, 1), nn.ReLU())
        assert f"polyphase winograd {tile}" in kernels(network)
        x = randn(29, 128, *size)
        whole = run(network, x, threads=2)
        np.testing.assert_array_equal(whole, run(network, x, threads=1))
        np.testing.assert_array_equal(whole[3:20], run(network, x[3:20], threads=2))
        np.testing.assert_array_equal(whole[::-1], run(network, np.ascontiguousarray(x[::-1]), threads=1))
        np.testing.assert_array_equal(whole[7:8], run(network, x[7:8], threads=2))


def test_the_papers_deep_decoders_use_it(isa: str) -> None:
    for features, layers in (((128, 16, 16), 1), ((128, 8, 8), 2)):
        network = exported(features, make_decoder(features, (3, 32, 32)))
        assert kernels(network).count("polyphase winograd 4x4") == layers
