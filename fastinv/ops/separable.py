"""separable: y[c] = R · x[c] · Cᵀ with any matrices: crops, strides, flips, reflecting pads, sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import Case, Shape, expect, expect_inputs, expect_weights
from fastinv.ops.resample import Matrix, Resample, expect_matrix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Separable(Resample):
    """[C, H, W] to [C, H', W'] by the weights `rows` [H', H] and `columns` [W', W].

    One of them may be left out: that axis stays as it is. Backends skip zeros, so a matrix that copies costs a copy.
    """

    name: ClassVar[str] = "separable"

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        c, *sizes = inputs[0]
        expected = {}
        for axis, key in enumerate(("rows", "columns")):
            if key not in weights:
                expect_matrix(self, sizes[axis], sizes[axis])  # backends are given the identity
                continue
            given = tuple(weights[key])
            expect(len(given) == 2 and min(given) >= 1, f"separable: {key} has shape {list(given)}, expected rank 2")
            expect_matrix(self, *given)
            expected[key] = (given[0], sizes[axis])
            sizes[axis] = given[0]
        expect(bool(expected), "separable: no weights, expected rows, columns or both")
        expect_weights(self, weights, **expected)
        return (c, *sizes)

    def matrices(self, shape: Shape, weights: Mapping[str, npt.NDArray[np.float32]]) -> tuple[Matrix, Matrix]:
        rows, columns = (
            weights[key].astype(np.float64) if key in weights else np.eye(size)
            for key, size in zip(("rows", "columns"), shape[1:], strict=True)
        )
        return rows, columns

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (y,) = inputs
        if "rows" in weights:
            y = weights["rows"] @ y
        return y @ weights["columns"].mT if "columns" in weights else y

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("both", Separable(), ((5, 7, 6),), {"rows": (4, 7), "columns": (9, 6)}),
            Case("rows", Separable(), ((17, 3, 5),), {"rows": (1, 3)}),
            Case("columns", Separable(), ((1, 6, 19),), {"columns": (37, 19)}),
        )
