"""matmul: y = a · b or a · bᵀ of two computed values, for each of several groups of rows by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Matmul(Op):
    """a [groups · M, K] times b [groups · K, N], or, where `transposed`, [groups · N, K], to [groups · M, N].

    A group's rows lie one below the other.
    """

    name: ClassVar[str] = "matmul"
    affine: ClassVar[bool] = False
    groups: int = 1
    transposed: bool = False

    def validate(self) -> None:
        expect(self.groups >= 1, f"matmul: {self.groups} groups, expected >= 1")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 2, rank=2)
        expect_weights(self, weights)
        a, b = inputs
        for x in inputs:
            expect(x[0] % self.groups == 0, f"matmul: {x[0]} rows, expected a multiple of {self.groups} groups")
        rows = b[0] // self.groups
        depth, columns = (b[1], rows) if self.transposed else (rows, b[1])
        expect(a[1] == depth, f"matmul: of depths {a[1]} and {depth}, expected the same")
        return (a[0], columns)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        a, b = (x.reshape(len(x), self.groups, x.shape[1] // self.groups, x.shape[2]) for x in inputs)
        return (a @ (b.mT if self.transposed else b)).flatten(1, 2)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        rows, columns = self.shape(inputs, weights)
        return 2 * rows * columns * inputs[0][1]

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("plain", Matmul(), ((7, 5), (5, 9))),
            Case("transposed", Matmul(1, True), ((7, 5), (9, 5))),
            Case("groups", Matmul(3), ((21, 17), (51, 33))),
            Case("groups-transposed", Matmul(2, True), ((50, 34), (66, 34))),
            Case("column", Matmul(2), ((6, 4), (8, 1))),
        )
