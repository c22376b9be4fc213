"""pixel_shuffle: y[c, i·r + u, j·r + v] = x[c·r² + u·r + v, i, j]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import Case, Shape, expect, expect_inputs, expect_weights
from fastinv.ops.rearrange import Rearrange

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PixelShuffle(Rearrange):
    """[C·r², H, W] to [C, H·r, W·r], r = `factor`."""

    name: ClassVar[str] = "pixel_shuffle"
    factor: int = 2

    def validate(self) -> None:
        expect(1 <= self.factor <= 1024, f"pixel_shuffle: factor {self.factor}, expected 1 to 1024")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=3)
        expect_weights(self, weights)
        c, h, w = inputs[0]
        area = self.factor**2
        expect(c % area == 0, f"pixel_shuffle: {c} channels, expected a multiple of {area}")
        return (c // area, h * self.factor, w * self.factor)

    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        r = self.factor
        c, h, w = array.shape
        blocks = array.reshape(c // r**2, r, r, h, w).transpose(0, 3, 1, 4, 2)
        return blocks.reshape(c // r**2, h * r, w * r)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch.nn.functional as F

        result: torch.Tensor = F.pixel_shuffle(inputs[0], self.factor)
        return result

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("2", PixelShuffle(), ((16, 5, 7),)),
            Case("3-to-one-channel", PixelShuffle(3), ((9, 4, 3),)),
        )
