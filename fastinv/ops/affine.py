"""affine: y = scale · x + shift, elementwise with constants (batch norm, denormalisation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Affine(Op):
    """`scale` and `shift`, of one shape that has the input's rank and broadcasts to it."""

    name: ClassVar[str] = "affine"

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1)
        (shape,) = inputs
        scale = tuple(weights.get("scale", ()))
        expect_weights(self, weights, scale=scale, shift=scale)
        expect(
            len(scale) == len(shape) and all(s in (1, n) for s, n in zip(scale, shape, strict=True)),
            f"affine: scale of shape {list(scale)} does not broadcast to {list(shape)}",
        )
        return shape

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return weights["scale"] * inputs[0] + weights["shift"]

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return 2 * math.prod(inputs[0])

    @staticmethod
    def cases() -> tuple[Case, ...]:
        def case(name: str, x: Shape, w: Shape) -> Case:
            return Case(name, Affine(), (x,), {"scale": w, "shift": w})

        return (
            case("per-channel", (19, 6, 5), (19, 1, 1)),
            case("scalar", (3, 6, 5), (1, 1, 1)),
            case("per-pixel", (3, 6, 5), (1, 6, 5)),
            case("full", (4, 3, 5), (4, 3, 5)),
            case("flat", (37,), (37,)),
        )
