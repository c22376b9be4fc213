"""3×3 convolutions of float32 in products of float16, of CUDA C++, against the torch reference, forward and back.

Without a GPU a block's threads are those of the host's stand-in.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, reference_gradient
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")

from fastinv.kernels.triton import launch
from interpreter import DEVICE, check_solver, expect_close, forward, gradient, recipe_for

from fastinv import _cuda
from fastinv.backends.cuda import layers as cuda_layers
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.network import Network

if DEVICE == "cuda" and not cuda_layers.runs_on(torch.device("cuda", 0)):
    pytest.skip("this GPU has other tensor cores", allow_module_level=True)

TOLERANCE = 2e-6  # relative: 22 bits of 24, and float32 sums of up to 3,456 products
NATIVE, OTHER = "HalvedConvolution", "Convolution"


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images are few."""
    monkeypatch.setattr(launch, "processors", lambda device: 1)


def kernels_of(network: Network, precision: str = "float32", back: bool = False) -> list[str]:
    nodes = Lowering(network, DEVICE, PRECISIONS[precision], differentiable=back).nodes
    return [type(getattr(node, "back" if back else "kernel", None)).__name__ for node in nodes]


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def check(network: Network, x: np.ndarray) -> None:
    for image, expected in zip(forward(network, x, "float32"), reference(network, x), strict=True):
        expect_close(image, expected, TOLERANCE)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (11, 8), (16, 16), (5, 16), (1, 32), (6, 32), (3, 64), (1, 64)])
def test_shapes(shape: tuple[int, int]) -> None:
    network = exported((64, *shape), convolution(64, 64), nn.ReLU())
    assert kernels_of(network) == [NATIVE]
    check(network, randn(7 if shape[0] * shape[1] < 128 else 3, 64, *shape))


@pytest.mark.parametrize(("inputs", "outputs"), [(128, 64), (64, 128), (192, 120), (64, 48), (128, 128)])
def test_channels_that_take_several_launches(inputs: int, outputs: int) -> None:
    network = exported((inputs, 3, 16), convolution(inputs, outputs), nn.LeakyReLU(0.1))
    assert kernels_of(network) == [NATIVE]
    check(network, randn(3, inputs, 3, 16))


@pytest.mark.parametrize(
    "activation", [nn.Identity(), nn.LeakyReLU(-0.5), nn.Sigmoid(), nn.Tanh(), nn.Hardtanh(-0.5, 0.25)]
)
def test_activations(activation: nn.Module) -> None:
    network = exported((128, 4, 8), convolution(128, 64), activation)
    assert kernels_of(network) == [NATIVE]
    check(network, randn(3, 128, 4, 8))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (convolution(128, 128) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def test_a_residual_block_forward_and_back() -> None:
    network = exported((128, 4, 8), Residual())
    assert kernels_of(network) == [NATIVE, NATIVE]
    x, v = randn(3, 128, 4, 8), randn(3, 128, 4, 8, seed=1)
    check(network, x)
    expect_close(gradient(network, x, v), reference_gradient(network, x, v), TOLERANCE)


def test_two_nodes_that_read_one_value_add_their_gradients() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (convolution(64, 64) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sigmoid(x)
            return self.first(x) * self.second(x)

    network = exported((64, 4, 16), Both())
    x, v = randn(2, 64, 4, 16), randn(2, 64, 4, 16, seed=1)
    expect_close(gradient(network, x, v), reference_gradient(network, x, v), TOLERANCE)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.SiLU(), nn.Identity()])
def test_gradients(activation: nn.Module) -> None:
    """Where the slope is not told from a sign, Triton's kernel goes back."""
    layers = convolution(64, 64), activation, convolution(64, 128), activation
    network = exported((64, 5, 8), *layers)
    assert set(kernels_of(network, back=True)) - {"NoneType"} == {NATIVE}
    z, v = randn(2, 64, 5, 8), randn(2, 128, 5, 8, seed=1)
    expect_close(gradient(network, z, v), reference_gradient(network, z, v), 2 * TOLERANCE)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_images_of_any_size(size: float) -> None:
    """One after the other, by the same warpgroup; each has a power of two of its own."""
    network = exported((64, 9, 8), nn.Conv2d(64, 64, 3, padding=1, bias=False))
    x = randn(9, 64, 9, 8)
    x[1::2] *= np.float32(size)
    x[4] = 0
    for image, expected in zip(forward(network, x, "float32"), reference(network, x), strict=True):
        expect_close(image, expected, TOLERANCE)


