"""Features from the host to a network on the GPU, and its results back: batch after batch, each a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.device import Streams, flag_on, repeatable, wait_for_all
from fastinv.backends.cuda.host import Copy, Upload
from fastinv.backends.cuda.nodes import of_channels, pixels_and_channels
from fastinv.backends.cuda.plan import Buffer, bucket
from fastinv.ops.base import Shape
from fastinv.tensors import Source, chunks

if TYPE_CHECKING:
    import torch

# Bytes of a batch's features, as float32, at most: on an H200 each batch took 0.6 ms beside what its bytes did.
MOST_FEATURES = 2**27
MOST_RESULTS = 2**25  # these are in pinned memory, too
LEAST = 2**24  # of both together, where a call is more than one batch
OVERLAP = 8  # batches of a call where that allows it: its last overlaps with nothing

# Launches on features, results and a flag on the device; with scale and zero point, or without.
Bind = Callable[..., Sequence[Callable[[], None]]]


@dataclass(eq=False)
class Slot:
    """Memory for one batch on its way, as bytes: features and results on the device, results on the host, pinned."""

    features: torch.Tensor
    results: torch.Tensor
    host: torch.Tensor
    flag: torch.Tensor  # of features that are not finite
    host_bytes: npt.NDArray[np.uint8]  # the same memory as `host`
    flag_value: npt.NDArray[np.int32]  # and as `flag`
    wait: Any = None  # for the batch that is on its way
    rows: tuple[int, int] = (0, 0)

    def arrived(self, out: npt.NDArray[Any]) -> tuple[bool, Copy | None]:
        """Wait for the batch here, if there is one: whether its features were finite, and how its results come to their
        place. What is next here may start on its way meanwhile, but not be run."""
        if self.wait is None:
            return True, None
        self.wait()
        self.wait = None
        start, stop = self.rows
        part = out[start:stop]
        wrong = bool(self.flag_value[0])
        if wrong:
            self.flag.zero_()
        return not wrong, Copy(self.host_bytes[: part.nbytes].view(part.dtype).reshape(part.shape), part)


class Stream:
    """Brings features to a network's launches, and results back, while the batch between them is computed.

    It does not keep the network, which keeps it: one that is not used any more is to free its memory at once.

    Args:
        given, made: shapes of a feature and of its result.
        dtype: what the network keeps its values in.

    Attributes:
        most: images at once, at most.
    """

    def __init__(self, given: Shape, made: Shape, dtype: str, device: torch.device) -> None:
        self._given, self._made = given, made
        self._device = device
        self._rounds = dtype == "bfloat16"
        features, results = (Buffer(int(np.prod(shape)), "float32").bytes(1) for shape in (given, made))
        self.most = max(1, min(MOST_FEATURES // features, MOST_RESULTS // results))
        self._least = max(1, LEAST // (features + results))
        self._streams = Streams(device)
        self._upload: Upload | None = None
        # One slot is filled and emptied while the other is computed on.
        self._slots: tuple[Slot, Slot] | None = None
        self._graphs: dict[tuple[Any, ...], Callable[[], None]] = {}
        self._quantised: tuple[torch.Tensor, ...] = ()

    def size_of(self, count: int, most: int) -> int:
        """Images at once of a call with so many: a power of two where it is fewer than the most, as graphs are kept."""
        return bucket(max(self._least, -(-count // OVERLAP)), min(most, self.most))

    def open(self) -> None:
        """Take what a call needs whole, before a batch is halved for what is left of memory.

        Raises:
            BackendError: there is no pinned memory for the pieces that features go through.
        """
        if self._upload is None:
            self._upload = Upload(self._device, self._streams)

    def run(self, rows: Source, out: npt.NDArray[Any], bind: Bind, most: int) -> bool:
        """out = results of features; False where these hold NaN or Inf. It has to be open.

        Args:
            most: images that can be bound at once, as many until `release`.
        """
        most = min(most, self.most)
        slots = self._ready_slots(most)
        self._streams.begin()
        with self._streams.on("compute"):
            constants = self._constants(rows)
        sent = "bfloat16" if rows.dtype == "float32" and self._rounds else rows.dtype
        size, good = self.size_of(len(rows), most), True
        try:
            for number, (start, stop) in enumerate(chunks(len(rows), size)):
                slot = slots[number % 2]
                finite, results = slot.arrived(out)
                good &= finite
                images = bucket(stop - start, most)
                run = self._graph(slot, images, sent, out.dtype.name, constants, bind)
                there = _as(slot.features, (images, *self._given), sent)
                self._bring(rows.data[start:stop], there, results)
                self._start(slot, run, out[start:stop].nbytes)
                slot.rows = (start, stop)
            for slot in sorted(slots, key=lambda slot: slot.rows):
                finite, results = slot.arrived(out)
                good &= finite
                if results is not None:
                    results.make()
        except BaseException:  # what is on its way uses memory that may be given back
            wait_for_all(self._device)
            raise
        return good

    def forget(self) -> None:
        """After a call that was cut short, and a wait for all: what it has left is not to be the next one's."""
        for slot in self._slots or ():
            slot.wait = None
            slot.flag.zero_()

    def release(self) -> bool:
        """Give back what is kept for the next call; whether there was anything."""
        kept, self._slots = self._slots is not None, None
        self._graphs.clear()
        return kept

    def _ready_slots(self, images: int) -> tuple[Slot, Slot]:
        if self._slots is None:
            self._slots = self._slot(images), self._slot(images)
        return self._slots

    def _slot(self, images: int) -> Slot:
        import torch

        def memory(shape: Shape, device: torch.device, pinned: bool = False) -> torch.Tensor:
            size = 4 * images * int(np.prod(shape))
            return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)

        device = self._device
        host = memory(self._made, torch.device("cpu"), device.type == "cuda")
        flag = flag_on(device)
        return Slot(memory(self._given, device), memory(self._made, device), host, flag, host.numpy(), flag.numpy())

    def _bring(self, part: npt.NDArray[Any], there: torch.Tensor, before: Copy | None) -> None:
        """Start features on their way; the results of the batch before them in the slot come to their place."""
        assert self._upload is not None
        count = len(part)
        self._upload.send(part, there[:count].view(-1), before)
        if len(there) > count:  # the rest of the bucket is computed on, too
            with self._streams.on("in"):
                there[count:].zero_()

    def _start(self, slot: Slot, run: Callable[[], None], size: int) -> None:
        """Have the launches follow the features, and so many bytes of results the launches."""
        streams = self._streams
        streams.after("compute", "in")
        with streams.on("compute"):
            run()
        streams.after("out", "compute")
        with streams.on("out"):
            slot.host[:size].copy_(slot.results[:size], non_blocking=True)
        slot.wait = streams.mark("out")

    def _graph(
        self, slot: Slot, images: int, sent: str, made: str, constants: tuple[torch.Tensor, ...], bind: Bind
    ) -> Callable[[], None]:
        """The whole run for so many images in a slot, from one type to another."""
        key = (id(slot), images, sent, made, bool(constants))
        if key not in self._graphs:
            features = _as(slot.features, (images, *self._given), sent)
            results = _as(slot.results, (images, *self._made), made)
            launches = bind(features, results, slot.flag, *constants)
            with self._streams.on("compute"):  # where the batch before may still be, in the same arena
                self._graphs[key] = repeatable(launches, self._device)
            slot.flag.zero_()  # that was one run, on whatever there was
        return self._graphs[key]

    def _constants(self, rows: Source) -> tuple[torch.Tensor, ...]:
        """Scale and zero point on the device, one entry for each channel; always in the same memory, as graphs need."""
        import torch

        if rows.scale is None or rows.zero_point is None:
            return ()
        if not self._quantised:
            _, channels = pixels_and_channels(self._given)
            self._quantised = tuple(torch.empty(channels, dtype=torch.float32, device=self._device) for _ in range(2))
        for tensor, values in zip(self._quantised, (rows.scale, rows.zero_point), strict=True):
            tensor.copy_(torch.from_numpy(of_channels(values, self._given)))
        return self._quantised


def _as(memory: torch.Tensor, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """What bytes begin with, as another type."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return memory[: int(np.prod(shape)) * kind.itemsize].view(kind).view(shape)
