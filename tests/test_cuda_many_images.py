"""The kernels of layers in CUDA C++ with more images than a launch has warpgroups, each of which takes several.

What becomes of an image does not depend on which of them takes it, and after which other: copies give the same, bit
for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")

from fastinv.kernels.triton import launch
from interpreter import DEVICE, expect_close, network_on, rounded

from fastinv.backends.cuda import layers as cuda_layers

if DEVICE == "cuda" and not cuda_layers.runs_on(torch.device("cuda", 0)):
    pytest.skip("this GPU has other tensor cores", allow_module_level=True)

IMAGES = 3
COPIES = 400 if DEVICE == "cuda" else 3  # the stand-in on the host has two blocks
SIZES = np.float32([1, 1e-3, 1e3])[:, None, None, None]
TOLERANCES = {"float16": 1e-3, "float32": 2e-6}
WHOLE = nn.MaxPool2d(1)  # the layer before does not write the results where the user wants them


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


@pytest.mark.parametrize(
    ("shape", "layers", "precision", "kernel"),
    [
        (
            (128, 16, 16),
            [nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ReLU(), convolution(64, 3)],
            "float16",
            "Tail",
        ),
        ((64, 4, 16), [nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU(), convolution(64, 3)], "float16", "Tail"),
        ((64, 1, 64), [nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU(), convolution(64, 3)], "float16", "Tail"),
        ((64, 8, 8), [convolution(64, 64), WHOLE], "float16", "WindowConvolution"),
        ((128, 8, 16), [convolution(128, 64), WHOLE], "float16", "WindowConvolution"),
        ((64, 2, 32), [nn.ConvTranspose2d(64, 64, 4, 2, 1), WHOLE], "float16", "WindowConvolution"),
        ((128, 8, 8), [nn.ConvTranspose2d(128, 128, 3, 2, 1, 1), WHOLE], "float16", "WindowConvolution"),
        ((64, 9, 8), [convolution(64, 64), WHOLE], "float32", "HalvedConvolution"),
        ((128, 8, 16), [convolution(128, 64), WHOLE], "float32", "HalvedConvolution"),
        ((64, 5, 32), [convolution(64, 64), WHOLE], "float32", "HalvedConvolution"),
        ((64, 3, 64), [convolution(64, 64), WHOLE], "float32", "HalvedConvolution"),
    ],
)
def test_copies_give_the_same(
    shape: tuple[int, ...],
    layers: list[nn.Module],
    precision: str,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: 1)  # no images are few
    network = exported(shape, *layers)
    compiled = network_on(network, precision, most=IMAGES * COPIES)
    assert compiled.describe()[0]["kernel"] == kernel
    x = randn(IMAGES, *shape) if precision == "float16" else SIZES * randn(IMAGES, *shape)
    x = rounded(x, precision)
    there = torch.from_numpy(np.tile(x, (COPIES, 1, 1, 1))).to(DEVICE, getattr(torch, precision))
    found = compiled.run_there(there, "float32").cpu().numpy()
    for copy in np.split(found, COPIES):
        np.testing.assert_array_equal(copy, found[:IMAGES])
    for image, expected in zip(found, reference(network, x), strict=False):
        expect_close(image, expected, TOLERANCES[precision])
