"""Limited-memory BFGS within bounds (Nocedal 1980; Liu and Nocedal 1989): one program an image.

Elements at a bound whose gradient points out of it stand still; steps along the direction of the others are cut back
to the bounds (projected Newton: Bertsekas 1982), and shortened until the objective falls enough (Armijo 1966).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.descent import clamped
from fastinv.kernels.triton.launch import Launch, power_of_two
from fastinv.kernels.triton.objective import Variation, objective
from fastinv.kernels.triton.vectors import add_scaled, dot, scale

BLOCK = 2048  # elements at once, of 8 warps: with fewer the compiler takes so few registers that they spill


@triton.jit
def _pick(values, index, WIDE: tl.constexpr):
    """values[index], of a vector in registers."""
    return tl.sum(tl.where(tl.arange(0, WIDE) == index, values, 0.0), axis=0)


@triton.jit
def _inverse(x):
    """1 / x as float64, to float32's precision: that is enough here, and a division in float64 takes a stack."""
    x = x.to(tl.float32)
    return (1.0 / tl.where(x == 0, 1e-38, x)).to(tl.float64)


@triton.jit
def _free(d, best, gradient, k, inside, channels, low, high):
    """d at elements k, and 0 where they are at a bound that the gradient points out of."""
    if low is not None:
        z = tl.load(best + k, mask=inside, other=0.0)
        g = tl.load(gradient + k, mask=inside, other=0.0)
        bottom = tl.load(low + k % channels)
        top = tl.load(high + k % channels)
        d = tl.where(((z <= bottom) & (g > 0)) | ((z >= top) & (g < 0)), 0.0, d)
    return d


