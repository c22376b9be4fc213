"""Weights of MNIST's ReLU2 edge as `kernels/cuda/pooled.h` reads them: factors of matrix products on tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.fragments import exponent, halved, left, scale_below, split_right

TAPS, FIRST, SECOND = 5, 8, 16  # of both convolutions, and their channels
LARGEST = 13  # the weights' largest is next below this power of two
SPREAD = TAPS + 1  # rows and columns of the image that a window of the pool reaches

Array = npt.NDArray[Any]


def pooled_fields(
    first: Array, first_bias: Array, second: Array, second_bias: Array
) -> tuple[Mapping[str, Array], Mapping[str, float]]:
    """Arrays and numbers of `PooledLayers` from weights [channels out, channels in, taps, taps]."""
    first_scale, second_scale = (scale_below(w, LARGEST) for w in (first, second))
    w, v = first[:, 0] * first_scale, second * second_scale
    parts = (_first(w), _second(v), _second_back(v), _first_back(w))
    arrays = {
        "weights": np.concatenate([part.ravel() for part in parts]).view(np.int32),
        "first_bias": first_bias,
        "second_bias": second_bias,
    }
    numbers = {
        "first_scale": first_scale,
        "second_scale": second_scale,
        "first_gain": 2.0 ** exponent((abs(first).sum((1, 2, 3)) + abs(first_bias)).max()),
        "second_gain": float(abs(second).sum((1, 2, 3)).max()),
        "second_offset": float(abs(second_bias).max()),
        "back_gain": 2.0 ** exponent(abs(second).sum((0, 2, 3)).max()),
    }
    return arrays, numbers


def _first(w: Array) -> Array:
    """[K step, lane, word]: rows are channels, their high parts above their low ones; see `first_layer`."""
    columns = np.zeros((FIRST, 4, 4, 2), np.float32)  # [group, lane % 4, of two]
    for group in range(3):
        rows = w[:, 2 * group : 2 * group + 2, :4]
        columns[:, group, :, : rows.shape[1]] = rows.transpose(0, 2, 1)
    columns[:, 3] = np.pad(w[:, :, 4], [(0, 0), (0, 3)]).reshape(FIRST, 4, 2)
    high, low = halved(columns.transpose(1, 0, 2, 3).reshape(2, 2, FIRST, 8))  # [K step, its half, channel, …]
    return left(np.concatenate([high, low], 2).transpose(0, 2, 1, 3).reshape(2, 16, 16))


def _second(v: Array) -> Array:
    """[pair of column taps, row tap, part, lane, word]: rows are channels out, columns two taps' channels in."""
    padded = np.pad(v, [(0, 0), (0, 0), (0, 0), (0, 1)]).reshape(SECOND, FIRST, TAPS, 3, 2)
    both = halved(padded.transpose(3, 2, 0, 4, 1).reshape(3, TAPS, SECOND, 2 * FIRST))
    return np.stack([left(part) for part in both], 2)


def _second_back(v: Array) -> Array:
    """[column tap, row tap, lane, part, word]: rows are channels out, columns channels in."""
    return split_right(v.transpose(3, 2, 0, 1))


def _first_back(w: Array) -> Array:
    """[eight columns, K step, lane, part, word]: see `back`.

    A row is a channel and a place in a window, a column a pixel that the window reaches.
    """
    reached = np.zeros((FIRST, 4, SPREAD, SPREAD), np.float32)
    for place in range(4):
        y, x = divmod(place, 2)
        reached[:, place, y : y + TAPS, x : x + TAPS] = w
    columns = np.pad(reached.reshape(FIRST, 4, -1), [(0, 0), (0, 0), (0, 4)]).reshape(4, 2, 2, 2, 5, 8)
    # [lane % 4, K step, half, of two, eight columns, column]
    return split_right(columns.transpose(4, 1, 2, 0, 3, 5).reshape(5, 2, 16, 8))
