"""What several test files share: random inputs, and comparisons with the float64 reference."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

import fastinv
from fastinv import _core
from fastinv.backends.cpu import CpuSolver
from fastinv.backends.torch import as_module
from fastinv.benchmark import network_of
from fastinv.export import export
from fastinv.inverters import RMLE
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import KINDS, STEEP, Activation
from fastinv.ops.affine import Affine
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.reshape import Reshape

__all__ = [
    "ACTIVATIONS",
    "CASES",
    "ISAS",
    "InterruptAt",
    "check_gradient",
    "exported",
    "kernels",
    "network_of",
    "randn",
    "reference",
    "relative",
    "run",
    "steep_examples",
]

CASES = [pytest.param(case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in op.cases()]
ACTIVATIONS = [  # but for the steep ones, which are no check of what computes their input
    Activation(kind, *parameters)
    for kind, parameters in {
        **dict.fromkeys((kind for kind in KINDS if kind not in STEEP), (0.0, 0.0)),
        "leaky_relu": (0.1, 0.0),
        "softplus": (1.5, 3.0),
        "hardtanh": (0.0, 6.0),
        "clamp": (-0.3, 0.4),
        "elu": (1.5, 0.7),
    }.items()
]
ISAS = [name for name, runnable in _core.isas() if runnable]


class InterruptAt:
    """A progress function that interrupts, as Ctrl-C does, at the call of this number."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.told: list[tuple[int, int]] = []

    def __call__(self, images: int, steps: int) -> None:
        self.told.append((images, steps))
        if len(self.told) == self.calls:
            raise KeyboardInterrupt


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


_exported: dict[bytes, Network] = {}


def exported(shape: tuple[int, ...], *layers: torch.nn.Module) -> Network:
    """The layers as a network for inputs of this shape. Of PyTorch's own, whose attributes and weights say all of them,
    once: of kernels' tests, each on every instruction set, tracing took most of the time."""
    model = torch.nn.Sequential(*layers).eval()
    parts = list(model.named_modules())
    if not all(type(part).__module__.startswith("torch.nn.modules.") for _, part in parts):
        return export(model, torch.zeros(2, *shape))
    own = [(name, type(part), {k: v for k, v in vars(part).items() if not k.startswith("_")}) for name, part in parts]
    content = hashlib.sha256(repr((shape, own)).encode())
    for value in model.state_dict().values():
        content.update(value.contiguous().numpy())
    key = content.digest()
    if key not in _exported:
        _exported[key] = export(model, torch.zeros(2, *shape))
    return _exported[key]


def steep(kind: str, *ops: Step) -> Network:
    """`ops` on images [6, 5, 7] of some 1, the last one with this activation."""
    scale, shift = (np.full((1, 1, 1), value, np.float32) for value in (0.1, 1.0))
    first = Step(Affine(), (0,), {"scale": scale, "shift": shift}, Activation() if ops else Activation(kind))
    steps = [first, *(dataclasses.replace(step, inputs=(i + 1,)) for i, step in enumerate(ops))]
    steps[-1] = dataclasses.replace(steps[-1], activation=Activation(kind))
    return Network((6, 5, 7), tuple(steps))


def steep_examples(kind: str) -> dict[str, Network]:
    """After a constant map, an average of neighbours, and as a step by itself."""
    weight = np.random.default_rng(0).uniform(0.01, 0.02, (16, 6, 3, 3)).astype(np.float32)
    average = Step(Conv2d(), (0,), {"weight": weight, "bias": np.full(16, 0.2, np.float32)})
    return {
        "affine": steep(kind),
        "conv2d": steep(kind, average),
        "alone": steep("identity", Step(Activation(kind), (0,))),
    }


def kernels(network: Network, precision: str = "float32") -> list[str]:
    """What the cpu backend runs, launch by launch."""
    return [row["kernel"] for row in fastinv.compile(network, backend="cpu", precision=precision).describe()]


def reference(network: Network, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return as_module(network, torch.float64)(torch.from_numpy(x).double()).numpy()


def run(network: Network, x: np.ndarray, threads: int = 1) -> np.ndarray:
    return fastinv.compile(network, backend="cpu", threads=threads)(x)


def gradient_solver(network: Network, block: int = 0, precision: str = "float32") -> CpuSolver:
    """One step of plain gradient descent on Σ(network(z) − v)², with a step size of 1, so many images at once."""
    recipe = RMLE(network, network.input_shape, steps=1, lr=1.0, tv_weight=0.0, optimizer="sgd", clamp=None)
    return CpuSolver(recipe, 1, block, precision)


def gradient(solver: CpuSolver, z: np.ndarray, features: np.ndarray) -> np.ndarray:
    after, report, _ = solver.solve(features, z)
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
    z = randn(3, *network.input_shape, seed=1)
    features = (reference(network, z) + 0.5 * randn(3, *network.output_shape, seed=2)).astype(np.float32)
    # Where the result barely matters the difference z − after would only show rounding: compare in units of z.
    expected = reference_gradient(network, z, features)
    found = gradient(gradient_solver(network, block=1), z, features)
    np.testing.assert_array_equal(gradient(gradient_solver(network, block=2), z, features), found)
    many = gradient_solver(network)
    if images := many.images_abreast:
        again = gradient(many, *(np.resize(array, (images, *array.shape[1:])) for array in (z, features)))
        np.testing.assert_array_equal(again, np.resize(found, again.shape))
    error = np.linalg.norm(found - expected)
    assert error <= 1e-4 * np.linalg.norm(expected) + 1e-6 * np.linalg.norm(z)
