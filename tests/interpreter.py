"""Runs networks by their Triton launches on CPU tensors, in the interpreter; on the GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from checks import randn, reference, relative
from hasten import hasten

from fastinv import tensors
from fastinv.attacks.rmle import rmle
from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.backends.cuda.nodes import places
from fastinv.backends.cuda.plan import Arena, Buffer, Ending, Stage
from fastinv.backends.cuda.solver import CudaSolver
from fastinv.backends.torch import as_module
from fastinv.inverters import RMLE
from fastinv.network import Network, Step
from fastinv.ops.linear import Linear

DEVICE = "cpu" if CudaBackend().available() else "cuda"

if DEVICE == "cpu":
    hasten()


def _stored(x: np.ndarray, dtype: str) -> torch.Tensor:
    """[N, *shape] in the layout of the kernels, [N, elements]."""
    inner = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    return torch.from_numpy(np.ascontiguousarray(inner).reshape(len(x), -1)).to(DEVICE, getattr(torch, dtype))


def _loaded(values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    return values.float().cpu().numpy()[:, places(shape).ravel()].reshape(-1, *shape)


def _run(stages: list[Stage], images: int, outside: dict[Buffer, torch.Tensor]) -> None:
    arena = Arena(stages, outside)
    memory = torch.full((arena.bytes(images),), 0xFF, dtype=torch.uint8, device=DEVICE)  # NaN in every type
    for launch in arena.bind(images, memory, outside):
        launch()


def expect_close(found: np.ndarray, expected: np.ndarray, within: float) -> None:
    """Fails with the error that there is: of a run on a GPU nothing but the message may be left."""
    error = relative(found, expected)
    assert error < within, f"relative error {error:.3g}, expected less than {within:.3g}"


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """As values are stored in this precision: what a kernel cannot see is not its error."""
    return torch.from_numpy(x).to(getattr(torch, PRECISIONS[precision].dtype)).float().numpy()


def forward(network: Network, x: np.ndarray, precision: str) -> np.ndarray:
    """What the launches make of x."""
    numbers = PRECISIONS[precision]
    to = Lowering(network, DEVICE, numbers)
    out = torch.full((len(x), to.output.elements), float("nan"), device=DEVICE, dtype=getattr(torch, numbers.dtype))
    inside = _stored(x, numbers.dtype)
    _run(to.forward(), len(x), {to.output: out} | {to.input: inside})
    return _loaded(inside if to.output is to.input else out, network.output_shape)


def gradient(network: Network, z: np.ndarray, features: np.ndarray, precision: str = "float32") -> np.ndarray:
    """∇_z Σ(network(z) − v)²."""
    from fastinv.kernels.triton.objective import launch_residual, tiles

    numbers = PRECISIONS[precision]
    to = Lowering(network, DEVICE, numbers, differentiable=True)
    inside, target = _stored(z, numbers.dtype), _stored(features, "float32")
    part = torch.full((len(z), tiles(to.output.elements)), float("nan"), device=DEVICE)

    def seed(into: Buffer, ending: Ending) -> Stage:
        def make(tensors):
            return launch_residual(tensors(to.output), target, tensors(into), part, ending.epilogue(tensors))

        return Stage(make, (to.output, *ending.reads), (into,))

    back, result = to.backward(seed)
    out = torch.full(inside.shape, float("nan"), device=DEVICE, dtype=inside.dtype)
    _run([*to.forward(), *back], len(z), {to.input: inside, result: out})
    return _loaded(out, network.input_shape)


def network_on(network: Network, precision: str = "float32", most: int = 64) -> CudaNetwork:
    """The whole path of the GPU backend, on `DEVICE`."""
    return CudaNetwork(network, precision, torch.device(DEVICE), most)


def check_features(network: Network, dtype: str) -> None:
    """Features [3, 2, 6, 8] of this type: quantised ones with scale and zero point, float32 ones in another layout."""
    values = randn(3, 2, 6, 8)
    options = {}
    x = torch.from_numpy(values).to(torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    if dtype in ("uint8", "int8"):
        x = torch.from_numpy((values * 20 + 60).astype(dtype))
        options = {"scale": [0.05, 0.1], "zero_point": [60, 50]}
    elif dtype == "float32":
        x = torch.from_numpy(np.ascontiguousarray(values[::-1])).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    source = tensors.source(x, network.input_shape, **options)
    out = np.empty((3, *network.output_shape), np.float32)
    assert network_on(network, most=2).run_raw(source, out)
    assert relative(out, reference(network, source.chunk(0, 3))) < 1e-5


def solver_on(recipe: RMLE, precision: str = "float32", most: int = 64) -> CudaSolver:
    return CudaSolver(recipe, precision, torch.device(DEVICE), most=most)


def recipe_for(edge: Network, **options) -> RMLE:
    start = np.random.default_rng(0).random(edge.input_shape, np.float32)
    return RMLE(edge, edge.input_shape, **{"steps": 2, "init": start, "clamp": None, **options})


def solve_by_definition(recipe: RMLE, features: np.ndarray, start: np.ndarray):
    options = recipe.recipe()
    options["start"] = torch.from_numpy(start).double()
    module = as_module(recipe.edge, torch.float64)
    z, report = rmle(module, torch.from_numpy(features).double(), **options)
    return z.numpy(), report


def check_solver(recipe: RMLE, count: int = 2, most: int = 64, within: float = 1e-4) -> None:
    start = randn(count, *recipe.input_shape, seed=3)
    features = reference(recipe.edge, randn(count, *recipe.input_shape, seed=4)).astype(np.float32)
    expected, told = solve_by_definition(recipe, features, start)
    z, report, finished = solver_on(recipe, most=most).solve(features, start)
    assert finished
    assert relative(z, expected) < within
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-4)
    np.testing.assert_array_equal(report.steps, told.steps)
    np.testing.assert_array_equal(report.converged, told.converged)


def _probe() -> None:
    """Triton 3.6 to 3.8 may meet a numpy (2.4 and later) whose scalars their interpreter cannot take."""
    from triton.runtime.errors import InterpreterError

    identity = Network((2,), (Step(Linear(), (0,), {"weight": np.eye(2), "bias": np.zeros(2)}),))
    try:
        forward(identity, np.ones((1, 2), np.float32), "float32")
    except InterpreterError as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip(
            f"Triton {triton.__version__} cannot interpret with numpy {np.__version__}: take Triton 3.9 or numpy 2.3",
            allow_module_level=True,
        )


_probe()
