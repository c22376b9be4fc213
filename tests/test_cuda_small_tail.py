"""The decoder of MNIST's ReLU2 in one launch of CUDA C++, against the torch reference.

Without a GPU a block's threads are those of the host's stand-in.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")

from interpreter import DEVICE, rounded

from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.errors import FeatureError
from fastinv.models import make_decoder
from fastinv.network import Network
from fastinv.tensors import Source

WHERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
SHAPE = (16, 8, 8)


def papers_decoder() -> Network:
    torch.manual_seed(0)
    layers = make_decoder(SHAPE, (1, 28, 28))
    for layer in layers:
        if hasattr(layer, "bias"):
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return exported(SHAPE, *layers)


def decoder(between: int = 8, activation: nn.Module | None = None, *last: nn.Module, bias: bool = True) -> Network:
    to_image = nn.ConvTranspose2d(between, 1, 5, stride=2, output_padding=1, bias=bias)
    return exported(SHAPE, nn.ConvTranspose2d(16, between, 5, bias=bias), activation or nn.ReLU(), to_image, *last)


def compiled(network: Network, precision: str = "float32") -> CudaNetwork:
    """The plan must be one launch of the kernel."""
    found = CudaNetwork(network, precision, WHERE)
    assert [row["kernel"] for row in found.describe()] == ["SmallTail"]
    return found


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("images", [0, 1, 2, 7, 8, 9, 27])
def test_the_papers_decoder(images: int, precision: str) -> None:
    """Everything is float32, whatever the features are."""
    network, x = papers_decoder(), rounded(randn(images, *SHAPE), precision)
    dtype = getattr(torch, precision.replace("tf32", "float32"))
    found = compiled(network, precision).run_there(torch.from_numpy(x).to(WHERE, dtype), "float32").cpu().numpy()
    assert found.shape == (images, 1, 28, 28)
    for image, expected in zip(found, reference(network, x), strict=True):
        assert relative(image, expected) < 1e-6


@pytest.mark.parametrize(
    ("activation", "last"),
    [
        (nn.LeakyReLU(0.2), [nn.Sigmoid()]),
        (nn.Identity(), [nn.Tanh()]),
        (nn.LeakyReLU(-1.5), [nn.Hardtanh(-0.5, 0.25)]),
        (nn.ReLU(), [nn.LeakyReLU(0.1)]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_other_activations(activation: nn.Module, last: list[nn.Module], bias: bool) -> None:
    network, x = decoder(8, activation, *last, bias=bias), randn(9, *SHAPE)
    found = compiled(network).run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 1e-6


def test_an_input_reaches_the_outputs_that_see_it() -> None:
    """Every pixel alone, each in another channel."""
    network = papers_decoder()
    x = np.zeros((64, 16, 64), np.float32)
    x[np.arange(64), np.arange(64) % 16, np.arange(64)] = 3
    x = x.reshape(64, *SHAPE)
    found = compiled(network).run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    np.testing.assert_allclose(found, reference(network, x), atol=1e-6)
    assert len(np.unique(found, axis=0)) == 64


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("features", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_features_from_the_host(dtype: str, features: str, precision: str) -> None:
    """What it does not read as it is comes through the layout, channels last."""
    network, x = decoder(8, nn.ReLU(), nn.Sigmoid()), randn(11, *SHAPE)
    source = Source(x.astype(features), features, False)
    if features == "uint8":
        x = np.abs(40 * x).astype(np.uint8)
        scale, zero_point = np.full((16, 1, 1), 0.05, np.float32), np.full((16, 1, 1), 3, np.float32)
        source = Source(x, features, False, scale, zero_point)
        x = (x - zero_point) * scale
    machine, out = compiled(network, precision), np.empty((11, 1, 28, 28), dtype)
    assert machine.run_raw(source, out)
    expected = reference(network, x)
    if dtype == "uint8":
        assert np.abs(out - 255 * expected).max() < (0.51 if precision == "float32" and features != "float16" else 3)
    else:
        assert relative(out, expected) < (1e-6 if precision == "float32" and features != "float16" else 1e-2)


def test_within_a_network() -> None:
    """Its features come from another layer, and its image goes to another."""
    layers = nn.Conv2d(4, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 5), nn.ReLU()
    last = nn.ConvTranspose2d(8, 1, 5, stride=2, output_padding=1)
    network, x = exported((4, 8, 8), *layers, last, nn.Flatten(), nn.Linear(784, 12)), randn(3, 4, 8, 8)
    machine = CudaNetwork(network, "float32", WHERE)
    assert "SmallTail" in [row["kernel"] for row in machine.describe()]
    found = machine.run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (8, 15, 7, 7), (7, 3, 4, 5)])
def test_features_that_are_not_finite_are_refused(place: tuple[int, ...], value: float, precision: str) -> None:
    x, network = randn(9, *SHAPE), compiled(papers_decoder(), precision)
    there = torch.from_numpy(x).to(WHERE, getattr(torch, precision))
    network.run_there(there, "float32")
    there[place] = value
    with pytest.raises(FeatureError, match="NaN or Inf"):
        network.run_there(there, "float32")
    x[place] = value
    assert not network.run_raw(Source(x, "float32", False), np.empty((9, 1, 28, 28), np.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the stand-in")
def test_the_order_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = papers_decoder(), torch.from_numpy(randn(9, *SHAPE))
    found = compiled(network).run_there(x, "float32")
    monkeypatch.setattr(cuda_native, "HOST", -2)
    assert torch.equal(compiled(network).run_there(x, "float32"), found)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.ConvTranspose2d(16, 6, 5), nn.ReLU(), nn.ConvTranspose2d(6, 1, 5, stride=2, output_padding=1)),
        (nn.ConvTranspose2d(16, 8, 5), nn.SiLU(), nn.ConvTranspose2d(8, 1, 5, stride=2, output_padding=1)),
        (nn.ConvTranspose2d(16, 8, 5), nn.ReLU(), nn.ConvTranspose2d(8, 1, 5, stride=2)),
        (nn.ConvTranspose2d(16, 8, 5), nn.ReLU(), nn.ConvTranspose2d(8, 2, 5, stride=2, output_padding=1)),
        (nn.ConvTranspose2d(16, 8, 5, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 5, stride=2, output_padding=1)),
    ],
)
def test_other_layers_take_other_kernels(layers: tuple[nn.Module, ...]) -> None:
    network, x = exported(SHAPE, *copy.deepcopy(layers)), randn(2, *SHAPE)
    machine = CudaNetwork(network, "float32", WHERE)
    assert "SmallTail" not in [row["kernel"] for row in machine.describe()]
    found = machine.run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 1e-5


def test_without_the_extension_there_are_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "extension", lambda: None)
    plan = CudaNetwork(papers_decoder(), "float32", WHERE).describe()
    assert [row["kernel"] for row in plan] == ["DirectConvolution", "DirectConvolution"]
