"""concat: the inputs one after the other along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import MAX_RANK, Case, Op, Shape, expect, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Concat(Op):
    """Two or more inputs joined along `axis`, which counts from 0 without the batch axis."""

    name: ClassVar[str] = "concat"
    axis: int = 0

    def validate(self) -> None:
        expect(0 <= self.axis < MAX_RANK, f"concat: axis {self.axis}, expected 0 to {MAX_RANK - 1}")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_weights(self, weights)
        expect(len(inputs) >= 2, f"concat: {len(inputs)} inputs, expected two or more")
        first = inputs[0]
        expect(self.axis < len(first), f"concat: axis {self.axis} of shape {list(first)}")
        for shape in inputs[1:]:
            expect(
                len(shape) == len(first)
                and all(a == b for k, (a, b) in enumerate(zip(first, shape, strict=True)) if k != self.axis),
                f"concat: shapes {list(first)} and {list(shape)} differ beside axis {self.axis}",
            )
        joined = sum(shape[self.axis] for shape in inputs)
        return (*first[: self.axis], joined, *first[self.axis + 1 :])

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.cat(list(inputs), dim=self.axis + 1)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return 0

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("channels", Concat(0), ((5, 4, 6), (18, 4, 6))),
            Case("three", Concat(0), ((3, 5, 5), (1, 5, 5), (4, 5, 5))),
            Case("rows", Concat(1), ((3, 4, 5), (3, 2, 5))),
            Case("columns", Concat(2), ((3, 4, 5), (3, 4, 1))),
            Case("flat", Concat(0), ((7,), (12,))),
        )
