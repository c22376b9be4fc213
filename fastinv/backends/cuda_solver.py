"""rMLE on the GPU: a turn of the method is one CUDA graph, which is launched again and again."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.base import Array, Progress, Report
from fastinv.backends.cuda_device import flag_on, halving, isa_of, on_device, repeatable, wait
from fastinv.backends.cuda_host import NO_FEATURES, Feed, Given, finite
from fastinv.backends.cuda_methods import Objective, method_of
from fastinv.backends.cuda_network import MOST_IMAGES, NOT_FINITE, door, fitting
from fastinv.backends.cuda_plan import Arena, Buffer, bucket
from fastinv.errors import BackendError, FeatureError
from fastinv.inverters import RMLE
from fastinv.tensors import chunks

if TYPE_CHECKING:
    import torch

LOOK = 50  # turns between looks at what is going on: each waits for the device
LOOK_SOON = 10  # the same, of the methods that need few
EXACT_PRECISIONS = ("float32", "tf32")  # that L-BFGS and conjugate gradients find their way in


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
        self.batch_size: int | None = self._most
        self._batch: Batch | None = None
        self._features = objective.target.elements
        self._feed: tuple[Feed, int] | None = None
        self._lock = threading.Lock()

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        import torch

        starts = torch.from_numpy(np.array(init, np.float32)).to(self._device)
        with self._lock, on_device(self._device):
            batch = self._ready()
            feed, images = self._ready_feed()
            feed.features = features
            try:
                z, report, finished = self._solve(batch, feed, len(features), images, starts, progress)
            finally:
                feed.features = NO_FEATURES
        return z.cpu().numpy(), report, finished

    def solve_there(
        self, features: torch.Tensor, init: torch.Tensor, progress: Progress | None = None
    ) -> tuple[torch.Tensor, Report, bool]:
        """As `solve`, for tensors on this device."""
        with self._lock, on_device(self._device):
            batch = self._ready()  # may lower `_most`
            return self._solve(batch, Given(features), len(features), self._most, init, progress)

    def _solve(
        self,
        batch: Batch,
        feed: Given | Feed,
        count: int,
        images: int,
        init: torch.Tensor,
        progress: Progress | None,
    ) -> tuple[torch.Tensor, Report, bool]:
        """Solve so many images at once, until all are.

        Raises:
            FeatureError: features hold NaN or Inf.
        """
        import torch

        z = torch.zeros((count, *self._recipe.input_shape), device=self._device)
        objective = np.full(count, np.nan)
        taken = np.zeros(count, np.int64)
        converged = np.zeros(count, np.bool_)
        starts = init.expand(z.shape)
        finished, flag = True, flag_on(self._device)
        parts = [*chunks(count, images), (count, count)]
        feed.send(*parts[0])
        for (start, stop), following in pairwise(parts):
            part = slice(start, stop)
            batch.load(feed.take(start, stop), starts[part], flag)
            feed.free()
            finished = batch.solve(progress, start, int(taken.sum()), partial(feed.send, *following))
            z[part], objective[part], taken[part], converged[part] = batch.results(stop - start)
            if flag.item():  # the results have been waited for
                raise FeatureError(NOT_FINITE)
            if not finished:
                break
        wait(self._device)
        return z, Report(objective, taken, converged, self._name, self.isa), finished

    def _ready(self) -> Batch:
        if self._batch is None:
            fresh, self._most = halving(self._allocate, self._most)
            self._batch = fresh
        return self._batch

    def _ready_feed(self) -> tuple[Feed, int]:
        """What brings features from the host, and how many images at once: half a batch, so that its way there overlaps
        with the other half's steps."""
        if self._feed is None:
            self._feed = halving(lambda images: Feed(images, self._features, self._device), -(-self._most // 2))
        return self._feed

    def _allocate(self, images: int) -> Batch:
        import torch

        def tensor(buffer: Buffer) -> torch.Tensor:
            return torch.zeros(images, buffer.elements, dtype=getattr(torch, buffer.dtype), device=self._device)

        most = max(arena.bytes(images) for arena in self._arenas.values())
        memory = torch.empty(max(1, most), dtype=torch.uint8, device=self._device)
        return Batch(self, {buffer: tensor(buffer) for buffer in self._outside}, memory)


class Batch:
    """Tensors for the images that are solved at once, and the launches on them."""

    def __init__(self, solver: CudaSolver, tensors: dict[Buffer, torch.Tensor], memory: torch.Tensor) -> None:
        self._solver = solver
        self._tensors = tensors
        self._memory = memory
        self._runs: dict[int, dict[str, Callable[[], None]]] = {}
        self._images = 0

    def load(self, features: torch.Tensor, starts: torch.Tensor, flag: torch.Tensor) -> None:
        """Features [n, *feature_shape] and starts [n, C, H, W], in the user's order; a feature that is NaN or Inf sets
        the flag to 1."""
        from fastinv.kernels.triton.layout import launch_channels_last

        solver, count = self._solver, len(features)
        objective = solver._objective
        self._images = bucket(count, solver._most)
        self._capture()
        target = self._tensors[objective.target]
        target[count : self._images].zero_()
        shape = solver._recipe.feature_shape
        launch_channels_last(features, target[:count], *door(shape), *objective.shift, flag)()
        self._run("prepare")
        channels, height, width = solver._recipe.input_shape
        images = self._tensors[objective.z][:count].view(count, height, width, channels)
        images.copy_(starts.permute(0, 2, 3, 1))
        if "best" in solver._method.state:
            self._of("best")[:count] = self._tensors[objective.z][:count]
        self._of("running")[:count] = 1
        self._run("begin")

    def solve(self, progress: Progress | None, done: int, steps_done: int, meanwhile: Callable[[], None]) -> bool:
        """Take all steps; False when Ctrl-C cut them short. `meanwhile` is called when the first are on their way."""
        method = self._solver._method
        look = LOOK if method.other is not None else LOOK_SOON
        finished = True
        try:
            if method.turns == 0:
                meanwhile()
            for turn in itertools.count() if method.turns is None else range(method.turns):
                self._run("turn")
                if turn == 0:
                    meanwhile()
                if turn % look == look - 1 and not self._look(progress, done, steps_done):
                    break
        except KeyboardInterrupt:
            finished = False
        self._run("end")
        return finished

    def results(self, count: int) -> tuple[torch.Tensor, Any, Any, Any]:
        """Images z [count, C, H, W], objectives, steps, and which have converged."""
        import torch

        solver = self._solver
        z, value = self._tensors[solver._method.result], self._of("value")
        if solver._recipe.keep == "best" and "best_value" in solver._method.state:
            better = self._of("best_value") < value
            z = torch.where(better, self._of("best"), z)
            value = torch.where(better, self._of("best_value"), value)
        channels, height, width = solver._recipe.input_shape
        images = z[:count].reshape(count, height, width, channels).permute(0, 3, 1, 2)
        # Together: every copy to the host is waited for.
        numbers = torch.stack([value, self._of("taken"), self._of("running")])[..., 0].cpu().numpy()
        found, taken, running = numbers[:, :count]
        return images, found, taken.astype(np.int64), running == 0

    def _of(self, name: str) -> torch.Tensor:
        return self._tensors[(self._solver._method.state | self._solver._objective.report)[name]]

    def _look(self, progress: Progress | None, done: int, steps_done: int) -> bool:
        """Tell how things stand; whether any image still runs."""
        if progress is not None:
            progress(done, steps_done + int(self._of("taken").sum()))
        return not self._solver._method.ends_early or bool((self._of("running") == 1).any())

    def _capture(self) -> None:
        """The parts of the method for so many images, as graphs. They are run once, on whatever there is: before a
        batch is loaded."""
        if self._images not in self._runs:
            self._of("running").zero_()
            device = self._solver._device
            self._runs[self._images] = {name: repeatable(part, device) for name, part in self._launches().items()}

    def _run(self, part: str) -> None:
        self._runs[self._images][part]()

    def _launches(self) -> dict[str, list[Callable[[], None]]]:
        """Those of every part of the method; a turn that leaves z elsewhere is followed by one that brings it back."""
        solver, images = self._solver, self._images
        here = {buffer: tensor[:images] for buffer, tensor in self._tensors.items()}
        bound = {name: arena.bind(images, self._memory, here) for name, arena in solver._arenas.items()}
        z, other = solver._objective.z, solver._method.other
        if other is not None:
            there = here | {z: here[other], other: here[z]}
            bound["turn"] += solver._arenas["turn"].bind(images, self._memory, there)
        bound["prepare"].insert(0, partial(self._clear, here))
        return bound

    def _clear(self, tensors: dict[Buffer, torch.Tensor]) -> None:
        """Set to 0 all but the features; what is not known yet to NaN or Inf."""
        method, objective = self._solver._method, self._solver._objective
        unknown = {"value": math.nan, "best_value": math.inf}
        first = {buffer: unknown.get(name, 0) for name, buffer in (method.state | objective.report).items()}
        for buffer, tensor in tensors.items():
            if buffer is not objective.target:
                tensor.fill_(first.get(buffer, 0))
