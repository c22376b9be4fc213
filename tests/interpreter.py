"""Runs networks by their Triton launches on CPU tensors, in the interpreter; on the GPU where there is one."""

from __future__ import annotations

import numpy as np
import torch

from fastinv.backends.cuda import CudaBackend, CudaNetwork
from fastinv.backends.cuda_lowering import PRECISIONS, Lowering
from fastinv.backends.cuda_nodes import places
from fastinv.backends.cuda_plan import Arena, Buffer, Ending, Stage
from fastinv.backends.cuda_solver import CudaSolver
from fastinv.inverters import RMLE
from fastinv.network import Network

DEVICE = "cpu" if CudaBackend().available() else "cuda"


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
    from fastinv.kernels.triton.rmle import launch_residual, tiles

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


def solver_on(recipe: RMLE, precision: str = "float32", most: int = 64) -> CudaSolver:
    return CudaSolver(recipe, precision, torch.device(DEVICE), most=most)
