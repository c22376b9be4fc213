"""The images that rMLE solves at once on the GPU: their tensors, and the launches on them, which are CUDA graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.base import Progress
from fastinv.backends.cuda.device import mark, nothing, repeatable, wait
from fastinv.backends.cuda.methods import Method, Objective
from fastinv.backends.cuda.nodes import pixels_and_channels
from fastinv.backends.cuda.plan import Arena, Buffer, bucket

if TYPE_CHECKING:
    import torch

TOLD = 3  # numbers of an image: its objective, its steps, whether it still runs
LOOK = 50  # turns between looks at what is going on: each waits for the one before
LOOK_SOON = 10  # the same, of the methods that need few

Shift = tuple[Any, Any]  # factors and zero points of the features' channels, on the device; or None for both


class Batch:
    """Tensors for the images that are solved at once, `most` of them, and the launches on them.

    It does not keep the solver, which keeps it: one that is not used any more is to free its memory at once.
    """

    def __init__(
        self,
        objective: Objective,
        method: Method,
        arenas: Mapping[str, Arena],
        tensors: dict[Buffer, torch.Tensor],
        memory: torch.Tensor,
        most: int,
    ) -> None:
        import torch

        self._recipe = objective.recipe
        self._device = objective.device
        self._objective = objective
        self._method = method
        self._arenas = arenas
        self._tensors = tensors
        self._memory = memory
        self._most = most
        self._named = {name: tensors[buffer] for name, buffer in (method.state | objective.report).items()}
        self._told = torch.empty(TOLD * most, dtype=torch.float64, device="cpu", pin_memory=self._device.type == "cuda")
        self._results: tuple[torch.Tensor, torch.Tensor] | None = None
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
        if count < self._images:
            target[count : self._images].zero_()
        shape = self._recipe.feature_shape
        launch_channels_last(features, target[:count], *pixels_and_channels(shape), *shift, flag)()
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
        except KeyboardInterrupt:
            finished = False
        self._run("end")
        self._results = self._gather()
        try:  # only now, with all on its way
            wait(self._device)
        except KeyboardInterrupt:  # before it waited or after, nobody knows
            finished = False
            wait(self._device)
        return finished

    def results(self, count: int) -> tuple[torch.Tensor, Any, Any, Any]:
        """Images z [count, C, H, W], in memory of the batch or not, objectives, steps, and which have converged."""
        assert self._results is not None
        (z, told), self._results = self._results, None
        channels, height, width = self._recipe.input_shape
        images = z[:count].reshape(count, height, width, channels).permute(0, 3, 1, 2)
        found, taken, running = np.array(told.numpy()[:, :count])
        return images, found, taken.astype(np.int64), running == 0

    def _gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, and what is told of them, [TOLD, images], which is on its way to the host: to be waited for."""
        import torch

        z, value = self._tensors[self._method.result], self._of("value")
        if self._recipe.keep == "best" and "best_value" in self._method.state:
            better = self._of("best_value") < value
            z = torch.where(better, self._of("best"), z)
            value = torch.where(better, self._of("best_value"), value)
        images = self._images
        numbers = torch.stack([part[:images, 0] for part in (value, self._of("taken"), self._of("running"))])
        # In one piece, and of one type: other copies would be waited for.
        told = self._told[: TOLD * images].view(TOLD, images)
        return z, told.copy_(numbers, non_blocking=True)

    def _of(self, name: str) -> torch.Tensor:
        return self._named[name]

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
