"""rMLE on the GPU: a turn of the method is one CUDA graph, which is launched again and again."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.base import Array, Progress, Report, Start
from fastinv.backends.compiled import RAW_DTYPES
from fastinv.backends.cuda_device import (
    Streams,
    flag_on,
    halving,
    isa_of,
    keeps_memory,
    mark,
    nothing,
    on_device,
    repeatable,
    room_for_images,
    wait,
)
from fastinv.backends.cuda_host import Download, Drain, Feed, Given, Kept, Upload, finite
from fastinv.backends.cuda_methods import Objective, method_of
from fastinv.backends.cuda_network import MOST_IMAGES, NOT_FINITE, door, fitting, of_channels
from fastinv.backends.cuda_plan import Arena, Buffer, bucket
from fastinv.errors import BackendError, FeatureError
from fastinv.inverters import RMLE, channelwise
from fastinv.tensors import Source, chunks

if TYPE_CHECKING:
    import torch

LOOK = 50  # turns between looks at what is going on: each waits for the one before
LOOK_SOON = 10  # the same, of the methods that need few
MOST_BATCHES = 16  # of one call
MOST_VALUES = 2**30  # of its features: what cannot go to the device as it is becomes float32 first, 4 GiB
EXACT_PRECISIONS = ("float32", "tf32")  # that L-BFGS and conjugate gradients find their way in


Shift = tuple[Any, Any]  # factors and zero points of the features' channels, on the device; or None for both


@dataclass(frozen=True, eq=False)
class Job:
    """What a call asks for.

    Attributes:
        count: of images.
        at_once: how many of them.
        features: where they come from.
        shift: what goes with them.
        starts: normalised, [C, H, W] or [count, C, H, W], on the device; or what makes them of features there.
        sink: where images go, normalised.
        progress: told now and then.
    """

    count: int
    at_once: int
    features: Given | Feed
    shift: Shift
    starts: torch.Tensor | Start
    sink: Kept | Drain
    progress: Progress | None

    def starts_of(self, features: torch.Tensor, part: slice) -> torch.Tensor:
        """Of these images, whose features are there."""
        if callable(self.starts):
            made: torch.Tensor = self.starts(features)
            return made
        return self.starts.expand(self.count, *self.starts.shape[-3:])[part]


class CudaSolver:
    """The rMLE loop for one device. Between looks nothing comes back to Python but to launch the next graph.

    Args:
        most: images at once, at most.

    Raises:
        BackendError: a precision that the method cannot work in.
    """

    finite = staticmethod(finite)

    def __init__(
        self, recipe: RMLE, precision: str, device: torch.device, name: str = "cuda", most: int = MOST_IMAGES
    ) -> None:
        if recipe.method in ("lbfgs", "exact") and precision not in EXACT_PRECISIONS:
            raise BackendError(
                f"backend 'cuda': optimizer {recipe.method} cannot work in {precision}, whose rounding hides how the "
                f"objective falls: take precision {' or '.join(EXACT_PRECISIONS)}, or the optimizer 'adam'"
            )
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
        self._most = fitting(self._arenas.values(), outside, most)
        self._features = objective.target.elements
        self.batch_size: int | None = max(self._most, min(MOST_BATCHES * self._most, MOST_VALUES // self._features))
        self._mean, self._std = (
            torch.from_numpy(np.array(channelwise(values, recipe.image_shape))).to(device)
            for values in (recipe.mean, recipe.std)
        )
        self._batch: Batch | None = None
        self._room: tuple[torch.Tensor, int] | None = None
        self._transfers: tuple[Upload, Download] | None = None
        self.lock = threading.Lock()
        keeps_memory(self)

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        with self.lock, on_device(self._device):
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
        with self.lock, on_device(self._device):
            self._ready()  # may lower `_most`
            kept = Kept(self._zeros(len(features)))
            job = Job(len(features), self._most, Given(features), self._objective.shift, init, kept, None)
            report, finished = self._solve(job)
            with room_for_images(len(features)):
                return self._pixels(kept.images, dtype), report, finished

    def _from_host(
        self,
        features: npt.NDArray[Any],
        dtype: str,
        shift: Shift,
        init: Array | Start,
        sink: Kept | Drain,
        progress: Progress | None,
    ) -> tuple[Report, bool]:
        import torch

        self._ready()
        room, images = self._ready_room()
        upload, _ = self._ready_transfers()
        upload.streams.begin()
        starts = init if callable(init) else torch.from_numpy(np.array(init, np.float32)).to(self._device)
        feed = Feed(features, dtype, room, upload)
        return self._solve(Job(len(features), images, feed, shift, starts, sink, progress))

    def _solve(self, job: Job) -> tuple[Report, bool]:
        """Solve so many images at once, until all are.

        Raises:
            FeatureError: features hold NaN or Inf.
        """
        batch, count = self._ready(), job.count
        objective = np.full(count, np.nan)
        taken = np.zeros(count, np.int64)
        converged = np.zeros(count, np.bool_)
        finished, flag = True, flag_on(self._device)
        parts = [*chunks(count, job.at_once), (count, count)]
        try:
            job.features.send(*parts[0])
            for (start, stop), following in pairwise(parts):
                part = slice(start, stop)
                features = job.features.take(start, stop)
                batch.load(features, job.shift, job.starts_of(features, part), flag)
                job.features.free()

                def meanwhile(start: int = start, following: tuple[int, int] = following) -> None:
                    job.features.send(*following)
                    job.sink.flush()
                    if job.progress is not None and start > 0:
                        job.progress(start, int(taken.sum()))

                finished = batch.solve(job.progress, start, int(taken.sum()), meanwhile)
                images, *found = batch.results(stop - start)
                if flag.item():  # the results have been waited for
                    raise FeatureError(NOT_FINITE)
                job.sink.flush()  # where Ctrl-C came before
                job.sink.put(start, stop, images)
                objective[part], taken[part], converged[part] = found
                if not finished:
                    break
        except KeyboardInterrupt:  # before the steps of a batch, or after them
            finished = False
        finally:  # what is still on its way is not to be the next call's
            job.features.free()
            wait(self._device)
        job.sink.flush()
        return Report(objective, taken, converged, self._name, self.isa), finished

    def _zeros(self, images: int) -> torch.Tensor:
        import torch

        with room_for_images(images):
            return torch.zeros((images, *self._recipe.input_shape), dtype=torch.float32, device=self._device)

    def _pixels(self, z: torch.Tensor, dtype: str) -> torch.Tensor:
        """Of normalised images: in [0, 1], or as bytes, NaN as 0; contiguous."""
        import torch

        pixels = (z * self._std + self._mean).nan_to_num(0).clamp(0, 1)
        return ((255 * pixels).round().to(torch.uint8) if dtype == "uint8" else pixels).contiguous()

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
            fresh, self._most = halving(self._allocate, self._most)
            self._batch = fresh
        return self._batch

    def _ready_room(self) -> tuple[torch.Tensor, int]:
        """Where features from the host go, and how many images at once: half a batch, so that the way there overlaps
        with the other half's steps."""
        import torch

        if self._room is None:
            size = 4 * self._features
            self._room = halving(
                lambda images: torch.empty(size * images, dtype=torch.uint8, device=self._device), -(-self._most // 2)
            )
        return self._room

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
        return Batch(self, {buffer: tensor(buffer) for buffer in self._outside}, memory, images)


class Batch:
    """Tensors for the images that are solved at once, `most` of them, and the launches on them.

    It does not keep the solver, which keeps it: one that is not used any more is to free its memory at once.
    """

    def __init__(
        self, solver: CudaSolver, tensors: dict[Buffer, torch.Tensor], memory: torch.Tensor, most: int
    ) -> None:
        self._recipe = solver._recipe
        self._device = solver._device
        self._objective = solver._objective
        self._method = solver._method
        self._arenas = solver._arenas
        self._tensors = tensors
        self._memory = memory
        self._most = most
        self._runs: dict[int, dict[str, Callable[[], None]]] = {}
        self._images = 0

    def load(self, features: torch.Tensor, shift: Shift, starts: torch.Tensor, flag: torch.Tensor) -> None:
        """Features [n, *feature_shape], with their factors and zero points, and starts [n, C, H, W], in the user's
        order; a feature that is NaN or Inf sets the flag to 1."""
        from fastinv.kernels.triton.layout import launch_channels_last

        count, objective = len(features), self._objective
        self._images = bucket(count, self._most)
        self._capture()
        target = self._tensors[objective.target]
        target[count : self._images].zero_()
        shape = self._recipe.feature_shape
        launch_channels_last(features, target[:count], *door(shape), *shift, flag)()
        self._run("prepare")
        channels, height, width = self._recipe.input_shape
        images = self._tensors[objective.z][:count].view(count, height, width, channels)
        images.copy_(starts.permute(0, 2, 3, 1))
        if "best" in self._method.state:
            self._of("best")[:count] = self._tensors[objective.z][:count]
        self._of("running")[:count] = 1
        self._run("begin")

    def solve(self, progress: Progress | None, done: int, steps_done: int, meanwhile: Callable[[], None]) -> bool:
        """Take all steps; False when Ctrl-C cut them short. `meanwhile` is called when the first are on their way."""
        method = self._method
        look = LOOK if method.other is not None else LOOK_SOON
        finished, reached = True, nothing
        try:
            if method.turns == 0:
                meanwhile()
            for turn in itertools.count() if method.turns is None else range(method.turns):
                self._run("turn")
                if turn == 0:
                    meanwhile()
                if turn % look == look - 1:
                    reached()  # not further ahead than to the look before, or Ctrl-C would be heard at the end
                    reached = mark(self._device)
                    if not self._look(progress, done, steps_done):
                        break
            wait(self._device)
        except KeyboardInterrupt:
            finished = False
        self._run("end")
        return finished

    def results(self, count: int) -> tuple[torch.Tensor, Any, Any, Any]:
        """Images z [count, C, H, W], objectives, steps, and which have converged."""
        import torch

        z, value = self._tensors[self._method.result], self._of("value")
        if self._recipe.keep == "best" and "best_value" in self._method.state:
            better = self._of("best_value") < value
            z = torch.where(better, self._of("best"), z)
            value = torch.where(better, self._of("best_value"), value)
        channels, height, width = self._recipe.input_shape
        images = z[:count].reshape(count, height, width, channels).permute(0, 3, 1, 2)
        # Together: every copy to the host is waited for.
        numbers = torch.stack([value, self._of("taken"), self._of("running")])[..., 0].cpu().numpy()
        found, taken, running = numbers[:, :count]
        return images, found, taken.astype(np.int64), running == 0

    def _of(self, name: str) -> torch.Tensor:
        return self._tensors[(self._method.state | self._objective.report)[name]]

    def _look(self, progress: Progress | None, done: int, steps_done: int) -> bool:
        """Tell how things stand; whether any image still runs."""
        if progress is not None:
            progress(done, steps_done + int(self._of("taken")[: self._images].sum()))
        return not self._method.ends_early or bool((self._of("running")[: self._images] == 1).any())

    def _capture(self) -> None:
        """The parts of the method for so many images, as graphs. They are run once, on whatever there is: before a
        batch is loaded."""
        if self._images not in self._runs:
            self._of("running").zero_()
            launches = self._launches()
            self._runs[self._images] = {name: repeatable(part, self._device) for name, part in launches.items()}

    def _run(self, part: str) -> None:
        self._runs[self._images][part]()

    def _launches(self) -> dict[str, list[Callable[[], None]]]:
        """Those of every part of the method; a turn that leaves z elsewhere is followed by one that brings it back."""
        images = self._images
        here = {buffer: tensor[:images] for buffer, tensor in self._tensors.items()}
        bound = {name: arena.bind(images, self._memory, here) for name, arena in self._arenas.items()}
        z, other = self._objective.z, self._method.other
        if other is not None:
            there = here | {z: here[other], other: here[z]}
            bound["turn"] += self._arenas["turn"].bind(images, self._memory, there)
        target, unknown = self._objective.target, {"value": math.nan, "best_value": math.inf}
        first = {buffer: unknown.get(name, 0) for name, buffer in (self._method.state | self._objective.report).items()}

        def clear() -> None:
            """Set to 0 all but the features; what is not known yet to NaN or Inf."""
            for buffer, tensor in here.items():
                if buffer is not target:
                    tensor.fill_(first.get(buffer, 0))

        bound["prepare"].insert(0, clear)
        return bound
