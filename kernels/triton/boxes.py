"""Convolutions whose pixels come in boxes, by tensor descriptors: the copy engine (TMA) of Hopper and later.

As matrix products like those of `convolution.py`, of the same weights and in the same order. A tile's pixels are a box
of rows and columns of some images, and so are those that a tap reads, a little further on: no addresses have to be
formed, and what lies outside arrives as zeros. That asks for one group, a stride of 1, and pixels of whole 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import put
from fastinv.kernels.triton.geometry import Geometry, phase_of
from fastinv.kernels.triton.halves import add_product
from fastinv.kernels.triton.launch import ceil_div


@triton.jit
def products_of_boxes(
    x, w, n, y, x0, o, begin, taps_y, taps_x, per_tap, halfway, spacing_y, spacing_x,
    PRECISION: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """As `products`, where x and w are tensor descriptors, whose boxes hold BM pixels and BN outputs.

    The box of the first tap begins at n, y, x0, that of the weights at output o and column `begin`; each tap has
    `per_tap` of them; that of the lower halves at `halfway` + o. With TURNED the pixels are the columns of the product,
    see `turned`.
    """
    sums = tl.zeros((BN, BM) if TURNED else (BM, BN), tl.float32)
    for block in range(0, taps_y * taps_x * per_tap):
        t = block // per_tap
        box = x.load([n, y + t // taps_x * spacing_y, x0 + t % taps_x * spacing_x, block % per_tap * BK])
        pixels = tl.reshape(box, (BM, BK)).to(w.dtype)
        weights = w.load([o, begin + block * BK])
        if TURNED:
            sums = tl.dot(weights, pixels.T, sums, input_precision=PRECISION)
        else:
            lower = w.load([halfway + o, begin + block * BK]).T if PRECISION == "tf32x3" else None
            sums = add_product(sums, pixels, weights.T, lower, PRECISION)
    return tl.trans(sums) if TURNED else sums


@triton.jit
def _boxes_kernel(
    x, w, bias, phases, out, addend, saved, a, b,
    images, outputs, out_height, out_width, out_n, out_y, out_x, out_c,
    spacing_y, spacing_x, step_y, step_x, tiles, tiles_y, tiles_x, column_tiles, per_tap, halfway,
    PHASE: tl.constexpr, PHASES: tl.constexpr, KIND: tl.constexpr, BYTES: tl.constexpr, PRECISION: tl.constexpr,
    BI: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TURNED: tl.constexpr, LASTING: tl.constexpr,
):  # fmt: skip
    """As `_convolution_kernel`, of one group at a stride of 1, where x and w are tensor descriptors.

    A tile's pixels are a box: BY × BX pixels of BI images. So are those that a tap reads, a little further on, and the
    copy engine (TMA) brings them without addresses, with zeros for what lies outside. With LASTING programs take tile
    after tile, and load while they store.
    """
    BM: tl.constexpr = BI * BY * BX
    p = tl.arange(0, BM)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=LASTING):
        tile_n = tile % column_tiles
        phase = phases + tile // column_tiles % PHASES * PHASE
        box = tile // (column_tiles * PHASES)
        row, column, rows, columns, taps_y, taps_x, first_y, first_x, begin = phase_of(phase)
        i0 = box // tiles_x % tiles_y * BY
        j0 = box % tiles_x * BX
        n0 = box // (tiles_x * tiles_y) * BI
        sums = products_of_boxes(
            x, w, n0, i0 + first_y, j0 + first_x, tile_n * BN, begin, taps_y, taps_x, per_tap, halfway,
            spacing_y, spacing_x, PRECISION, TURNED, BM, BN, BK,
        )  # fmt: skip
        n = n0 + p // (BY * BX)
        i = i0 + p // BX % BY
        j = j0 + p % BX
        inside = (n < images) & (i < rows) & (j < columns)
        o = tile_n * BN + tl.arange(0, BN)
        put(
            sums, n, i * step_y + row, j * step_x + column, o,
            inside[:, None] & (o < outputs)[None, :], outputs, bias, out, addend, saved, a, b,
            out_height, out_width, out_n, out_y, out_x, out_c, KIND, BYTES,
        )  # fmt: skip


def turned(outputs: int, precision: str) -> bool:
    """Whether the pixels of boxes are the columns of the product, and so many output channels its rows.

    Triton takes a box from where the copy engine has put it only as the second factor; as the first, it goes through
    registers. But rows of wgmma are 64 at least, and pixels are halved (`halves.py`) in registers anyhow.
    """
    return outputs >= 64 and precision != "tf32x3"


def box_for(geometry: Geometry, pixels: int) -> tuple[int, int, int]:
    """The box of so many pixels, images, rows and columns of a phase, of which a large batch needs the fewest; of those
    that of the fewest images, with the longest rows."""
    rows, columns = geometry.most
    sizes = [1 << e for e in range(pixels.bit_length())]
    shapes = [(pixels // (y * x), y, x) for y in sizes for x in sizes if y * x <= pixels]
    return min(shapes, key=lambda s: (ceil_div(rows, s[1]) * ceil_div(columns, s[2]) / s[0], s[0], -s[2]))
