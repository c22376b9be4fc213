"""Steps of rMLE by gradient descent: which step an image takes or why it stops, and the fused step.

No kernel asks for the number of the step: each image counts its own, so that one CUDA graph of a step can be launched
again and again. Images that are done stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.launch import Launch
from fastinv.kernels.triton.objective import Variation, objective, tiles, variation_slope


@triton.jit
def _advance_kernel(
    z, part, best, value, best_value, calm, running, taken,
    size, height, width, channels, tiles, steps, patience, tolerance, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr,
    WATCHED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An image that runs on is given its next step. WATCHED: its objective decides, too.

    z, best (KEEP: of the lowest objective): float32 [N, size]; value, best_value: float64 [N]; calm (evaluations in a
    row within the tolerance), running (see `objective.py`), taken (steps): int32 [N].
    """
    n = tl.program_id(0)
    if tl.load(running + n) == 1:
        before_steps = tl.load(taken + n)
        state = tl.where(before_steps >= steps, 2, 1)
        if WATCHED:
            image = z + n * size
            found = objective(
                image, part + n * tiles, size, tiles, height, width, channels, tv_weight, half_beta,
                TV, SQUARES, ROOT, BLOCK,
            )  # fmt: skip
            if KEEP:
                lowest = tl.load(best_value + n)
                tl.debug_barrier()  # every warp reads it before one writes it
                if found < lowest:
                    tl.store(best_value + n, found)
                    for start in range(0, size, BLOCK):
                        k = start + tl.arange(0, BLOCK)
                        pixels = tl.load(image + k, mask=k < size, other=0.0)
                        tl.store(best + n * size + k, pixels, mask=k < size)
            before = tl.load(value + n)
            still = (tolerance > 0) & (before_steps > 0) & (tl.abs(found - before) <= tolerance * tl.abs(before))
            count = tl.where(still, tl.load(calm + n) + 1, 0)
            state = tl.where(count >= patience, 0, state)
            tl.store(value + n, found)
            tl.store(calm + n, count)
        tl.store(running + n, state)
        tl.store(taken + n, before_steps + (state == 1).to(tl.int32))


@triton.jit
def _step_kernel(
    z, gradient, out, first, second, third, rates, running, taken, low, high,
    size, height, width, channels, tiles, rest1, beta2, rest2, eps, momentum, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, OPTIMIZER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = clamp(z − step), by the gradient [N, size] plus that of tv_weight · TV_β(z).

    z, out (another tensor: neighbours read z) and the moments first, second, third (of AMSGrad): float32 [N, size].
    rates: float32 [steps, 2], for Adam lr_t / (1 − β1^t) and (1 − β2^t)^(−1/2), for SGD lr_t. low, high: float32
    [channels], or None. rest1, rest2: 1 − β1, 1 − β2. Adam: Kingma and Ba 2015; AMSGrad: Reddi et al. 2018; both as in
    PyTorch.
    """
    n = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    p = n * size + k
    here = tl.load(z + p, mask=inside, other=0.0)
    if tl.load(running + n) == 1:
        g = tl.load(gradient + p, mask=inside, other=0.0).to(tl.float32)
        if TV:
            g += variation_slope(z + n * size, k, inside, height, width, channels, tv_weight, half_beta, SQUARES, ROOT)
        rate = rates + 2 * (tl.load(taken + n) - 1)
        m = tl.load(first + p, mask=inside, other=0.0)
        if OPTIMIZER == "sgd":
            m = momentum * m + g
            here -= tl.load(rate) * m
        else:
            m += rest1 * (g - m)
            s = tl.load(second + p, mask=inside, other=0.0)
            s = beta2 * s + rest2 * g * g
            tl.store(second + p, s, mask=inside)
            if OPTIMIZER == "amsgrad":
                s = tl.maximum(s, tl.load(third + p, mask=inside, other=0.0))
                tl.store(third + p, s, mask=inside)
            here -= tl.load(rate) * m / (tl.sqrt(s) * tl.load(rate + 1) + eps)
        tl.store(first + p, m, mask=inside)
        here = clamped(here, k % channels, low, high)
    tl.store(out + p, here, mask=inside)


@triton.jit
def clamped(z, c, low, high):
    """z of channels c within bounds [channels]; as it is where they are None. NaN stays NaN."""
    if low is not None:
        bottom = tl.load(low + c)
        top = tl.load(high + c)
        z = tl.where(z < bottom, bottom, tl.where(z > top, top, z))
    return z


@dataclass(frozen=True, eq=False)
class Descent:
    """Adam, AMSGrad or SGD, on the device: what `RMLE` says of it.

    Attributes:
        variation: of the objective.
        sloped: whether the step adds the gradient of the variation to the one it is given.
        rates: float32 [steps, 2].
        low, high: float32 [channels], or None.
    """

    variation: Variation
    sloped: bool
    optimizer: str
    steps: int
    rates: Any
    tolerance: float
    patience: int
    keep_best: bool
    low: Any
    high: Any
    beta1: float
    beta2: float
    eps: float
    momentum: float

    @property
    def watched(self) -> bool:
        """Whether the objective is needed after every step."""
        return self.tolerance > 0 or self.keep_best

    def launch_advance(self, z: Any, part: Any, state: dict[str, Any]) -> Launch:
        """z: float32 [N, size]; part: float32 [N, tiles]; state: the tensors of both kernels by their names."""
        names = ("best", "value", "best_value", "calm", "running", "taken")
        args = {
            "z": z, "part": part, **{name: state[name] for name in names}, **self.variation.args,
            "tiles": part.shape[1], "steps": self.steps, "patience": self.patience, "tolerance": self.tolerance,
        }  # fmt: skip
        constants = {**self.variation.constants, "WATCHED": self.watched, "KEEP": self.keep_best}
        return Launch(_advance_kernel, len(z), args, constants)

    def launch_step(self, z: Any, gradient: Any, out: Any, state: dict[str, Any]) -> Launch:
        """z and out: float32 [N, size], two tensors; gradient like them, of any type."""
        names = ("first", "second", "third", "running", "taken")
        programs = tiles(self.variation.args["size"])
        args = {
            "z": z, "gradient": gradient, "out": out, "rates": self.rates, "low": self.low, "high": self.high,
            **{name: state[name] for name in names}, **self.variation.args, "tiles": programs,
            "rest1": 1 - self.beta1, "beta2": self.beta2, "rest2": 1 - self.beta2, "eps": self.eps,
            "momentum": self.momentum,
        }  # fmt: skip
        constants = {**self.variation.constants, "OPTIMIZER": self.optimizer}
        constants["TV"] &= self.sloped
        return Launch(_step_kernel, len(z) * programs, args, constants)
