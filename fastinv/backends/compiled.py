"""What the compiled backends share: how values lie in memory, what features they read, how a plan is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from fastinv.errors import BackendError

RAW_DTYPES = ("float32", "float16", "bfloat16", "uint8", "int8")  # of features, which are read as they are

EXACT_METHODS = ("lbfgs", "exact")  # optimizers that compare objectives, or take the gradient for what it is


def expect_exact(backend: str, method: str, precision: str, exact: Sequence[str]) -> None:
    """Raise BackendError where the optimizer could not work in this precision, but in those that are `exact`.

    Of bfloat16 L-BFGS ends where the objective's rounding hides that it falls: 0.1 to 0.5 dB below float32 through
    CIFAR-10's ReLU22 and ReLU32 (64 test images).
    """
    if method in EXACT_METHODS and precision not in exact:
        raise BackendError(
            f"backend {backend!r}: optimizer {method} cannot work in {precision}, whose rounding hides how the "
            f"objective falls: take precision {' or '.join(exact)}, or the optimizer 'adam'"
        )


def channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[C, H, W] as it lies in memory, [H, W, C]; other ranks as they are."""
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def timed(plan: list[dict[str, Any]], taken: Sequence[float]) -> list[dict[str, Any]]:
    """A plan (see `fastinv.Engine.describe`) with the seconds that each of its rows takes for one image."""
    return [
        row | {"seconds": seconds, "gflops": row["flops"] / seconds / 1e9 if seconds > 0 else 0.0}
        for row, seconds in zip(plan, taken, strict=True)
    ]
