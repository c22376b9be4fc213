"""rMLE on the GPU: a turn of the method is one CUDA graph, which is launched again and again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.base import Array, Progress, Report, Start
from fastinv.backends.compiled import RAW_DTYPES
from fastinv.backends.cuda.batch import Batch, Shift
from fastinv.backends.cuda.device import (
    Streams,
    flag_on,
    halving,
    isa_of,
    keeps_memory,
    on_device,
    room_for,
    room_for_images,
    wait,
)
from fastinv.backends.cuda.host import Download, Drain, Feed, Given, Kept, Upload, finite
from fastinv.backends.cuda.methods import Objective, method_of
from fastinv.backends.cuda.network import NOT_FINITE
from fastinv.backends.cuda.nodes import of_channels
from fastinv.backends.cuda.plan import MOST_IMAGES, Arena, Buffer, fitting
from fastinv.errors import FeatureError
from fastinv.inverters import RMLE, channelwise
from fastinv.tensors import Source, chunks

if TYPE_CHECKING:
    import torch

MOST_BATCHES = 16  # of one call
MOST_VALUES = 2**30  # of its features: what cannot go to the device as it is becomes float32 first, 4 GiB


@dataclass(frozen=True, eq=False)
class Job:
    """What a call asks for.

    Attributes:
        count: of images.
        features: makes where they come from, and says how many go on at once.
        shift: what goes with them.
        starts: normalised, [C, H, W] or [count, C, H, W], on the device; or what makes them of features there.
        sink: where images go, normalised.
        progress: told now and then.
    """

    count: int
    features: Callable[[], tuple[Given | Feed, int]]
    shift: Shift
    starts: torch.Tensor | Start
    sink: Kept | Pixels | Drain
    progress: Progress | None

    def starts_of(self, features: torch.Tensor, part: slice) -> torch.Tensor:
        """Of these images, whose features are there."""
        if callable(self.starts):
            made: torch.Tensor = self.starts(features)
            return made
        return self.starts.expand(self.count, *self.starts.shape[-3:])[part]


class Pixels:
    """Where images go as they are to be given, on the device.

    Args:
        images: [N, ...], their memory.
        write: makes of what is put what is to stand there.

    Attributes:
        done: of so many images, the first, there are pixels.
    """

    def __init__(self, images: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self.done = 0
        self._images = images
        self._write = write

    def put(self, start: int, stop: int, images: torch.Tensor) -> None:
        """These images are done."""
        self._write(images, self._images[start:stop])
        self.done = stop

    def flush(self) -> None:
        """They are where they belong."""


@dataclass(eq=False)
class Found:
    """What is known of a job's images: all of the first `done`."""

    count: int
    done: int = 0
    finished: bool = True
    objective: npt.NDArray[np.float64] = field(init=False)
    taken: npt.NDArray[np.int64] = field(init=False)
    converged: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.objective = np.full(self.count, np.nan)
        self.taken = np.zeros(self.count, np.int64)
        self.converged = np.zeros(self.count, np.bool_)


