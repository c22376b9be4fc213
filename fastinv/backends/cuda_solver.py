"""rMLE on the GPU: two steps are one CUDA graph, which is launched again and again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.base import Array, Progress, Report
from fastinv.backends.cuda_device import halving, isa_of, on_device, repeatable, wait
from fastinv.backends.cuda_lowering import PRECISIONS, Lowering
from fastinv.backends.cuda_network import MOST_IMAGES, fitting
from fastinv.backends.cuda_plan import Arena, Buffer, Ending, Stage, bucket
from fastinv.inverters import RMLE, channelwise

if TYPE_CHECKING:
    import torch

LOOK = 50  # pairs of steps between looks at what is going on: each waits for the device


class CudaSolver:
    """The rMLE loop for one device. Between looks nothing comes back to Python but to launch the next graph.

    Args:
        most: images at once, at most.
    """

    def __init__(
        self, recipe: RMLE, precision: str, device: torch.device, name: str = "cuda", most: int = MOST_IMAGES
    ) -> None:
        from fastinv.kernels.triton.rmle import tiles

        self.precision = precision
        self.isa = isa_of(device)
        self._name = name
        self._recipe = recipe
        self._device = device
        self._lowering = Lowering(recipe.edge, device, PRECISIONS[precision], "float32", differentiable=True)
        self._rule = _rule(recipe, device)
        size = self._lowering.input.elements
        self._target = Buffer(self._lowering.output.elements, "float32")
        self._next = Buffer(size, "float32")
        self._part = Buffer(tiles(self._target.elements), "float32")
        self._state = {
            name: Buffer(size if name in ("best", "first", "second", "third") else 1, dtype)
            for name, dtype in {
                **dict.fromkeys(("best", "value", "best_value", "first", "second", "third"), "float32"),
                **dict.fromkeys(("calm", "running", "taken"), "int32"),
            }.items()
        }
        self._outside = (self._lowering.input, self._target, self._next, *self._state.values())
        evaluation, rest = self._stages()
        self._evaluation = Arena(evaluation, self._outside)
        self._step = Arena([*evaluation, *rest], self._outside)
        self._most = fitting(self._step, recipe.edge, most)
        self.batch_size: int | None = self._most
        self._batch: Batch | None = None
        self._lock = threading.Lock()

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        import torch

        own = [torch.from_numpy(np.array(values, np.float32)) for values in (features, init)]
        z, report, finished = self.solve_there(own[0], own[1], progress)
        return z.cpu().numpy(), report, finished

    def solve_there(
        self, features: torch.Tensor, init: torch.Tensor, progress: Progress | None = None
    ) -> tuple[torch.Tensor, Report, bool]:
        """As `solve`, for tensors anywhere; the images are on this device."""
        import torch

        shape = self._recipe.input_shape
        count = len(features)
        z = torch.zeros((count, *shape), device=self._device)
        objective = np.full(count, np.nan)
        taken = np.zeros(count, np.int64)
        converged = np.zeros(count, np.bool_)
        starts = init.expand(z.shape)
        start, finished = 0, True
        with self._lock, on_device(self._device):
            while start < count and finished:
                batch = self._ready()  # may lower `_most`
                stop = min(start + self._most, count)
                part = slice(start, stop)
                batch.load(features[part], starts[part])
                finished = batch.solve(progress, start, int(taken.sum()))
                z[part], objective[part], taken[part], converged[part] = batch.results(stop - start)
                start = stop
            wait(self._device)
        return z, Report(objective, taken, converged, self._name, self.isa), finished

    def _ready(self) -> Batch:
        if self._batch is None:
            fresh, self._most = halving(self._allocate, self._most)
            self._batch = fresh
        return self._batch

    def _allocate(self, images: int) -> Batch:
        import torch

        def tensor(buffer: Buffer) -> torch.Tensor:
            return torch.zeros(images, buffer.elements, dtype=getattr(torch, buffer.dtype), device=self._device)

        memory = torch.empty(max(1, self._step.bytes(images)), dtype=torch.uint8, device=self._device)
        return Batch(self, {buffer: tensor(buffer) for buffer in self._outside}, memory)

    def _stages(self) -> tuple[list[Stage], list[Stage]]:
        """Those that evaluate the objective, and those that then take the step from z to `_next`."""
        from fastinv.kernels.triton.rmle import State, launch_residual

        to, state = self._lowering, tuple(self._state.values())

        def states(tensors: Any) -> Any:
            return State(**{name: tensors(buffer) for name, buffer in self._state.items()})

        def seed(into: Buffer, ending: Ending) -> Stage:
            def residual(tensors: Any) -> Any:
                y, v, out, part = (tensors(b) for b in (to.output, self._target, into, self._part))
                return launch_residual(y, v, out, part, ending.epilogue(tensors))

            return Stage(residual, (to.output, *ending.reads), (into, self._part))

        def objective(tensors: Any) -> Any:
            return self._rule.launch_objective(tensors(to.input), tensors(self._part), states(tensors))

        (first, *back), gradient = to.backward(seed)

        def step(tensors: Any) -> Any:
            z, g, out = (tensors(b) for b in (to.input, gradient, self._next))
            return self._rule.launch_step(z, g, out, states(tensors))

        evaluation = [*to.forward(), first, Stage(objective, (to.input, self._part), state)]
        return evaluation, [*back, Stage(step, (to.input, gradient), (self._next, *state))]


class Batch:
    """Tensors for the images that are solved at once, and the launches on them."""

    def __init__(self, solver: CudaSolver, tensors: dict[Buffer, torch.Tensor], memory: torch.Tensor) -> None:
        self._solver = solver
        self._tensors = tensors
        self._memory = memory
        self._bound: dict[int, tuple[list[Callable[[], None]], ...]] = {}
        self._graphs: dict[int, Callable[[], None]] = {}
        self._images = self._here = 0

    def load(self, features: torch.Tensor, starts: torch.Tensor) -> None:
        """Features [n, *feature_shape] and starts [n, C, H, W], in the user's order."""
        solver, count = self._solver, len(features)
        self._images = bucket(count, solver._most)
        self._here = 0
        for tensor in self._tensors.values():
            tensor.zero_()
        for buffer, values in ((solver._target, features), (solver._lowering.input, starts)):
            inner = values.permute(0, 2, 3, 1) if values.ndim == 4 else values
            self._tensors[buffer][:count].copy_(inner.reshape(count, -1))
        self._of("best")[:count] = self._tensors[solver._lowering.input][:count]
        self._of("best_value").fill_(math.inf)
        self._of("running")[:count] = 1

    def solve(self, progress: Progress | None, done: int, steps_done: int) -> bool:
        """Take all steps; False when Ctrl-C cut them short."""
        steps = self._solver._recipe.steps
        try:
            for pair in range(steps // 2):
                self._pair()
                if pair % LOOK == LOOK - 1 and not self._look(progress, done, steps_done):
                    break
            else:
                if steps % 2:
                    self._launch(0)
                    self._here = 1
            finished = True
        except KeyboardInterrupt:
            finished = False
        self._launch(2 + self._here)
        running = self._of("running")
        self._of("taken").sub_((running == 1).int())  # they were given a step that is not taken
        return finished

    def results(self, count: int) -> tuple[torch.Tensor, Any, Any, Any]:
        """Images z [count, C, H, W], objectives, steps, and which have converged."""
        solver = self._solver
        best = solver._recipe.keep == "best"
        z = self._of("best") if best else self._z()
        channels, height, width = solver._recipe.input_shape
        images = z[:count].reshape(count, height, width, channels).permute(0, 3, 1, 2)
        names = ("best_value" if best else "value", "taken", "running")
        value, taken, running = (self._of(name)[:count, 0].cpu().numpy() for name in names)
        return images, value.astype(np.float64), taken.astype(np.int64), running == 0

    def _of(self, name: str) -> torch.Tensor:
        return self._tensors[self._solver._state[name]]

    def _z(self) -> torch.Tensor:
        return self._tensors[self._solver._next if self._here else self._solver._lowering.input]

    def _look(self, progress: Progress | None, done: int, steps_done: int) -> bool:
        """Tell how things stand; whether any image still runs."""
        if progress is not None:
            progress(done, steps_done + int(self._of("taken").sum()))
        return self._solver._recipe.tolerance == 0 or bool((self._of("running") == 1).any())

    def _pair(self) -> None:
        if self._images not in self._graphs:
            first, second, *_ = self._launches()
            saved = {buffer: tensor.clone() for buffer, tensor in self._tensors.items()}
            self._graphs[self._images] = repeatable([*first, *second], self._solver._device)
            for buffer, tensor in saved.items():  # capturing runs them once
                self._tensors[buffer].copy_(tensor)
        self._graphs[self._images]()

    def _launch(self, which: int) -> None:
        for launch in self._launches()[which]:
            launch()

    def _launches(self) -> tuple[list[Callable[[], None]], ...]:
        """A step from the first place of z to the second, one back, and evaluations in both places."""
        if self._images not in self._bound:
            solver, images = self._solver, self._images
            here = {buffer: tensor[:images] for buffer, tensor in self._tensors.items()}
            z, other = solver._lowering.input, solver._next
            there = here | {z: here[other], other: here[z]}
            arenas = (
                (solver._step, here),
                (solver._step, there),
                (solver._evaluation, here),
                (solver._evaluation, there),
            )
            self._bound[images] = tuple(arena.bind(images, self._memory, tensors) for arena, tensors in arenas)
        return self._bound[self._images]


def _rule(recipe: RMLE, device: torch.device) -> Any:
    """The recipe as the kernels take it."""
    import torch

    from fastinv.kernels.triton.rmle import Rule

    channels, height, width = recipe.input_shape
    t = np.arange(1, max(1, recipe.steps) + 1, dtype=np.float64)
    lr = np.full_like(t, recipe.lr)
    if recipe.schedule == "cosine":
        lr *= (1 + np.cos(np.pi * (t - 1) / max(1, recipe.steps))) / 2
    if recipe.method == "sgd":
        rates = np.stack([lr, lr], axis=1)
    else:
        beta1, beta2 = recipe.betas
        rates = np.stack([lr / (1 - beta1**t), (1 - beta2**t) ** -0.5], axis=1)
    low = high = None
    if recipe.clamp is not None:
        mean, std = (channelwise(values, recipe.input_shape).ravel() for values in (recipe.mean, recipe.std))
        low, high = (
            torch.from_numpy(np.ascontiguousarray((np.float32(bound) - mean) / std, np.float32)).to(device)
            for bound in recipe.clamp
        )
    return Rule(
        shape=(height, width, channels),
        optimizer=recipe.method,
        steps=recipe.steps,
        rates=torch.from_numpy(rates.astype(np.float32)).to(device),
        tv_weight=recipe.tv_weight,
        tv_beta=recipe.tv_beta,
        tolerance=recipe.tolerance,
        patience=recipe.patience,
        keep_best=recipe.keep == "best",
        low=low,
        high=high,
        beta1=recipe.betas[0],
        beta2=recipe.betas[1],
        eps=recipe.eps,
        momentum=recipe.momentum,
    )
