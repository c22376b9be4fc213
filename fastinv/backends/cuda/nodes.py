"""What a step of a network becomes on the GPU: nodes, which go forward, and back to each of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastinv.backends.base import Array
from fastinv.backends.compiled import channels_last
from fastinv.backends.cuda.plan import Buffer, Ending, Stage
from fastinv.ops.base import Shape

Index = npt.NDArray[np.int64]


class Node(Protocol):
    """One kernel launch. Its output has been through the activation of `ending`."""

    inputs: tuple[Buffer, ...]
    output: Buffer
    ending: Ending

    def forward(self) -> Stage: ...

    def backward(self, which: int, gradient: Buffer, into: Buffer, ending: Ending) -> Stage:
        """From the gradient of the output before the activation to `into`, the gradient of input `which`."""


@dataclass(frozen=True, eq=False)
class Door:
    """Features as users hold them, [N, C, H, W] of any type, and what goes with them, as in `layout.py`."""

    features: Buffer
    scale: Buffer
    zero_point: Buffer
    flag: Buffer

    @property
    def beside(self) -> tuple[Buffer, ...]:
        return self.scale, self.zero_point, self.flag


@dataclass(eq=False)
class ConvolutionNode:
    """A convolution, also a dense layer. A second input is added to its result before the activation.

    With a `door` the features there are read instead of the first input, by kernels that can (`planar`), if they take
    them.
    """

    inputs: tuple[Buffer, ...]
    output: Buffer
    kernel: Any  # `Convolution`, `DirectConvolution`, `GroupedConvolution`, or a `Pair` or `Tail` of two
    back: Any  # the same for the way back, or None
    ending: Ending
    weight: Any  # float32 [groups, outputs, inputs, kh, kw], of the way forward
    out_strides: tuple[int, int, int, int] | None = None
    door: Door | None = None

    def takes(self, tensors: Any) -> bool:
        """Whether the kernel reads these features where they are."""
        door = self.door
        return door is not None and self.kernel.takes(tensors(door.features), tensors(door.scale))

    def forward(self) -> Stage:
        def make(tensors: Any) -> Any:
            out, epilogue = tensors(self.output), self.ending.epilogue(tensors)
            if self.door is None or not self.takes(tensors):
                return self.kernel.launch(tensors(self.inputs[0]), out, epilogue, self.out_strides)
            features, *beside = map(tensors, (self.door.features, *self.door.beside))
            return self.kernel.launch_planar(features, out, epilogue, self.out_strides, *beside)

        return Stage(make, self.inputs, (self.output,))

    def backward(self, which: int, gradient: Buffer, into: Buffer, ending: Ending) -> Stage:
        if which == 1:
            return copy(gradient, into, ending)

        def make(tensors: Any) -> Any:
            return self.back.launch(tensors(gradient), tensors(into), ending.epilogue(tensors))

        return Stage(make, (gradient, *ending.reads), (into,))


@dataclass(eq=False)
class RereadingNode:
    """A node whose kernel reads, on the way back, what there was on the way forward."""

    inputs: tuple[Buffer, ...]
    output: Buffer
    kernel: Any
    ending: Ending

    def forward(self) -> Stage:
        given = (*self.inputs, self.output, *self.keeps())

        def make(tensors: Any) -> Any:
            return self.kernel.launch(*map(tensors, given), self.ending.epilogue(tensors))

        return Stage(make, self.inputs, tuple(buffer for buffer in given[len(self.inputs) :] if buffer is not None))

    def backward(self, which: int, gradient: Buffer, into: Buffer, ending: Ending) -> Stage:
        kept = tuple(buffer for buffer in self.keeps() if buffer is not None)
        assert len(kept) == len(self.keeps())
        reads = (gradient, *self.read_again(), *kept)

        def make(tensors: Any) -> Any:
            return self.launch_backward(which, *map(tensors, reads), tensors(into), ending.epilogue(tensors))

        return Stage(make, (*reads, *ending.reads), (into,))

    def keeps(self) -> tuple[Buffer | None, ...]:
        """What the way forward leaves for the way back; None where no gradient is to go back."""
        return ()

    def read_again(self) -> tuple[Buffer, ...]:
        """What the way back reads of the way forward, besides."""
        return self.inputs

    def launch_backward(self, which: int, *tensors: Any) -> Any:
        return self.kernel.launch_backward(*tensors)


@dataclass(eq=False)
class KeepingNode(RereadingNode):
    """One whose kernel keeps something for the way back, in `kept`."""

    kept: Buffer | None

    def keeps(self) -> tuple[Buffer | None, ...]:
        return (self.kept,)


class MaxPoolNode(KeepingNode):
    """A max pool, which keeps the places of the maxima."""

    def read_again(self) -> tuple[Buffer, ...]:
        return ()


class NormalizeNode(KeepingNode):
    """A norm, which keeps mean and deviation of each group."""


class AttentionNode(KeepingNode):
    """Attention of queries, keys and values, which keeps the sum of each query's weights."""

    def read_again(self) -> tuple[Buffer, ...]:
        return (*self.inputs, self.output)

    def launch_backward(self, which: int, *tensors: Any) -> Any:
        return self.kernel.launch_backward(which, *tensors)


