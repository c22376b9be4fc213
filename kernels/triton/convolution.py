"""Convolutions, transposed convolutions and dense layers as matrix products, forward and back to the input.

The rows of the product are the pixels of all images, its columns the output channels of a group; the matrix of what
each pixel sees is never formed, its tiles are gathered (implicit GEMM, as in cuDNN: Chetlur et al. 2014). All phases of
a strided transposed convolution run in one launch, those of the same pixels side by side, so that what they share stays
in the cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import triton
import triton.language as tl
from fastinv.kernels.triton.boxes import _boxes_kernel, box_for, turned
from fastinv.kernels.triton.epilogue import Epilogue, put
from fastinv.kernels.triton.geometry import Geometry, Weights, packed, phase_of
from fastinv.kernels.triton.halves import add_product, halved
from fastinv.kernels.triton.launch import Launch, ceil_div, copies_boxes, power_of_two, processors
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def products(
    x, w, rows, pitch, halfway, base, inside, y, x0, height, width, channels, taps_y, taps_x,
    x_y, x_x, x_c, spacing_y, spacing_x,
    FLAT: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ_{t,c} w[o, t, c] · x[n, y + ty · spacing_y, x0 + tx · spacing_x, c], float32 [BM, BN].

    Of BM pixels, of which those `inside` count: their first tap is at y, x0 (which may lie outside), and `base` is
    where their image and group begin; and of the BN outputs o whose weights are these `rows` of w, `packed`, of `pitch`
    columns, from a phase's first on, and `halfway` rows further their lower halves, where `add_product` asks for them.
    With FLAT the tiles of the sum run over taps and channels together, else over the channels of one tap; with FULL
    those fill their tiles.
    """
    k = tl.arange(0, BK)
    taps = taps_y * taps_x
    if FLAT:
        blocks = (taps * channels + BK - 1) // BK
    else:
        per_tap = (channels + BK - 1) // BK
        blocks = taps * per_tap
    weights = w + (rows * pitch)[None, :] + k[:, None]

    sums = tl.zeros((BM, BN), tl.float32)
    for block in range(0, blocks):
        if FLAT:
            product = block * BK + k
            t = product // channels
            c = product % channels
            iy = y[:, None] + (t // taps_x * spacing_y)[None, :]
            ix = x0[:, None] + (t % taps_x * spacing_x)[None, :]
            seen = inside[:, None] & (t < taps)[None, :] & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            place = base[:, None] + iy * x_y + ix * x_x + (c * x_c)[None, :]
        else:
            t = block // per_tap
            c = block % per_tap * BK + k
            iy = y + t // taps_x * spacing_y
            ix = x0 + t % taps_x * spacing_x
            seen = (inside & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width))[:, None]
            if not FULL:
                seen = seen & (c < channels)[None, :]
            place = (base + iy * x_y + ix * x_x)[:, None] + (c * x_c)[None, :]
        pixels = tl.load(x + place, mask=seen, other=0.0).to(w.dtype.element_ty)
        place = weights + block * BK
        lower = tl.load(place + halfway * pitch) if PRECISION == "tf32x3" else None
        sums = add_product(sums, pixels, tl.load(place), lower, PRECISION)
    return sums


