"""What is done with the user's arrays by all threads of PyTorch: looks at them, copies to and from pinned memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends.base import Array
from fastinv.backends.cuda_device import Streams, nothing

if TYPE_CHECKING:
    import torch


PIECE = 2**22  # bytes of pinned memory at once
PIECES = 4  # that take turns. All together stay in the L3 cache: so float32 moved at 52 GB/s, not at 37, and where
# others used the memory, too, at 41, not at 21 (two cores of a Zen 5)


class _Pieces:
    """Pinned memory in pieces, each with a function that waits until it is free."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        import torch

        pinned = device.type == "cuda"
        self.streams = streams
        self._pieces = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned) for _ in range(PIECES)]
        self._waits = [nothing] * PIECES


class Upload(_Pieces):
    """What brings arrays of the host to a device, on the stream "in": pieces are filled by all threads while those
    before are on their way."""

    _next = 0

    def send(self, source: npt.NDArray[Any], there: torch.Tensor) -> None:
        """there = source, flat; of the same type, or float32 that is rounded to bfloat16 here: half as much goes to
        pinned memory, and on from there. Returns when the source has been read."""
        with self.streams.on("in"):
            begin = 0
            for part in _flat(source, there.dtype, PIECE // there.itemsize):
                pinned = self._pieces[self._next].view(there.dtype)[: len(part)]
                self._waits[self._next]()
                pinned.copy_(part)
                there[begin : begin + len(part)].copy_(pinned, non_blocking=True)
                self._waits[self._next] = self.streams.mark("in")
                self._next = (self._next + 1) % PIECES
                begin += len(part)


class Download(_Pieces):
    """What brings tensors of a device to arrays of the host, on the stream "out"."""

    def fetch(self, there: torch.Tensor, target: npt.NDArray[Any]) -> None:
        """target = there, contiguous and of the same shape and type. Returns when it is done."""
        import torch

        whole = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        source = there.reshape(-1).view(torch.uint8)
        parts = list(tensors.chunks(len(source), PIECE))
        for number in range(len(parts) + PIECES - 1):
            if number < len(parts):
                begin, end = parts[number]
                with self.streams.on("out"):
                    self._pieces[number % PIECES][: end - begin].copy_(source[begin:end], non_blocking=True)
                self._waits[number % PIECES] = self.streams.mark("out")
            done = number - PIECES + 1
            if 0 <= done < len(parts):
                begin, end = parts[done]
                self._waits[done % PIECES]()
                _as_bytes(whole)[begin:end].copy_(self._pieces[done % PIECES][: end - begin])
        if whole is not target:
            target[...] = whole


class Given:
    """Features that are on the device already."""

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features

    def send(self, start: int, stop: int) -> None:
        """Start these images' features on their way."""

    def take(self, start: int, stop: int) -> torch.Tensor:
        """What was sent last, on the device, for the current stream."""
        return self._features[start:stop]

    def free(self) -> None:
        """What is on the current stream by now is all that uses what was taken."""


class Feed:
    """As `Given`, for features on the host, [N, ...] in any layout: one batch is on its way while that before is worked
    on.

    Args:
        dtype: what they are, by torch's name.
        room: uint8, on the device, as much as the features of a batch may take.
    """

    def __init__(self, features: npt.NDArray[Any], dtype: str, room: torch.Tensor, upload: Upload) -> None:
        import torch

        kind: torch.dtype = getattr(torch, dtype)
        self._features = features
        self._there = room.view(kind)
        self._upload = upload

    def send(self, start: int, stop: int) -> None:
        values = self._features[start:stop]
        self._upload.send(values, self._there[: values.size])

    def take(self, start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, *self._features.shape[1:])
        self._upload.streams.after("current", "in")
        return self._there[: int(np.prod(shape))].view(shape)

    def free(self) -> None:
        self._upload.streams.after("in", "current")


class Kept:
    """Images that stay on the device.

    Attributes:
        images: [N, ...], those that were put there.
    """

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def put(self, start: int, stop: int, images: torch.Tensor) -> None:
        """These images are done. What was put before has been flushed."""
        self.images[start:stop] = images

    def flush(self) -> None:
        """Bring what was put last to where it belongs."""


class Drain:
    """As `Kept`, for images that go to the host.

    Args:
        target: [N, ...], where they belong.
        finish: makes of what is put what is to stand there.
    """

    def __init__(
        self, target: npt.NDArray[Any], finish: Callable[[torch.Tensor], torch.Tensor], download: Download
    ) -> None:
        self._target = target
        self._finish = finish
        self._download = download
        self._last: tuple[int, int, torch.Tensor] | None = None

    def put(self, start: int, stop: int, images: torch.Tensor) -> None:
        self._last = start, stop, self._finish(images)
        self._download.streams.after("out", "current")  # not after what is launched until they are fetched

    def flush(self) -> None:
        if self._last is not None:
            start, stop, images = self._last
            self._download.fetch(images, self._target[start:stop])
            self._last = None


def finite(values: Array) -> bool:
    """As `fastinv.tensors.finite`. The sum of what is finite may be too large, of what is not it never is finite."""
    import torch

    if values.size == 0 or not values.flags.c_contiguous:
        return tensors.finite(values)
    total = _as_bytes(values).view(torch.float32).sum()
    return bool(torch.isfinite(total)) or tensors.finite(values)


def copy(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """target = source, of the same shape and dtype. Where both lie in one piece it takes all threads of PyTorch: one
    alone moved 18 GB/s on a Zen 5, and PCIe 4 and 5 carry 25 and 50."""
    if source.flags.c_contiguous and target.flags.c_contiguous and source.size > 0:
        _as_bytes(target).copy_(_as_bytes(source))
    else:
        target[...] = source


def _flat(source: npt.NDArray[Any], dtype: torch.dtype, most: int) -> Iterator[torch.Tensor]:
    """Its values in parts of at most so many, as they lie in memory: as float32 where that is to become bfloat16, else
    as `dtype`. What is not in one piece is copied, so many images at a time."""
    import torch

    if source.size == 0:
        return
    kind = torch.float32 if dtype is torch.bfloat16 and source.dtype == np.float32 else dtype
    images = len(source) if source.flags.c_contiguous else max(1, most * len(source) // source.size)
    for start, stop in tensors.chunks(len(source), images):
        values = np.ascontiguousarray(source[start:stop])  # a name, so that it lives as long as its memory is read
        whole = _as_bytes(values).view(kind)
        yield from (whole[begin:end] for begin, end in tensors.chunks(len(whole), most))


def _as_bytes(array: npt.NDArray[Any]) -> torch.Tensor:
    """Its memory, which must be in one piece; it is not kept alive.

    PyTorch would warn of an array that is read-only, hence the address.
    """
    import torch

    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(memory))
