"""Convolutions whose weights stay in shared memory, of CUDA C++, against the torch reference.

Without a GPU a block's threads are those of the host's stand-in.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")

from fastinv.kernels.triton import launch
from interpreter import DEVICE, rounded

from fastinv import _cuda
from fastinv.backends.cuda import layers as cuda_layers
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.models import make_decoder
from fastinv.network import Network

if DEVICE == "cuda" and not cuda_layers.runs_on(torch.device("cuda", 0)):
    pytest.skip("this GPU has other tensor cores", allow_module_level=True)

WHERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
TOLERANCES = {"bfloat16": 8e-3, "float16": 1e-3}  # relative; results are rounded, too


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images are few."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)


def check(network: Network, x: np.ndarray, precision: str, kernels: list[str]) -> None:
    compiled = CudaNetwork(network, precision, WHERE)
    assert [row["kernel"].split()[0] for row in compiled.describe()] == kernels
    x = rounded(x, precision)
    found = compiled.run_there(torch.from_numpy(x).to(WHERE, getattr(torch, precision)), "float32").cpu().numpy()
    for image, expected in zip(found, reference(network, x), strict=True):
        assert relative(image, expected) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("inputs", "shape"),
    [
        *((64, shape) for shape in ((16, 16), (4, 16), (6, 16), (6, 32), (3, 64), (1, 64))),
        *((64, shape) for shape in ((8, 8), (7, 7), (5, 10), (5, 20), (4, 48), (7, 56), (2, 112), (2, 128))),
        *((128, shape) for shape in ((8, 16), (4, 32), (8, 8), (3, 20))),
    ],
)
def test_shapes(inputs: int, shape: tuple[int, int], precision: str) -> None:
    layers = nn.Conv2d(inputs, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(1)
    x = randn(9 if shape[0] * shape[1] < 128 else 3, inputs, *shape)
    check(exported((inputs, *shape), *layers), x, precision, ["WindowConvolution", "MaxPool"])


@pytest.mark.parametrize("shape", [(4, 16), (2, 32), (2, 64), (8, 8), (5, 10), (3, 56)])
@pytest.mark.parametrize("upsampled", [True, False])
def test_twice_the_pixels(upsampled: bool, shape: tuple[int, int]) -> None:
    up = nn.ConvTranspose2d(64, 48, 4, stride=2, padding=1)
    layers = (nn.Upsample(scale_factor=2), nn.Conv2d(64, 48, 3, padding=1)) if upsampled else (up,)
    network = exported((64, *shape), *layers, nn.LeakyReLU(0.1), nn.MaxPool2d(1))
    check(network, randn(3, 64, *shape), "float16", ["WindowConvolution", "MaxPool"])


@pytest.mark.parametrize("outputs", [128, 64, 40, 72])
@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (2, 32), (5, 10), (16, 16)])
def test_twice_the_pixels_of_more_channels(shape: tuple[int, int], outputs: int) -> None:
    """As the paper's ReLU32 decoder begins."""
    up = nn.ConvTranspose2d(128, outputs, 3, stride=2, padding=1, output_padding=1)
    network = exported((128, *shape), up, nn.ReLU(), nn.MaxPool2d(1))
    check(network, randn(3, 128, *shape), "bfloat16", ["WindowConvolution", "MaxPool"])


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("inputs", "outputs", "shape"), [(64, 128, (5, 20)), (64, 72, (8, 8)), (128, 128, (8, 16))])
def test_more_outputs_than_a_block_has_weights_of(
    inputs: int, outputs: int, shape: tuple[int, int], precision: str
) -> None:
    network = exported((inputs, *shape), nn.Conv2d(inputs, outputs, 3, padding=1), nn.Sigmoid(), nn.MaxPool2d(1))
    check(network, randn(5, inputs, *shape), precision, ["WindowConvolution", "MaxPool"])


@pytest.mark.parametrize(
    ("outputs", "activation"),
    [
        (8, nn.Identity()),
        (24, nn.LeakyReLU(-0.5)),
        (56, nn.Sigmoid()),
        (64, nn.Tanh()),
        (40, nn.Hardtanh(-0.5, 0.25)),
    ],
)
def test_outputs_and_activations(outputs: int, activation: nn.Module) -> None:
    network = exported((64, 4, 16), nn.Conv2d(64, outputs, 3, padding=1), activation, nn.MaxPool2d(1))
    check(network, randn(3, 64, 4, 16), "float16", ["WindowConvolution", "MaxPool"])


class Residual(nn.Module):
    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        return torch.max_pool2d(torch.relu(x + y), 1)


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_residual_block(precision: str, channels: int) -> None:
    network = exported((channels, 4, 16), Residual(channels))
    check(network, randn(3, channels, 4, 16), precision, ["WindowConvolution", "WindowConvolution", "MaxPool"])


def test_a_residual_decoder() -> None:
    """From features to an image: windows, and the last two layers in one."""
    torch.manual_seed(0)
    network = exported((128, 16, 16), make_decoder((128, 16, 16), (3, 32, 32), "residual"))
    compiled = CudaNetwork(network, "float16", WHERE)
    kernels = [row["kernel"].split()[0] for row in compiled.describe()]
    assert kernels[-1] == "Tail"
    assert set(kernels[:-1]) == {"WindowConvolution"}
    x = rounded(randn(2, 128, 16, 16), "float16")
    found = compiled.run_there(torch.from_numpy(x).to(WHERE, torch.float16), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 3e-3


@pytest.mark.parametrize(
    ("inputs", "shape", "layer"),
    [
        (64, (4, 16), nn.Conv2d(64, 60, 3, padding=1)),  # outputs that are no eights
        (64, (4, 16), nn.Conv2d(64, 136, 3, padding=1)),
        (128, (4, 16), nn.ConvTranspose2d(128, 64, 4, 2, 1)),  # other taps than there are of so many channels
        (64, (4, 16), nn.Conv2d(64, 64, 3)),
        (64, (4, 16), nn.Conv2d(64, 64, 1)),
        (64, (4, 16), nn.Conv2d(64, 64, 3, 2, 1)),
        (64, (6, 6), nn.Conv2d(64, 64, 3, padding=1)),  # few cells of a band
        (64, (9, 9), nn.Conv2d(64, 64, 3, padding=1)),
        (96, (4, 16), nn.Conv2d(96, 64, 3, padding=1)),
        (128, (4, 64), nn.Conv2d(128, 64, 3, padding=1)),  # no room
    ],
)
def test_other_layers_take_other_kernels(inputs: int, shape: tuple[int, int], layer: nn.Module) -> None:
    network = exported((inputs, *shape), layer, nn.ReLU(), nn.MaxPool2d(1))
    check(network, randn(2, inputs, *shape), "float16", ["Convolution", "MaxPool"])


def test_results_in_another_order_and_few_images_go_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    network = exported((64, 4, 16), nn.Conv2d(64, 8, 3, padding=1))
    check(network, randn(3, 64, 4, 16), "float16", ["WindowConvolution"])
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    network = exported((64, 4, 16), nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(1))
    check(network, randn(3, 64, 4, 16), "float16", ["WindowConvolution", "MaxPool"])


def test_a_layer_that_does_not_fit_is_refused() -> None:
    for layer in (_cuda.WindowLayer(), _cuda.Tail()):
        assert not layer.fits()
        with pytest.raises(ValueError, match="no kernel for these layers"):
            layer.run(-1, 0)