class MatmulNode(RereadingNode):
    """A product of two values."""

    def launch_backward(self, which: int, *tensors: Any) -> Any:
        return self.kernel.launch_backward(which, *tensors)


class SoftmaxNode(RereadingNode):
    """A softmax of rows, whose results the way back reads: in a solver no activation follows."""

    def read_again(self) -> tuple[Buffer, ...]:
        return (self.output,)


@dataclass(eq=False)
class ResampleNode:
    """A separable resampling, and the one with transposed matrices."""

    inputs: tuple[Buffer, ...]
    output: Buffer
    kernel: Any
    back: Any
    ending: Ending

    def forward(self) -> Stage:
        return _resample(self.kernel, self.inputs[0], self.output, self.ending)

    def backward(self, which: int, gradient: Buffer, into: Buffer, ending: Ending) -> Stage:
        return _resample(self.back, gradient, into, ending)


@dataclass(eq=False)
class GatherNode:
    """An elementwise op or one that moves elements. `backs` has for each input the gather that goes back to it, and
    the number of the input that it needs as y, or None."""

    inputs: tuple[Buffer, ...]
    output: Buffer
    kernel: Any
    backs: Sequence[tuple[Any, int | None]]
    ending: Ending

    def forward(self) -> Stage:
        return _gather(self.kernel, (*self.inputs, None)[:2], self.output, self.ending)

    def backward(self, which: int, gradient: Buffer, into: Buffer, ending: Ending) -> Stage:
        kernel, needed = self.backs[which]
        return _gather(kernel, (gradient, None if needed is None else self.inputs[needed]), into, ending)


def copy(source: Buffer, target: Buffer, ending: Ending) -> Stage:
    """target = ending(source)."""
    from fastinv.kernels.triton.gather import Gather

    return _gather(Gather(source.elements), (source, None), target, ending)


def _resample(kernel: Any, source: Buffer, target: Buffer, ending: Ending) -> Stage:
    def make(tensors: Any) -> Any:
        return kernel.launch(tensors(source), tensors(target), ending.epilogue(tensors))

    return Stage(make, (source, *ending.reads), (target,))


def _gather(kernel: Any, sources: tuple[Buffer | None, ...], target: Buffer, ending: Ending) -> Stage:
    def make(tensors: Any) -> Any:
        x, y = (tensors(source) for source in sources)
        return kernel.launch(x, y, tensors(target), ending.epilogue(tensors))

    return Stage(make, (*(s for s in sources if s is not None), *ending.reads), (target,))


# ---- places of elements: an image [C, H, W] lies as [H, W, C], all else in row-major order ---------------------------


def pixels_and_channels(shape: Shape) -> tuple[int, int]:
    """Of a value: all of it is channels where it is no image."""
    size = int(np.prod(shape))
    return (size // shape[0], shape[0]) if len(shape) == 3 else (1, size)


def of_channels(values: Array, shape: Shape) -> Array:
    """Numbers that are broadcast over a value of this shape, one for each of its channels (`pixels_and_channels`)."""
    whole = np.broadcast_to(values, shape)
    return (whole[:, 0, 0] if len(shape) == 3 else whole.ravel()).copy()


def places(shape: Shape) -> Index:
    """For every element of a value of this shape, where it lies."""
    result = np.empty(shape, np.int64)
    channels_last(result)[...] = np.arange(result.size).reshape(channels_last(result).shape)
    return result


def listed(values: Index) -> Index:
    """An array of the shape of a value, in the order of that value's memory."""
    return channels_last(values).ravel()


def inverse(index: Index, size: int) -> Index:
    """For each of `size` sources the positions that read it, [terms, size]; every one is read equally often."""
    return np.argsort(index, kind="stable").reshape(size, -1).T


def is_identity(index: Index) -> bool:
    return bool(np.array_equal(index.ravel(), np.arange(index.size)))
