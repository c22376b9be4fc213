"""Launches of the kernels in CUDA C++ (`kernels/cuda`), where they are built: for shallow edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda_quadratic import QuadraticForm
from fastinv.errors import BackendError

if TYPE_CHECKING:
    import torch

    from fastinv import _cuda

MOST_STEPS = 1000  # of a launch: then Ctrl-C is heard
OPTIMIZERS = ("adam", "amsgrad", "sgd")  # the order of Optimizer in kernels/cuda/descent.h


def extension() -> Any:
    """`fastinv._cuda`, or None where it is not built."""
    try:
        from fastinv import _cuda
    except ImportError:
        return None
    return _cuda


class OnChipDescent:
    """Gradient descent with everything on chip; a launch takes `MOST_STEPS` steps, or those that are left.

    Args:
        form: the objective's quadratic form.
        rule: the recipe, a `fastinv.kernels.triton.descent.Descent`.
    """

    def __init__(self, form: QuadraticForm, rule: Any, device: torch.device) -> None:
        import torch

        weight = _packed(form)
        self._tensors = {
            "weight": torch.from_numpy(weight).to(device),
            "row_kind": torch.from_numpy(form.row_kind).to(device),
            "column_kind": torch.from_numpy(form.column_kind).to(device),
            "rates": rule.rates,
            "low": rule.low,
            "high": rule.high,
        }
        height, width, channels = form.shape
        self._numbers: dict[str, int | float] = {
            "height": height,
            "width": width,
            "channels": channels,
            "taps_y": form.weight.shape[2],
            "taps_x": form.weight.shape[3],
            "row_kinds": form.weight.shape[0],
            "column_kinds": form.weight.shape[1],
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
        }

    @property
    def fits(self) -> bool:
        """Whether there is a kernel for it, built."""
        return extension() is not None and self._problem({}).fits()

    @property
    def launches(self) -> int:
        """That take all steps."""
        steps = int(self._numbers["steps"])
        return -(-steps // MOST_STEPS)

    def launch(self, z: torch.Tensor, constant: torch.Tensor, state: Mapping[str, torch.Tensor]) -> Any:
        """Take steps from z, in place. z, constant: float32 [N, H·W·C]; state: first, second, third, running, taken."""
        tensors = {"z": z, "constant": constant, "largest": state["third"]}
        tensors |= {name: state[name] for name in ("first", "second", "running", "taken")}
        problem = self._problem(tensors)
        problem.images = len(z)

        def run() -> None:
            import torch

            on_gpu = z.device.type == "cuda"
            stream = torch.cuda.current_stream(z.device).cuda_stream if on_gpu else 0
            try:
                problem.run(z.device.index if on_gpu else -1, stream)
            except RuntimeError as error:
                raise BackendError(f"backend 'cuda': {error}") from error

        return run

    def _problem(self, tensors: Mapping[str, Any]) -> _cuda.Descent:
        problem: _cuda.Descent = extension().Descent()
        for name, tensor in {**self._tensors, **tensors}.items():
            setattr(problem, name, 0 if tensor is None else tensor.data_ptr())
        for name, number in self._numbers.items():
            setattr(problem, name, number)
        return problem


def _packed(form: QuadraticForm) -> Any:
    """Weights [row kinds, column kinds, taps across, channels in, taps down · channels out, rounded up to 4]."""
    kinds_y, kinds_x, down, across, channels, _ = form.weight.shape
    ordered = form.weight.transpose(0, 1, 3, 4, 2, 5).reshape(kinds_y, kinds_x, across, channels, down * channels)
    return np.ascontiguousarray(np.pad(ordered, [(0, 0)] * 4 + [(0, -down * channels % 4)]))
