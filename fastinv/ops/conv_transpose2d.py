"""conv_transpose2d: the adjoint of conv2d.

y[o, i, j] = b[o] + Σ w[c, o, u, v] · x[c, (i + top − u·d) / s, (j + left − v·d) / s], over the taps for which both
quotients are whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import MAX_ATTRIBUTE, Case, Op, Pair, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ConvTranspose2d(Op):
    """2-d transposed convolution of [C, H, W] with `weight` [C, O / groups, kh, kw] and `bias` [O].

    `padding` cuts that many rows and columns off every side of the result, `output_padding` adds some at its end.
    """

    name: ClassVar[str] = "conv_transpose2d"
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def validate(self) -> None:
        positive = (*self.stride, *self.dilation, self.groups)
        expect(
            all(1 <= v <= MAX_ATTRIBUTE for v in positive),
            f"conv_transpose2d: stride {self.stride}, dilation {self.dilation}, groups {self.groups}: expected >= 1",
        )
        expect(
            all(0 <= v <= MAX_ATTRIBUTE for v in self.padding),
            f"conv_transpose2d: padding {self.padding}, expected >= 0",
        )
        limits = [max(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        expect(
            all(0 <= p < limit for p, limit in zip(self.output_padding, limits, strict=True)),
            f"conv_transpose2d: output_padding {self.output_padding}, expected less than stride or dilation {limits}",
        )

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        c, *sizes = inputs[0]
        weight = weights.get("weight", ())
        expect(len(weight) == 4, f"conv_transpose2d: weight has shape {list(weight)}, expected rank 4")
        expect(min(weight) >= 1, f"conv_transpose2d: weight has shape {list(weight)}, expected no empty axis")
        expect(
            c % self.groups == 0,
            f"conv_transpose2d: {c} input channels do not divide into {self.groups} groups",
        )
        o = weight[1] * self.groups
        expect_weights(self, weights, weight=(c, *weight[1:]), bias=(o,))
        out = tuple(
            (size - 1) * s - 2 * p + d * (k - 1) + extra + 1
            for size, s, p, d, k, extra in zip(
                sizes, self.stride, self.padding, self.dilation, weight[2:], self.output_padding, strict=True
            )
        )
        expect(min(out) >= 1, f"conv_transpose2d: nothing is left of input {inputs[0]} with {self}")
        return (o, *out)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        return F.conv_transpose2d(
            inputs[0],
            weights["weight"],
            weights["bias"],
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        _, h, w = inputs[0]
        return 2 * h * w * math.prod(weights["weight"])

    @staticmethod
    def cases() -> tuple[Case, ...]:
        def case(name: str, op: ConvTranspose2d, h: int, w: int, weight: Shape) -> Case:
            return Case(name, op, ((weight[0], h, w),), {"weight": weight, "bias": (weight[1] * op.groups,)})

        double = ConvTranspose2d((2, 2), (1, 1), (1, 1))
        return (
            case("3x3-stride-2", double, 8, 8, (128, 64, 3, 3)),
            case("3x3-to-rgb", ConvTranspose2d(padding=(1, 1)), 16, 16, (64, 3, 3, 3)),
            case("3x3-ragged", ConvTranspose2d(padding=(0, 2)), 9, 14, (33, 20, 3, 3)),
            case("5x5", ConvTranspose2d(), 8, 8, (16, 8, 5, 5)),
            case(
                "5x5-stride-2-one-output",
                ConvTranspose2d((2, 2), output_padding=(1, 1)),
                12,
                12,
                (8, 1, 5, 5),
            ),
            case("odd-everything", ConvTranspose2d((3, 2), (1, 2), (1, 0), (1, 2)), 5, 7, (6, 5, 4, 3)),
            case(
                "kernel-smaller-than-stride",
                ConvTranspose2d((3, 3), output_padding=(1, 2)),
                4,
                5,
                (7, 19, 2, 2),
            ),
            case("dilated", ConvTranspose2d(dilation=(2, 3)), 6, 5, (4, 33, 3, 2)),
            case("depthwise", ConvTranspose2d((2, 2), (1, 1), (1, 1), groups=20), 6, 6, (20, 1, 3, 3)),
            case("grouped", ConvTranspose2d((2, 2), (1, 1), groups=3), 5, 6, (9, 4, 4, 4)),
            case("from-one-pixel", ConvTranspose2d(), 1, 1, (24, 17, 4, 4)),
        )
