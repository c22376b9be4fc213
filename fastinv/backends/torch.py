"""The reference backend: runs a network with torch ops. It is the definition that every other backend is held to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.base import Array, Progress, Report, Start
from fastinv.inverters import METHODS
from fastinv.network import Network, Step
from fastinv.tensors import Source, finite

if TYPE_CHECKING:
    import torch

    from fastinv.inverters import RMLE

CHUNK = 256  # images run at once at most
MAX_VALUES = 2**26  # elements of all values of a chunk: bounds the memory of the activations


class TorchBackend:
    """Plain PyTorch on the CPU; see `fastinv.backends.base.Backend`. float64 is for tests and comparisons."""

    name = "torch"
    methods: tuple[str, ...] = METHODS

    def precisions(self, solver: bool, method: str = "adam") -> tuple[str, ...]:
        return ("float32", "bfloat16", "float64")

    def available(self) -> str | None:
        try:
            import torch  # noqa: F401 - whether it loads is the question
        except ImportError as error:
            return f"PyTorch cannot be imported ({error}); install it with `pip install 'torch>=2.11,<2.14'`"
        return None

    def supports(self, step: Step) -> bool:
        return True

    def compile(self, network: Network, precision: str, threads: int | None) -> TorchNetwork:
        return TorchNetwork(network, precision, threads)

    def compile_solver(self, recipe: RMLE, precision: str, threads: int | None) -> TorchSolver:
        return TorchSolver(recipe, precision, threads)


class TorchNetwork:
    """A network as a torch module."""

    isa = "torch"
    batch_size: int | None = None

    def __init__(self, network: Network, precision: str, threads: int | None) -> None:
        import torch

        self.precision = precision
        self._dtype: torch.dtype = getattr(torch, precision)
        self._module = as_module(network, self._dtype)
        self._network = network
        self._threads = threads
        self._chunk = max(1, min(CHUNK, MAX_VALUES // sum(map(math.prod, network.shapes))))

    def run(self, x: Array, out: Array) -> None:
        import torch

        with torch.no_grad(), torch_threads(self._threads):
            for start in range(0, len(x), self._chunk):
                part = np.array(x[start : start + self._chunk])  # torch refuses read-only memory
                y = self._module(torch.from_numpy(part).to(self._dtype))
                out[start : start + self._chunk] = y.float().numpy()

    def run_plain(self, x: Any, most: int) -> Array | None:
        return None

    def run_raw(self, rows: Source, out: npt.NDArray[Any]) -> bool:
        return False

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        network = self._network
        return [
            {
                "step": index,
                "op": step.op.name,
                "kernel": "torch",
                "activation": step.activation.kind,
                "output": network.shapes[index + 1],
                "flops": network.costs[index].flops,
                "bytes": network.costs[index].bytes,
                "source": step.source,
            }
            for index, step in enumerate(network.steps)
        ]


class TorchSolver:
    """rMLE as `fastinv.attacks.rmle` defines it."""

    isa = "torch"
    batch_size: int | None = None
    stops_within = False
    finite = staticmethod(finite)

    def __init__(self, recipe: RMLE, precision: str, threads: int | None) -> None:
        import torch

        self.precision = precision
        # Solvers keep their state in float32 at least: Adam's steps are below bfloat16's resolution.
        self._dtype = torch.float64 if precision == "float64" else torch.float32
        self._edge = as_module(recipe.edge, self._dtype)
        self._recipe = recipe
        self._threads = threads

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        import torch

        from fastinv.attacks.rmle import rmle

        recipe = self._recipe
        with torch_threads(self._threads):
            z, report = rmle(
                self._edge,
                torch.tensor(features, dtype=self._dtype),
                recipe.input_shape,
                start=torch.tensor(init, dtype=self._dtype),
                mean=recipe.mean,
                std=recipe.std,
                steps=recipe.steps,
                lr=recipe.lr,
                tv_weight=recipe.tv_weight,
                tv_beta=recipe.tv_beta,
                optimizer=recipe.method,
                clamp=recipe.clamp,
                keep=recipe.keep,
                tolerance=recipe.tolerance,
                patience=recipe.patience,
                betas=recipe.betas,
                eps=recipe.eps,
                momentum=recipe.momentum,
                schedule=recipe.schedule,
            )
        return z.float().numpy(), report, True

    def solve_raw(
        self, rows: Source, init: Array | Start, out: npt.NDArray[Any], progress: Progress | None = None
    ) -> tuple[Report, bool] | None:
        return None


def as_module(network: Network, dtype: torch.dtype) -> torch.nn.Module:
    """The network as a differentiable torch module whose weights are buffers of this dtype."""
    import torch

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index, step in enumerate(network.steps):
                for key, value in step.weights.items():
                    self.register_buffer(f"{key}_{index}", torch.tensor(value, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values = [x]
            for index, step in enumerate(network.steps):
                weights = {key: getattr(self, f"{key}_{index}") for key in step.weights}
                y = step.op.reference([values[i] for i in step.inputs], weights)
                values.append(step.activation.reference([y], {}))
            return values[-1]

    return Module().eval()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run torch with `count` threads; its setting is the process's, so put it back."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
