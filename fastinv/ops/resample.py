"""Separable linear resampling: what average pools and upsampling have in common.

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
    def output_length(self, axis: int, size: int) -> int:
        """Number of output rows (axis 0) or columns (axis 1) for `size` input ones."""

    @abstractmethod
    def weights_along(self, axis: int, size: int) -> Matrix:
        """R (axis 0) or C (axis 1), [output length, size]."""

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        expect_weights(self, weights)
        c, *sizes = inputs[0]
        lengths = [self.output_length(axis, size) for axis, size in enumerate(sizes)]
        for length, size in zip(lengths, sizes, strict=True):
            expect(length * size <= MAX_MATRIX, f"{self.name}: from {size} to {length} is too large")
        return (c, *lengths)


def window_means(begins: Sequence[int], ends: Sequence[int], size: int, divisors: Sequence[float]) -> Matrix:
    """Rows that sum inputs begin to end and divide by the divisor."""
    matrix = np.zeros((len(begins), size))
    for row, begin, end, divisor in zip(matrix, begins, ends, divisors, strict=True):
        row[begin:end] = 1 / divisor
    return matrix
