"""The GPU backend: Triton kernels of `fastinv.kernels`, launched as CUDA graphs.

What does the work is imported when it is asked for: where there is no GPU, listing the backend costs nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from fastinv.backends.compiled import EXACT_METHODS
from fastinv.backends.cuda.device import missing, room_for
from fastinv.inverters import METHODS
from fastinv.network import Network, Step

if TYPE_CHECKING:
    import torch

    from fastinv.backends.cuda.network import CudaNetwork
    from fastinv.backends.cuda.solver import CudaSolver
    from fastinv.backends.cuda.tuning import Measured
    from fastinv.inverters import RMLE


class CudaBackend:
    """NVIDIA GPUs from Ampere on; see `fastinv.backends.base.Backend`."""

    methods: tuple[str, ...] = METHODS

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.name = f"cuda:{index}" if index else "cuda"

    def on(self, index: int) -> CudaBackend:
        """The same on another GPU."""
        return CudaBackend(index)

    def precisions(self, solver: bool, method: str = "adam") -> tuple[str, ...]:
        if solver and method in EXACT_METHODS:
            return ("float32", "tf32")
        # Gradients may leave float16's range; and a solver's first is not the fastest, but what is known to be exact.
        return ("float32", "tf32", "bfloat16") if solver else ("bfloat16", "float16", "tf32", "float32")

    def available(self) -> str | None:
        return missing(self.index)

    def supports(self, step: Step) -> bool:
        from fastinv.backends.cuda.ops import LOWERINGS

        return step.op.name in LOWERINGS

    def compile(self, network: Network, precision: str, threads: int | None) -> CudaNetwork:
        from fastinv.backends.cuda.network import CudaNetwork

        with room_for_weights():
            return CudaNetwork(network, precision, self._device())

    def compile_solver(self, recipe: RMLE, precision: str, threads: int | None) -> CudaSolver:
        from fastinv.backends.cuda.solver import CudaSolver

        with room_for_weights():
            return CudaSolver(recipe, precision, self._device(), self.name)

    def tune(self, network: Network, precision: str, solver: bool) -> Measured:
        """Measure the tiles of a network's matrix products, or of an edge's both ways, and keep them for later runs.

        Returns:
            What was found; what was before is kept, too.

        Raises:
            BackendError: the file cannot be written.
        """
        from fastinv.backends.cuda.tuning import tune

        return tune(network, precision, self._device(), solver)

    def _device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.index)


def room_for_weights() -> AbstractContextManager[None]:
    """What is allocated within is a compiled network's."""
    return room_for("the network's weights on the GPU", "free memory there, or take another GPU or backend='cpu'")
