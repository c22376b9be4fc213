"""The minimum of a quadratic objective by conjugate gradients (Hestenes and Stiefel 1952): one program an image.

Its gradient is H·z + c. The network is shown the direction at the length of an image: near the end the direction itself
would be lost in the rounding of what the network makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.launch import Launch
from fastinv.kernels.triton.objective import block_of
from fastinv.kernels.triton.vectors import add_scaled, dot, scale


@triton.jit
def _unit(direction, size, BLOCK: tl.constexpr):
    """What takes the direction to length √size."""
    square = dot(direction, direction, size, BLOCK)
    return tl.where(square > 0, tl.sqrt(size / tl.where(square > 0, square, 1.0)), 1.0)


@triton.jit
def _conjugate_start_kernel(
    z, gradient, solution, residual, direction, numbers, running, size, steps, exact, BLOCK: tl.constexpr
):
    """From the start z and the objective's gradient there to the first direction, shown in z.

    z, gradient, solution, residual, direction: float32 [N, size]; numbers: float64 [N, 4], what `_conjugate_kernel`
    reads; running: int32 [N]. An image is done when its residual has shrunk by `exact`.
    """
    n = tl.program_id(0)
    if tl.load(running + n) == 1:
        own = n * size
        scale(solution + own, 1.0, z + own, size, BLOCK)
        scale(residual + own, -1.0, gradient + own, size, BLOCK)
        scale(direction + own, -1.0, gradient + own, size, BLOCK)
        square = dot(residual + own, residual + own, size, BLOCK)
        unit = _unit(direction + own, size, BLOCK)
        scale(z + own, unit, direction + own, size, BLOCK)
        goal = square * exact * exact
        tl.store(numbers + 4 * n, square)
        tl.store(numbers + 4 * n + 1, goal)
        tl.store(numbers + 4 * n + 2, square)
        tl.store(numbers + 4 * n + 3, unit)
        tl.store(running + n, tl.where(square <= goal, 0, tl.where(steps == 0, 2, 1)))


@triton.jit
def _conjugate_kernel(
    z, image, solution, residual, direction, numbers, idle, running, taken, size, steps, stalled, BLOCK: tl.constexpr
):
    """A step, by image = H·z, where z is the direction times `unit`; then the next direction, shown in z.

    numbers: the residual's square, its goal, the lowest so far, and `unit`. idle: int32 [N], steps without a new lowest
    one; after `stalled` of them rounding is all that is left.
    """
    n = tl.program_id(0)
    if tl.load(running + n) == 1:
        own = n * size
        before = tl.load(numbers + 4 * n)
        lowest = tl.load(numbers + 4 * n + 2)
        unit = tl.load(numbers + 4 * n + 3)
        curvature = dot(direction + own, image + own, size, BLOCK) / unit
        state = 2  # the direction is in the null space, or too large for float32
        if curvature > 0:
            step = before / curvature
            add_scaled(solution + own, solution + own, step, direction + own, size, BLOCK)
            add_scaled(residual + own, residual + own, -step / unit, image + own, size, BLOCK)
            after = dot(residual + own, residual + own, size, BLOCK)
            add_scaled(direction + own, residual + own, after / before, direction + own, size, BLOCK)
            unit = _unit(direction + own, size, BLOCK)
            scale(z + own, unit, direction + own, size, BLOCK)
            count = tl.load(taken + n) + 1
            waited = tl.where(after < lowest, 0, tl.load(idle + n) + 1)
            state = tl.where((count >= steps) | (waited >= stalled), 2, 1)
            state = tl.where(after <= tl.load(numbers + 4 * n + 1), 0, state)
            tl.store(numbers + 4 * n, after)
            tl.store(numbers + 4 * n + 2, tl.minimum(lowest, after))
            tl.store(numbers + 4 * n + 3, unit)
            tl.store(idle + n, waited)
            tl.store(taken + n, count)
        tl.store(running + n, state)


@dataclass(frozen=True)
class ConjugateGradients:
    """On the device: at most so many steps, until the residual has shrunk by `exact` or has `stalled` so often."""

    steps: int
    exact: float
    stalled: int

    def launch_start(self, z: Any, gradient: Any, state: dict[str, Any]) -> Launch:
        """z, gradient: float32 [N, size]; state: the tensors of both kernels by their names."""
        names = ("solution", "residual", "direction", "numbers", "running")
        size = z[0].numel()
        args = {"z": z, "gradient": gradient, **{name: state[name] for name in names}}
        args |= {"size": size, "steps": self.steps, "exact": self.exact}
        return Launch(_conjugate_start_kernel, len(z), args, {"BLOCK": block_of(size)})

    def launch_step(self, z: Any, image: Any, state: dict[str, Any]) -> Launch:
        """z, image: float32 [N, size]."""
        names = ("solution", "residual", "direction", "numbers", "idle", "running", "taken")
        size = z[0].numel()
        args = {"z": z, "image": image, **{name: state[name] for name in names}}
        args |= {"size": size, "steps": self.steps, "stalled": self.stalled}
        return Launch(_conjugate_kernel, len(z), args, {"BLOCK": block_of(size)})
