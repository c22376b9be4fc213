"""What the cpu backend does in one launch: upsampling with the convolution that follows, sums with the one before."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import check_gradient, exported, randn, relative, run
from torch import nn

import fastinv
from fastinv.models import make_decoder

TOLERANCE = 1e-5


def plan(module: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Kernels of the module, compiled, after its results were compared with PyTorch's in float64."""
    torch.manual_seed(0)
    module = module.eval()
    network = exported(shape, module)
    x = randn(3, *shape)
    expected = copy.deepcopy(module).double()(torch.from_numpy(x).double()).detach().numpy()
    assert relative(run(network, x), expected) < TOLERANCE
    check_gradient(network)
    return [row["kernel"] for row in fastinv.compile(network, backend="cpu").describe()]


class Sums(nn.Module):
    """Additions that the convolution before can do, and some that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(12, 12, 3, padding=1) for _ in range(2))
        self.strided = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(12, 12, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x + self.b(self.a(x).relu())).relu()
        y = (self.strided(y) + self.shortcut(y)).relu()  # the later of the two does it
        a = self.a(y)
        y = a + self.b(a)  # a is read twice, b's result once
        y = y + self.a(y).relu()  # an activation comes between
        return y + y


def test_sums(isa: str) -> None:
    kernels = plan(Sums(), (12, 10, 9))
    assert sum(kernel.endswith(", add") for kernel in kernels) == 3
    assert kernels.count("add") == 2


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 3), (2, 4)])
@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (2, 1), (3, 3), (4, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_upsampling(isa: str, kernel: tuple[int, int], factors: tuple[int, int], groups: int) -> None:
    for padding in {(0, 0), (kernel[0] // 2, kernel[1] - 1)}:
        layers = nn.Upsample(scale_factor=factors), nn.Conv2d(6, 9, kernel, padding=padding, groups=groups), nn.ReLU()
        assert "resample" not in plan(nn.Sequential(nn.Conv2d(6, 6, 1), *layers), (6, 5, 7))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.interpolate(x, scale_factor=2)
        return y + self.conv(y)


@pytest.mark.parametrize(
    "module",
    [
        ReadTwice(),
        nn.Sequential(nn.Upsample(scale_factor=5), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Upsample(size=(11, 11)), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, stride=2)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, dilation=2)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1, padding=1)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2)),
    ],
)
def test_upsampling_that_stays_apart(isa: str, module: nn.Module) -> None:
    assert "resample" in plan(module, (4, 6, 6))


def test_residual_decoder_is_convolutions_alone() -> None:
    decoder = make_decoder((64, 8, 8), (3, 32, 32), kind="residual", final="sigmoid")
    kernels = plan(decoder, (64, 8, 8))
    assert not {"resample", "add", "activation"} & set(kernels)
