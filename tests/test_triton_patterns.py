"""Some patterns of other people's models on the cuda backend, forward and back."""

from __future__ import annotations

import numpy as np
import pytest
from checks import exported, randn, reference, reference_gradient
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import expect_close, forward, gradient
from test_export_patterns import Function, Prelu, each

MODULES = {
    text: Function(each(text))
    for text in (
        "x[..., 1:-1, ::2]",
        "x[:, 1::2].flip(3)",
        "F.pad(x, (1, 2, 3, 0), mode='circular')",
        "F.pad(x, (2, 0, 1, 2), mode='reflect')",
        "torch.cat([F.relu(part) for part in x.split([1, 2, 3], 1)], 1)",
        "x.repeat(1, 2, 1, 1)",
        "x.sum((2, 3))",
        "x.amax(1, keepdim=True) * x.mean(1, keepdim=True)",
        "F.interpolate(x, size=(3, 7), mode='bicubic')",
        "F.hardswish(4 * x) + F.mish(x)",
        "torch.maximum(x.abs(), x**2)",
    )
} | {"prelu": Prelu(0.3, 0.0, 1.0, -0.5, 2.0, 0.25)}
SHAPE = (6, 5, 4)


@pytest.mark.parametrize("name", MODULES)
def test_forward_and_gradient(name: str) -> None:
    network = exported(SHAPE, nn.Conv2d(6, 6, 1), MODULES[name])
    x = randn(2, *SHAPE)
    expected = reference(network, x)
    expect_close(forward(network, x, "float32"), expected, 1e-5)
    features = (expected + randn(*expected.shape, seed=2)).astype(np.float32)
    expect_close(gradient(network, x, features), reference_gradient(network, x, features), 1e-4)
