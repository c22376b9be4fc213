"""Separable linear resampling: what average pools, upsampling and `separable` have in common.

Each channel X becomes R · X · Cᵀ with one sparse matrix for rows and one for columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import Op, Shape, expect, expect_inputs, expect_weights

Matrix = npt.NDArray[np.float64]

MAX_MATRIX = 2**25  # entries of one matrix (256 MiB): from 4096 to 8192 pixels


@dataclass(frozen=True)
class Resample(Op):
    """Base of the ops that resample pixels linearly, rows and columns apart."""

    @abstractmethod
    def matrices(self, shape: Shape, weights: Mapping[str, npt.NDArray[np.float32]]) -> tuple[Matrix, Matrix]:
        """R [H', H] and C [W', W] for an input [C, H, W] and these weights."""


@dataclass(frozen=True)
class SizedResample(Resample):
    """Base of those whose matrices follow from the attributes and the size of the input."""

    @abstractmethod
    def output_length(self, axis: int, size: int) -> int:
        """Number of output rows (axis 0) or columns (axis 1) for `size` input ones."""

    @abstractmethod
    def weights_along(self, axis: int, size: int) -> Matrix:
        """R (axis 0) or C (axis 1), [output length, size]."""

    def matrices(self, shape: Shape, weights: Mapping[str, npt.NDArray[np.float32]]) -> tuple[Matrix, Matrix]:
        return self.weights_along(0, shape[1]), self.weights_along(1, shape[2])

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        expect_weights(self, weights)
        c, *sizes = inputs[0]
        lengths = [self.output_length(axis, size) for axis, size in enumerate(sizes)]
        for length, size in zip(lengths, sizes, strict=True):
            expect_matrix(self, length, size)
        return (c, *lengths)


def expect_matrix(op: Op, length: int, size: int) -> None:
    """Check that the matrix from `size` pixels to `length` is not too large."""
    expect(length * size <= MAX_MATRIX, f"{op.name}: from {size} to {length} is too large")


def window_means(begins: Sequence[int], ends: Sequence[int], size: int, divisors: Sequence[float]) -> Matrix:
    """Rows that sum inputs begin to end and divide by the divisor."""
    matrix = np.zeros((len(begins), size))
    for row, begin, end, divisor in zip(matrix, begins, ends, divisors, strict=True):
        row[begin:end] = 1 / divisor
    return matrix
