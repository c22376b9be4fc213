"""The compiled CPU backend: engines and solvers of `fastinv._core`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import _core
from fastinv.backends.base import Array, Progress, Report, Start
from fastinv.backends.compiled import EXACT_METHODS, RAW_DTYPES, timed
from fastinv.backends.cpu_lowering import LOWERINGS, Lowering, current_isa
from fastinv.inverters import METHODS
from fastinv.network import Network, Step
from fastinv.tensors import Source

if TYPE_CHECKING:
    from fastinv.inverters import RMLE


class CpuBackend:
    """C++ kernels for AVX-512, AVX2 and any other processor; see `fastinv.backends.base.Backend`."""

    name = "cpu"
    methods: tuple[str, ...] = METHODS

    def precisions(self, solver: bool, method: str = "adam") -> tuple[str, ...]:
        if not _core.has_bfloat16(current_isa()) or (solver and method in EXACT_METHODS):
            return ("float32",)
        # A solver's first is not the fastest, but what is known to be exact.
        return ("float32", "bfloat16") if solver else ("bfloat16", "float32")

    def available(self) -> str | None:
        return None  # without the core the package itself does not load

    def supports(self, step: Step) -> bool:
        return step.op.name in LOWERINGS

    def compile(self, network: Network, precision: str, threads: int | None) -> CpuNetwork:
        return CpuNetwork(network, precision, threads)

    def compile_solver(self, recipe: RMLE, precision: str, threads: int | None) -> CpuSolver:
        return CpuSolver(recipe, threads, precision=precision)


NO_SCALE: Array = np.zeros(0, np.float32)  # of features that are not quantised


class CpuNetwork:
    """A network compiled for this machine's instruction set, or the one FASTINV_ISA names."""

    batch_size: int | None = None

    def __init__(self, network: Network, precision: str, threads: int | None) -> None:
        lowering = Lowering(network, bfloat16=precision == "bfloat16")
        self.precision = "bfloat16" if lowering.program.rounds else "float32"
        self._engine = _core.Engine(lowering.program, network.flops, _thread_count(threads))
        self._network = network
        self._launches = lowering.launches
        self.isa = self._engine.isa
        self.run_plain = self._engine.run_plain

    def run(self, x: Array, out: Array) -> None:
        self._engine.run(x, out)

    def run_raw(self, rows: Source, out: npt.NDArray[Any]) -> bool:
        data, scale, zero_point = rows.data, NO_SCALE, NO_SCALE
        if rows.scale is not None and rows.zero_point is not None:
            scale, zero_point = rows.scale.ravel(), rows.zero_point.ravel()
        plain = _plain(data)
        turned = not plain and data.ndim == 4 and max(len(scale), len(zero_point)) <= 1
        if turned:  # perhaps they lie channels last
            data = data.transpose(0, 2, 3, 1)
            plain = _plain(data)
        if rows.dtype not in RAW_DTYPES or not (plain and _plain(out)):
            return False
        return self._engine.run(data, out, scale, zero_point, turned)

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        plan = _describe(self._network, self._launches, self._engine)
        return timed(plan, self._engine.profile(PROFILE_SECONDS)) if measure else plan


class CpuSolver:
    """The rMLE loop, compiled: it returns to Python only when all images are done."""

    batch_size: int | None = None
    stops_within = True

    def __init__(self, recipe: RMLE, threads: int | None, block: int = 0, precision: str = "float32") -> None:
        lowering = Lowering(recipe.edge, differentiable=True, bfloat16=precision == "bfloat16")
        self.precision = "bfloat16" if lowering.program.rounds else "float32"
        low, high = ([], []) if recipe.bounds is None else (bound.tolist() for bound in recipe.bounds)
        self._solver = _core.Solver(
            lowering.program,
            optimizer=recipe.method,
            steps=recipe.steps,
            lr=recipe.lr,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
            momentum=recipe.momentum,
            cosine=recipe.schedule == "cosine",
            tv_weight=recipe.tv_weight,
            tv_beta=recipe.tv_beta,
            tolerance=recipe.tolerance,
            patience=recipe.patience,
            keep_best=recipe.keep == "best",
            low=low,
            high=high,
            threads=_thread_count(threads),
            block=block,
        )
        matrix = self._solver.hessian()
        if matrix.size > 0 and (inverse := _inverse(matrix)) is not None:
            self._solver.take_inverse(inverse)
        self.isa = self._solver.isa
        self.finite = self._solver.finite
        self.kernels = [kernel for kernel, _ in self._solver.describe()]
        self.images_abreast = self._solver.images_abreast  # that a thread takes through all steps together, or 0

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        z, objective, steps, converged, finished = self._solver.solve(features, init, progress)
        return z, Report(objective, steps, converged, CpuBackend.name, self.isa), finished

    def solve_raw(
        self, rows: Source, init: Array | Start, out: npt.NDArray[Any], progress: Progress | None = None
    ) -> tuple[Report, bool] | None:
        return None


def _inverse(matrix: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Of a symmetric matrix; None where there is none, or none that float32 could use."""
    most = 1e5  # a step by an inverse of this condition, rounded to float32, leaves less than 1% of the gradient
    matrix = matrix.astype(np.float64)
    try:
        inverse = np.linalg.inv((matrix + matrix.T) / 2)
    except np.linalg.LinAlgError:
        return None
    return inverse if np.linalg.norm(matrix, 1) * np.linalg.norm(inverse, 1) <= most else None


def _plain(array: npt.NDArray[Any]) -> bool:
    """Whether the core can read or write the array where it is."""
    flags = array.flags
    return flags.c_contiguous and flags.aligned and array.dtype.isnative


def _thread_count(threads: int | None) -> int:
    return _core.available_threads() if threads is None else threads


PROFILE_SECONDS = 0.1
LAYOUT_KERNELS = ("layout", "copy")  # launches that no step asked for


def _describe(network: Network, launches: Sequence[int], engine: _core.Engine) -> list[dict[str, Any]]:
    plan = []
    for index, (kernel, shares_image) in zip(launches, engine.describe(), strict=True):
        step, output = network.steps[index], network.shapes[index + 1]
        own = kernel not in LAYOUT_KERNELS
        row = {"step": index, "op": step.op.name if own else kernel, "kernel": kernel, "output": output}
        row["activation"] = step.activation.kind if own else "identity"
        row["split"] = "images, and within one" if shares_image else "images"
        row["images"] = engine.block
        row["strips"] = engine.strips
        row["flops"] = network.costs[index].flops if own else 0
        row["bytes"] = network.costs[index].bytes if own else 0
        plan.append(row | {"source": step.source})
    return plan
