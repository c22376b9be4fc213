"""What a convolution reads: one description for plain, strided, dilated and transposed ones, forward and back.

Output (i·step + row) of an axis sums taps t = 0 .. count − 1, which read input i·stride + first + t·spacing. A
transposed convolution of stride s has s such phases on each axis, each with the taps that reach it; any other has one.
Going back to the input turns the one kind into the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue

Pair = tuple[int, int]
Weight = npt.NDArray[np.float32]

PHASE = 9  # integers that a kernel reads for each phase: see `Geometry.table`


@dataclass(frozen=True)
class Axis:
    """One phase along one axis: its first output and how many, its taps, and the kernel's entry behind each tap."""

    row: int
    rows: int
    first: int
    taps: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where a convolution from images of `inputs` to images of `outputs` pixels reads.

    Attributes:
        stride: of the input, from one output of a phase to the next.
        spacing: of the input, from one tap to the next.
        step: of the output, from one output of a phase to the next.
        axes: the phases of rows, and those of columns.
    """

    inputs: Pair
    outputs: Pair
    stride: Pair
    spacing: Pair
    step: Pair
    axes: tuple[tuple[Axis, ...], tuple[Axis, ...]]

    def phases(self) -> Iterator[tuple[Axis, Axis]]:
        for y in self.axes[0]:
            for x in self.axes[1]:
                yield y, x

    @property
    def count(self) -> int:
        return len(self.axes[0]) * len(self.axes[1])

    @property
    def most(self) -> Pair:
        """Rows and columns of the largest phase: the first has the most of both."""
        return self.axes[0][0].rows, self.axes[1][0].rows

    @property
    def largest(self) -> int:
        """Pixels of the largest phase."""
        return math.prod(self.most)

    def table(self, offsets: list[int]) -> npt.NDArray[np.int32]:
        """[phases, PHASE]: row, column, rows, columns, taps down and across, first row and column, weights' place."""
        rows = [
            (y.row, x.row, y.rows, x.rows, len(y.taps), len(x.taps), y.first, x.first, offset)
            for (y, x), offset in zip(self.phases(), offsets, strict=True)
        ]
        return np.array(rows, np.int32)

    def weights(self, weight: Weight) -> Iterator[Weight]:
        """For each phase the part [groups, outputs, taps, inputs] of `weight` [groups, outputs, inputs, kh, kw]."""
        for y, x in self.phases():
            part = weight[..., list(y.taps), :][..., list(x.taps)]
            g, o, c = part.shape[:3]
            yield part.reshape(g, o, c, -1).swapaxes(2, 3)


class Weights:
    """What every kernel of a convolution is given: its weights, [groups, outputs, inputs, …], as they lie for it.

    Args:
        shape: begins with groups, and with outputs and inputs of a group.
        packed: the weights of all phases; each phase's begin at its one of `offsets`.
        bias: float32 [groups · outputs], or None.
    """

    def __init__(
        self, geometry: Geometry, shape: Any, packed: Weight, offsets: list[int], bias: Any, device: Any, dtype: Any
    ) -> None:
        import torch

        self.geometry = geometry
        self.groups, self.outputs, self.inputs = shape[:3]
        self.weight = torch.from_numpy(packed).to(device, dtype)
        self.bias = None if bias is None else torch.tensor(bias, device=device)
        self.phases = torch.from_numpy(geometry.table(offsets)).to(device)

    @property
    def reads(self) -> str:
        """Groups, channels and geometry, for people and for files."""
        g = self.geometry
        taps = [[len(axis.taps) for axis in axes] for axes in g.axes]
        steps = f"stride {g.stride} spacing {g.spacing} step {g.step} taps {taps}"
        return f"{self.groups}x{self.outputs}x{self.inputs} {g.inputs}->{g.outputs} {steps}"

    def planar(self) -> Any:
        """The kernel that can read features [N, C, H, W] by `launch_planar`; None where there is none."""
        return None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[H, W, C] of an image."""
        return (*self.geometry.inputs, self.groups * self.inputs)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return (*self.geometry.outputs, self.groups * self.outputs)

    @property
    def flops(self) -> int:
        """Of one image, in direct form."""
        taps = sum(y.rows * x.rows * len(y.taps) * len(x.taps) for y, x in self.geometry.phases())
        return 2 * taps * self.groups * self.outputs * self.inputs

    def arguments(
        self, x: Any, out: Any, epilogue: Epilogue, out_strides: Any, x_strides: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and constants of all kernels; strides that are None are those of contiguous tensors."""
        geometry = self.geometry
        (height, width), (out_height, out_width) = geometry.inputs, geometry.outputs
        x_n, x_y, x_x, x_c = x_strides or strides(height, width, self.groups * self.inputs)
        out_n, out_y, out_x, out_c = out_strides or strides(out_height, out_width, self.groups * self.outputs)
        args = {
            "x": x, "w": self.weight, "bias": self.bias, "phases": self.phases, "out": out, **epilogue.args,
            "images": len(x), "height": height, "width": width, "channels": self.inputs, "outputs": self.outputs,
            "out_height": out_height, "out_width": out_width,
            "x_n": x_n, "x_y": x_y, "x_x": x_x, "x_c": x_c,
            "out_n": out_n, "out_y": out_y, "out_x": out_x, "out_c": out_c,
            "stride_y": geometry.stride[0], "stride_x": geometry.stride[1],
            "spacing_y": geometry.spacing[0], "spacing_x": geometry.spacing[1],
            "step_y": geometry.step[0], "step_x": geometry.step[1],
        }  # fmt: skip
        constants = {
            "PHASE": PHASE, "PHASES": geometry.count, "KIND": epilogue.kind, "BYTES": out.dtype.itemsize == 1,
        }  # fmt: skip
        return args, constants


