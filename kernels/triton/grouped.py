"""Convolutions with many small groups (depthwise: of one channel each), without tensor cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, put
from fastinv.kernels.triton.geometry import Geometry, Weights, phase_of
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two


@triton.jit
def _grouped_kernel(
    x, w, bias, phases, out, addend, saved, a, b,
    images, height, width, channels, outputs, out_height, out_width, groups,
    x_n, x_y, x_x, x_c, out_n, out_y, out_x, out_c,
    stride_y, stride_x, spacing_y, spacing_x, step_y, step_x, column_tiles,
    PHASE: tl.constexpr, PHASES: tl.constexpr, KIND: tl.constexpr, BYTES: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """out[n, i·step + row, j·step + column, o] = finish(bias[o] + Σ_{t,c} w[t, c, o] · x[n, iy(i, t), ix(j, t), c]).

    o: over the outputs of all groups, c: over the channels of its group.
    """
    rest = tl.program_id(0) % (column_tiles * PHASES)
    phase = phases + rest // column_tiles * PHASE
    row, column, rows, columns, taps_y, taps_x, first_y, first_x, begin = phase_of(phase)
    w += begin
    m = tl.program_id(0) // (column_tiles * PHASES) * BM + tl.arange(0, BM)
    inside = m < images * rows * columns
    n = m // (rows * columns)
    i = m // columns % rows
    j = m % columns
    y = i * stride_y + first_y
    x0 = j * stride_x + first_x
    o = rest % column_tiles * BO + tl.arange(0, BO)
    total = groups * outputs
    first = o // outputs * channels
    sums = tl.zeros((BM, BO), tl.float32)
    for product in range(0, taps_y * taps_x * channels):
        t = product // channels
        c = first + product % channels
        iy = y + t // taps_x * spacing_y
        ix = x0 + t % taps_x * spacing_x
        seen = inside & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
        place = (n * x_n + iy * x_y + ix * x_x)[:, None] + (c * x_c)[None, :]
        pixels = tl.load(x + place, mask=seen[:, None] & (o < total)[None, :], other=0.0).to(tl.float32)
        sums += pixels * tl.load(w + product * total + o, mask=o < total, other=0.0).to(tl.float32)[None, :]
    put(
        sums, n, i * step_y + row, j * step_x + column, o, inside[:, None] & (o < total)[None, :], total,
        bias, out, addend, saved, a, b, out_height, out_width, out_n, out_y, out_x, out_c, KIND, BYTES,
    )  # fmt: skip


class GroupedConvolution(Weights):
    """As `convolution.Convolution`, for groups of few channels. Weights are [taps, inputs, outputs] of each phase."""

    def __init__(self, geometry: Geometry, weight: Any, bias: Any, device: Any, dtype: Any) -> None:
        parts = [part.transpose(2, 3, 0, 1).ravel() for part in geometry.weights(weight)]  # [taps, c, groups · o]
        offsets = [0, *np.cumsum([part.size for part in parts])[:-1].tolist()]
        super().__init__(geometry, weight.shape, np.concatenate(parts), offsets, bias, device, dtype)

    def launch(self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any = None) -> Launch:
        """As `Convolution.launch`."""
        args, constants = self.arguments(x, out, epilogue, out_strides)
        geometry, outputs = self.geometry, self.groups * self.outputs
        wide = min(64, power_of_two(outputs))
        tile = {"BM": 2048 // wide, "BO": wide}
        args |= {"groups": self.groups, "column_tiles": ceil_div(outputs, wide)}
        programs = ceil_div(len(x) * geometry.largest, tile["BM"]) * geometry.count * args["column_tiles"]
        return Launch(_grouped_kernel, programs, args, constants | tile)
