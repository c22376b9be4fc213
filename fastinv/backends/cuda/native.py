"""Launches of the kernels in CUDA C++ (`kernels/cuda`), where they are built and run: for shallow edges."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.device import on_device, shared_memory
from fastinv.backends.cuda.pooled import FIRST, SECOND, TAPS, pooled_fields
from fastinv.backends.cuda.quadratic import QuadraticForm
from fastinv.errors import BackendError
from fastinv.network import Network
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.max_pool2d import MaxPool2d

if TYPE_CHECKING:
    import torch

MOST_STEPS = 1000  # of a launch: then Ctrl-C is heard
HOST = -1  # the device that stands in for a GPU; −2 is the same with threads in another order
OPTIMIZERS = ("adam", "amsgrad", "sgd")  # the order of Optimizer in kernels/cuda/descent.h


def extension() -> Any:
    """`fastinv._cuda`, or None where it is not built; where it cannot be loaded, that is told."""
    try:
        return importlib.import_module("fastinv._cuda")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        warnings.warn(
            f"fastinv._cuda is built, but cannot be loaded ({error!s:.200}): shallow edges go through Triton, step by "
            "step; install fastinv anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def usable_on(device: torch.device) -> bool:
    """Whether `fastinv._cuda` is built, and its kernels run on a device, or what stands in for one."""
    return extension() is not None and (device.type != "cuda" or _run_on_gpu(device))


@functools.cache
def _run_on_gpu(device: torch.device) -> bool:
    import torch

    try:
        with on_device(device):
            extension().check_device(torch.cuda.current_device())  # torch.device("cuda") has no index
    except RuntimeError as error:
        warnings.warn(
            f"fastinv._cuda is built, but not for the driver of {device} ({error!s:.200}): all goes through Triton; "
            "install a newer driver, or build fastinv with an older CUDA toolkit",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


@dataclass(frozen=True, eq=False)
class Problem:
    """An edge as the kernels take it.

    Attributes:
        kind: a class of `fastinv._cuda`.
        given: its field for what is given for each image: the gradient at 0, or the features.
        arrays, numbers: its other fields.
        least: images for each multiprocessor, below which it is not worth while.
    """

    kind: str
    given: str
    arrays: Mapping[str, npt.NDArray[Any]]
    numbers: Mapping[str, float]
    least: int = 0


def quadratic_problem(form: QuadraticForm) -> Problem:
    """One convolution, by AᵀA: an image a block."""
    kinds_y, kinds_x, down, across, channels, _ = form.weight.shape
    ordered = form.weight.transpose(0, 1, 3, 4, 2, 5).reshape(kinds_y, kinds_x, across, channels, down * channels)
    arrays = {"weight": _in_fours(ordered), "row_kind": form.row_kind, "column_kind": form.column_kind}
    numbers = {"taps_y": down, "taps_x": across, "row_kinds": kinds_y, "column_kinds": kinds_x}
    return Problem("QuadraticForm", "constant", arrays, numbers)


def pooled_problem(edge: Network) -> Problem | None:
    """Convolution, ReLU, max pool, convolution, ReLU, as in MNIST's ReLU2; None for anything else."""
    conv, pool, relu = Conv2d(), MaxPool2d(), Activation("relu")
    steps = [(step.op, step.activation, step.inputs) for step in edge.steps]
    if steps != [(conv, relu, (0,)), (pool, IDENTITY, (1,)), (conv, relu, (2,))]:
        return None
    (first, first_bias), (second, second_bias) = (
        (edge.steps[i].weights["weight"], edge.steps[i].weights["bias"]) for i in (0, 2)
    )
    if (first.shape, second.shape) != ((FIRST, 1, TAPS, TAPS), (SECOND, FIRST, TAPS, TAPS)):
        return None
    arrays, numbers = pooled_fields(first, first_bias, second, second_bias)
    return Problem("PooledLayers", "target", arrays, numbers)


def _in_fours(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The last axis rounded up to a multiple of 4."""
    return np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -weight.shape[-1] % 4)])


class OnChipDescent:
    """Gradient descent with everything on chip; a launch takes `MOST_STEPS` steps, or those that are left.

    Args:
        problems: one and the same, as different kernels take it: the first that fits the images solves them.
        rule: the recipe, a `fastinv.kernels.triton.descent.Descent`.
    """

    def __init__(self, problems: Sequence[Problem], rule: Any, device: torch.device) -> None:
        import torch

        self._device = device
        self._problems = [
            (problem, {n: torch.from_numpy(np.array(v, order="C")).to(device) for n, v in problem.arrays.items()})
            for problem in problems
        ]
        self._constants = {"rates": rule.rates, "low": rule.low, "high": rule.high}
        height, width, channels = rule.variation.shape
        self._numbers: dict[str, int | float] = {
            "height": height,
            "width": width,
            "channels": channels,
            "steps": rule.steps,
            "most": MOST_STEPS,
            "optimizer": OPTIMIZERS.index(rule.optimizer),
            "rest1": 1 - rule.beta1,
            "beta2": rule.beta2,
            "rest2": 1 - rule.beta2,
            "eps": rule.eps,
            "momentum": rule.momentum,
            "tv_weight": rule.variation.weight if rule.sloped else 0.0,
            "half_beta": rule.variation.beta / 2,
            "root": rule.variation.constants["ROOT"],
            "room": shared_memory(device),
        }

    @property
    def fits(self) -> bool:
        """Whether there is a kernel for it, built."""
        return usable_on(self._device) and self._filled({}, None, 0) is not None

    @property
    def launches(self) -> int:
        """That take all steps."""
        return -(-int(self._numbers["steps"]) // MOST_STEPS)

    def launch(self, z: torch.Tensor, given: torch.Tensor, state: Mapping[str, torch.Tensor]) -> Any:
        """Take steps from z, in place.

        Args:
            z: float32 [N, H·W·C].
            given: float32 [N, elements], as the problem says.
            state: first, second, third, running, taken.

        Returns:
            What launches them; it raises `BackendError` where that fails.
        """
        tensors = {"z": z, "largest": state["third"]}
        tensors |= {name: state[name] for name in ("first", "second", "running", "taken")}
        descent, problem = self._filled(tensors, given, len(z))
        return launching(functools.partial(problem.run, descent), z.device)

    def _filled(self, tensors: Mapping[str, Any], given: Any, images: int) -> Any:
        """A `Descent` and the problem for so many images; None where there is no kernel for it."""
        from fastinv.kernels.triton.launch import processors

        module = extension()
        descent = module.Descent()
        set_fields(descent, {**self._constants, **tensors}, {**self._numbers, "images": images})
        for problem, arrays in self._problems:
            filled = getattr(module, problem.kind)()
            set_fields(filled, {**arrays, problem.given: given}, problem.numbers)
            if images >= problem.least * processors(self._device) and filled.fits(descent):
                return descent, filled
        return None


def launching(run: Callable[[int, int], None], device: torch.device) -> Callable[[], None]:
    """run(device, stream) on the current stream of a device, or for what stands in for one on the host (`HOST`).

    Raises:
        BackendError: when it is called, and fails.
    """

    def launch() -> None:
        import torch

        on_gpu = device.type == "cuda"
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        try:
            run(device.index if on_gpu else HOST, stream)
        except RuntimeError as error:
            raise BackendError(f"backend 'cuda': {error}") from error

    return launch


def set_fields(struct: Any, tensors: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """Addresses and numbers as fields; 0 for what is None."""
    for name, tensor in tensors.items():
        setattr(struct, name, 0 if tensor is None else tensor.data_ptr())
    for name, number in numbers.items():
        setattr(struct, name, number)
