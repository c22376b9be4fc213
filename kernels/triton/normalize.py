"""normalize: norms on the statistics of each image's own groups of values, forward and back."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, interpreted, power_of_two


@triton.jit
def _place(u, e, units, size, pixels, channels, WIDTH: tl.constexpr):
    """Of elements e of units u: where they lie, which of the channels they belong to, and whether they exist.

    A unit is a group of WIDTH channels side by side, of so many pixels of […, pixels, channels].
    """
    groups = channels // WIDTH
    first = u % groups * WIDTH
    base = u // groups * (pixels * channels) + first
    at = base[:, None] + (e // WIDTH * channels + e % WIDTH)[None, :]
    return at, first[:, None] + (e % WIDTH)[None, :], (u < units)[:, None] & (e < size)[None, :]


@triton.jit
def _normalize_kernel(
    x, out, statistics, weight, bias, addend, saved, a, b, units, size, pixels, channels, eps,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = finish((x − μ) / √(σ² + eps) · weight + bias), both [units / groups, pixels, channels].

    statistics: float32 [units, 2], μ and 1 / √(σ² + eps) for the way back; or None.
    """
    u = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTERED:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, size, BLOCK):
            at, c, inside = _place(u, start + tl.arange(0, BLOCK), units, size, pixels, channels, WIDTH)
            total += tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) / size
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        at, c, inside = _place(u, start + tl.arange(0, BLOCK), units, size, pixels, channels, WIDTH)
        d = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None], 0.0)
        squares += d * d
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / size + eps)
    if statistics is not None:
        tl.store(statistics + 2 * u, mean, mask=u < units)
        tl.store(statistics + 2 * u + 1, inverse, mask=u < units)
    for start in range(0, size, BLOCK):
        at, c, inside = _place(u, start + tl.arange(0, BLOCK), units, size, pixels, channels, WIDTH)
        y = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None]) * inverse[:, None]
        y = y * tl.load(weight + c, mask=inside, other=0.0) + tl.load(bias + c, mask=inside, other=0.0)
        tl.store(out + at, finish(y, at, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normalize_backward_kernel(
    gradient, x, out, statistics, weight, addend, saved, a, b, units, size, pixels, channels,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x: (g − mean g − x̂ · mean(g · x̂)) / σ, with g = gradient · weight and x̂ = (x − μ) / σ.

    Without the first mean where not CENTERED.
    """
    u = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mean = tl.load(statistics + 2 * u, mask=u < units, other=0.0)[:, None]
    inverse = tl.load(statistics + 2 * u + 1, mask=u < units, other=0.0)[:, None]
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        at, c, inside = _place(u, start + tl.arange(0, BLOCK), units, size, pixels, channels, WIDTH)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=inside, other=0.0)
        sums += g
        products += g * (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean)
    slope = (tl.sum(products, axis=1) / size)[:, None] * inverse * inverse
    shift = (tl.sum(sums, axis=1) / size)[:, None] if CENTERED else 0.0
    for start in range(0, size, BLOCK):
        at, c, inside = _place(u, start + tl.arange(0, BLOCK), units, size, pixels, channels, WIDTH)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        g *= tl.load(weight + c, mask=inside, other=0.0)
        d = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean
        g = (g - shift - d * slope) * inverse
        tl.store(out + at, finish(g, at, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


TILE = 4096  # values that a program has at a time
SIDE_BY_SIDE = 32  # values that programs read together, where groups are narrower: two or four sectors of a cache line


class Normalization:
    """One norm of values [N, rows, pixels, C], which has statistics for each row and group of channels.

    Args:
        weight, bias: float32 [C], on the device.
        rows, pixels: of an image, (1, H · W) for statistics over all of it, (H · W, 1) for those of a pixel.
        groups: of channels.
    """

    def __init__(self, weight: Any, bias: Any, rows: int, pixels: int, groups: int, centered: bool, eps: float) -> None:
        channels = weight.numel()
        self._weight, self._bias, self._eps = weight, bias, eps
        self._width = channels // groups
        self._args = {"size": pixels * self._width, "pixels": pixels, "channels": channels}
        self._constants = {"WIDTH": self._width, "CENTERED": centered}
        self.statistics = 2 * rows * groups  # floats that the way back needs, of an image

    def launch(self, x: Any, out: Any, statistics: Any, epilogue: Epilogue) -> Launch:
        """`statistics`: float32 [N, `self.statistics`], or None where no gradient goes back."""
        tensors = {"x": x, "statistics": statistics, "bias": self._bias, "eps": self._eps}
        return self._launch(_normalize_kernel, out, tensors, epilogue)

    def launch_backward(self, gradient: Any, x: Any, statistics: Any, out: Any, epilogue: Epilogue) -> Launch:
        """`out`: the gradient of x."""
        tensors = {"gradient": gradient, "x": x, "statistics": statistics}
        return self._launch(_normalize_backward_kernel, out, tensors, epilogue)

    def _launch(self, kernel: Any, out: Any, tensors: dict[str, Any], epilogue: Epilogue) -> Launch:
        units, tile = out.numel() // self._args["size"], TILE * interpreted(out.device)
        beside = min(power_of_two(units), max(1, SIDE_BY_SIDE // power_of_two(self._width)))
        block = min(power_of_two(self._args["size"]), tile // beside)
        rows = min(power_of_two(units), tile // block)
        args = {"out": out, **tensors, "weight": self._weight, **self._args, **epilogue.args, "units": units}
        constants = {**self._constants, "KIND": epilogue.kind, "ROWS": rows, "BLOCK": block}
        return Launch(kernel, ceil_div(units, rows), args, constants)
