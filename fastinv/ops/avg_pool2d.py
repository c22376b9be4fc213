"""avg_pool2d: y[c, i, j] = mean over the window of x."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Pair, Shape, expect
from fastinv.ops.resample import Matrix, SizedResample, window_means
from fastinv.ops.window import expect_window, pooled_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AvgPool2d(SizedResample):
    """Mean of every window of [C, H, W]; PyTorch's rules for padding and `ceil_mode`.

    The sum is divided by `divisor` where given, else by the window's size, with (`count_include_pad`) or without
    its part in the padding.
    """

    name: ClassVar[str] = "avg_pool2d"
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    def validate(self) -> None:
        expect_window(self, self.kernel, self.stride, self.padding)
        expect(self.divisor is None or self.divisor >= 1, f"avg_pool2d: divisor {self.divisor}, expected >= 1")

    def output_length(self, axis: int, size: int) -> int:
        window = self.kernel[axis], self.stride[axis], self.padding[axis]
        return pooled_size(self, size, *window, ceil_mode=self.ceil_mode)

    def weights_along(self, axis: int, size: int) -> Matrix:
        kernel, stride, padding = self.kernel[axis], self.stride[axis], self.padding[axis]
        starts = [i * stride - padding for i in range(self.output_length(axis, size))]
        begins = [max(s, 0) for s in starts]
        ends = [min(s + kernel, size) for s in starts]
        if self.divisor is not None:  # divides the whole sum: once, along the rows
            divisors = [float(self.divisor) if axis == 0 else 1.0] * len(starts)
        elif self.count_include_pad:
            divisors = [float(min(s + kernel, size + padding) - s) for s in starts]
        else:
            divisors = [float(e - b) for b, e in zip(begins, ends, strict=True)]
        return window_means(begins, ends, size, divisors)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        return F.avg_pool2d(
            inputs[0],
            self.kernel,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor,
        )

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return math.prod(self.shape(inputs, weights)) * math.prod(self.kernel)

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("2x2", AvgPool2d(), ((16, 8, 8),)),
            Case("padded", AvgPool2d((3, 3), (2, 1), (1, 1)), ((5, 9, 7),)),
            Case("without-padding", AvgPool2d((3, 4), (2, 2), (1, 2), count_include_pad=False), ((19, 8, 9),)),
            Case("ceil-mode", AvgPool2d((3, 2), (2, 2), (1, 1), ceil_mode=True), ((4, 8, 7),)),
            Case("ceil-mode-larger-than-input", AvgPool2d((3, 3), (2, 2), ceil_mode=True), ((5, 2, 7),)),
            Case("divisor", AvgPool2d((2, 3), (2, 3), divisor=5), ((3, 6, 9),)),
        )
