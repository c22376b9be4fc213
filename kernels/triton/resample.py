"""Separable resampling: average pools, nearest and bilinear upsampling, forward and back.

Each channel X becomes R · X · Cᵀ. A row of R or C has few entries side by side; going back is the same with Rᵀ and Cᵀ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from fastinv.kernels.triton.elementwise import launch_elements, place_of
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch


@triton.jit
def _resample_kernel(
    x, out, row_first, row_weight, column_first, column_weight, addend, saved, a, b,
    elements, height, width, channels, out_height, out_width, row_taps, column_taps,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, i, j, c] = finish(Σ_{u,v} R[i, u] · C[j, v] · x[n, row_first[i] + u, column_first[j] + v, c]).

    x: [N, height, width, C], out: [N, out_height, out_width, C]; R: [out_height, row_taps], C: likewise of columns.
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < elements
    n, i, j, c = place_of(p, out_height, out_width, channels)
    y = tl.load(row_first + i)
    z = tl.load(column_first + j)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, row_taps * column_taps):
        u = t // column_taps
        v = t % column_taps
        weight = tl.load(row_weight + i * row_taps + u) * tl.load(column_weight + j * column_taps + v)
        seen = inside & (y + u < height) & (z + v < width) & (weight != 0)
        at = ((n * height + y + u) * width + z + v) * channels + c
        total += weight * tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + p, finish(total, p, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


class Resampling:
    """One resampling of images with `channels` channels by R [OH, H] and C [OW, W]."""

    def __init__(self, rows: npt.NDArray[Any], columns: npt.NDArray[Any], channels: int, device: Any) -> None:
        import torch

        self._args: dict[str, Any] = {
            "height": rows.shape[1], "width": columns.shape[1], "channels": channels,
            "out_height": rows.shape[0], "out_width": columns.shape[0],
        }  # fmt: skip
        for name, matrix in (("row", rows), ("column", columns)):
            first, weight = _banded(matrix)
            self._args[f"{name}_first"] = torch.from_numpy(first).to(device)
            self._args[f"{name}_weight"] = torch.from_numpy(weight).to(device)
            self._args[f"{name}_taps"] = weight.shape[1]

    def launch(self, x: Any, out: Any, epilogue: Epilogue) -> Launch:
        return launch_elements(_resample_kernel, out, {"x": x, **self._args}, {}, epilogue)


def _banded(matrix: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Where the entries of each row begin, and the entries from there, as many for every row."""
    some = matrix != 0
    first = np.where(some.any(axis=1), some.argmax(axis=1), 0)
    last = np.where(some.any(axis=1), matrix.shape[1] - 1 - some[:, ::-1].argmax(axis=1), 0)
    taps = int((last - first).max()) + 1
    padded = np.pad(matrix, ((0, 0), (0, taps)))
    weight = np.take_along_axis(padded, first[:, None] + np.arange(taps), axis=1)
    return first.astype(np.int32), weight.astype(np.float32)
