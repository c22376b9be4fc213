"""roll: elements move on along each axis, those that leave it come in at its other end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import Case, Shape, expect_inputs, expect_weights
from fastinv.ops.rearrange import Rearrange

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Roll(Rearrange):
    """By so many places along each axis, without the batch."""

    name: ClassVar[str] = "roll"
    shifts: tuple[int, ...] = ()

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1, rank=len(self.shifts))
        expect_weights(self, weights)
        return inputs[0]

    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.roll(array, self.shifts, range(array.ndim))

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return inputs[0].roll(self.shifts, tuple(range(1, len(self.shifts) + 1)))

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("rows-and-columns", Roll((0, -2, 3)), ((5, 7, 9),)),
            Case("channels", Roll((1, 0, 0)), ((20, 3, 4),)),
            Case("tokens", Roll((4, -1)), ((11, 6),)),
        )
