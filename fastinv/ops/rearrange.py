"""Rearranging: what pixel_shuffle, reshape and permute have in common. They move elements and compute nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import Op, Shape


@dataclass(frozen=True)
class Rearrange(Op):
    """Base of the ops whose output holds each input element exactly once."""

    @abstractmethod
    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`array`, of the input's shape, in the order and shape of the output."""

    def source_index(self, shape: Shape) -> npt.NDArray[np.int64]:
        """For every output element the row-major position of its input element, in the output's shape."""
        return self.rearranged(np.arange(math.prod(shape)).reshape(shape))

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return 0
