"""upsample: nearest or bilinear interpolation to another size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv.ops.base import MAX_ATTRIBUTE, Case, Pair, Shape, expect
from fastinv.ops.resample import Matrix, SizedResample

if TYPE_CHECKING:
    import torch

MODES = ("nearest", "bilinear")
SMALL = 128  # rows + columns: up to here PyTorch's nearest copies or doubles whatever the scales, beyond it does not


@dataclass(frozen=True)
class Upsample(SizedResample):
    """[C, H, W] to [C, *output_size], by PyTorch's rules.

    `scales` are the factors that positions are computed with; None takes the ratio of the sizes. `align_corners`
    belongs to bilinear.
    """

    name: ClassVar[str] = "upsample"
    output_size: Pair = (1, 1)
    mode: str = "nearest"
    align_corners: bool = False
    scales: tuple[float, float] | None = None

    def validate(self) -> None:
        expect(
            all(1 <= v <= MAX_ATTRIBUTE for v in self.output_size),
            f"upsample: output_size {self.output_size}, expected >= 1",
        )
        expect(self.mode in MODES, f"upsample: mode {self.mode!r:.40}, expected one of {', '.join(MODES)}")
        expect(not self.align_corners or self.mode == "bilinear", "upsample: align_corners belongs to bilinear")
        expect(
            self.scales is None or all(1e-6 < s < 1e6 for s in self.scales),
            f"upsample: scales {self.scales}, expected positive factors",
        )

    def output_length(self, axis: int, size: int) -> int:
        return self.output_size[axis]

    def weights_along(self, axis: int, size: int) -> Matrix:
        count = self.output_size[axis]
        matrix = np.zeros((count, size))
        rows = np.arange(count)
        if self.mode == "nearest":
            matrix[rows, self.source(axis, size)] = 1
            return matrix
        if count == size:  # PyTorch copies, whatever the scales
            return np.eye(size)
        if self.align_corners:
            position = rows * ((size - 1) / (count - 1) if count > 1 else 0.0)
        else:
            step = size / count if self.scales is None else 1 / self.scales[axis]
            position = np.maximum((rows + 0.5) * step - 0.5, 0)
        low = np.minimum(np.floor(position).astype(np.int64), size - 1)
        part = np.minimum(position - low, 1.0)
        matrix[rows, low] += 1 - part
        matrix[rows, np.minimum(low + 1, size - 1)] += part
        return matrix

    def source(self, axis: int, size: int) -> npt.NDArray[np.int64]:
        """The input row or column that each output one copies.

        PyTorch rounds positions in the dtype of the data; here they are its float32 ones whatever the dtype.
        """
        count = self.output_size[axis]
        if sum(self.output_size) <= SMALL and count in (size, 2 * size):
            return np.arange(count, dtype=np.int64) // (count // size)
        step = size / count if self.scales is None else 1 / self.scales[axis]
        position = np.arange(count, dtype=np.float32) * np.float32(step)
        index: npt.NDArray[np.int64] = np.minimum(np.floor(position), size - 1).astype(np.int64)
        return index

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        import torch

        (x,) = inputs
        if self.mode == "nearest":
            rows, columns = (torch.from_numpy(self.source(axis, x.shape[2 + axis])) for axis in (0, 1))
            return x.index_select(2, rows).index_select(3, columns)
        factors = self.scales or (None, None)
        upsample = torch.ops.aten.upsample_bilinear2d
        result: torch.Tensor = upsample(x, self.output_size, self.align_corners, *factors)
        return result

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        c, h, w = self.shape(inputs, weights)
        return c * h * w * (1 if self.mode == "nearest" else 8)

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("nearest-2", Upsample((16, 16)), ((16, 8, 8),)),
            Case("nearest-odd", Upsample((7, 11)), ((5, 3, 4),)),
            Case("nearest-scales", Upsample((7, 7), scales=(2.5, 2.4)), ((19, 3, 3),)),
            Case("nearest-rounding", Upsample((63, 40)), ((2, 35, 14),)),
            Case("nearest-down", Upsample((3, 2)), ((4, 7, 5),)),
            Case("bilinear-2", Upsample((16, 16), "bilinear"), ((17, 8, 8),)),
            Case("bilinear-corners", Upsample((9, 5), "bilinear", True), ((3, 4, 2),)),
            Case("bilinear-scales", Upsample((7, 9), "bilinear", False, (2.4, 3.1)), ((6, 3, 3),)),
            Case("bilinear-same-size", Upsample((5, 7), "bilinear", False, (1.1, 2.4)), ((4, 5, 3),)),
            Case("bilinear-down", Upsample((3, 4), "bilinear"), ((5, 8, 9),)),
        )
