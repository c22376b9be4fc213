"""softmax: y = exp(x) / Σ exp(x), of each row by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Softmax(Op):
    """Of [rows, columns], over the columns. What attention has of its own is part of `Attention`."""

    name: ClassVar[str] = "softmax"
    affine: ClassVar[bool] = False

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=2)
        expect_weights(self, weights)
        return inputs[0]

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return inputs[0].softmax(-1)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return 5 * math.prod(inputs[0])  # the largest, a difference, its exponential, a sum, and a product

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("rows", Softmax(), ((5, 37),)),
            Case("vectors", Softmax(), ((3, 32),)),
            Case("pairs", Softmax(), ((19, 2),)),
            Case("one-column", Softmax(), ((4, 1),)),
        )
