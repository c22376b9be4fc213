"""Every op on the Triton path, forward and gradient, against the torch reference; without a GPU in the interpreter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from checks import network_of, randn, reference, reference_gradient, relative

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.backends.cuda_lowering import LOWERINGS, PRECISIONS, Lowering
from fastinv.backends.cuda_plan import Arena, Stage
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import KINDS, Activation
from fastinv.ops.reshape import Reshape
from interpreter import DEVICE, forward, gradient

CASES = [pytest.param(case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in op.cases()]
TOLERANCES = {"float32": 1e-5, "float16": 5e-3}  # relative, of one op; the promise for float32 is 1e-4


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, precision: str) -> None:
    network = network_of(case)
    x = randn(3, *network.input_shape)
    assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("case", CASES)
def test_gradient(case) -> None:
    network = network_of(case)
    z = randn(2, *network.input_shape, seed=1)
    features = (reference(network, z) + randn(2, *network.output_shape, seed=2)).astype(np.float32)
    expected = reference_gradient(network, z, features)
    found = gradient(network, z, features)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected) + 1e-6 * np.linalg.norm(z)
