"""linear: y[..., o] = b[o] + Σ_i w[o, i] · x[..., i]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Linear(Op):
    """Affine map of the last axis with `weight` [O, I] and `bias` [O]."""

    name: ClassVar[str] = "linear"

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1)
        expect(len(inputs[0]) >= 1, "linear: a scalar input, expected rank 1 or more")
        weight = weights.get("weight", ())
        expect(len(weight) == 2 and min(weight) >= 1, f"linear: weight has shape {list(weight)}, expected [O, I]")
        expect_weights(self, weights, weight=(weight[0], inputs[0][-1]), bias=(weight[0],))
        return (*inputs[0][:-1], weight[0])

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        return F.linear(inputs[0], weights["weight"], weights["bias"])

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return 2 * math.prod(inputs[0]) * weights["weight"][0]

    @staticmethod
    def cases() -> tuple[Case, ...]:
        def case(name: str, x: Shape, out: int) -> Case:
            return Case(name, Linear(), (x,), {"weight": (out, x[-1]), "bias": (out,)})

        return (
            case("256-to-120", (256,), 120),
            case("few-outputs", (84,), 3),
            case("tiny", (2,), 1),
            case("odd", (37,), 67),
            case("rows", (5, 19), 23),
            case("image", (3, 4, 10), 7),
        )
