"""A 3×3 convolution of features in the user's order to a few channels, in CUDA C++, against the torch reference.

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

from interpreter import DEVICE, expect_close, rounded

from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.errors import FeatureError
from fastinv.models import make_decoder
from fastinv.network import Network
from fastinv.tensors import Source

WHERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
TOLERANCES = {"float16": 1e-3, "bfloat16": 1e-2}  # of weights that are rounded
EXACT = 2e-6  # of sums of exact products


def decoder(height: int, width: int, outputs: int = 3, *last: nn.Module, bias: bool = True) -> Network:
    """Its weights are numbers of two bytes."""
    layer = nn.Conv2d(64, outputs, 3, padding=1, bias=bias)
    layer.weight.data = layer.weight.data.bfloat16().float()
    return exported((64, height, width), layer, *last)


def compiled(network: Network, precision: str) -> CudaNetwork:
    """The plan must be one launch of the kernel."""
    found = CudaNetwork(network, precision, WHERE)
    assert [row["kernel"] for row in found.describe()] == ["PlanarConvolution"]
    return found


def there(x: np.ndarray, precision: str) -> torch.Tensor:
    return torch.from_numpy(x).to(WHERE, getattr(torch, precision))


def check(network: Network, images: int, precision: str, tolerance: float = EXACT) -> None:
    x = rounded(randn(images, *network.input_shape), precision)
    found = compiled(network, precision).run_there(there(x, precision), "float32").cpu().numpy()
    assert found.shape == (images, *network.output_shape)
    for image, expected in zip(found, reference(network, x), strict=True):
        expect_close(image, expected, tolerance)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("images", [0, 1, 2, 5])
def test_the_papers_decoder(images: int, precision: str) -> None:
    """CIFAR-10's conv11."""
    torch.manual_seed(0)
    layers = make_decoder((64, 32, 32), (3, 32, 32))
    check(exported((64, 32, 32), *layers), images, precision, TOLERANCES[precision])


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 4), (4, 1), (2, 2), (3, 4), (4, 9), (6, 6), (8, 8), (5, 28), (28, 28), (16, 33), (12, 64)]
)
def test_odd_shapes(height: int, width: int, outputs: int) -> None:
    check(decoder(height, width, outputs), 3, "float16")


def test_an_input_reaches_the_outputs_that_see_it() -> None:
    """Every pixel alone, each in another channel; and every channel alone."""
    network = decoder(8, 8)
    pixels = np.zeros((64, 64, 64), np.float32)
    pixels[np.arange(64), np.arange(64) * 27 % 64, np.arange(64)] = 3
    channels = np.zeros((64, 64, 64), np.float32)
    channels[np.arange(64), np.arange(64), 27] = 2
    x = np.concatenate([pixels, channels]).reshape(128, 64, 8, 8)
    found = compiled(network, "float16").run_there(there(x, "float16"), "float32").cpu().numpy()
    np.testing.assert_allclose(found, reference(network, x), atol=1e-5)
    assert len(np.unique(found, axis=0)) == 128


@pytest.mark.parametrize(
    "last", [(), (nn.Sigmoid(),), (nn.Tanh(),), (nn.ReLU(),), (nn.LeakyReLU(-1.5),), (nn.Hardtanh(-0.5, 0.25),)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_activations(last: tuple[nn.Module, ...], bias: bool) -> None:
    check(decoder(8, 12, 3, *last, bias=bias), 3, "float16")


def test_a_transposed_convolution() -> None:
    check(exported((64, 8, 8), nn.ConvTranspose2d(64, 2, 3, padding=1)), 2, "float16", TOLERANCES["float16"])


@pytest.mark.parametrize(
    ("features", "precision", "dtype"),
    [
        ("float32", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "uint8"),
        ("float16", "float16", "uint8"),
        ("float32", "float16", "uint8"),
        ("bfloat16", "float16", "float32"),
        ("uint8", "bfloat16", "float32"),
    ],
)
def test_features_from_the_host(dtype: str, features: str, precision: str) -> None:
    """What it does not read as it is another kernel reads."""
    network, x = decoder(8, 8, 3, nn.Sigmoid()), randn(5, 64, 8, 8)
    scale = zero_point = None
    if features == "uint8":
        scale, zero_point = np.full((64, 1, 1), 0.05, np.float32), np.full((64, 1, 1), 3, np.float32)
        given = np.abs(40 * x).astype(np.uint8)
        x = (given - zero_point) * scale
    elif features == "bfloat16":
        x = rounded(x, features)
        given = torch.from_numpy(x).bfloat16().view(torch.int16).numpy()
    else:
        given = x.astype(features)
    out = np.empty((5, 3, 8, 8), dtype)
    assert compiled(network, precision).run_raw(Source(given, features, False, scale, zero_point), out)
    expected = reference(network, x)
    if dtype == "uint8":
        assert np.abs(out - 255 * expected).max() < 3
    else:
        assert relative(out, expected) < 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 63, 7, 11), (1, 37, 4, 5)])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_features_that_are_not_finite_are_refused(precision: str, place: tuple[int, ...], value: float) -> None:
    x, network = there(randn(3, 64, 8, 12), precision), compiled(decoder(8, 12), precision)
    network.run_there(x, "float32")
    x[place] = value
    with pytest.raises(FeatureError, match="NaN or Inf"):
        network.run_there(x, "float32")
    x[place] = 1
    network.run_there(x, "float32")


def test_the_largest_features_are_finite() -> None:
    """Sums may overflow: that is no fault of the features."""
    x = torch.full((1, 64, 4, 4), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16, device=WHERE)
    compiled(decoder(4, 4), "bfloat16").run_there(x, "float32")


@pytest.mark.skipif(DEVICE == "cuda", reason="of the stand-in")
def test_the_order_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = decoder(6, 10), there(randn(5, 64, 6, 10), "bfloat16")
    found = compiled(network, "bfloat16").run_there(x, "float32")
    monkeypatch.setattr(cuda_native, "HOST", -2)
    assert torch.equal(compiled(network, "bfloat16").run_there(x, "float32"), found)


@pytest.mark.skipif(DEVICE == "cpu", reason="the stand-in takes long for so many")
def test_copies_give_the_same() -> None:
    """More images than there are blocks at once: each block takes several."""
    x = there(np.tile(randn(3, 64, 32, 32), (700, 1, 1, 1)), "bfloat16")
    found = compiled(decoder(32, 32), "bfloat16").run_there(x, "float32").view(700, 3, 3, 32, 32)
    assert torch.equal(found, found[:1].expand_as(found))


@pytest.mark.parametrize(
    ("shape", "layer"),
    [
        ((32, 8, 8), nn.Conv2d(32, 3, 3, padding=1)),
        ((64, 8, 8), nn.Conv2d(64, 4, 3, padding=1)),
        ((64, 8, 8), nn.Conv2d(64, 3, 5, padding=2)),
        ((64, 8, 8), nn.Conv2d(64, 3, 3)),
        ((64, 9, 9), nn.Conv2d(64, 3, 3, padding=1)),
        ((64, 80, 80), nn.Conv2d(64, 3, 3, padding=1)),
        ((64, 8, 8), nn.Conv2d(64, 3, 3, padding=1, dilation=1, stride=2)),
    ],
)
def test_others_go_another_way(shape: tuple[int, ...], layer: nn.Module) -> None:
    network = exported(shape, layer)
    plan = CudaNetwork(network, "bfloat16", WHERE).describe()
    assert "PlanarConvolution" not in [row["kernel"] for row in plan]
