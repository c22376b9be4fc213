"""What several test files share: networks from the ops' own cases, and comparisons with the float64 reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

import fastinv
from fastinv import _core
from fastinv.backends.cpu import CpuBackend
from fastinv.backends.torch import as_module
from fastinv.inverters import RMLE
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.base import Case
from fastinv.ops.linear import Linear
from fastinv.ops.reshape import Reshape

ISAS = [name for name, runnable in _core.isas() if runnable]


def network_of(case: Case, activation: Activation = IDENTITY, seed: int = 0) -> Network:
    """The case's op on random weights of unit gain.

    The network's input is the case's first input; a dense layer of the flat input makes each further one.
    """
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        fan_in = max(1, math.prod(shape[1:]))
        return rng.standard_normal(shape) / math.sqrt(fan_in)

    steps: list[Step] = []
    inputs = [0]
    size = math.prod(case.inputs[0])
    for shape in case.inputs[1:]:
        steps.append(Step(Reshape((size,)), (0,)))
        count = math.prod(shape)
        weights = {"weight": draw((count, size)), "bias": rng.standard_normal(count)}
        steps.append(Step(Linear(), (len(steps),), weights))
        steps.append(Step(Reshape(shape), (len(steps),)))
        inputs.append(len(steps))
    weights = {key: draw(shape) for key, shape in case.weights.items()}
    steps.append(Step(case.op, tuple(inputs), weights, activation))
    return Network(case.inputs[0], tuple(dataclasses.replace(s, source=f"s{k}") for k, s in enumerate(steps)))


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def reference(network: Network, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return as_module(network, torch.float64)(torch.from_numpy(x).double()).numpy()


def run(network: Network, x: np.ndarray, threads: int = 1) -> np.ndarray:
    return fastinv.compile(network, backend="cpu", threads=threads)(x)


def gradient(network: Network, z: np.ndarray, features: np.ndarray) -> np.ndarray:
    """∇_z Σ(network(z) − v)² by one step of plain gradient descent with a step size of 1."""
    recipe = RMLE(
        network,
        network.input_shape,
        steps=1,
        lr=1.0,
        tv_weight=0.0,
        optimizer="sgd",
        clamp=None,
    )
    after, report = CpuBackend().compile_solver(recipe, "float32", 1).solve(features, z)
    assert (report.steps == 1).all()
    return z - after


def reference_gradient(network: Network, z: np.ndarray, features: np.ndarray) -> np.ndarray:
    start = torch.from_numpy(z).double().requires_grad_(True)
    residual = as_module(network, torch.float64)(start) - torch.from_numpy(features).double()
    (grad,) = torch.autograd.grad(residual.square().sum(), start)
    return grad.numpy()


def check_gradient(network: Network) -> None:
    if len(network.input_shape) != 3:  # solvers work on images
        size = int(np.prod(network.input_shape))
        steps = tuple(dataclasses.replace(s, inputs=tuple(i + 1 for i in s.inputs)) for s in network.steps)
        network = Network((1, 1, size), (Step(Reshape(network.input_shape), (0,)), *steps))
    z = randn(2, *network.input_shape, seed=1)
    features = (reference(network, z) + 0.5 * randn(2, *network.output_shape, seed=2)).astype(np.float32)
    # Where the result barely matters the difference z − after would only show rounding: compare in units of z.
    expected = reference_gradient(network, z, features)
    error = np.linalg.norm(gradient(network, z, features) - expected)
    assert error <= 1e-4 * np.linalg.norm(expected) + 1e-6 * np.linalg.norm(z)