@triton.jit
def _downhill(direction, best, gradient, longest, size, channels, low, high, BLOCK: tl.constexpr):
    """direction = −gradient where elements are free; its largest element is made `longest`, if that is not 0."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < size
        g = tl.load(gradient + k, mask=inside, other=0.0)
        d = _free(-g, best, gradient, k, inside, channels, low, high)
        tl.store(direction + k, d, mask=inside)
        largest = tl.maximum(largest, tl.abs(d))
    tl.debug_barrier()
    most = tl.max(largest, axis=0)
    if (longest > 0) & (most > 0):
        scale(direction, longest / most, direction, size, BLOCK)


@triton.jit
def _newton(
    direction, best, gradient, moves, changes, inverses, pairs, newest, size, channels, low, high,
    PAIRS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """direction = H · direction where elements are free, H being the inverse Hessian by the pairs."""
    rho = tl.load(inverses + tl.arange(0, WIDE))
    weights = tl.zeros((WIDE,), tl.float64)
    for age in range(0, pairs):
        slot = (newest + PAIRS - age) % PAIRS
        weight = dot(moves + slot * size, direction, size, BLOCK) * _pick(rho, slot, WIDE)
        weights = tl.where(tl.arange(0, WIDE) == slot, weight, weights)
        add_scaled(direction, direction, -weight, changes + slot * size, size, BLOCK)
    latest = changes + newest * size
    scale(direction, _inverse(_pick(rho, newest, WIDE) * dot(latest, latest, size, BLOCK)), direction, size, BLOCK)
    for back in range(0, pairs):
        slot = (newest + PAIRS - (pairs - 1 - back)) % PAIRS
        weight = dot(changes + slot * size, direction, size, BLOCK) * _pick(rho, slot, WIDE)
        weight = _pick(weights, slot, WIDE) - weight
        add_scaled(direction, direction, weight, moves + slot * size, size, BLOCK)
    if low is not None:
        for start in range(0, size, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < size
            d = _free(
                tl.load(direction + k, mask=inside, other=0.0), best, gradient, k, inside, channels, low, high
            )  # fmt: skip
            tl.store(direction + k, d, mask=inside)
        tl.debug_barrier()


@triton.jit
def _expected(z, best, gradient, size, BLOCK: tl.constexpr):
    """Σ gradient · (z − best): the fall that the slope promises along the path that was cut back."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        move = tl.load(z + k, mask=k < size, other=0.0) - tl.load(best + k, mask=k < size, other=0.0)
        total += tl.load(gradient + k, mask=k < size, other=0.0).to(tl.float64) * move.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _lbfgs_kernel(
    z, gradient, part, best, best_gradient, direction, moves, changes, inverses, numbers, counts, value, running, taken,
    low, high, size, height, width, channels, tiles, steps, patience, tolerance, tv_weight, half_beta,
    first_move, armijo,
    PAIRS: tl.constexpr, WIDE: tl.constexpr, TRIALS: tl.constexpr,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the objective and its gradient at z; leave in z where both are wanted next.

    z, gradient, best (the last iterate that was accepted), best_gradient, direction: float32 [N, size]; moves, changes
    (how z and the gradient changed): float32 [N, PAIRS, size]; inverses (1 / move · change): float64 [N, WIDE];
    numbers: float64 [N, 2], slope and step; counts: int32 [N, 5], pairs, the newest, trials, evaluations within the
    tolerance, and whether there was one before; value (of best): float64 [N]; running, taken: int32 [N].
    """
    n = tl.program_id(0)
    if tl.load(running + n) == 1:
        here, there = z + n * size, best + n * size
        g_here, g_there = gradient + n * size, best_gradient + n * size
        d = direction + n * size
        own_moves, own_changes = moves + n * PAIRS * size, changes + n * PAIRS * size
        count = counts + 5 * n
        pairs, newest, trials = tl.load(count), tl.load(count + 1), tl.load(count + 2)
        calm, begun = tl.load(count + 3), tl.load(count + 4)
        slope, step = tl.load(numbers + 2 * n), tl.load(numbers + 2 * n + 1)
        before = tl.load(value + n)
        done = tl.load(taken + n)
        found = objective(
            here, part + n * tiles, size, tiles, height, width, channels, tv_weight, half_beta, TV, SQUARES, ROOT, BLOCK
        )
        expected = _expected(here, there, g_there, size, BLOCK)
        fell = (found <= before + armijo * tl.minimum(expected, 0.0)) & (found < before)
        accepted = (begun == 0) | fell
        turn = accepted  # whether a new direction is due
        state = 1
        if accepted:
            if begun != 0:
                at = tl.where(pairs == 0, 0, (newest + 1) % PAIRS)
                minus = step * 0.0 - 1.0
                add_scaled(own_moves + at * size, here, minus, there, size, BLOCK)
                add_scaled(own_changes + at * size, g_here, minus, g_there, size, BLOCK)
                change = own_changes + at * size
                product = dot(own_moves + at * size, change, size, BLOCK)
                if product > 1e-10 * dot(change, change, size, BLOCK):  # else it is no curvature that can be used
                    tl.store(inverses + n * WIDE + at, _inverse(product))
                    newest = at
                    pairs = tl.minimum(pairs + 1, PAIRS)
                done += 1
                still = (tolerance > 0) & (tl.abs(found - before) <= tolerance * tl.abs(before))
                calm = tl.where(still, calm + 1, 0)
            scale(there, 1.0, here, size, BLOCK)
            scale(g_there, 1.0, g_here, size, BLOCK)
            tl.store(value + n, found)
            begun = 1
            state = tl.where(calm >= patience, 0, tl.where(done >= steps, 2, 1))
        else:
            trials += 1
            if trials < TRIALS:
                # The minimum of the parabola through what is known, where that makes sense; also of NaN, a tenth.
                excess = found - before - slope * step
                parabola = -0.5 * slope * step * step * _inverse(excess)
                step = tl.where(parabola > 0.1 * step, tl.minimum(parabola, 0.5 * step), 0.1 * step)
            else:
                state = tl.where(pairs == 0, 0, 1)
                turn = pairs > 0  # what it knows leads nowhere
                pairs = 0
        if turn & (state == 1):
            trials = 0
            step = step * 0.0 + 1.0
            slope = slope * 0.0
            if pairs > 0:
                _downhill(d, there, g_there, 0.0, size, channels, low, high, BLOCK)
                _newton(
                    d, there, g_there, own_moves, own_changes, inverses + n * WIDE, pairs, newest, size, channels,
                    low, high, PAIRS, WIDE, BLOCK,
                )  # fmt: skip
                slope = dot(g_there, d, size, BLOCK)
            if (slope < 0) == 0:
                pairs = 0
                _downhill(d, there, g_there, first_move, size, channels, low, high, BLOCK)
                slope = dot(g_there, d, size, BLOCK)
            state = tl.where(slope < 0, 1, 0)
        if state == 1:
            for start in range(0, size, BLOCK):
                k = start + tl.arange(0, BLOCK)
                trial = tl.load(there + k, mask=k < size, other=0.0)
                trial += step.to(tl.float32) * tl.load(d + k, mask=k < size, other=0.0)
                tl.store(here + k, clamped(trial, k % channels, low, high), mask=k < size)
        tl.store(count, pairs)
        tl.store(count + 1, newest)
        tl.store(count + 2, trials)
        tl.store(count + 3, calm)
        tl.store(count + 4, begun)
        tl.store(numbers + 2 * n, slope)
        tl.store(numbers + 2 * n + 1, step)
        tl.store(taken + n, done)
        tl.store(running + n, state)


@dataclass(frozen=True, eq=False)
class Lbfgs:
    """L-BFGS on the device: what `RMLE` and its definition say of it.

    Attributes:
        pairs: of iterates that are remembered.
        first_move: of any element, while there is no idea of the scale.
        armijo: part of the fall that the slope promises.
        trials: along one direction.
        low, high: float32 [channels], or None.
    """

    variation: Variation
    steps: int
    tolerance: float
    patience: int
    pairs: int
    first_move: float
    armijo: float
    trials: int
    low: Any
    high: Any

    def launch(self, z: Any, gradient: Any, part: Any, state: dict[str, Any]) -> Launch:
        """z, gradient: float32 [N, size]; part: float32 [N, tiles]; state: the kernel's tensors by their names."""
        args = {
            "z": z, "gradient": gradient, "part": part, **state, "low": self.low, "high": self.high,
            **self.variation.args, "tiles": part.shape[1], "steps": self.steps, "patience": self.patience,
            "tolerance": self.tolerance, "first_move": self.first_move, "armijo": self.armijo,
        }  # fmt: skip
        constants = {"PAIRS": self.pairs, "WIDE": power_of_two(self.pairs), "TRIALS": self.trials}
        constants |= {**self.variation.constants, "BLOCK": BLOCK}
        return Launch(_lbfgs_kernel, len(z), args, constants, warps=8)
