"""Buffers and stages: launches whose tensors are not there yet, and where in one arena they will lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fastinv.ops.activation import IDENTITY, Activation

if TYPE_CHECKING:
    import torch

ALIGNMENT = 256  # bytes: a whole number of cache lines, and more than any vector load asks for
MOST_IMAGES = 4096  # at once
MOST_BYTES = 2**32  # of the arena and of all that goes with a batch
MOST_ELEMENTS = 2**31 - 1  # of a tensor: the kernels' offsets are 32-bit


@dataclass(frozen=True, eq=False)
class Buffer:
    """A value of each image of a batch, [N, elements], in the layout of the kernels; equal only to itself.

    Attributes:
        dtype: a torch dtype's name.
    """

    elements: int
    dtype: str

    def bytes(self, images: int) -> int:
        """Of so many images, in the arena."""
        import torch

        itemsize: int = getattr(torch, self.dtype).itemsize
        return -(-images * self.elements * itemsize // ALIGNMENT) * ALIGNMENT


Tensors = Callable[[Buffer | None], Any]  # the tensor that stands for a buffer; None for None


class Stage(NamedTuple):
    """A launch to be: `make` gives it, once the tensors are known."""

    make: Callable[[Tensors], Any]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]


@dataclass(frozen=True, eq=False)
class Ending:
    """An `Epilogue` to be: with buffers instead of tensors."""

    activation: Activation = IDENTITY
    addend: Buffer | None = None
    saved: Buffer | None = None

    def epilogue(self, tensors: Tensors) -> Any:
        from fastinv.kernels.triton.epilogue import Epilogue

        act = self.activation
        return Epilogue(act.kind, act.a, act.b, tensors(self.addend), tensors(self.saved))

    @property
    def reads(self) -> tuple[Buffer, ...]:
        return tuple(buffer for buffer in (self.addend, self.saved) if buffer is not None)


def place(buffers: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for buffers of (bytes, first stage, last stage), so that none overlap while both live; and the total.

    The largest first, each at the lowest place that is free (greedy by size: Pisarchyk and Lee 2020).
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i][0], i)):
        size, first, last = buffers[index]
        others = sorted((offsets[i], buffers[i][0]) for i in placed if buffers[i][1] <= last and first <= buffers[i][2])
        offset = 0
        for start, length in others:
            if start >= offset + size:
                break
            offset = max(offset, start + length)
        offsets[index] = offset
        placed.append(index)
    return offsets, max((offsets[i] + buffers[i][0] for i in placed), default=0)


class Arena:
    """Where the buffers of some stages lie; those in `outside` are given by the caller.

    Attributes:
        stages: in the order in which they run.
    """

    def __init__(self, stages: Sequence[Stage], outside: Iterable[Buffer]) -> None:
        self.stages = tuple(stages)
        self._outside = set(outside)
        self._spans: dict[Buffer, tuple[int, int]] = {}
        for index, stage in enumerate(stages):
            for buffer in (*stage.reads, *stage.writes):
                if buffer not in self._outside:
                    first, _ = self._spans.get(buffer, (index, index))
                    self._spans[buffer] = (first, index)

    def bytes(self, images: int) -> int:
        """How large it has to be."""
        return self._layout(images)[1]

    def largest(self) -> int:
        """Elements of the largest buffer, for one image."""
        return max((buffer.elements for buffer in self._spans), default=1)

    def bind(self, images: int, memory: torch.Tensor, outside: Mapping[Buffer, Any]) -> list[Callable[[], None]]:
        """The launches, for tensors in `memory` (uint8, of `bytes(images)` or more) and those given."""
        import torch

        offsets, _ = self._layout(images)
        tensors: dict[Buffer | None, Any] = {None: None}
        tensors.update(outside.items())
        for buffer, offset in zip(self._spans, offsets, strict=True):
            dtype: torch.dtype = getattr(torch, buffer.dtype)
            length = images * buffer.elements * dtype.itemsize
            tensors[buffer] = memory[offset : offset + length].view(dtype).view(images, buffer.elements)
        return [stage.make(tensors.__getitem__) for stage in self.stages]

    def _layout(self, images: int) -> tuple[list[int], int]:
        return place([(buffer.bytes(images), *span) for buffer, span in self._spans.items()])


def fitting(arenas: Iterable[Arena], outside: Iterable[Buffer], most: int) -> int:
    """As many images as the kernels' offsets and a modest amount of memory allow; the arenas share theirs."""
    arenas, outside = list(arenas), list(outside)
    by_memory = MOST_BYTES // (max(a.bytes(64) for a in arenas) // 64 + sum(b.bytes(64) for b in outside) // 64 + 1)
    largest = max(*(arena.largest() for arena in arenas), *(buffer.elements for buffer in outside))
    return max(1, min(most, by_memory, MOST_ELEMENTS // largest))


def bucket(images: int, most: int) -> int:
    """The batch that is bound for so many images: the next power of two, up to `most`."""
    return min(most, 1 << math.ceil(math.log2(max(1, images))))
