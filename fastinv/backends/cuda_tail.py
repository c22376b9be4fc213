"""A decoder's last two layers as the one kernel of `kernels/cuda/tail.h`, where they have the shapes it is made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda_native import extension, launching, set_fields
from fastinv.backends.cuda_nodes import ConvolutionNode

if TYPE_CHECKING:
    import torch

INPUTS, BETWEEN, OUTPUTS, SIDE = 128, 64, 4, 16  # the first exactly, the next two at most
LEFT, EVEN, ODD, RIGHT = range(4)  # the order of Column in tail.h
BESIDE = 32  # the column where those to the rows above and below begin
LINEAR = ("identity", "relu", "leaky_relu")  # activations between the layers
SLOPES = {"identity": 1.0, "relu": 0.0}  # below 0; leaky_relu's is its own parameter
FINISHES = {"identity": 0, "relu": 1, "leaky_relu": 1, "sigmoid": 2, "tanh": 3, "hardtanh": 4, "clamp": 4}
RESULTS = ("float32", "bfloat16", "float16", "uint8")  # the order of Result in tail.h
CAPABILITY = (9, 0)  # of a GPU with these tensor cores; later ones have others


class Tail:
    """A transposed convolution to twice the pixels, an activation, and a convolution to a few channels.

    See `fits`. Takes the place of a `fastinv.kernels.triton.pair.Pair`.

    Args:
        first, last: the two nodes, as they were for two launches.
    """

    takes_all = False  # features that are not of its type, or do not begin at a multiple of 16 bytes, go another way

    def __init__(self, first: ConvolutionNode, last: ConvolutionNode) -> None:
        kernel = first.kernel
        self.weight = kernel.weight  # for its device and type
        self.outputs = last.kernel.outputs
        self.bias = _padded(kernel.bias, BETWEEN)
        self.last_bias = last.kernel.bias
        activation = first.ending.activation
        self.slope = SLOPES.get(activation.kind, activation.a)
        dtype, device = kernel.weight.dtype, kernel.weight.device
        self.first = _for_tensor_cores(_first_tiles(kernel.geometry, first.weight), dtype, device)
        self.last = _for_tensor_cores(_last_tiles(kernel.geometry, last.kernel.geometry, last.weight), dtype, device)

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
            and a.inputs == INPUTS
            and a.outputs <= BETWEEN
            and b.outputs <= OUTPUTS
            and a.geometry.inputs == (SIDE, SIDE)
            and a.geometry.outputs == b.geometry.outputs == (2 * SIDE, 2 * SIDE)
            and first.ending.activation.kind in LINEAR
            and last.ending.activation.kind in FINISHES
            and len(first.inputs) == len(last.inputs) == 1
            and _doubles(a.geometry)
            and _stays(b.geometry)
            and runs_on(a.weight.device)
            and extension() is not None
        )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of an image."""
        return SIDE, SIDE, INPUTS

    def planar(self) -> Tail:
        """As `Weights.planar`."""
        return self

    def takes(self, features: Any, scale: Any) -> bool:
        """Whether `launch_planar` can read them."""
        return features.dtype == self.weight.dtype and features.data_ptr() % 16 == 0 and scale is None

    def launch(self, x: Any, out: Any, epilogue: Any, x_strides: Any = None, out_strides: Any = None) -> Any:
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

        side = 2 * SIDE
        out_n, out_y, out_x, out_c = out_strides or strides(side, side, self.outputs)
        tail = extension().Tail()
        weights = {"first": self.first, "last": self.last, "bias": self.bias, "last_bias": self.last_bias}
        numbers = {
            "images": len(x), "outputs": self.outputs,
            "channels_last": int(channels_last), "float16": int(self.weight.dtype is torch.float16),
            "out_n": out_n, "out_y": out_y, "out_x": out_x, "out_c": out_c,
            "result": RESULTS.index(str(out.dtype).removeprefix("torch.")), "slope": self.slope,
            "finish": FINISHES[epilogue.kind], "a": SLOPES.get(epilogue.kind, epilogue.a), "b": epilogue.b,
        }  # fmt: skip
        set_fields(tail, {"x": x, "out": out, "flag": flag, **weights}, numbers)
        return launching(tail.run, x.device)


def runs_on(device: torch.device) -> bool:
    """Whether its tensor cores are those that the kernel is made for; what stands in for a GPU has them."""
    import torch

    return device.type != "cuda" or torch.cuda.get_device_capability(device) == CAPABILITY


def _doubles(geometry: Any) -> bool:
    """Whether phase f of an axis reads the pixels 0 to f further on, as a 3×3 kernel at a stride of 2 does."""
    return geometry.step == (2, 2) and geometry.stride == (1, 1) and _reads(geometry) == [[[0], [0, 1]]] * 2


def _stays(geometry: Any) -> bool:
    """Whether each pixel reads those around it."""
    return geometry.step == geometry.stride == (1, 1) and _reads(geometry) == [[[-1, 0, 1]]] * 2


def _reads(geometry: Any) -> list[list[list[int]]]:
    """For each axis, for each of its phases, how far on the pixels lie that are read."""
    return [
        [sorted(axis.first + t * spacing for t in range(len(axis.taps))) for axis in axes]
        for axes, spacing in zip(geometry.axes, geometry.spacing, strict=True)
    ]


def _first_tiles(geometry: Any, weight: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """[BETWEEN, 64] of both halves of the channels, for every shift and the phases that read there."""
    outputs = weight.shape[1]
    tiles: dict[tuple[int, int, int, int], npt.NDArray[np.float32]] = {}
    for number, (y, x) in enumerate(geometry.phases()):
        for t, tap_y in enumerate(y.taps):
            for s, tap_x in enumerate(x.taps):
                down, right = y.first + t * geometry.spacing[0], x.first + s * geometry.spacing[1]
                tile = np.zeros((BETWEEN, INPUTS), np.float32)
                tile[:outputs] = weight[0, :, :, tap_y, tap_x]
                tiles[down, right, number // 2, number % 2] = tile
    for shift in sorted(tiles):
        yield from np.split(tiles[shift], INPUTS // 64, axis=1)


def _last_tiles(first: Any, last: Any, weight: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """[columns, BETWEEN] for each phase: see Column in tail.h."""
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


def _for_tensor_cores(tiles: Iterator[npt.NDArray[np.float32]], dtype: torch.dtype, device: torch.device) -> Any:
    """Matrices of 64 columns, one below the other, as tensor cores read them: pieces of 16 bytes lie in the order of
    their number xor that of the row, modulo 8."""
    import torch

    rows = np.concatenate(list(tiles))
    pieces = rows.reshape(len(rows), 8, 8)
    order = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    return torch.from_numpy(np.take_along_axis(pieces, order[:, :, None], axis=1)).to(device, dtype)


def _padded(bias: Any, size: int) -> Any:
    import torch

    return None if bias is None else torch.nn.functional.pad(bias, (0, size - len(bias)))
