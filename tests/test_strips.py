"""Images that do not fit the cache go through all layers strip by strip; results are the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from architectures import ChannelNorm
from checks import exported, randn, reference, relative
from torch import Tensor, nn

import fastinv
from fastinv.models import make_decoder, resnet_decoder

CHANNELS, HEIGHT, WIDTH = 32, 67, 75  # each value is 640 kB


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def conv(kernel: int = 3, **options: int) -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, **options)


def up(kernel: int, stride: int, **options: int) -> nn.Module:
    return nn.ConvTranspose2d(CHANNELS, CHANNELS, kernel, stride, **options)


NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "stride 1": lambda: [conv(padding=1), nn.ReLU(), conv(5, padding=2), nn.Sigmoid(), conv()],
    "no padding, much padding": lambda: [conv(5), conv(3, padding=2), conv(3, padding=4), conv(1)],
    "stride 2": lambda: [conv(padding=1), conv(4, stride=2, padding=1), nn.ReLU(), up(3, 2), up(4, 2), conv(padding=1)],
    "stride 3": lambda: [conv(5, stride=3, padding=1), up(5, 3, padding=2, output_padding=1), conv(3, padding=1)],
    "dilation": lambda: [conv(3, dilation=2, padding=2), nn.ReLU(), up(3, 2, dilation=2, padding=1), conv(padding=1)],
    "groups": lambda: [conv(groups=4, padding=1), nn.Tanh(), conv(groups=CHANNELS, padding=1), up(4, 2, groups=2)],
    "residual": lambda: [Residual(conv(padding=1), nn.ReLU(), conv(padding=1)), nn.ReLU(), Residual(conv(padding=1))],
    "pools": lambda: [conv(padding=1), nn.MaxPool2d(2), conv(padding=1), nn.AvgPool2d(3, 2, 1), conv(padding=1)],
    "upsampling": lambda: [conv(), nn.Upsample(scale_factor=2), conv(padding=1), nn.Upsample(size=(90, 80)), conv()],
    "activations": lambda: [nn.GELU(), conv(padding=1), nn.GELU(), nn.Softplus(), conv(), nn.SiLU()],
    "batch norm": lambda: [nn.BatchNorm2d(CHANNELS), conv(padding=1), nn.ReLU(), nn.BatchNorm2d(CHANNELS), conv()],
    "few channels": lambda: [conv(padding=1), nn.ReLU(), nn.Conv2d(CHANNELS, 3, 3, padding=1), nn.Conv2d(3, 1, 5)],
    "few channels, stride 2": lambda: [
        conv(padding=1),
        nn.ConvTranspose2d(CHANNELS, 4, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 5, padding=2),
    ],
    "one channel": lambda: [nn.Conv2d(CHANNELS, 1, 3), nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(), conv()],
    "norms of pixels": lambda: [conv(padding=1), ChannelNorm(CHANNELS), nn.GELU(), conv(), ChannelNorm(CHANNELS)],
    "norms of images": lambda: [conv(padding=1), nn.GroupNorm(4, CHANNELS), nn.ReLU(), conv(padding=1)],
    "to a vector": lambda: [conv(padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(CHANNELS * 72, 10)],
}


WHOLE = {"pools", "to a vector"}  # a pool needs the whole image


def check(network: fastinv.Network, images: int = 3) -> fastinv.Engine:
    alone, shared = (fastinv.compile(network, backend="cpu", threads=threads) for threads in (1, 2))
    x = randn(images, *network.input_shape)
    y = alone(x)
    assert relative(y, reference(network, x)) < 1e-5
    assert np.array_equal(y, shared(x))
    for i in range(images):  # the last layers first, and the threads share each image
        assert np.array_equal(y[i : i + 1], shared(x[i : i + 1]))
    return alone


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_kind_of_layer(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*NETWORKS[name]()).eval()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    engine = check(exported((CHANNELS, HEIGHT, WIDTH), module))
    assert all(row["strips"] > 1 for row in engine.describe()) == (name not in WHOLE)


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 2000), (3, 1500), (257, 16)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(conv(padding=1), nn.ReLU(), up(4, 2, padding=1), conv(padding=1)).eval()
    check(exported((CHANNELS, *size), module), images=2)


@pytest.mark.usefixtures("isa")
def test_strips_that_end_within_a_line() -> None:
    module = nn.Sequential(conv(padding=1), nn.ReLU(), conv(padding=1)).eval()
    engine = check(exported((CHANNELS, 128, 105), module), images=2)
    assert all(row["strips"] > 1 for row in engine.describe())


def test_large_images_are_cut_and_small_ones_are_not() -> None:
    torch.manual_seed(0)
    large = exported((64, 56, 56), resnet_decoder())
    engine = check(large, images=2)
    assert all(row["strips"] > 10 for row in engine.describe())
    small = exported((128, 8, 8), make_decoder((128, 8, 8), (3, 32, 32)))
    assert all(row["strips"] == 1 for row in fastinv.compile(small, backend="cpu").describe())
    # Windows instead of whole values: 64 × 112 × 112 and 32 × 224 × 224 floats are 9.6 MB.
    assert engine._compiled._engine.workspace_bytes < 6e6


@pytest.mark.usefixtures("isa")
def test_linear_layers_come_before_the_strips() -> None:
    """All images of a block go through them together; their memory is the windows and what leads there."""
    torch.manual_seed(0)
    network = exported((40,), make_decoder((40,), (3, 64, 64)))
    engine = check(network, images=26)  # blocks of 12 and a rest
    assert all(row["strips"] > 10 and row["images"] == 12 for row in engine.describe())
    assert engine._compiled._engine.workspace_bytes < 4e6


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("skips", [False, True])
def test_what_is_read_before_a_linear_layer_and_after_it(skips: bool) -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(96, 96)
            self.convs = nn.Sequential(nn.Upsample(scale_factor=16), nn.Conv2d(6, 64, 3, padding=1), nn.ReLU())
            self.last = nn.Conv2d(64, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.flatten(1)).relu().unflatten(1, (6, 4, 4))
            return self.last(self.convs(y + x if skips else y))

    torch.manual_seed(0)
    engine = check(exported((6, 4, 4), Skipping()), images=5)
    assert all(row["strips"] > 1 for row in engine.describe())


def test_bytes_and_quantised_features() -> None:
    torch.manual_seed(0)
    network = exported((CHANNELS, 96, 96), conv(padding=1), nn.Sigmoid())
    engine = fastinv.compile(network, backend="cpu", threads=1)
    q = np.random.default_rng(0).integers(0, 256, (3, CHANNELS, 96, 96), np.uint8)
    x = (q.astype(np.float32) - 3) * np.float32(0.02)
    assert np.array_equal(engine(q, scale=0.02, zero_point=3), engine(x))
    assert all(row["strips"] > 1 for row in engine.describe())


def test_nan_is_refused() -> None:
    network = exported((CHANNELS, 96, 96), conv(padding=1))
    x = randn(2, CHANNELS, 96, 96)
    x[1, 5, 95, 95] = np.nan
    with pytest.raises(fastinv.FeatureError, match="first in image 1"):
        fastinv.compile(network, backend="cpu", threads=1)(x)