class CudaSolver:
    """The rMLE loop for one device. Between looks nothing comes back to Python but to launch the next graph.

    Args:
        most: images at once, at most.
    """

    finite = staticmethod(finite)

    def __init__(
        self, recipe: RMLE, precision: str, device: torch.device, name: str = "cuda", most: int = MOST_IMAGES
    ) -> None:
        import torch

        self.precision = precision
        self.isa = isa_of(device)
        self.stops_within = True
        self._name = name
        self._recipe = recipe
        self._device = device
        self._objective = objective = Objective(recipe, precision, device)
        self._method = method = method_of(objective)
        outside = [objective.z, objective.target, objective.constant, *objective.report.values()]
        outside += [*method.state.values(), *([] if method.other is None else [method.other])]
        self._outside = tuple(outside)
        stages = {"prepare": method.prepare, "begin": method.begin, "turn": method.turn, "end": method.end}
        self._arenas = {name: Arena(stages[name], outside) for name in stages}
        self._features = objective.target.elements
        room = Buffer(-(-self._features // 2), "float32")  # that of `_feed`
        self.most = fitting(self._arenas.values(), [*outside, room], most)
        self.batch_size: int | None = max(self.most, min(MOST_BATCHES * self.most, MOST_VALUES // self._features))
        self._mean, self._std = (
            torch.from_numpy(np.array(channelwise(values, recipe.image_shape))).to(device)
            for values in (recipe.mean, recipe.std)
        )
        self._batch: Batch | None = None
        self._room: torch.Tensor | None = None
        self._flag: torch.Tensor | None = None  # a 0, of features that are not finite, between calls
        self._transfers: tuple[Upload, Download] | None = None
        self.lock = threading.Lock()
        keeps_memory(self)

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        with self.lock, on_device(self._device):
            with room_for(f"the images of {len(features):,} features on the GPU", "pass fewer at once"):
                kept = Kept(self._zeros(len(features)))
            report, finished = self._from_host(features, "float32", self._objective.shift, init, kept, progress)
        return kept.images.cpu().numpy(), report, finished

    def solve_raw(
        self, rows: Source, init: Array | Start, out: npt.NDArray[Any], progress: Progress | None = None
    ) -> tuple[Report, bool] | None:
        if rows.dtype not in RAW_DTYPES or not rows.data.dtype.isnative or (callable(init) and rows.scale is not None):
            return None
        with self.lock, on_device(self._device), contextlib.suppress(FeatureError):
            _, download = self._ready_transfers()
            drain = Drain(out, partial(self._pixels, dtype=out.dtype.name), download)
            return self._from_host(rows.data, rows.dtype, self._shift(rows), init, drain, progress)
        return None

    def solve_there(self, features: torch.Tensor, init: torch.Tensor, dtype: str) -> tuple[torch.Tensor, Report, bool]:
        """As `solve_raw`, for float features and a start on this device; the images are there, too."""
        import torch

        with self.lock, on_device(self._device):
            with room_for_images(len(features)):
                out = torch.empty(
                    (len(features), *self._recipe.input_shape), dtype=getattr(torch, dtype), device=self._device
                )
            given, kept = Given(features), Pixels(out, self._write_pixels)
            job = Job(len(features), lambda: (given, self.most), self._objective.shift, init, kept, None)
            report, finished = self._solve(job)
            if not finished:
                out[kept.done :] = self._pixels(self._zeros(1), dtype)
            return out, report, finished

    def _from_host(
        self,
        features: npt.NDArray[Any],
        dtype: str,
        shift: Shift,
        init: Array | Start,
        sink: Kept | Pixels | Drain,
        progress: Progress | None,
    ) -> tuple[Report, bool]:
        import torch

        upload, _ = self._ready_transfers()
        starts = init if callable(init) else torch.from_numpy(np.array(init, np.float32)).to(self._device)
        feed = partial(self._feed, features, dtype, upload)
        return self._solve(Job(len(features), feed, shift, starts, sink, progress))

    def _feed(self, features: npt.NDArray[Any], dtype: str, upload: Upload) -> tuple[Feed, int]:
        """Half a batch at once, so that the way there overlaps with the other half's steps."""
        import torch

        images = -(-self.most // 2)
        if self._room is None:
            self._room = torch.empty(4 * self._features * images, dtype=torch.uint8, device=self._device)
        upload.streams.begin()
        return Feed(features, dtype, self._room, upload), images

    def _solve(self, job: Job) -> tuple[Report, bool]:
        """Solve so many images at once, until all are; fewer where memory does not suffice for so many.

        Raises:
            FeatureError: features hold NaN or Inf.
        """
        found = Found(job.count)
        halving(partial(self._go_on, job, found), self, self._device)
        return Report(found.objective, found.taken, found.converged, self._name, self.isa), found.finished

    def _go_on(self, job: Job, found: Found) -> None:
        """Solve the images that are not yet."""
        batch = self._ready()
        # A call that is cut short may leave launches that set its flag, and so leaves no flag.
        flag, self._flag = flag_on(self._device) if self._flag is None else self._flag, None
        given, at_once = job.features()
        first, count = found.done, job.count
        parts = [(first + start, first + stop) for start, stop in chunks(count - first, at_once)]
        parts.append((count, count))
        try:
            given.send(*parts[0])
            for (start, stop), following in pairwise(parts):
                part = slice(start, stop)
                features = given.take(start, stop)
                batch.load(features, job.shift, job.starts_of(features, part), flag)
                given.free()

                def meanwhile(start: int = start, following: tuple[int, int] = following) -> None:
                    given.send(*following)
                    job.sink.flush()
                    if job.progress is not None and start > 0:
                        job.progress(start, int(found.taken.sum()))

                found.finished = batch.solve(job.progress, start, int(found.taken.sum()), meanwhile)
                images, *numbers = batch.results(stop - start)
                if flag.item():  # the results have been waited for
                    raise FeatureError(NOT_FINITE)
                job.sink.flush()  # where Ctrl-C came before
                job.sink.put(start, stop, images)
                found.objective[part], found.taken[part], found.converged[part] = numbers
                found.done = stop
                if not found.finished:
                    break
        except KeyboardInterrupt:  # before the steps of a batch, or after them
            found.finished = False
        finally:  # what is still on its way is not to be the next call's
            given.free()
            given.wait()
            wait(self._device)
        self._flag = flag if found.finished else None
        job.sink.flush()

    def _zeros(self, images: int) -> torch.Tensor:
        import torch

        return torch.zeros((images, *self._recipe.input_shape), dtype=torch.float32, device=self._device)

    def _pixels(self, z: torch.Tensor, dtype: str) -> torch.Tensor:
        """Of normalised images: in [0, 1], or as bytes, NaN as 0; contiguous."""
        import torch

        out = torch.empty(z.shape, dtype=getattr(torch, dtype), device=self._device)
        self._write_pixels(z, out)
        return out

    def _write_pixels(self, z: torch.Tensor, out: torch.Tensor) -> None:
        import torch

        pixels = (z * self._std).add_(self._mean).nan_to_num_(0)
        if out.dtype is torch.uint8:
            out.copy_(pixels.clamp_(0, 1).mul_(255).round_())
        else:
            torch.clamp(pixels, 0, 1, out=out)

    def _shift(self, rows: Source) -> Shift:
        """Of features as they are given, to what the objective takes as its target."""
        import torch

        if rows.scale is None or rows.zero_point is None:
            return self._objective.shift
        shape = self._recipe.feature_shape
        scale, zero_point = (
            torch.from_numpy(of_channels(values, shape)).to(self._device) for values in (rows.scale, rows.zero_point)
        )
        _, bias = self._objective.shift
        return scale, zero_point if bias is None else zero_point + bias / scale

    def release(self) -> bool:
        """Give back what is kept for the next call; whether there was anything."""
        kept = self._batch is not None or self._room is not None
        self._batch = self._room = None
        return kept

    def _ready(self) -> Batch:
        if self._batch is None:
            self._batch = self._allocate(self.most)
        return self._batch

    def _ready_transfers(self) -> tuple[Upload, Download]:
        if self._transfers is None:
            streams = Streams(self._device)
            self._transfers = Upload(self._device, streams), Download(self._device, streams)
        return self._transfers

    def _allocate(self, images: int) -> Batch:
        import torch

        def tensor(buffer: Buffer) -> torch.Tensor:
            return torch.zeros(images, buffer.elements, dtype=getattr(torch, buffer.dtype), device=self._device)

        most = max(arena.bytes(images) for arena in self._arenas.values())
        memory = torch.empty(max(1, most), dtype=torch.uint8, device=self._device)
        tensors = {buffer: tensor(buffer) for buffer in self._outside}
        return Batch(self._objective, self._method, self._arenas, tensors, memory, images)
