"""What is done with the user's arrays by all threads of PyTorch: looks at them, copies to and from pinned memory."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends.base import Array
from fastinv.backends.cuda_device import Streams, nothing

if TYPE_CHECKING:
    import torch


NO_FEATURES: Array = np.empty((0, 0), np.float32)  # of which there is nothing to send
PIECE = 2**26  # bytes of pinned memory at once: to allocate it takes as long as to copy it a few times


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
    """As `Given`, for `features` on the host, float32 and C-contiguous: one batch is on its way while that before is
    worked on.

    Args:
        images: of a batch, at most.
        elements: of an image's features.
    """

    def __init__(self, images: int, elements: int, device: torch.device) -> None:
        import torch

        size, pinned = images * elements, device.type == "cuda"
        self.features = NO_FEATURES
        self._streams = Streams(device)
        self._there = torch.empty(size, device=device)
        self._piece = max(1, min(size, PIECE // 4))
        self._pinned = [torch.empty(self._piece, pin_memory=pinned) for _ in range(2)]
        self._waits = [nothing, nothing]

    def send(self, start: int, stop: int) -> None:
        values = self.features[start:stop].reshape(-1)
        for number, (begin, end) in enumerate(tensors.chunks(len(values), self._piece)):
            pinned = self._pinned[number % 2][: end - begin]
            self._waits[number % 2]()
            fill(pinned, values[begin:end])
            with self._streams.on("in"):
                self._there[begin:end].copy_(pinned, non_blocking=True)
            self._waits[number % 2] = self._streams.mark("in")

    def take(self, start: int, stop: int) -> torch.Tensor:
        shape = (stop - start, *self.features.shape[1:])
        self._streams.after("current", "in")
        return self._there[: int(np.prod(shape))].view(shape)

    def free(self) -> None:
        self._streams.after("in", "current")


def finite(values: Array) -> bool:
    """As `fastinv.tensors.finite`. The sum of what is finite may be too large, of what is not it never is finite."""
    import torch

    if values.size == 0 or not values.flags.c_contiguous:
        return tensors.finite(values)
    total = _as_bytes(values).view(torch.float32).sum()
    return bool(torch.isfinite(total)) or tensors.finite(values)


def fill(target: torch.Tensor, source: npt.NDArray[Any]) -> None:
    """target = source, whose type is the target's, or float32 for bfloat16."""
    import torch

    if source.dtype == np.float32 and target.dtype is torch.bfloat16:
        values = np.ascontiguousarray(source)  # a name, so that it lives as long as its memory is read
        if values.size > 0:
            target.copy_(_as_bytes(values).view(torch.float32))
    else:
        copy(source, target.view(torch.uint8).numpy().view(source.dtype).reshape(source.shape))


def copy(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None:
    """target = source, of the same shape and dtype. Where both lie in one piece it takes all threads of PyTorch: one
    alone moved 18 GB/s on a Zen 5, and PCIe 4 and 5 carry 25 and 50."""
    if source.flags.c_contiguous and target.flags.c_contiguous and source.size > 0:
        _as_bytes(target).copy_(_as_bytes(source))
    else:
        target[...] = source


def _as_bytes(array: npt.NDArray[Any]) -> torch.Tensor:
    """Its memory, which must be in one piece; it is not kept alive.

    PyTorch would warn of an array that is read-only, hence the address.
    """
    import torch

    memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
    return torch.from_numpy(np.ctypeslib.as_array(memory))
