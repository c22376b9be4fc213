"""Convolutions with few outputs or few inputs, without tensor cores: a matrix tile would be mostly empty.

A thread has some outputs one below the other, of all phases, and what it reads of a column of the input goes to all
outputs that see it. Taps, strides and borders are constants of the kernel, so that a load is an address plus a
constant. All products are of float32. On an H100 4,096 images of MNIST's conv1 decoder took 84 µs and of CIFAR-10's
conv11 565, as matrix products 2,196 and 1,037.

What lies side by side in memory is side by side among threads. With few outputs the columns of a tile are channels,
whose sums come together at the end, or one channel where the input is planar, as features are in the user's order:
there it is pixels that lie side by side. Else the columns are the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, put
from fastinv.kernels.triton.geometry import Geometry, Weight, Weights
from fastinv.kernels.triton.launch import Launch, ceil_div, interpreted, power_of_two

FEW = 4  # outputs whose sums a thread has all
WIDEST = 64  # outputs that can be the columns of a tile
SECTOR = 16  # channels that are loaded side by side: 32 bytes, of which memory is made, if they have two each
VALUES = 72  # of a thread, sums and what it reads of a column: of 128 registers, with weights and addresses
MOST_ROWS = 8  # of a thread: more would leave too few threads
PRODUCTS = 256  # of a channel, that are written out one by one: so many take the compiler 20 s
LOAD = 4  # products that a multiprocessor can do while it loads one value from its cache
THREADS = 128  # of a program


@triton.jit
def _added(sums, value, INDEX: tl.constexpr):
    return sums[:INDEX] + (sums[INDEX] + value,) + sums[INDEX + 1 :]  # noqa: RUF005


@triton.jit
def _direct_kernel(
    x, w, bias, scale, zero_point, flag, out, addend, saved, a, b,
    images, height, width, channels, out_height, out_width, cells_y, cells_x, x_n, out_n, step_y, step_x,
    X_Y: tl.constexpr, X_X: tl.constexpr, X_C: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    OUT_Y: tl.constexpr, OUT_X: tl.constexpr, OUT_C: tl.constexpr, OUTPUTS: tl.constexpr,
    OFFSETS_Y: tl.constexpr, FREE_Y: tl.constexpr, CHECKED_Y: tl.constexpr,
    ENTRIES_Y: tl.constexpr, PHASES_Y: tl.constexpr, TAPS_Y: tl.constexpr, COUNT_Y: tl.constexpr,
    OFFSETS_X: tl.constexpr, FREE_X: tl.constexpr, CHECKED_X: tl.constexpr,
    ENTRIES_X: tl.constexpr, PHASES_X: tl.constexpr, TAPS_X: tl.constexpr, COUNT_X: tl.constexpr,
    KERNEL_Y: tl.constexpr, KERNEL_X: tl.constexpr, OVER_CHANNELS: tl.constexpr,
    KIND: tl.constexpr, BYTES: tl.constexpr,
    BM: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[n, i·step + row, j·step + column, o] = finish(bias[o] + Σ_{t,c} w[t, c, o] · x[n, iy(i, t), ix(j, t), c]).

    x: [images, height, width, channels], with any strides, of which X_Y, X_X and X_C are constants, and of any type;
    with scale and zero_point, float32 [channels], it stands for (x − zero_point) · scale. flag: int32 [1], set to 1
    where a value is NaN or Inf; or None. out, addend and saved: as in `convolution.py`.

    w: float32 [blocks of channels, KERNEL_Y, KERNEL_X, PARTS, COLUMNS]. With OVER_CHANNELS the columns are channels and
    the parts outputs, else the columns are outputs, of one part, and a block is a channel. A thread has cells of ROWS
    outputs of each phase; the constants of both axes are those of `Reach`.
    """
    XC: tl.constexpr = COLUMNS if OVER_CHANNELS else 1
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    there = m < images * cells_y * cells_x
    m = tl.where(there, m, 0)
    n = m // (cells_y * cells_x)
    i = m // cells_x % cells_y * ROWS
    j = m % cells_x
    y = i * STRIDE_Y
    x0 = j * STRIDE_X
    k = tl.arange(0, COLUMNS)
    c = tl.arange(0, XC)
    pixels = x + (n * x_n + y * X_Y + x0 * X_X)[:, None] + (c * X_C)[None, :]
    weights = w + k[None, :] + tl.zeros((1 if OVER_CHANNELS else BM, 1), tl.int32)

    finite = tl.full((BM, XC), True, tl.int1)
    sums = ()
    for _ in tl.static_range(ROWS * COUNT_Y * COUNT_X * PARTS):
        sums = sums + (tl.zeros((BM, COLUMNS), tl.float32),)  # noqa: RUF005
    for block in range(0, channels // XC):
        if scale is not None:
            zero = tl.load(zero_point + block * XC + c)[None, :]
            unit = tl.load(scale + block * XC + c)[None, :]
        for e in tl.static_range(len(OFFSETS_X)):
            column = ()
            for f in tl.static_range(len(OFFSETS_Y)):
                place = pixels + (OFFSETS_Y[f] * X_Y + OFFSETS_X[e] * X_X)
                if FREE_Y[f] and FREE_X[e]:
                    value = tl.load(place).to(tl.float32)
                    if scale is not None:
                        value = (value - zero) * unit
                else:
                    seen = tl.full((BM, 1), True, tl.int1)
                    if not FREE_Y[f]:
                        seen = seen & ((y + OFFSETS_Y[f] >= 0) & (y + OFFSETS_Y[f] < height))[:, None]
                    if not FREE_X[e]:
                        seen = seen & ((x0 + OFFSETS_X[e] >= 0) & (x0 + OFFSETS_X[e] < width))[:, None]
                    value = tl.load(place, mask=seen, other=0).to(tl.float32)
                    if scale is not None:
                        value = tl.where(seen, (value - zero) * unit, 0.0)
                if flag is not None:
                    if CHECKED_Y[f] and CHECKED_X[e]:
                        finite = finite & (tl.abs(value) < float("inf"))
                column = column + (value,)  # noqa: RUF005
            for s in tl.static_range(len(TAPS_Y)):
                for t in tl.static_range(len(TAPS_X)):
                    if ENTRIES_X[t] == e:
                        for part in tl.static_range(PARTS):
                            tap = (TAPS_Y[s] * KERNEL_X + TAPS_X[t]) * PARTS + part
                            weight = tl.load(weights + tap * COLUMNS)
                            for r in tl.static_range(ROWS):
                                product = column[ENTRIES_Y[s * ROWS + r]] * weight
                                sums = _added(
                                    sums, product,
                                    ((r * COUNT_Y + PHASES_Y[s]) * COUNT_X + PHASES_X[t]) * PARTS + part,
                                )  # fmt: skip
        pixels += XC * X_C
        weights += KERNEL_Y * KERNEL_X * PARTS * COLUMNS

    if flag is not None:
        tl.store(flag + tl.zeros((BM, XC), tl.int32), tl.full((BM, XC), 1, tl.int32), mask=~finite)
    for r in tl.static_range(ROWS):
        for p in tl.static_range(COUNT_Y):
            for q in tl.static_range(COUNT_X):
                for part in tl.static_range(PARTS):
                    total = sums[((r * COUNT_Y + p) * COUNT_X + q) * PARTS + part]
                    o = k
                    if OVER_CHANNELS:
                        total = tl.sum(total, axis=1)[:, None]
                        o = part + tl.arange(0, 1)
                    oy = (i + r) * step_y + p
                    ox = j * step_x + q
                    inside = there & (oy < out_height) & (ox < out_width)
                    put(
                        total, n, oy, ox, o, inside[:, None] & (o < OUTPUTS)[None, :], OUTPUTS, bias, out,
                        addend, saved, a, b, out_height, out_width, out_n, OUT_Y, OUT_X, OUT_C, KIND, BYTES,
                    )  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """What cells of outputs read along one axis.

    A cell has `rows` outputs of each phase, one after the other; the g-th begins at input g · rows · stride.

    Attributes:
        rows: outputs of a cell and phase.
        cells: of an image.
        count: how many phases.
        offsets: of the inputs that a cell reads, from where it begins.
        free: for each of them whether it is inside the image for all cells.
        checked: for each of them whether it is among the few through which the cells reach every input.
        phases, taps: of each tap its phase and the kernel's entry.
        entries: of each tap and each of the `rows` the number of the offset that it reads.
        whole: whether every input is read.
    """

    rows: int
    cells: int
    count: int
    offsets: tuple[int, ...]
    free: tuple[bool, ...]
    checked: tuple[bool, ...]
    phases: tuple[int, ...]
    taps: tuple[int, ...]
    entries: tuple[int, ...]
    whole: bool

    def constants(self, axis: str) -> dict[str, Any]:
        return {
            f"OFFSETS_{axis}": self.offsets, f"FREE_{axis}": self.free, f"CHECKED_{axis}": self.checked,
            f"ENTRIES_{axis}": self.entries, f"PHASES_{axis}": self.phases, f"TAPS_{axis}": self.taps,
            f"COUNT_{axis}": self.count,
        }  # fmt: skip


def reach(geometry: Geometry, axis: int, rows: int) -> Reach:
    """Along an axis, for cells of so many outputs of each phase."""
    inputs, stride, spacing = geometry.inputs[axis], geometry.stride[axis], geometry.spacing[axis]
    axes = geometry.axes[axis]
    cells = ceil_div(axes[0].rows, rows)
    taps = [(p, u, a.first + t * spacing) for p, a in enumerate(axes) for t, u in enumerate(a.taps)]
    offsets = sorted({first + r * stride for _, _, first in taps for r in range(rows)})
    begins = range(0, cells * rows * stride, rows * stride)
    left, checked = set(range(inputs)), set()
    for offset in sorted(offsets, key=lambda offset: (not 0 <= offset < rows * stride, offset)):
        reached = left & {begin + offset for begin in begins}
        if reached:
            left -= reached
            checked.add(offset)
    return Reach(
        rows=rows,
        cells=cells,
        count=len(axes),
        offsets=tuple(offsets),
        free=tuple(offset >= 0 and begins[-1] + offset < inputs for offset in offsets),
        checked=tuple(offset in checked for offset in offsets),
        phases=tuple(p for p, _, _ in taps),
        taps=tuple(u for _, u, _ in taps),
        entries=tuple(offsets.index(first + r * stride) for _, _, first in taps for r in range(rows)),
        whole=not left,
    )


class DirectConvolution(Weights):
    """As `convolution.Convolution`, for one group with few outputs or few inputs. Products are of float32.

    Attributes:
        takes_all: whether `launch_planar` takes whatever features there are.
        precision: of products, as of a `Convolution`.

    Args:
        planar: whether in memory the pixels of a channel lie side by side, not the channels of a pixel.
    """

    takes_all = True
    precision = "ieee"

    def __init__(self, geometry: Geometry, weight: Any, bias: Any, device: Any, planar: bool = False) -> None:
        import torch

        _, outputs, channels, *kernel = weight.shape
        self.kernel = kernel
        self.over_channels = outputs <= FEW
        if self.over_channels:
            self.parts, self.columns = outputs, 1 if planar else math.gcd(channels, SECTOR)
            width = min(self.columns, 2)  # columns of a thread
            pixels = 2 if self.columns == 1 else 1  # of a thread: a weight is loaded once for all of them
            self.rows = _rows(geometry, self.parts, width * pixels, width * pixels)
        else:
            self.parts, self.columns = 1, power_of_two(outputs)
            width, pixels = min(self.columns, 4), 1
            self.rows = _rows(geometry, self.parts, width, 1)
        self.tile_pixels = THREADS * width * pixels // self.columns * interpreted(device)
        self.reaches = reach(geometry, 0, self.rows), reach(geometry, 1, 1)
        packed = _packed(weight[0], self.columns, self.over_channels)
        super().__init__(geometry, weight.shape, packed, [0] * geometry.count, bias, device, torch.float32)
        self._again = geometry, weight, bias, device

    @staticmethod
    def fits(geometry: Geometry, weight: Any) -> bool:
        """Whether weights [groups, outputs, inputs, kh, kw] are one group's, few enough to be written out."""
        groups, outputs, _, *kernel = weight.shape
        parts = outputs if outputs <= FEW else 1
        sums = geometry.count * (outputs if outputs <= FEW else 4)  # of a thread, and as many again in what it reads
        return groups == 1 and outputs <= WIDEST and 2 * sums <= VALUES and math.prod(kernel) * parts <= PRODUCTS

    def planar(self) -> DirectConvolution | None:
        """The same for inputs that are planar; None where some are not read: are all finite?."""
        if not all(r.whole for r in self.reaches):
            return None
        return DirectConvolution(*self._again, planar=True) if self.over_channels and self.columns > 1 else self

    def takes(self, features: Any, scale: Any) -> bool:
        """Whether `launch_planar` can read them: always."""
        return True

    def launch(self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any = None) -> Launch:
        """As `Convolution.launch`."""
        return self._launch(x, out, epilogue, out_strides)

    def launch_planar(
        self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any, scale: Any, zero_point: Any, flag: Any
    ) -> Launch:
        """For x [N, C, H, W], contiguous, of any type; scale, zero point and flag as in `layout.py`."""
        height, width, channels = self.input_shape
        x_strides = channels * height * width, width, 1, height * width
        return self._launch(x, out, epilogue, out_strides, x_strides, scale, zero_point, flag)

    def _launch(
        self,
        x: Any,
        out: Any,
        epilogue: Epilogue,
        out_strides: Any,
        x_strides: Any = None,
        scale: Any = None,
        zero_point: Any = None,
        flag: Any = None,
    ) -> Launch:
        given, constants = self.arguments(x, out, epilogue, out_strides, x_strides)
        down, across = self.reaches
        args = {name: value for name, value in given.items() if name in _direct_kernel.arg_names}
        args |= {
            "scale": scale, "zero_point": zero_point, "flag": flag, "cells_y": down.cells, "cells_x": across.cells,
        }  # fmt: skip
        constants = {
            "X_Y": given["x_y"], "X_X": given["x_x"], "X_C": given["x_c"],
            "OUT_Y": given["out_y"], "OUT_X": given["out_x"], "OUT_C": given["out_c"], "OUTPUTS": self.outputs,
            "STRIDE_Y": self.geometry.stride[0], "STRIDE_X": self.geometry.stride[1],
            **down.constants("Y"), **across.constants("X"), "KERNEL_Y": self.kernel[0], "KERNEL_X": self.kernel[1],
            "OVER_CHANNELS": self.over_channels,
            "KIND": constants["KIND"], "BYTES": constants["BYTES"],
            "BM": self.tile_pixels, "ROWS": self.rows, "PARTS": self.parts, "COLUMNS": self.columns,
        }  # fmt: skip
        programs = ceil_div(len(x) * down.cells * across.cells, self.tile_pixels)
        return Launch(_direct_kernel, programs, args, constants, THREADS // 32)


def _packed(weight: Weight, columns: int, over_channels: bool) -> Weight:
    """Weights [outputs, inputs, kh, kw] as the kernel has them, flat; outputs that fill up the columns are zero."""
    outputs, channels, *kernel = weight.shape
    if over_channels:
        return weight.reshape(outputs, channels // columns, columns, *kernel).transpose(1, 3, 4, 0, 2).flatten()
    padded = np.zeros((columns, channels, *kernel), np.float32)
    padded[:outputs] = weight
    return padded.transpose(1, 2, 3, 0).flatten()


def _rows(geometry: Geometry, parts: int, width: int, read: int) -> int:
    """Outputs of a cell and phase: so many that they take least, if they fit the registers.

    Args:
        parts: of `_direct_kernel`.
        width, read: values that a thread has of an output, and of an input.
    """
    across = reach(geometry, 1, 1)

    def cost(rows: int) -> int:
        down = reach(geometry, 0, rows)
        loads = len(down.offsets) * len(across.offsets)
        return down.cells * (rows * _products(geometry, parts) + LOAD * loads)

    def fits(rows: int) -> bool:
        values = width * rows * geometry.count * parts + read * len(reach(geometry, 0, rows).offsets)
        return values <= VALUES and rows * _products(geometry, parts) <= PRODUCTS

    return min((rows for rows in range(1, MOST_ROWS + 1) if rows == 1 or fits(rows)), key=cost)


def _products(geometry: Geometry, parts: int) -> int:
    return parts * math.prod(sum(len(axis.taps) for axis in axes) for axes in geometry.axes)