@triton.jit
def _convolution_kernel(
    x, w, bias, phases, out, addend, saved, a, b,
    images, height, width, channels, outputs, out_height, out_width,
    x_n, x_y, x_x, x_c, out_n, out_y, out_x, out_c,
    stride_y, stride_x, spacing_y, spacing_x, step_y, step_x,
    pitch, halfway, column_tiles, groups,
    PHASE: tl.constexpr, PHASES: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, KIND: tl.constexpr,
    BYTES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[n, i·step + row, j·step + column, o] = finish(bias[o] + Σ_{t,c} w[o, t, c] · x[n, iy(i, t), ix(j, t), c]).

    x: [images, height, width, groups · channels] and out: [images, out_height, out_width, groups · outputs], both with
    any strides; addend and saved as out, contiguous. w, phases: `packed` and `Geometry.table`. FLAT, FULL: as in
    `products`.
    """
    program = tl.program_id(0)
    per_pixels = column_tiles * groups * PHASES
    tile_m = program // per_pixels
    rest = program % per_pixels
    tile_n = rest % column_tiles
    group = rest // column_tiles % groups
    phase = phases + rest // (column_tiles * groups) * PHASE
    row, column, rows, columns, taps_y, taps_x, first_y, first_x, begin = phase_of(phase)
    w += begin

    m = tile_m * BM + tl.arange(0, BM)
    inside = m < images * rows * columns
    n = m // (rows * columns)
    i = m // columns % rows
    j = m % columns
    y = i * stride_y + first_y
    x0 = j * stride_x + first_x
    base = n * x_n + group * channels * x_c
    o = tile_n * BN + tl.arange(0, BN)
    sums = products(
        x, w, group * column_tiles * BN + o, pitch, halfway, base, inside, y, x0, height, width, channels,
        taps_y, taps_x, x_y, x_x, x_c, spacing_y, spacing_x, FLAT, FULL, PRECISION, BM, BN, BK,
    )  # fmt: skip

    put(
        sums, n, i * step_y + row, j * step_x + column, group * outputs + o,
        inside[:, None] & (o < outputs)[None, :], groups * outputs, bias, out, addend, saved, a, b,
        out_height, out_width, out_n, out_y, out_x, out_c, KIND, BYTES,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A tile of the product: pixels, output channels and products at a time; warps; tiles in flight.

    Attributes:
        boxes: whether its pixels are boxes, which tensor descriptors bring.
        lasting: whether there are as many programs as multiprocessors, which take tile after tile; only with boxes.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    boxes: bool = False
    lasting: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.m, self.n, self.k, self.warps, self.stages, int(self.boxes), int(self.lasting)


class Tiled:
    """What has a `tile`, and other `candidates` for it."""

    tile: Tile
    candidates: tuple[Tile, ...]

    def with_tile(self, tile: Tile) -> Self:
        """The same in tiles that are one of `candidates`; weights and all are shared."""
        other = copy.copy(self)
        other.tile = tile
        return other


def tile_for(outputs: int, products: int, itemsize: int, precision: str, flat: bool, boxes: bool) -> Tile:
    """The tile for so many output channels a group and products an output, by the size of an input in bytes.

    128 rows are two wgmma of 64. Boxes leave the registers to the sums: one group of 4 warps takes both, and several
    programs share a multiprocessor. On an H100 that took 563 µs for the paper's ReLU22 decoder's first layer, 249 for
    ReLU32's; with 8 warps 618 and 274, with addresses in place of boxes 1067 and 551. Addresses spill out of the
    registers on 4 warps, and on 8 with more products or columns where tiles run over taps and channels, or outputs
    cannot be stored many at a time. 64 two-byte inputs are the 128 bytes that shared memory swizzles best.
    """
    most_n, most_k = (128, 64) if itemsize == 2 else (64, 32)
    k = most_k // 2 if flat else most_k
    if flat and precision == "tf32x3":
        k = 16
    if boxes and precision == "tf32":
        most_n = 128
    if flat or outputs % 16 != 0:
        most_n = 64
    n = min(most_n, max(16, power_of_two(outputs)))
    k = min(k, max(16, power_of_two(products)))
    return Tile(128, n, k, 4, 3, boxes=True) if boxes else Tile(128, n, k, 8, 4 if itemsize == 2 else 3)


def variants(tile: Tile, itemsize: int, phases: int) -> tuple[Tile, ...]:
    """The tile, and up to four others that may be faster: each has to be compiled before it can be measured.

    All have as many products at a time: the order of a sum stays. 4 warps of a lasting program spill up to 200 bytes a
    thread where it has 128 sums and adds as many 4-byte values to them.

    Args:
        itemsize: of an input, in bytes.
        phases: of the convolution. Where there are more than one, loads of a lasting program stop between two tiles:
            the compiler cannot tell how many a tile takes.
    """
    found = [tile, replace(tile, m=64, warps=4)]
    if tile.n >= 32:
        found.append(replace(tile, n=tile.n // 2))
    if tile.boxes:
        found.append(replace(tile, warps=8))
        lasting = replace(tile, lasting=True, warps=8 if tile.n == 128 and itemsize == 4 else tile.warps)
        found.append(lasting if phases == 1 else replace(tile, stages=4))
    else:
        found += [replace(tile, stages=tile.stages + 1), replace(tile, stages=tile.stages - 1)]
    return tuple(found)


class Convolution(Weights, Tiled):
    """Weights and geometry of one convolution on a device, ready for any batch.

    Args:
        geometry: where it reads.
        weight: float32 [groups, outputs, inputs, kh, kw], outputs and inputs of a group, for this direction.
        bias: float32 [groups · outputs], or None.
        dtype: what the products are computed from; with `precision` "tf32" or "tf32x3" for float32, else "ieee".
    """

    def __init__(self, geometry: Geometry, weight: Any, bias: Any, device: Any, dtype: Any, precision: str) -> None:
        groups, outputs, channels = weight.shape[:3]
        taps = max(len(y.taps) * len(x.taps) for y, x in geometry.phases())
        # Few channels would leave most of a tile of one tap empty.
        self.flat = channels % 16 != 0 and channels < 64
        products = taps * channels if self.flat else channels
        whole = channels * dtype.itemsize % 16 == 0
        plain = taps > 0 and groups == 1 and geometry.stride == (1, 1)
        self.boxes = plain and not self.flat and whole and copies_boxes(device)
        self.tile = tile_for(outputs, products, dtype.itemsize, precision, self.flat, self.boxes)
        inputs = None if self.flat else self.tile.k
        # Between groups the weights are rounded up to `tile.n`.
        others = variants(self.tile, dtype.itemsize, geometry.count)
        self.candidates = tuple(t for t in others if groups == 1 or t.n == self.tile.n)
        matrix, offsets = packed(geometry.weights(weight), self.tile.n, inputs, self.tile.k)
        self.halfway = 0  # rows of the weights before their lower halves
        if precision == "tf32x3":
            self.halfway = len(matrix)
            matrix = np.concatenate(halved(matrix))
        super().__init__(geometry, weight.shape, matrix, offsets, bias, device, dtype)
        self.precision = precision

    def launch(self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any = None) -> Launch:
        """For x [N, H, W, C], contiguous, and out [N, OH, OW, O] with these strides, in elements; without, contiguous.

        A uint8 `out` gets round(255 · y).
        """
        if self.tile.boxes:
            return self._launch_boxes(x, out, epilogue, out_strides)
        geometry, tile = self.geometry, self.tile
        columns = ceil_div(self.outputs, tile.n)
        args, constants = self.arguments(x, out, epilogue, out_strides)
        args |= {
            "pitch": self.weight.shape[1], "halfway": self.halfway, "column_tiles": columns, "groups": self.groups,
        }  # fmt: skip
        constants |= {
            "FLAT": self.flat, "FULL": self.inputs % tile.k == 0, "PRECISION": self.precision,
            "BM": tile.m, "BN": tile.n, "BK": tile.k,
        }  # fmt: skip
        programs = ceil_div(len(x) * geometry.largest, tile.m) * columns * self.groups * geometry.count
        return Launch(_convolution_kernel, programs, args, constants, tile.warps, tile.stages)

    def _launch_boxes(self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any) -> Launch:
        geometry, tile = self.geometry, self.tile
        box = box_for(geometry, tile.m)
        boxes = [ceil_div(size, part) for size, part in zip((len(x), *geometry.most), box, strict=True)]
        columns = ceil_div(self.outputs, tile.n)
        tiles = math.prod(boxes) * geometry.count * columns
        given, constants = self.arguments(x, out, epilogue, out_strides)
        args = {name: value for name, value in given.items() if name in _boxes_kernel.arg_names}
        args |= {
            **self.described(x, given, box, tile), "tiles": tiles, "tiles_y": boxes[1], "tiles_x": boxes[2],
            "column_tiles": columns,
        }  # fmt: skip
        constants |= {
            "PRECISION": self.precision, "BI": box[0], "BY": box[1], "BX": box[2], "BN": tile.n, "BK": tile.k,
            "TURNED": turned(tile.n, self.precision), "LASTING": tile.lasting,
        }  # fmt: skip
        programs = min(tiles, processors(x.device)) if tile.lasting else tiles
        return Launch(_boxes_kernel, programs, args, constants, tile.warps, tile.stages)

    def described(self, x: Any, given: Mapping[str, Any], box: tuple[int, int, int], tile: Tile) -> dict[str, Any]:
        """Arguments of `products_of_boxes`, for boxes of so many images, rows and columns, and `given` strides."""
        shape = len(x), *self.geometry.inputs, self.inputs
        w = self.weight
        return {
            "x": TensorDescriptor(x, list(shape), [given[f"x_{axis}"] for axis in "nyxc"], [*box, tile.k]),
            "w": TensorDescriptor(w, list(w.shape), list(w.stride()), [tile.n, tile.k]),
            "per_tap": ceil_div(self.inputs, tile.k),
            "halfway": self.halfway,
        }
