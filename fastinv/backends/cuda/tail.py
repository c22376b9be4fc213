"""A decoder's last two layers as the one kernel of `kernels/cuda/tail.h` or `wide_tail.h`, where they have the shapes
that these are made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.layers import (
    AROUND,
    AROUND_TWO,
    FINISHES,
    LINEAR,
    ONWARD_TWO,
    are_few,
    finish_of,
    for_tensor_cores,
    padded,
    reads,
    result_of,
    runs_on,
    slope_of,
    tap_tiles,
)
from fastinv.backends.cuda.native import extension, launching, set_fields
from fastinv.backends.cuda.nodes import ConvolutionNode

if TYPE_CHECKING:
    from fastinv import _cuda

NARROW = 128  # inputs that `tail.h` takes; `wide_tail.h` takes 64
BETWEEN, OUTPUTS = 64, 4  # at most
LEFT, EVEN, ODD, RIGHT = range(4)  # the order of Column in tail_last.h
BESIDE = 32  # the column where those to the rows above and below begin


class Tail:
    """A convolution to twice the pixels, an activation, and a convolution to a few channels.

    See `fits`. Takes the place of a `fastinv.kernels.triton.pair.Pair`.

    Args:
        first, last: the two nodes, as they were for two launches.
        other: the pair, or None where there is none; it takes few images of a larger decoder.
    """

    takes_all = False  # features that are not of its type, or do not begin at a multiple of 16 bytes, go another way

    def __init__(self, first: ConvolutionNode, last: ConvolutionNode, other: Any) -> None:
        kernel = first.kernel
        self.other = other
        self.input_shape: tuple[int, int, int] = kernel.input_shape
        self.weight = kernel.weight  # for its device and type
        self.outputs = last.kernel.outputs
        self.bias = None if kernel.bias is None else padded(kernel.bias, BETWEEN)
        self.last_bias = last.kernel.bias
        self.slope = slope_of(first.ending.activation)
        dtype, device = kernel.weight.dtype, kernel.weight.device
        taps = ONWARD_TWO if kernel.inputs == NARROW else AROUND_TWO
        self.first = for_tensor_cores(tap_tiles(kernel.geometry, first.weight, taps), dtype, device)
        self.last = for_tensor_cores(_last_tiles(kernel.geometry, last.kernel.geometry, last.weight), dtype, device)

    @staticmethod
    def fits(first: ConvolutionNode, last: ConvolutionNode) -> bool:
        """Whether there is a kernel for the two, built, for this device; `last` reads what `first` writes."""
        from fastinv.kernels.triton.geometry import Weights

        a, b = first.kernel, last.kernel
        return (
            isinstance(a, Weights)
            and isinstance(b, Weights)
            and a.groups == b.groups == 1
            and a.weight.dtype.itemsize == 2
            and a.outputs <= BETWEEN
            and b.outputs <= OUTPUTS
            and b.geometry.inputs == a.geometry.outputs
            and (reads(a.geometry, ONWARD_TWO) or (a.inputs != NARROW and reads(a.geometry, AROUND_TWO)))
            and reads(b.geometry, AROUND)
            and first.ending.activation.kind in LINEAR
            and last.ending.activation.kind in FINISHES
            and len(first.inputs) == len(last.inputs) == 1
            and runs_on(a.weight.device)
            and _sized(a.input_shape).fits()
        )

    def planar(self) -> Tail | None:
        """As `Weights.planar`."""
        return self if self.input_shape[2] == NARROW else None

    def takes(self, features: Any, scale: Any) -> bool:
        """Whether `launch_planar` can read them."""
        return features.dtype == self.weight.dtype and features.data_ptr() % 16 == 0 and scale is None

    def launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any = None) -> Any:
        """As `Convolution.launch`, of the two; x is contiguous."""
        return self._launch(x, out, epilogue, out_strides, None, channels_last=True)

    def launch_planar(
        self, x: Any, out: Any, epilogue: Any, out_strides: Any, scale: Any, zero_point: Any, flag: Any
    ) -> Any:
        """For x [N, C, H, W] that it `takes`, contiguous; `flag` is set to 1 where a value is NaN or Inf."""
        return self._launch(x, out, epilogue, out_strides, flag, channels_last=False)

    def _launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any, flag: Any, channels_last: bool) -> Any:
        import torch

        from fastinv.kernels.triton.geometry import strides

        if self.other is not None and self.planar() is None and are_few(len(x), x.device):
            return self.other.launch(x, out, epilogue, out_strides)
        height, width, _ = self.input_shape
        out_n, out_y, out_x, out_c = out_strides or strides(2 * height, 2 * width, self.outputs)
        tail = _sized(self.input_shape)
        tail.channels_last = int(channels_last)
        weights = {"first": self.first, "last": self.last, "bias": self.bias, "last_bias": self.last_bias}
        numbers = {
            "images": len(x), "outputs": self.outputs, "float16": int(self.weight.dtype is torch.float16),
            "out_n": out_n, "out_y": out_y, "out_x": out_x, "out_c": out_c,
            "result": result_of(out), "slope": self.slope,
            **finish_of(epilogue),
        }  # fmt: skip
        set_fields(tail, {"x": x, "out": out, "flag": flag, **weights}, numbers)
        return launching(tail.run, x.device)


def _sized(input_shape: tuple[int, int, int]) -> _cuda.Tail:
    """For images of this shape, channels last."""
    tail: _cuda.Tail = extension().Tail()
    sizes = dict(zip(("height", "width", "inputs"), input_shape, strict=True))
    set_fields(tail, {}, {**sizes, "channels_last": 1})
    return tail


def _last_tiles(first: Any, last: Any, weight: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """[columns, BETWEEN] for each phase: see Column in tail_last.h."""
    from fastinv.kernels.triton.pair import terms

    rows, columns = terms(first, last, 0), terms(first, last, 1)
    outputs, between = weight.shape[1:3]
    for down in rows:
        for across in columns:
            tile = np.zeros((BESIDE + 16, BETWEEN), np.float32)
            for y in down:
                for x in across:
                    column = _column(y.shift, y.place, x.shift, x.place)
                    tile[column : column + outputs, :between] = weight[0, :, :, y.tap, x.tap]
            yield tile


def _column(down: int, row: int, right: int, column: int) -> int:
    """Of what goes to the cell so many down and right, to this row and column in it."""
    if down != 0:
        return BESIDE + 8 * abs(right) + 4 * column
    return 8 * {-1: LEFT, 0: (EVEN, ODD)[column], 1: RIGHT}[right] + 4 * row
