"""Convolutions that stay in [C, H, W]: first and last layers with few channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import check_gradient, exported, randn, reference, relative, run
from torch import nn

import fastinv
from fastinv.models import make_decoder

TOLERANCE = 1e-5


def kernels(network: fastinv.Network) -> list[str]:
    return [row["kernel"].split()[0] for row in fastinv.compile(network, backend="cpu").describe()]


def check(layers: list[nn.Module], shape: tuple[int, ...], batch: int = 3) -> list[str]:
    torch.manual_seed(0)
    network = exported(shape, *layers)
    x = randn(batch, *shape)
    assert relative(run(network, x), reference(network, x)) < TOLERANCE
    assert np.array_equal(run(network, x), np.concatenate([run(network, row[None]) for row in x]))
    return kernels(network)


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (2, 7), (9, 4)])
def test_convolution(isa: str, outputs: int, kernel: tuple[int, int]) -> None:
    padding = (kernel[0] // 2, kernel[1] - 1)
    for shape in ((3, 5, 9), (8, 28, 28), (2, 17, 33)):
        if kernel[0] <= shape[1] + 2 * padding[0]:
            found = check([nn.Conv2d(shape[0], outputs, kernel, padding=padding)], shape)
            assert found == ["planar"] or outputs > 2


@pytest.mark.parametrize("rows", [16, 17, 18, 24, 41])
@pytest.mark.parametrize("outputs", [1, 2])
def test_tall_kernels(isa: str, outputs: int, rows: int) -> None:
    """More taps along a column than a tile has room for."""
    conv = nn.Conv2d(1, outputs, (rows, 3), padding=(rows // 2, 1))
    assert (check([conv], (1, 48, 20)) == ["planar"]) == (rows <= 16)
    check([nn.ConvTranspose2d(2, outputs, (rows, 4), 2)], (2, 12, 9))
    check_gradient(exported((1, 48, 20), conv))


@pytest.mark.parametrize("padding", [4, 16, 17, 40])
@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 28, 28)])
def test_kernels_wholly_in_the_padding(isa: str, shape: tuple[int, ...], padding: int) -> None:
    assert check([nn.ZeroPad2d(padding), nn.Conv2d(1, 2, 3), nn.ReLU()], shape) == ["planar"]
    check_gradient(exported(shape, nn.Conv2d(1, 1, 3, padding=padding)))


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_transposed(isa: str, outputs: int, stride: int | tuple[int, int], kernel: int) -> None:
    for padding in {0, kernel // 2}:
        check([nn.ConvTranspose2d(4, outputs, kernel, stride, padding)], (4, 6, 19))
    if stride == 2:
        check([nn.ConvTranspose2d(4, outputs, kernel, 2, kernel // 2, output_padding=1)], (4, 7, 5))


def test_groups_and_activations(isa: str) -> None:
    check([nn.Conv2d(4, 2, 3, padding=1, groups=2), nn.ReLU()], (4, 9, 21))
    check([nn.Conv2d(4, 2, 3, padding=1), nn.Sigmoid()], (4, 9, 21))
    check([nn.ConvTranspose2d(4, 2, 5, 2, output_padding=1, groups=2), nn.Tanh()], (4, 9, 11))


def test_layouts_mix(isa: str) -> None:
    """A row-major value that a channels-last kernel reads, and the other way round."""
    wide = [nn.Conv2d(2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 2, 3, padding=1)]
    check([nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), *wide, nn.Conv2d(2, 1, 3)], (3, 21, 18))
    check([nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(9 * 7, 5)], (3, 11, 9))
    check([nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 9 * 7, 5)], (3, 11, 9))
    check([nn.MaxPool2d(2), nn.Conv2d(3, 2, 3)], (3, 12, 9))


def test_a_value_read_in_both_layouts(isa: str) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.conv(y) + nn.functional.max_pool2d(y, 3, 1, 1) + y + x

    check([Both()], (3, 10, 12))


def test_the_papers_shallow_decoders_stay_row_major() -> None:
    for features, image in (((8, 24, 24), (1, 28, 28)), ((64, 32, 32), (3, 32, 32))):
        network = exported(features, make_decoder(features, image))
        assert kernels(network) == ["planar"]


def winograd(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    """Check the layers, of which the first runs as F(4, 3)."""
    check(layers, shape)
    network = exported(shape, *layers)
    assert fastinv.compile(network, backend="cpu").describe()[0]["kernel"].startswith("planar winograd 4x")


@pytest.mark.parametrize("outputs", [3, 4, 6, 7, 8])
@pytest.mark.parametrize("size", [(29, 64), (34, 66), (63, 47), (32, 95)])
def test_winograd(isa: str, outputs: int, size: tuple[int, int]) -> None:
    """Heights of whole tiles and ragged ones, widths of one vector and of several."""
    winograd([nn.Conv2d(40, outputs, 3, padding=1)], (40, *size))
    winograd([nn.ConvTranspose2d(37, outputs, 3, padding=1), nn.ReLU()], (37, *size))


@pytest.mark.parametrize("taps", [3, 4, 5, 8])
@pytest.mark.parametrize("padding", [(0, 0), (2, 3)])
def test_winograd_of_other_widths(isa: str, taps: int, padding: tuple[int, int]) -> None:
    winograd([nn.Conv2d(17, 3, (3, taps), padding=padding), nn.Sigmoid()], (17, 31, 80))
    if padding[1] < taps:
        check([nn.ConvTranspose2d(17, 3, (3, taps), padding=padding)], (17, 31, 80))


def test_winograd_adds_in_its_epilogue(isa: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(16, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return torch.relu(self.second(y) + y)

    winograd([Residual()], (16, 62, 67))
