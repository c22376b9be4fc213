"""Factors of matrix products as the lanes of a warp have them: see `kernels/cuda/warp.h`.

A float32 is there the sum of two float16, its high and its low part. It is multiplied by a power of two before, so that
the largest is near the end of float16's range, 65,504: then the low part of whatever matters is not too small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def exponent(value: float) -> int:
    """The smallest whose power of two is above this value; 0 of 0."""
    return int(np.frexp(value)[1])


def scale_below(values: Array, limit: int) -> float:
    """The power of two by which the largest of these comes next below 2^limit."""
    return float(2.0 ** (limit - exponent(abs(values).max())))


def halved(values: Array) -> tuple[Array, Array]:
    """The high and the low parts."""
    high = values.astype(np.float16)
    return high, (values - high.astype(np.float32)).astype(np.float16)


def left(factor: Array) -> Array:
    """float16 [..., 16, 16] in the order of `LeftFactor`, [..., lane, word]."""
    pairs = factor.view(np.uint32)  # [..., row, 8]
    lane = np.arange(32)
    return np.stack([pairs[..., lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)] for i in range(4)], -1)


def split_right(factor: Array) -> Array:
    """float32 [..., 16, 8] in the order of `SplitRight`, [..., lane, part, word]."""
    return np.stack([_right(part) for part in halved(factor)], -2)


def _right(factor: Array) -> Array:
    pairs = np.ascontiguousarray(np.swapaxes(factor, -1, -2)).view(np.uint32)  # [..., column, 8]
    lane = np.arange(32)
    return np.stack([pairs[..., lane // 4, lane % 4 + 4 * j] for j in range(2)], -1)
