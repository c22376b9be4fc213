"""rMLE around the edge: residual, objective and stopping test, and the fused step (paper, Algorithm 1).

No kernel asks for the number of the step: each image counts its own, so that one CUDA graph of a step can be launched
again and again. Images that are done stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

BLOCK = 1024  # elements of a program
RUNNING, CONVERGED, FINISHED = 1, 0, 2  # what `running` says of an image
ROOT = 1e-12  # under the root of the total variation, for β < 2


@triton.jit
def _residual_kernel(
    y, v, out, part, addend, saved, a, b, size, tiles,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, k] = finish(2 · (y[n, k] − v[n, k])), and part[n, tile] = Σ_k (y[n, k] − v[n, k])² over the tile.

    y, out: [N, size]; v: float32 [N, size]; part: float32 [N, tiles].
    """
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    p = n * size + k
    difference = tl.load(y + p, mask=inside, other=0.0).to(tl.float32) - tl.load(v + p, mask=inside, other=0.0)
    tl.store(part + tl.program_id(0), tl.sum(difference * difference, axis=0))
    gradient = finish(2.0 * difference, p, inside, addend, saved, a, b, KIND)
    tl.store(out + p, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _squares(z, k, inside, height, width, channels):
    """dy, dx and dy² + dx² at elements k of an image [height, width, channels]; over the border they are 0."""
    row = k // (width * channels)
    column = k // channels % width
    here = tl.load(z + k, mask=inside, other=0.0)
    dy = tl.load(z + k + width * channels, mask=inside & (row + 1 < height), other=0.0) - here
    dx = tl.load(z + k + channels, mask=inside & (column + 1 < width), other=0.0) - here
    dy = tl.where(inside & (row + 1 < height), dy, 0.0)
    dx = tl.where(inside & (column + 1 < width), dx, 0.0)
    return dy, dx, dy * dy + dx * dx


@triton.jit
def _power(q, exponent, SQUARES: tl.constexpr, ROOT: tl.constexpr):
    """(q [+ ROOT])^exponent, ROOT where exponent < 0 or < 1 in the objective says so (β < 2)."""
    if SQUARES:
        return q
    else:
        q = tl.maximum(q + ROOT, 1e-30)
        return tl.exp2(exponent * tl.log2(q))


@triton.jit
def _objective_kernel(
    z, part, best, value, best_value, calm, running, taken,
    size, height, width, channels, tiles, steps, patience, tolerance, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The objective of one image, Σ part + tv_weight · Σ (dy² + dx²)^(β/2), and what follows from it.

    z, best (KEEP: of the lowest objective): float32 [N, size]; value, best_value: float32 [N]; calm (evaluations in a
    row within the tolerance), running (`RUNNING`, …), taken (steps): int32 [N]. An image that runs on is given its
    next step.
    """
    n = tl.program_id(0)
    if tl.load(running + n) == 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, tiles, BLOCK):
            k = start + tl.arange(0, BLOCK)
            total += tl.load(part + n * tiles + k, mask=k < tiles, other=0.0)
        found = tl.sum(total, axis=0)
        image = z + n * size
        if TV:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, size, BLOCK):
                k = start + tl.arange(0, BLOCK)
                _, _, q = _squares(image, k, k < size, height, width, channels)
                total += tl.where(k < size, _power(q, half_beta, SQUARES, ROOT), 0.0)
            found += tv_weight * tl.sum(total, axis=0)
        steps_before = tl.load(taken + n)
        if KEEP:
            if found < tl.load(best_value + n):
                tl.store(best_value + n, found)
                for start in range(0, size, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    pixels = tl.load(image + k, mask=k < size, other=0.0)
                    tl.store(best + n * size + k, pixels, mask=k < size)
        before = tl.load(value + n)
        still = (tolerance > 0) & (steps_before > 0) & (tl.abs(found - before) <= tolerance * tl.abs(before))
        count = tl.where(still, tl.load(calm + n) + 1, 0)
        state = tl.where(count >= patience, 0, tl.where(steps_before >= steps, 2, 1))
        tl.store(value + n, found)
        tl.store(calm + n, count)
        tl.store(running + n, state)
        tl.store(taken + n, steps_before + (state == 1).to(tl.int32))


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
    image = z + n * size
    here = tl.load(image + k, mask=inside, other=0.0)
    if tl.load(running + n) == 1:
        g = tl.load(gradient + p, mask=inside, other=0.0).to(tl.float32)
        if TV:
            up = inside & (k >= width * channels)
            left = inside & (k // channels % width > 0)
            dy, dx, q = _squares(image, k, inside, height, width, channels)
            dy_up, _, q_up = _squares(image, k - width * channels, up, height, width, channels)
            _, dx_left, q_left = _squares(image, k - channels, left, height, width, channels)
            if SQUARES:
                slope = dy_up + dx_left - dy - dx
            else:
                slope = dy_up * _power(q_up, half_beta - 1.0, False, ROOT)
                slope += dx_left * _power(q_left, half_beta - 1.0, False, ROOT)
                slope -= (dy + dx) * _power(q, half_beta - 1.0, False, ROOT)
            g += tv_weight * 2.0 * half_beta * slope
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
        if low is not None:
            bottom = tl.load(low + k % channels)
            top = tl.load(high + k % channels)
            here = tl.where(here < bottom, bottom, tl.where(here > top, top, here))
    tl.store(out + p, here, mask=inside)


def launch_residual(y: Any, v: Any, out: Any, part: Any, epilogue: Epilogue) -> Launch:
    """y, out: [N, size] or more axes; v: float32 like y; part: float32 [N, `tiles(size)`]."""
    size = y[0].numel()
    block = min(BLOCK, power_of_two(size))
    args = {"y": y, "v": v, "out": out, "part": part, **epilogue.args, "size": size, "tiles": tiles(size)}
    return Launch(_residual_kernel, len(y) * tiles(size), args, {"KIND": epilogue.kind, "BLOCK": block})


def tiles(size: int) -> int:
    """Programs for one image of so many elements."""
    return ceil_div(size, BLOCK)


@dataclass(frozen=True, eq=False)
class State:
    """What the solver knows of a batch, on the device: see the kernels."""

    best: Any
    value: Any
    best_value: Any
    calm: Any
    running: Any
    taken: Any
    first: Any
    second: Any
    third: Any


@dataclass(frozen=True, eq=False)
class Rule:
    """What is optimised and how, on the device: `RMLE` as the kernels take it.

    Attributes:
        shape: (height, width, channels).
        rates: float32 [steps, 2].
        low, high: float32 [channels], or None.
    """

    shape: tuple[int, int, int]
    optimizer: str
    steps: int
    rates: Any
    tv_weight: float
    tv_beta: float
    tolerance: float
    patience: int
    keep_best: bool
    low: Any
    high: Any
    beta1: float
    beta2: float
    eps: float
    momentum: float

    def launch_objective(self, z: Any, part: Any, state: State) -> Launch:
        """z: float32 [N, H, W, C]."""
        size = z[0].numel()
        args = {
            "z": z, "part": part, "best": state.best, "value": state.value, "best_value": state.best_value,
            "calm": state.calm, "running": state.running, "taken": state.taken, "size": size, **self._sides,
            "tiles": part.shape[1], "steps": self.steps, "patience": self.patience, "tolerance": self.tolerance,
            "tv_weight": self.tv_weight, "half_beta": self.tv_beta / 2,
        }  # fmt: skip
        constants = {**self._constants, "KEEP": self.keep_best, "BLOCK": min(BLOCK, power_of_two(size))}
        return Launch(_objective_kernel, len(z), args, constants)

    def launch_step(self, z: Any, gradient: Any, out: Any, state: State) -> Launch:
        """z and out: float32 [N, H, W, C], two tensors; gradient like them, of any type."""
        size = z[0].numel()
        block = min(BLOCK, power_of_two(size))
        args = {
            "z": z, "gradient": gradient, "out": out, "first": state.first, "second": state.second,
            "third": state.third, "rates": self.rates, "running": state.running, "taken": state.taken,
            "low": self.low, "high": self.high, "size": size, **self._sides, "tiles": ceil_div(size, block),
            "rest1": 1 - self.beta1, "beta2": self.beta2, "rest2": 1 - self.beta2, "eps": self.eps,
            "momentum": self.momentum, "tv_weight": self.tv_weight, "half_beta": self.tv_beta / 2,
        }  # fmt: skip
        constants = {**self._constants, "OPTIMIZER": self.optimizer, "BLOCK": block}
        return Launch(_step_kernel, len(z) * ceil_div(size, block), args, constants)

    @property
    def _sides(self) -> dict[str, int]:
        height, width, channels = self.shape
        return {"height": height, "width": width, "channels": channels}

    @property
    def _constants(self) -> dict[str, Any]:
        root = ROOT if self.tv_beta < 2 else 0.0
        return {"TV": self.tv_weight > 0, "SQUARES": self.tv_beta == 2, "ROOT": root}
