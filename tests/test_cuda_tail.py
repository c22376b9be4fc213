"""A decoder's last two layers in one launch of CUDA C++, against the torch reference.

Without a GPU a block's threads are those of the host's stand-in.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")

from fastinv.kernels.triton import launch
from interpreter import DEVICE, rounded

from fastinv.backends.cuda import layers as cuda_layers
from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda import tail as cuda_tail
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.errors import FeatureError
from fastinv.network import Network
from fastinv.tensors import Source

if DEVICE == "cuda" and not cuda_layers.runs_on(torch.device("cuda", 0)):
    pytest.skip("this GPU has other tensor cores", allow_module_level=True)

WHERE = torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")
TOLERANCES = {"bfloat16": 8e-3, "float16": 1e-3}  # relative; what lies between the layers is rounded, too


def decoder(between: int = 64, outputs: int = 3, activation: nn.Module | None = None, *last: nn.Module) -> Network:
    up = nn.ConvTranspose2d(128, between, 3, stride=2, padding=1, output_padding=1)
    to_image = nn.ConvTranspose2d(between, outputs, 3, padding=1)
    return exported((128, 16, 16), up, activation or nn.ReLU(), to_image, *last)


def on_device(network: Network, x: np.ndarray, precision: str, dtype: str = "float32") -> np.ndarray:
    """What `run_there` makes of features of the precision's type; the plan must be one launch of the kernel."""
    compiled = CudaNetwork(network, precision, WHERE)
    assert [row["kernel"] for row in compiled.describe()] == ["Tail"]
    there = torch.from_numpy(x).to(WHERE, getattr(torch, precision))
    return compiled.run_there(there, dtype).cpu().numpy()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("images", [0, 1, 2, 5])
def test_the_papers_layers(precision: str, images: int) -> None:
    network, x = decoder(), rounded(randn(images, 128, 16, 16), precision)
    found = on_device(network, x, precision)
    assert found.shape == (images, 3, 32, 32)
    for image, expected in zip(found, reference(network, x), strict=True):
        assert relative(image, expected) < TOLERANCES[precision]


@pytest.mark.parametrize(
    ("between", "outputs", "activation", "last"),
    [
        (64, 1, nn.LeakyReLU(0.2), nn.Sigmoid()),
        (40, 4, nn.ReLU(), nn.Tanh()),
        (64, 2, nn.Identity(), nn.LeakyReLU(0.1)),
        (7, 3, nn.LeakyReLU(-1.5), nn.Hardtanh(-0.5, 0.25)),
        (64, 3, nn.ReLU(), nn.ReLU()),
    ],
)
def test_other_channels_and_activations(between: int, outputs: int, activation: nn.Module, last: nn.Module) -> None:
    network, x = decoder(between, outputs, activation, last), rounded(randn(3, 128, 16, 16), "float16")
    assert relative(on_device(network, x, "float16"), reference(network, x)) < TOLERANCES["float16"]


def test_an_input_reaches_the_outputs_that_see_it() -> None:
    """Every pixel alone, at the borders and corners of an image, of its halves and of a row's halves."""
    network = decoder()
    zero = reference(network, np.zeros((1, 128, 16, 16), np.float32))
    places = [(y, x) for y in (0, 1, 7, 8, 9, 15) for x in (0, 7, 8, 15)]
    x = np.zeros((len(places), 128, 16, 16), np.float32)
    for image, (row, column) in zip(x, places, strict=True):
        image[:, row, column] = randn(128)
    x = rounded(x, "float16")
    found, expected = on_device(network, x, "float16"), reference(network, x)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert ((np.abs(expected - zero) > 1e-6).sum((1, 2, 3)) < 200).all()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_features_from_the_host(dtype: str, precision: str) -> None:
    """float32: rounded to bfloat16 on the host, and read as they are; to float16 on the device, by the layout."""
    network, x = decoder(64, 3, nn.ReLU(), nn.Sigmoid()), randn(3, 128, 16, 16)
    compiled, out = CudaNetwork(network, precision, WHERE), np.empty((3, 3, 32, 32), dtype)
    assert compiled.run_raw(Source(x, "float32", False), out)
    expected = reference(network, x)
    if dtype == "uint8":
        assert np.abs(out.astype(float) - 255 * expected).max() < 4
    else:
        assert relative(out, expected) < 1e-2
    x[1, 2, 3, 4] = np.nan
    assert not compiled.run_raw(Source(x, "float32", False), out)


def test_within_a_network() -> None:
    layers = nn.Conv2d(16, 128, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ReLU()
    network, x = exported((16, 16, 16), *layers, nn.Conv2d(64, 3, 3, padding=1)), randn(3, 16, 16, 16)
    compiled = CudaNetwork(network, "float16", WHERE)
    assert [row["kernel"].split()[0] for row in compiled.describe()] == ["Convolution", "Tail"]
    found = compiled.run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 3e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 127, 15, 15), (1, 64, 8, 3)])
