"""adaptive_avg_pool2d: means of windows that split the input evenly into a given number of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import MAX_ATTRIBUTE, Case, Pair, Shape, expect
from fastinv.ops.resample import Matrix, SizedResample, window_means

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdaptiveAvgPool2d(SizedResample):
    """[C, H, W] to [C, *output_size]; window i of n runs from ⌊i·H/n⌋ to ⌈(i+1)·H/n⌉."""

    name: ClassVar[str] = "adaptive_avg_pool2d"
    output_size: Pair = (1, 1)

    def validate(self) -> None:
        expect(
            all(1 <= v <= MAX_ATTRIBUTE for v in self.output_size),
            f"adaptive_avg_pool2d: output_size {self.output_size}, expected >= 1",
        )

    def output_length(self, axis: int, size: int) -> int:
        return self.output_size[axis]

    def weights_along(self, axis: int, size: int) -> Matrix:
        count = self.output_size[axis]
        begins = [i * size // count for i in range(count)]
        ends = [-(-(i + 1) * size // count) for i in range(count)]
        return window_means(begins, ends, size, [float(e - b) for b, e in zip(begins, ends, strict=True)])

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        return F.adaptive_avg_pool2d(inputs[0], self.output_size)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return max(math.prod(inputs[0]), math.prod(self.shape(inputs, weights)))

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("global", AdaptiveAvgPool2d(), ((20, 7, 7),)),
            Case("uneven", AdaptiveAvgPool2d((3, 4)), ((5, 8, 9),)),
            Case("larger-than-input", AdaptiveAvgPool2d((5, 3)), ((17, 3, 2),)),
        )
