"""conv2d: y[o, i, j] = b[o] + Σ_{c,u,v} w[o, c, u, v] · x[c, i·s + u·d − top, j·s + v·d − left]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import (
    MAX_ATTRIBUTE,
    MAX_ELEMENTS,
    Case,
    Op,
    Pair,
    Shape,
    expect,
    expect_inputs,
    expect_weights,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Conv2d(Op):
    """2-d convolution (cross-correlation) of [C, H, W] with `weight` [O, C / groups, kh, kw] and `bias` [O].

    `padding` is (top, bottom, left, right), of zeros, so asymmetric and "same" padding are plain cases.
    """

    name: ClassVar[str] = "conv2d"
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def validate(self) -> None:
        positive = (*self.stride, *self.dilation, self.groups)
        expect(
            all(1 <= v <= MAX_ATTRIBUTE for v in positive),
            f"conv2d: stride {self.stride}, dilation {self.dilation}, groups {self.groups}: expected >= 1",
        )
        expect(
            all(0 <= v <= MAX_ATTRIBUTE for v in self.padding),
            f"conv2d: padding {self.padding}, expected >= 0",
        )

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        c, h, w = inputs[0]
        weight = weights.get("weight", ())
        expect(len(weight) == 4, f"conv2d: weight has shape {list(weight)}, expected rank 4")
        o, _, kh, kw = weight
        expect(min(weight) >= 1, f"conv2d: weight has shape {list(weight)}, expected no empty axis")
        expect(
            c % self.groups == 0 and o % self.groups == 0,
            f"conv2d: {c} input and {o} output channels do not divide into {self.groups} groups",
        )
        expect_weights(self, weights, weight=(o, c // self.groups, kh, kw), bias=(o,))
        top, bottom, left, right = self.padding
        rows, columns = h + top + bottom, w + left + right
        expect(c * rows * columns <= MAX_ELEMENTS, f"conv2d: padding {self.padding} makes {h}×{w} too large")
        oh = (rows - self.dilation[0] * (kh - 1) - 1) // self.stride[0] + 1
        ow = (columns - self.dilation[1] * (kw - 1) - 1) // self.stride[1] + 1
        expect(oh >= 1 and ow >= 1, f"conv2d: kernel {kh}×{kw} does not fit input {h}×{w} with {self}")
        return (o, oh, ow)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        top, bottom, left, right = self.padding
        (x,) = inputs
        if (top, left) != (bottom, right):  # torch's own padding is symmetric
            x = F.pad(x, (left, right, top, bottom))
            top = left = 0
        weight, bias = weights["weight"], weights["bias"]
        return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        _, oh, ow = self.shape(inputs, weights)
        return 2 * oh * ow * math.prod(weights["weight"])

    @staticmethod
    def cases() -> tuple[Case, ...]:
        def case(name: str, op: Conv2d, c: int, h: int, w: int, weight: Shape) -> Case:
            return Case(name, op, ((c, h, w),), {"weight": weight, "bias": weight[:1]})

        return (
            case("3x3", Conv2d(padding=(1, 1, 1, 1)), 16, 16, 16, (32, 16, 3, 3)),
            case("5x5-few-channels", Conv2d(), 1, 28, 28, (8, 1, 5, 5)),
            case("5x5-one-output", Conv2d(padding=(4, 4, 4, 4)), 8, 24, 24, (1, 8, 5, 5)),
            case("3x3-to-rgb", Conv2d(padding=(1, 1, 1, 1)), 64, 9, 11, (3, 64, 3, 3)),
            case("3x3-ragged", Conv2d(padding=(0, 2, 1, 0)), 20, 9, 14, (33, 20, 3, 3)),
            case("odd-everything", Conv2d((2, 3), (0, 2, 1, 3), (2, 1)), 5, 17, 13, (7, 5, 3, 2)),
            case("1x1", Conv2d(), 19, 7, 7, (67, 19, 1, 1)),
            case("1x1-stride-2", Conv2d((2, 2)), 33, 8, 8, (64, 33, 1, 1)),
            case("wide", Conv2d(padding=(1, 1, 1, 1)), 64, 8, 8, (130, 64, 3, 3)),
            case("depthwise", Conv2d((2, 2), (1, 1, 1, 1), groups=24), 24, 11, 11, (24, 1, 3, 3)),
            case("depthwise-multiplier", Conv2d(padding=(1, 1, 1, 1), groups=6), 6, 9, 9, (12, 1, 3, 3)),
            case("grouped", Conv2d(padding=(1, 1, 1, 1), groups=4), 20, 9, 10, (12, 5, 3, 3)),
            case("kernel-as-large-as-input", Conv2d(), 6, 4, 4, (10, 6, 4, 4)),
        )