@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-20, 1e20])
def test_weights_of_any_size(size: float) -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    with torch.no_grad():
        layer.weight *= size
    check(exported((64, 4, 8), layer), 1e6 * randn(2, 64, 4, 8))


@pytest.mark.parametrize(("height", "width"), [(12, 16), (20, 8), (8, 32), (6, 64)])
def test_pixels_of_different_sizes(height: int, width: int) -> None:
    """Rows that grow by up to 2^20 and fall again: what a result is off by is little beside the products in it."""
    network = exported((64, height, width), convolution(64, 64))
    rng = np.random.default_rng(0)
    grown = 2.0 ** rng.integers(0, 20, (3, 1, height, width)) * 2.0 ** rng.integers(-8, 1, (3, 64, 1, 1))
    grown[0] = 2.0 ** np.linspace(-10, 10, height)[:, None]
    x = (randn(3, 64, height, width) * grown).astype(np.float32)
    factors = (
        torch.from_numpy(abs(v).astype(float)) for v in (x, *map(network.steps[0].weights.get, ("weight", "bias")))
    )
    bound = torch.conv2d(*factors, padding=1).numpy()
    error = float((abs(forward(network, x, "float32") - reference(network, x)) / bound).max())
    assert error < TOLERANCE, f"error {error:.3g} of the products' sizes, expected less than {TOLERANCE:.3g}"


def test_what_is_not_finite_stays_in_its_image() -> None:
    network = exported((64, 9, 16), convolution(64, 64))
    x = randn(7, 64, 9, 16)
    expected = reference(network, x)
    x[2, 5, 4, 3], x[3, 1, 0, 0] = np.nan, np.inf
    found = forward(network, x, "float32")
    for image, right, ok in zip(found, expected, np.isfinite(x).all(axis=(1, 2, 3)), strict=True):
        if ok:
            expect_close(image, right, TOLERANCE)
        else:
            assert not np.isfinite(image).all()


def test_a_solver_through_it() -> None:
    layers = [convolution(3, 64), nn.ReLU(), convolution(64, 64), nn.ReLU(), nn.MaxPool2d(2)]
    edge = exported((3, 16, 16), *layers, convolution(64, 128), nn.ReLU())
    assert kernels_of(edge, back=True).count(NATIVE) == 2
    check_solver(recipe_for(edge, steps=2))


@pytest.mark.parametrize(
    ("inputs", "shape", "layer"),
    [
        (64, (4, 12), convolution(64, 64)),  # does not divide a band
        (64, (2, 128), convolution(64, 64)),
        (96, (4, 16), convolution(96, 64)),
        (64, (4, 16), convolution(64, 60)),
        (64, (4, 16), convolution(64, 72)),  # most of a launch would be empty
        (64, (4, 16), nn.Conv2d(64, 64, 3)),
        (64, (4, 16), nn.Conv2d(64, 64, 3, 2, 1)),
        (64, (4, 16), nn.Conv2d(64, 64, 1)),
        (64, (4, 16), nn.ConvTranspose2d(64, 64, 4, 2, 1)),
    ],
)
def test_other_layers_take_other_kernels(inputs: int, shape: tuple[int, int], layer: nn.Module) -> None:
    assert kernels_of(exported((inputs, *shape), layer, nn.ReLU())) == [OTHER]


def test_other_precisions_and_few_images_take_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    network = exported((64, 4, 16), convolution(64, 64))
    assert kernels_of(network, "tf32") == [OTHER]
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(_cuda.HalvedLayer, "run", None)
    check(network, randn(3, 64, 4, 16))


def test_a_layer_that_does_not_fit_is_refused() -> None:
    layer = _cuda.HalvedLayer()
    assert not layer.fits()
    with pytest.raises(ValueError, match="no kernel for these layers"):
        layer.run(-1, 0)
