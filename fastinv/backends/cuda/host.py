"""What is done with the user's arrays by many threads: looks at them, copies to and from pinned memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastinv import _core, tensors
from fastinv.backends.base import Array
from fastinv.backends.cuda.device import DRIVER, Streams, nothing, room_for
from fastinv.errors import BackendError

if TYPE_CHECKING:
    import torch


PIECE = 2**20  # bytes of pinned memory at once, on the way there: all of a thread's stay in its part of the L3 cache
MOST_THREADS = 16  # that fill them: 8 read 42 GB/s beside an H200, half of what becomes of float32 on PCIe 5
PART = 2**24  # bytes of features that are copied at once where they do not lie in one piece
PIECE_BACK = 2**22  # bytes of pinned memory at once, on the way back
PIECES_BACK = 4  # that take turns


class Copy(NamedTuple):
    """Of arrays on the host, of the same shape and dtype."""

    source: npt.NDArray[Any]
    target: npt.NDArray[Any]

    def make(self) -> None:
        """target = source. Where both lie in one piece it takes all threads: one alone moved 18 GB/s on a Zen 5, and
        PCIe 4 and 5 carry 25 and 50."""
        if self.in_one_piece:
            _core.copy(self.source, self.target, _core.available_threads())
        else:
            self.target[...] = self.source

    @property
    def in_one_piece(self) -> bool:
        return bool(self.source.flags.c_contiguous and self.target.flags.c_contiguous)


class Upload:
    """What brings arrays of the host to a device, on the stream "in": threads fill pieces of pinned memory while those
    before are on their way (`csrc/upload.h`)."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        import torch

        self.streams = streams
        threads, gpu = min(_core.available_threads(), MOST_THREADS), device.type == "cuda"
        with room_for_pinned_pieces():
            pinned = torch.empty(_core.Upload.pieces * threads * PIECE, dtype=torch.uint8, device="cpu", pin_memory=gpu)
        self._way = _core.Upload(pinned.numpy(), threads, DRIVER if gpu else "")

    def send(self, source: npt.NDArray[Any], there: torch.Tensor, beside: Copy | None = None) -> None:
        """there = source, flat; of the same type, or float32 that is rounded to bfloat16 here: half as much goes to
        pinned memory, and on from there. Beside it a copy on the host is made. Returns when the source has been read
        and the copy is done.

        Raises:
            BackendError: CUDA's driver cannot.
        """
        import torch

        rounds = there.dtype is torch.bfloat16 and source.dtype == np.float32
        stream, address = self.streams.handle("in"), there.data_ptr()
        if beside is not None and not beside.in_one_piece:
            beside.make()
            beside = None
        for part in _parts(source):
            try:
                self._way.send(part, address, rounds, stream, *(beside or ()))
            except RuntimeError as error:
                raise BackendError(f"backend 'cuda': features cannot be sent to the GPU: {error}") from error
            address += part.nbytes // (2 if rounds else 1)
            beside = None


class Download:
    """What brings tensors of a device to arrays of the host, on the stream "out"."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        import torch

        self.streams = streams
        with room_for_pinned_pieces():
            self._pieces = [
                torch.empty(PIECE_BACK, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
                for _ in range(PIECES_BACK)
            ]
        self._waits = [nothing] * PIECES_BACK

    def fetch(self, there: torch.Tensor, target: npt.NDArray[Any]) -> None:
        """target = there, contiguous and of the same shape and type. Returns when it is done."""
        import torch

        whole = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        source = there.reshape(-1).view(torch.uint8)
        parts = list(tensors.chunks(len(source), PIECE_BACK))
        for number in range(len(parts) + PIECES_BACK - 1):
            if number < len(parts):
                begin, end = parts[number]
                with self.streams.on("out"):
                    self._pieces[number % PIECES_BACK][: end - begin].copy_(source[begin:end], non_blocking=True)
                self._waits[number % PIECES_BACK] = self.streams.mark("out")
            done = number - PIECES_BACK + 1
            if 0 <= done < len(parts):
                begin, end = parts[done]
                self._waits[done % PIECES_BACK]()
                piece = self._pieces[done % PIECES_BACK][: end - begin].numpy()
                Copy(piece, whole.reshape(-1).view(np.uint8)[begin:end]).make()
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

    def wait(self) -> None:
        """Until all that was sent is there."""


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

    def wait(self) -> None:
        self._upload.streams.mark("in")()


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


def room_for_pinned_pieces() -> AbstractContextManager[None]:
    """What is allocated within is pinned memory that no smaller batch would do without."""
    return room_for("pinned memory, through which features and images pass", "free memory on the host")


def finite(values: Array) -> bool:
    """As `fastinv.tensors.finite`. The sum of what is finite may be too large, of what is not it never is finite."""
    import torch

    if values.size == 0 or not values.flags.c_contiguous:
        return tensors.finite(values)
    total = _as_bytes(values).view(torch.float32).sum()
    return bool(torch.isfinite(total)) or tensors.finite(values)


def _parts(source: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Its values, each part in one piece: all of it, or else copies of some images at a time."""
    if source.flags.c_contiguous:  # as what is empty always is
        yield source
        return
    images = max(1, PART * len(source) // source.nbytes)
    yield from (np.ascontiguousarray(source[start:stop]) for start, stop in tensors.chunks(len(source), images))


def _as_bytes(array: npt.NDArray[Any]) -> torch.Tensor:
    """Its memory, which must be in one piece; it is not kept alive.

    PyTorch would warn of an array that is read-only, hence the address.
    """
    import torch

    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(memory))
