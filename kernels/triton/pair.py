"""Two convolutions in one launch, the second with few outputs: what lies between them never reaches memory.

A decoder's largest value is what its last layer reads. In the paper's ReLU22 decoder that is 64 × 32 × 32: 128 KB in
bfloat16, written once and read once, between 64 KB of features and 6 KB of pixels. Here it stays in registers. A
program has a tile of the first layer's pixels, takes all their channels by matrix products, activates them, and
multiplies them at once by the second layer's weights: [pixels, C] · [C, taps · outputs], which leaves of each pixel
what it gives to every output that sees it. What remains is a sum over shifted pixels (col2im), but of few columns
instead of C. It goes through `tl.gather`, which exchanges values of a program in shared memory, in an order that
shapes alone decide. A scratch in memory would be as large as what is saved (32 float32 columns for 64 two-byte
channels), the sums of atomics have no order, and computing the first layer anew for every tap would cost as often as
much as there are taps.

Where an image has several tiles they overlap by what the second layer sees, and the first layer's pixels there are
computed more than once. An image that fits a tile (256 cells, as below, at most: all of 32 × 32 pixels after a stride
of 2) computes nothing twice.

Both layers are on one grid, of cells: where their steps are s and t pixels (1, or a transposed convolution's stride), a
cell has s × s pixels of the first layer, one of each phase, and s·t × s·t of the second. So through tap u pixel i of
phase f gives to cell i + shift(f, u), there to one of s·t places: alike for all pixels of a phase, so that a column of
the product has one shift.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from fastinv.kernels.triton.boxes import products_of_boxes, turned
from fastinv.kernels.triton.convolution import Convolution, Tile, Tiled, products
from fastinv.kernels.triton.direct import FEW
from fastinv.kernels.triton.epilogue import Epilogue, activate, finish, stored
from fastinv.kernels.triton.geometry import Geometry, Weights, strides
from fastinv.kernels.triton.halves import add_product, halved
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

WIDEST = 128  # channels between the layers: all of them are one tile
FEWEST = 128  # cells of a tile: two wgmma of 64 rows, one for each 4 of its 8 warps
NOWHERE = 1 << 14  # the shift where there is no tap: further than any tile


@triton.jit
def _pair_kernel(
    x, w, bias, phases, last_w, last_bias, sources, out, addend, saved, a, b, between_a, between_b,
    height, width, channels, between, outputs, out_height, out_width,
    x_n, x_y, x_x, x_c, out_n, out_y, out_x, out_c,
    stride_y, stride_x, spacing_y, spacing_x,
    tiles_y, tiles_x, advance_y, advance_x, before_y, before_x, after_y, after_x, per_tap, halfway,
    BOXES: tl.constexpr, TURNED: tl.constexpr, PHASE: tl.constexpr, PHASES: tl.constexpr, PITCH: tl.constexpr,
    FLAT: tl.constexpr, FULL: tl.constexpr, BETWEEN: tl.constexpr, KIND: tl.constexpr, BYTES: tl.constexpr,
    PRECISION: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    COLUMNS: tl.constexpr, CELL_Y: tl.constexpr, CELL_X: tl.constexpr,
    SLOTS: tl.constexpr, OUTPUTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out[n, i·CELL_Y + qy, j·CELL_X + qx, o] = finish(last_bias[o] + Σ_{f,s} h[n, f, (i, j) − shift] · last_w[col]).

    h[n, f, i, j, c] = between(bias[c] + Σ_{t,k} w[c, t, k] · x[n, iy(i, t), ix(j, t), k]): the first layer's pixel i, j
    of phase f, 0 outside its image. x: [images, height, width, channels], out: [images, out_height, out_width,
    outputs], both with any strides; addend as out, contiguous. w, phases: `packed` and `Geometry.table`. With BOXES x
    and w are tensor descriptors, as in `boxes.py`.

    last_w: [COLUMNS, BN], a row for each output and tap, then the rows of their lower halves, as w has them. sources:
    int32 [phases, 3, SLOTS, OUTPUTS, PLACES]: shift down and across, in cells, and the column of the s-th tap that
    brings pixels of phase f to place q of a cell.
    """
    program = tl.program_id(0)
    tile_x = program % tiles_x
    tile_y = program // tiles_x % tiles_y
    n = program // (tiles_x * tiles_y)
    p = tl.arange(0, TY * TX)
    at_y = p // TX
    at_x = p % TX
    i = tile_y * advance_y + at_y
    j = tile_x * advance_x + at_x
    base = n * x_n + tl.zeros((TY * TX,), tl.int32)
    c = tl.arange(0, BN)
    PART: tl.constexpr = OUTPUTS * PLACES
    entry = tl.arange(0, SLOTS)[:, None] * PART + tl.arange(0, PART)[None, :]

    total = tl.zeros((PART, TY * TX), tl.float32)
    # What is alike in all phases would be loaded before them, and fill registers that the sums need.
    for f in tl.range(0, PHASES, disable_licm=True):
        phase = phases + f * PHASE
        inside = (i < tl.load(phase + 2)) & (j < tl.load(phase + 3))
        taps_y, taps_x = tl.load(phase + 4), tl.load(phase + 5)
        first_y, first_x = tl.load(phase + 6), tl.load(phase + 7)
        if BOXES:
            hidden = products_of_boxes(
                x, w, n, tile_y * advance_y + first_y, tile_x * advance_x + first_x, 0, tl.load(phase + 8),
                taps_y, taps_x, per_tap, halfway, spacing_y, spacing_x, PRECISION, TURNED, TY * TX, BN, BK,
            )  # fmt: skip
        else:
            hidden = products(
                x, w + tl.load(phase + 8), c, PITCH, halfway, base, inside,
                i * stride_y + first_y, j * stride_x + first_x, height, width, channels, taps_y, taps_x,
                x_y, x_x, x_c, spacing_y, spacing_x, FLAT, FULL, PRECISION, TY * TX, BN, BK,
            )  # fmt: skip
        if bias is not None:
            hidden += tl.load(bias + c, mask=c < between, other=0.0)[None, :]
        hidden = activate(hidden, between_a, between_b, BETWEEN)
        hidden = tl.where(inside[:, None], hidden, 0.0).to(last_w.dtype.element_ty)
        taps = last_w + tl.arange(0, COLUMNS)[None, :] * BN + c[:, None]
        lower = tl.load(taps + COLUMNS * BN) if PRECISION == "tf32x3" else None
        given = tl.zeros((TY * TX, COLUMNS), tl.float32)
        given = tl.trans(add_product(given, hidden, tl.load(taps), lower, PRECISION))
        source = sources + f * (3 * SLOTS * PART) + entry
        from_y = at_y[None, None, :] - tl.load(source)[:, :, None]
        from_x = at_x[None, None, :] - tl.load(source + SLOTS * PART)[:, :, None]
        there = (from_y >= 0) & (from_y < TY) & (from_x >= 0) & (from_x < TX)
        place = tl.load(source + 2 * SLOTS * PART)[:, :, None] * (TY * TX) + from_y * TX + from_x
        place = tl.reshape(tl.where(there, place, 0), (SLOTS * PART * TY * TX,))
        taken = tl.gather(tl.reshape(given, (COLUMNS * TY * TX,)), place, 0)
        taken = tl.reshape(taken, (SLOTS, PART, TY * TX))
        total += tl.sum(tl.where(there, taken, 0.0), axis=0)

    # Cells at an edge of the tile that the image goes on beyond are the neighbouring tile's.
    whole = (at_y >= tl.where(tile_y == 0, 0, before_y)) & (at_x >= tl.where(tile_x == 0, 0, before_x))
    whole = whole & (at_y < tl.where(tile_y == tiles_y - 1, TY, TY - after_y))
    whole = whole & (at_x < tl.where(tile_x == tiles_x - 1, TX, TX - after_x))
    part = tl.arange(0, PART)
    o = (part // PLACES)[:, None]
    q = part % PLACES
    oy = i[None, :] * CELL_Y + (q // CELL_X)[:, None]
    ox = j[None, :] * CELL_X + (q % CELL_X)[:, None]
    inside = whole[None, :] & (o < outputs) & (q < CELL_Y * CELL_X)[:, None] & (oy < out_height) & (ox < out_width)
    if last_bias is not None:
        total += tl.load(last_bias + o, mask=o < outputs, other=0.0)
    position = ((n * out_height + oy) * out_width + ox) * outputs + o
    total = finish(total, position, inside, addend, saved, a, b, KIND)
    place = n * out_n + oy * out_y + ox * out_x + o * out_c
    tl.store(out + place, stored(total, BYTES).to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Term:
    """What a pixel of one phase gives through one tap, on one axis: the kernel's entry, a place in a cell, a shift."""

    tap: int
    place: int
    shift: int


def terms(first: Geometry, last: Geometry, axis: int) -> list[list[Term]]:
    """For each phase of the first layer; `last` reads pixel by pixel, at a stride of 1.

    Its output i·step + row reads pixel i + first + t·spacing. So pixel m goes to m·step + row − step·(first +
    t·spacing), and phase f's pixel i is m = i·(first layer's step) + f.
    """
    step, spacing = last.step[axis], last.spacing[axis]
    cell = first.step[axis] * step
    found = []
    for phase in first.axes[axis]:
        to = [
            (tap, step * (phase.row - other.first - t * spacing) + other.row)
            for other in last.axes[axis]
            for t, tap in enumerate(other.taps)
        ]
        found.append([Term(tap, offset % cell, offset // cell) for tap, offset in to])
    return found


@dataclass(frozen=True)
class Cover:
    """How one axis of an image is cut into tiles.

    Attributes:
        cells: of the image.
        before, after: cells that those of an output see beside it.
    """

    cells: int
    before: int
    after: int

    def advance(self, size: int) -> int:
        """Cells from one tile of this size to the next."""
        return size - self.before - self.after

    def tiles(self, size: int) -> int:
        """How many tiles of this size; 0 where they are too small."""
        if self.cells <= size:
            return 1
        advance = self.advance(size)
        return ceil_div(self.cells - self.before - self.after, advance) if advance > 0 else 0


def cover(first: Geometry, last: Geometry, axis: int) -> Cover:
    shifts = [term.shift for phase in terms(first, last, axis) for term in phase]
    cells = ceil_div(first.outputs[axis], first.step[axis])
    outputs = ceil_div(last.outputs[axis], first.step[axis] * last.step[axis])
    return Cover(max(cells, outputs), max([0, *shifts]), max([0, *(-shift for shift in shifts)]))


def sources_of(first: Geometry, last: Geometry, outputs: int, kernel: tuple[int, int]) -> Any:
    """`sources`, int32 [phases, 3, slots, outputs, places], the last three rounded up to powers of two.

    Args:
        kernel: rows and columns of the last layer's weights; column o · rows · columns + tap is output o's.
    """
    cell_x = first.step[1] * last.step[1]
    taps: list[dict[int, list[tuple[Term, Term]]]] = []
    for down in terms(first, last, 0):
        for across in terms(first, last, 1):
            found = defaultdict(list)
            for y in down:
                for x in across:
                    found[y.place * cell_x + x.place].append((y, x))
            taps.append(found)
    slots = max((len(pairs) for found in taps for pairs in found.values()), default=1)
    sizes = slots, outputs, first.step[0] * last.step[0] * cell_x
    result = np.zeros((len(taps), 3, *map(power_of_two, sizes)), np.int32)
    result[:, :2] = NOWHERE
    for phase, found in enumerate(taps):
        for place, pairs in found.items():
            for slot, (y, x) in enumerate(pairs):
                result[phase, 0, slot, :outputs, place] = y.shift
                result[phase, 1, slot, :outputs, place] = x.shift
                columns = np.arange(outputs) * math.prod(kernel) + y.tap * kernel[1] + x.tap
                result[phase, 2, slot, :outputs, place] = columns
    return result


def columns_of(weight: Any) -> int:
    """Of the second product, for weights [1, outputs, inputs, kh, kw]; 16 at least."""
    return max(16, power_of_two(math.prod(weight.shape) // weight.shape[2]))


def cells_of(first: Convolution, columns: int, sources: Any) -> int:
    """Cells of a tile, 256 or `FEWEST`, that 8 warps can have in registers without spilling; 0 where those are none.

    A cell has the sums of both products, what is taken of the second, and the total. Addresses of tiles that run over
    taps and channels leave less room for them.
    """
    taken, total = math.prod(sources.shape[2:]), math.prod(sources.shape[3:])
    values = max(16, power_of_two(first.outputs)) + columns + taken + total
    most = 96 if first.flat else 192  # of a thread: tried with the compiler
    return next((cells for cells in (256, FEWEST) if cells * values <= 256 * most), 0)


class Pair(Tiled):
    """Two convolutions, ready for any batch; launched as one.

    Args:
        first: of one group.
        last: a kernel for the other, with few outputs, of one group, which reads at a stride of 1. See `fits`.
        weight: its weights, float32 [1, outputs, inputs, kh, kw].
        between: kind, a and b of the activation between the two.
    """

    def __init__(self, first: Convolution, last: Weights, weight: Any, between: tuple[str, float, float]) -> None:
        import torch

        self.first, self.last, self.between = first, last, between
        device, dtype = first.weight.device, first.weight.dtype
        width = max(16, power_of_two(first.outputs))
        self.covers = [cover(first.geometry, last.geometry, axis) for axis in (0, 1)]
        sources = sources_of(first.geometry, last.geometry, last.outputs, weight.shape[3:])
        self.slots, self.outputs, self.places = sources.shape[2:]
        self.columns = columns_of(weight)
        self.size = self._best(cells_of(first, self.columns, sources))
        # Of the paper's ReLU22 decoder on an H100: 959 µs with boxes, and 1328 without, of the stages that did best.
        self.tile = Tile(math.prod(self.size), width, first.tile.k, 8, 3, first.boxes)
        self.candidates = (self.tile, replace(self.tile, stages=2))
        last_w = np.zeros((self.columns, width), np.float32)
        rows = weight[0].swapaxes(1, 0).reshape(first.outputs, -1).T  # [outputs · taps, channels]
        last_w[: len(rows), : first.outputs] = rows
        if first.precision == "tf32x3":
            last_w = np.concatenate(halved(last_w))
        self.weight = torch.from_numpy(last_w).to(device, dtype)
        self.sources = torch.from_numpy(sources).to(device)

    @staticmethod
    def fits(first: Any, last: Any, weight: Any) -> bool:
        """Whether there is a launch for the two; `last`, whose weights are given, reads what `first` writes."""
        if not isinstance(first, Convolution) or not isinstance(last, Weights):
            return False
        a, b = first.geometry, last.geometry
        if not first.groups == last.groups == 1 or first.outputs > WIDEST or last.outputs > FEW or b.stride != (1, 1):
            return False
        sources = sources_of(a, b, last.outputs, weight.shape[3:])
        return cells_of(first, columns_of(weight), sources) > 0 and all(cover(a, b, k).tiles(8) > 0 for k in (0, 1))

    @property
    def reads(self) -> str:
        """As `Weights.reads`, of both."""
        return f"{self.first.reads} then {self.last.reads}"

    def planar(self) -> None:
        """As `Weights.planar`."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.first.input_shape

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return self.last.output_shape

    @property
    def precision(self) -> str:
        return self.first.precision

    @property
    def tiles(self) -> tuple[int, int]:
        """Of an image, down and across."""
        return self.covers[0].tiles(self.size[0]), self.covers[1].tiles(self.size[1])

    @property
    def flops(self) -> int:
        """Of one image, with all that tiles are larger than layers, and that is computed twice."""
        first, (_, n, k) = self.first, self.tile.numbers[:3]
        inputs = first.inputs if first.flat else ceil_div(first.inputs, k) * k
        taps = [len(y.taps) * len(x.taps) for y, x in first.geometry.phases()]
        depth = sum(ceil_div(count * inputs, k) * k + self.columns for count in taps)
        return 2 * math.prod(self.tiles) * self.tile.m * n * depth

    def _best(self, cells: int) -> tuple[int, int]:
        """The tile of so many cells of which an image needs the fewest; of those that with the longest rows."""
        shapes = [(cells // columns, columns) for columns in (1 << e for e in range(cells.bit_length()))]
        down, across = self.covers
        counts = {s: down.tiles(s[0]) * across.tiles(s[1]) for s in shapes}
        return min((s for s in shapes if counts[s]), key=lambda s: (counts[s], -s[1]))

    def launch(self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any = None) -> Launch:
        """As `Convolution.launch`, from the first layer's x to the last layer's out."""
        first, last, tile = self.first, self.last, self.tile
        (down, across), (tiles_y, tiles_x) = self.covers, self.tiles
        out_strides = out_strides or strides(*last.geometry.outputs, last.outputs)
        args, constants = first.arguments(x, out, epilogue, out_strides)
        args |= {
            "last_w": self.weight, "last_bias": last.bias, "sources": self.sources,
            "between_a": self.between[1], "between_b": self.between[2],
            "between": first.outputs, "outputs": last.outputs,
            "out_height": last.geometry.outputs[0], "out_width": last.geometry.outputs[1],
            "tiles_y": tiles_y, "tiles_x": tiles_x,
            "advance_y": down.advance(self.size[0]), "advance_x": across.advance(self.size[1]),
            "before_y": down.before, "before_x": across.before, "after_y": down.after, "after_x": across.after,
        }  # fmt: skip
        args |= {"per_tap": 0, "halfway": first.halfway}
        if tile.boxes:
            args |= first.described(x, args, (1, *self.size), tile)
        for name in ("images", "step_y", "step_x"):
            del args[name]
        cell = [a * b for a, b in zip(first.geometry.step, last.geometry.step, strict=True)]
        constants |= {
            "BOXES": tile.boxes, "TURNED": turned(tile.n, first.precision), "FLAT": first.flat,
            "FULL": first.inputs % tile.k == 0, "PRECISION": first.precision,
            "PITCH": first.weight.shape[1], "BETWEEN": self.between[0],
            "TY": self.size[0], "TX": self.size[1], "BN": tile.n, "BK": tile.k,
            "COLUMNS": self.columns, "CELL_Y": cell[0], "CELL_X": cell[1],
            "SLOTS": self.slots, "OUTPUTS": self.outputs, "PLACES": self.places,
        }  # fmt: skip
        programs = len(x) * tiles_y * tiles_x
        return Launch(_pair_kernel, programs, args, constants, tile.warps, tile.stages)
