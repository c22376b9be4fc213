"""permute: y's axis k is x's axis axes[k]."""

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
class Permute(Rearrange):
    """Axes in another order; `axes` counts from 0 without the batch axis."""

    name: ClassVar[str] = "permute"
    axes: tuple[int, ...] = ()

    def validate(self) -> None:
        expect(
            sorted(self.axes) == list(range(len(self.axes))),
            f"permute: axes {list(self.axes)}, expected each of 0 to {len(self.axes) - 1} once",
        )

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=len(self.axes))
        expect_weights(self, weights)
        return tuple(inputs[0][axis] for axis in self.axes)

    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return array.transpose(self.axes)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return inputs[0].permute(0, *(axis + 1 for axis in self.axes))

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("to-channels-last", Permute((1, 2, 0)), ((5, 3, 7),)),
            Case("matrix", Permute((1, 0)), ((6, 11),)),
            Case("swap", Permute((0, 2, 1)), ((4, 5, 6),)),
        )
