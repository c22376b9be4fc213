"""rMLE's objective as a quadratic form, where the edge is one convolution of stride 1.

‖A·z + b − v‖² has the gradient 2·AᵀA·z + c, where c is the gradient at z = 0. AᵀA is a convolution from image to image
of 2·k − 1 taps, whose weights differ near the border: there fewer of A's results see a pixel. With many results to each
pixel this is far less work than A and Aᵀ (CIFAR-10, 3 → 64 channels of 3×3 taps: 75 products a value for 1,152).
TV₂, Σ dy² + dx², is a quadratic form, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.inverters import RMLE
from fastinv.ops.activation import IDENTITY
from fastinv.ops.conv2d import Conv2d

MOST_WEIGHTS = 2**18  # 1 MiB: they shall stay in the cache


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """The matrix H of the gradient H·z + c, for images [height, width, channels].

    Attributes:
        weight: float32 [row kinds, column kinds, row taps, column taps, channels in, channels out].
        row_kind, column_kind: int32 [height] and [width], which weights a pixel has.
        smooth: whether it holds the total variation.
    """

    shape: tuple[int, int, int]
    weight: npt.NDArray[np.float32]
    row_kind: npt.NDArray[np.int32]
    column_kind: npt.NDArray[np.int32]
    smooth: bool


@dataclass(frozen=True, eq=False)
class _Axis:
    """Of one axis: the kind of every position; and for each kind which taps see it, [kinds, taps], which of its two
    neighbours are in the image, [kinds, 2]."""

    kind: npt.NDArray[np.int32]
    seen: npt.NDArray[np.bool_]
    neighbours: npt.NDArray[np.bool_]


def quadratic_form(recipe: RMLE) -> QuadraticForm | None:
    """The recipe's objective as a quadratic form, with the total variation where β is 2; None where the edge is
    something else than one convolution, or steps through A and Aᵀ are less work."""
    edge = recipe.edge
    if len(edge.steps) != 1 or edge.steps[0].activation != IDENTITY or not isinstance(edge.steps[0].op, Conv2d):
        return None
    op, weight = edge.steps[0].op, edge.steps[0].weights["weight"].astype(np.float64)
    channels, *kernel = weight.shape[1:]
    sides, results = edge.input_shape[1:], edge.output_shape[1:]
    taps = [2 * max(k, 2) - 1 for k in kernel]  # TV reaches to the next pixel
    plain = op.groups == 1 and op.stride == (1, 1) and op.dilation == (1, 1)
    if not plain or np.prod(taps) * channels * np.prod(sides) >= 2 * weight[:, 0].size * np.prod(results):
        return None
    y, x = (_axis(sides[i], results[i], kernel[i], op.padding[2 * i]) for i in (0, 1))
    if len(y.seen) * len(x.seen) * np.prod(taps) * channels**2 > MOST_WEIGHTS:
        return None
    products = np.einsum("ocuv,odyx->cuvdyx", weight, weight)
    # From pixel (i, j) to (i + y − u, j + x − v), by the results that see the one by tap (u, v), the other by (y, x).
    steps = [np.stack([np.eye(k, k=o - (t // 2)) for o in range(t)]) for k, t in zip(kernel, taps, strict=True)]
    matrix = 2 * np.einsum("ru,auy,sv,bvx,cuvdyx->rsabdc", y.seen, steps[0], x.seen, steps[1], products, optimize=True)
    smooth = recipe.tv_weight > 0 and recipe.tv_beta == 2
    if smooth:
        _add_variation(matrix, recipe.tv_weight, y, x)
    shape = (sides[0], sides[1], channels)
    return QuadraticForm(shape, np.ascontiguousarray(matrix, np.float32), y.kind, x.kind, smooth)


def _axis(side: int, results: int, kernel: int, padding: int) -> _Axis:
    positions, taps = np.arange(side)[:, None], np.arange(kernel)
    result = positions + padding - taps  # that sees the position by this tap
    seen = (result >= 0) & (result < results)
    neighbours = np.concatenate([positions > 0, positions < side - 1], axis=1)
    rows, kind = np.unique(np.concatenate([seen, neighbours], axis=1), axis=0, return_inverse=True)
    return _Axis(kind.ravel().astype(np.int32), rows[:, :kernel], rows[:, kernel:])


def _add_variation(matrix: npt.NDArray[np.float64], weight: float, y: _Axis, x: _Axis) -> None:
    """Add the gradient of weight · Σ dy² + dx²: 2 · weight · (z − neighbour), over the neighbours in the image."""
    middle = [taps // 2 for taps in matrix.shape[2:4]]
    every: Any = np.arange(matrix.shape[-1])
    for axis, kinds in ((0, y.neighbours[:, None, :]), (1, x.neighbours[None, :, :])):
        for side, step in ((0, -1), (1, 1)):
            there = list(middle)
            there[axis] += step
            value = 2 * weight * kinds[..., side, None]
            matrix[:, :, middle[0], middle[1], every, every] += value
            matrix[:, :, there[0], there[1], every, every] -= value
