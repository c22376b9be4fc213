"""reshape: the same elements in row-major order under another shape (flatten, unflatten, view)."""

from __future__ import annotations

import math
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
class Reshape(Rearrange):
    """Any shape to `target` of as many elements."""

    name: ClassVar[str] = "reshape"
    target: tuple[int, ...] = ()

    def validate(self) -> None:
        expect(all(v >= 1 for v in self.target), f"reshape: target {list(self.target)}, expected positive sizes")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1)
        expect_weights(self, weights)
        expect(
            math.prod(inputs[0]) == math.prod(self.target),
            f"reshape: {list(inputs[0])} does not have the elements of {list(self.target)}",
        )
        return self.target

    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return array.reshape(self.target)

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return inputs[0].reshape(len(inputs[0]), *self.target)

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("flatten", Reshape((105,)), ((5, 3, 7),)),
            Case("unflatten", Reshape((6, 4, 5)), ((120,),)),
            Case("image-to-image", Reshape((4, 3, 6)), ((6, 4, 3),)),
            Case("one-channel", Reshape((64,)), ((1, 8, 8),)),
        )
