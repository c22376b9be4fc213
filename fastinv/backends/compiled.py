"""What the compiled backends share: how values lie in memory, what features they read, how a plan is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

RAW_DTYPES = ("float32", "float16", "bfloat16", "uint8", "int8")  # of features, which are read as they are

# Optimizers that compare objectives, or take the gradient for what it is. In bfloat16 L-BFGS ends where rounding hides
# that the objective falls: up to 0.5 dB below float32 through CIFAR-10's ReLU22 and ReLU32 (64 test images).
EXACT_METHODS = ("lbfgs", "exact")


def channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[C, H, W] as it lies in memory, [H, W, C]; other ranks as they are."""
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def timed(plan: list[dict[str, Any]], taken: Sequence[float]) -> list[dict[str, Any]]:
    """A plan (see `fastinv.Engine.describe`) with the seconds that each of its rows takes for one image."""
    return [
        row | {"seconds": seconds, "gflops": row["flops"] / seconds / 1e9 if seconds > 0 else 0.0}
        for row, seconds in zip(plan, taken, strict=True)
    ]