@triton.jit
def phase_of(phase):
    """A phase's numbers, from where they begin in `Geometry.table`."""
    row, column, rows, columns = tl.load(phase), tl.load(phase + 1), tl.load(phase + 2), tl.load(phase + 3)
    taps_y, taps_x, first_y, first_x = tl.load(phase + 4), tl.load(phase + 5), tl.load(phase + 6), tl.load(phase + 7)
    return row, column, rows, columns, taps_y, taps_x, first_y, first_x, tl.load(phase + 8)


def strides(height: int, width: int, channels: int) -> tuple[int, int, int, int]:
    """Of contiguous images [N, H, W, C]."""
    return height * width * channels, width * channels, channels, 1


def correlation(inputs: Pair, outputs: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """y[i] = Σ_u w[u] · x[i·stride + u·dilation − padding]; `padding` is the one at the top and at the left."""
    axes = [(Axis(0, outputs[k], -padding[k], tuple(range(kernel[k]))),) for k in (0, 1)]
    return Geometry(inputs, outputs, stride, dilation, (1, 1), (axes[0], axes[1]))


def transposed(inputs: Pair, outputs: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """y[o] = Σ_u w[u] · x[(o + padding − u·dilation) / stride], over the u for which the quotient is whole."""
    axes = [tuple(_phases(outputs[k], kernel[k], stride[k], padding[k], dilation[k])) for k in (0, 1)]
    spacing = [-(dilation[k] // math.gcd(dilation[k], stride[k])) for k in (0, 1)]
    return Geometry(inputs, outputs, (1, 1), (spacing[0], spacing[1]), stride, (axes[0], axes[1]))


def _phases(outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> Iterator[Axis]:
    for row in range(min(stride, outputs)):
        taps = tuple(u for u in range(kernel) if (row + padding - u * dilation) % stride == 0)
        first = (row + padding - taps[0] * dilation) // stride if taps else 0
        yield Axis(row, -(-(outputs - row) // stride), first, taps)


def packed(parts: Iterator[Weight], outputs: int, inputs: int | None, multiple: int) -> tuple[Any, list[int]]:
    """The weights of all phases as the matrix kernels read them, [groups · O', K], and the column where each begins.

    The products that make an output lie side by side, so that tensor cores take them without a transposition (wgmma has
    none for tf32), phase after phase. O' is O rounded up to `outputs`. With `inputs`, C is rounded up to it and a phase
    has taps · C' columns; without, taps · C. They are rounded up to `multiple`. What is added is zero.
    """
    columns: list[Weight] = []
    offsets = [0]
    for part in parts:
        g, o, t, c = part.shape
        wide = c if inputs is None else -(-c // inputs) * inputs
        block = np.zeros((g, -(-o // outputs) * outputs, -(-t * wide // multiple) * multiple), np.float32)
        padded = np.zeros((g, o, t, wide), np.float32)
        padded[..., :c] = part
        block[:, :o, : t * wide] = padded.reshape(g, o, t * wide)
        columns.append(block.reshape(g * block.shape[1], block.shape[2]))
        offsets.append(offsets[-1] + block.shape[2])
    return np.concatenate(columns, axis=1), offsets[:-1]