def test_features_that_are_not_finite_are_refused(value: float, place: tuple[int, ...]) -> None:
    x = randn(3, 128, 16, 16)
    x[place] = value
    with pytest.raises(FeatureError, match="NaN or Inf"):
        on_device(decoder(), x, "bfloat16")


# ---- larger decoders, of 64 channels ---------------------------------------------------------------------------------


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images are few."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)


def wide_decoder(shape: tuple[int, int], *up: nn.Module) -> Network:
    layers = up or (nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1))
    return exported((64, *shape), *layers, nn.ReLU(), nn.Conv2d(layers[-1].out_channels, 3, 3, padding=1), nn.Sigmoid())


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("shape", [(16, 16), (4, 16), (32, 32), (6, 32), (2, 32), (1, 64), (3, 64)])
@pytest.mark.usefixtures("one_processor")
def test_a_larger_decoder(shape: tuple[int, int], precision: str) -> None:
    network, x = wide_decoder(shape), rounded(randn(5 if shape[0] < 8 else 2, 64, *shape), precision)
    compiled = CudaNetwork(network, precision, WHERE)
    assert [row["kernel"] for row in compiled.describe()] == ["Tail"]
    there, expected = torch.from_numpy(x).to(WHERE, getattr(torch, precision)), reference(network, x)
    for image, right in zip(compiled.run_there(there, "float32").cpu().numpy(), expected, strict=True):
        assert relative(image, right) < TOLERANCES[precision]
    found = compiled.run_there(there, "uint8").cpu().numpy()
    assert np.abs(found - 255 * expected).max() < (2 if precision == "bfloat16" else 0.75)


@pytest.mark.parametrize(
    "up",
    [
        nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
        nn.ConvTranspose2d(64, 40, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(64, 24, 4, stride=2, padding=1, bias=False),
    ],
)
@pytest.mark.usefixtures("one_processor")
def test_other_ways_to_double(up: nn.Module) -> None:
    network, x = wide_decoder((4, 32), up), rounded(randn(3, 64, 4, 32), "float16")
    compiled = CudaNetwork(network, "float16", WHERE)
    assert [row["kernel"] for row in compiled.describe()] == ["Tail"]
    found = compiled.run_there(torch.from_numpy(x).to(WHERE, torch.float16), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < TOLERANCES["float16"]


@pytest.mark.usefixtures("one_processor")
def test_a_cell_of_a_larger_decoder_reaches_what_sees_it() -> None:
    """Alone, at the borders of strips, bands and images."""
    network = wide_decoder((3, 64))
    places = [(y, x) for y in range(3) for x in (0, 1, 15, 16, 31, 32, 47, 48, 62, 63)]
    x = np.zeros((len(places), 64, 3, 64), np.float32)
    for image, (row, column) in zip(x, places, strict=True):
        image[:, row, column] = 3 * randn(64)
    x = rounded(x, "float16")
    compiled = CudaNetwork(network, "float16", WHERE)
    found = compiled.run_there(torch.from_numpy(x).to(WHERE, torch.float16), "float32").cpu().numpy()
    np.testing.assert_allclose(found, reference(network, x), atol=2e-3)


def test_few_images_go_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = wide_decoder((16, 32)), rounded(randn(1, 64, 16, 32), "float16")
    compiled = CudaNetwork(network, "float16", WHERE)
    taken: list[int] = []
    monkeypatch.setattr(cuda_tail, "_sized", lambda shape: taken.append(1))
    found = compiled.run_there(torch.from_numpy(x).to(WHERE, torch.float16), "float32").cpu().numpy()
    assert not taken
    assert relative(found, reference(network, x)) < TOLERANCES["float16"]


@pytest.mark.parametrize(
    "layers",
    [
        (nn.ConvTranspose2d(128, 96, 3, 2, 1, 1), nn.ReLU(), nn.Conv2d(96, 3, 3, padding=1)),  # more between
        (nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1)),  # another activation
        (nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)),  # other taps
        (nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ReLU(), nn.Conv2d(64, 3, 5, padding=2)),
        (nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ReLU(), nn.Conv2d(64, 5, 3, padding=1)),  # more outputs
        (nn.Conv2d(128, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)),  # as many pixels
    ],
)
def test_other_layers_take_other_kernels(layers: tuple[nn.Module, ...]) -> None:
    network, x = exported((128, 16, 16), *layers), randn(2, 128, 16, 16)
    compiled = CudaNetwork(network, "float16", WHERE)
    assert "Tail" not in [row["kernel"] for row in compiled.describe()]
    found = compiled.run_there(torch.from_numpy(x).to(WHERE), "float32").cpu().numpy()
    assert relative(found, reference(network, x)) < 5e-3


def test_without_the_extension_it_is_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_native, "extension", lambda: None)
    (row,) = CudaNetwork(decoder(), "float16", WHERE).describe()
    assert re.match("Pair", row["kernel"])
