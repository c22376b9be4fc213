"""max_pool2d: y[c, i, j] = max over the window of x, which padding does not enter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Pair, Shape, expect, expect_inputs, expect_weights
from fastinv.ops.window import expect_window, pooled_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MaxPool2d(Op):
    """Maximum of every window of [C, H, W]; PyTorch's rules for padding and `ceil_mode`."""

    name: ClassVar[str] = "max_pool2d"
    affine: ClassVar[bool] = False
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False

    def validate(self) -> None:
        expect_window(self, self.kernel, self.stride, self.padding, self.dilation)

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        expect_weights(self, weights)
        c, *sizes = inputs[0]
        for size, padding, dilation in zip(sizes, self.padding, self.dilation, strict=True):
            expect(
                padding == 0 or dilation <= size,
                f"max_pool2d: dilation {dilation} on input size {size} makes windows of nothing but padding",
            )
        h, w = (
            pooled_size(self, size, *window, ceil_mode=self.ceil_mode)
            for size, *window in zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return (c, h, w)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        return F.max_pool2d(inputs[0], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return math.prod(self.shape(inputs, weights)) * math.prod(self.kernel)

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("2x2", MaxPool2d(), ((16, 8, 8),)),
            Case("3x3-overlapping", MaxPool2d((3, 3), (2, 2), (1, 1)), ((21, 11, 9),)),
            Case("odd-everything", MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1)), ((5, 9, 10),)),
            Case("ceil-mode", MaxPool2d((2, 2), (2, 2), ceil_mode=True), ((6, 7, 5),)),
            Case("ceil-mode-larger-than-input", MaxPool2d((3, 3), (2, 2), ceil_mode=True), ((5, 2, 7),)),
            Case("global", MaxPool2d((6, 5), (1, 1)), ((18, 6, 5),)),
        )
