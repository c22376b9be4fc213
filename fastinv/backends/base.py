"""What a backend is: a name, what it can do, and two compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fastinv.network import Network, Step
from fastinv.tensors import Source

if TYPE_CHECKING:
    from fastinv.inverters import RMLE

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Report:
    """What a recovery says of itself, one entry per image.

    Attributes:
        objective: the rMLE objective of the returned image, float64 [N]; None for an inverse network.
        steps: optimizer steps taken, int64 [N]; one (a forward pass) for an inverse network.
        converged: whether it was done before its steps were, bool [N]: by the tolerance, or with "lbfgs" and "exact"
            because nothing was left to do; always true for an inverse network.
        backend: the backend that ran.
        isa: its instruction set.
    """

    objective: npt.NDArray[np.float64] | None
    steps: npt.NDArray[np.int64]
    converged: npt.NDArray[np.bool_]
    backend: str
    isa: str


Progress = Callable[[int, int], object]  # told of the images done so far, and the steps of all images


class CompiledNetwork(Protocol):
    """A network ready to run: float32 [N, *input_shape] in, float32 [N, *output_shape] out.

    Attributes:
        batch_size: how many inputs it should be given at once; None: as many as occupy the threads for a moment.
    """

    isa: str
    precision: str
    batch_size: int | None

    def run(self, x: Array, out: Array) -> None:
        """Write the network's results for `x` (C-contiguous, any N >= 0) into `out` (C-contiguous)."""

    def run_plain(self, x: Any, most: int) -> Array | None:
        """The results, in new memory, for at most `most` features in a plain numpy array, not checked yet: on a small
        network the way through `run_raw` would take as long as the network itself.

        None where `x` is anything else than the backend can read where it lies, or holds NaN or Inf.
        """

    def run_raw(self, rows: Source, out: npt.NDArray[Any]) -> bool:
        """Like `run`, for features of any type and layout, not checked yet, and results as float32 or uint8 (see
        `fastinv.tensors.staged`).

        False where the backend cannot do that without a copy, or where the rows hold NaN or Inf; then nothing is
        promised about `out`.
        """

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        """The plan, as `fastinv.Engine.describe` gives it; with `measure` launches are timed, where that is done."""


Start = Callable[[Any], Any]  # from features [N, *output_shape] to starts [N, *input_shape]


class CompiledSolver(Protocol):
    """An rMLE loop ready to run.

    Attributes:
        batch_size: as of a network.
        stops_within: whether Ctrl-C stops it amid a batch, which then need not be short.
    """

    isa: str
    precision: str
    batch_size: int | None
    stops_within: bool

    def finite(self, features: Array) -> bool:
        """Whether none of the features, as `solve` takes them, is NaN or Inf."""

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        """Recover [N, *input_shape] normalised images z from float32 `features` [N, *output_shape].

        Args:
            init: the normalised start: [*input_shape], or one start for each image, [N, *input_shape].
            progress: told now and then, in the calling thread, how things stand.

        Returns:
            The images, the report, and whether it came to the end. A backend may give what it has after Ctrl-C, and
            False: the first images are solved or as far as they had come, the others, not begun, have taken 0 steps
            and have the objective NaN.
        """

    def solve_raw(
        self, rows: Source, init: Array | Start, out: npt.NDArray[Any], progress: Progress | None = None
    ) -> tuple[Report, bool] | None:
        """Like `solve`, for features of any type and layout, not checked yet, and pixels in [0, 1] as results, float32
        or uint8 (see `fastinv.tensors.staged`). `init` may make starts of features, both on the backend's own GPU.

        None where the backend cannot do that without a copy, or where the rows hold NaN or Inf; then nothing is
        promised about `out`.
        """


class Backend(Protocol):
    """One way to run networks. `BACKENDS` lists them, best first.

    Attributes:
        methods: the optimizers that its solvers have.
    """

    name: str
    methods: tuple[str, ...]

    def precisions(self, solver: bool, method: str = "adam") -> tuple[str, ...]:
        """What it computes networks in here, or solvers by an optimizer; the first is "auto"."""

    def available(self) -> str | None:
        """None when it can run here, else the reason why not and what to do."""

    def supports(self, step: Step) -> bool:
        """Whether it has a kernel for this step."""

    def compile(self, network: Network, precision: str, threads: int | None) -> CompiledNetwork:
        """The network, ready to run."""

    def compile_solver(self, recipe: RMLE, precision: str, threads: int | None) -> CompiledSolver:
        """The rMLE loop for the recipe's edge, ready to run."""
