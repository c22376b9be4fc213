"""mul: y = a · b, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case
from fastinv.ops.binary import BROADCASTS, Binary

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Mul(Binary):
    """a · b of two values."""

    name: ClassVar[str] = "mul"
    affine: ClassVar[bool] = False

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return inputs[0] * inputs[1]

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return tuple(Case(name, Mul(), shapes) for name, shapes in BROADCASTS)
