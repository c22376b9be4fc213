"""rMLE's objective, Σ(edge(z) − v)² + λ·TV_β(z) (paper, Algorithm 1): residual, total variation, value and gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

BLOCK = 1024  # elements of a program
# What `running` says of an image, for all methods: 1 it runs on, 0 it has converged, 2 it goes no further.
ROOT = 1e-12  # under the root of the total variation, for β < 2


@triton.jit
def _residual_kernel(
    y, v, out, part, addend, saved, a, b, size, tiles,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, k] = finish(2 · (y[n, k] − v[n, k])), and part[n, tile] = Σ_k (y[n, k] − v[n, k])² over the tile.

    y, out: [N, size], out may be None; v: float32 [N, size]; part: float32 [N, tiles].
    """
    n = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    k = tile * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    p = n * size + k
    difference = tl.load(y + p, mask=inside, other=0.0).to(tl.float32) - tl.load(v + p, mask=inside, other=0.0)
    tl.store(part + tl.program_id(0), tl.sum(difference * difference, axis=0))
    if out is not None:
        gradient = finish(2.0 * difference, p, inside, addend, saved, a, b, KIND)
        tl.store(out + p, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def squares(z, k, inside, height, width, channels):
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
def power(q, exponent, SQUARES: tl.constexpr, ROOT: tl.constexpr):
    """(q + ROOT)^exponent; with SQUARES, where β is 2, q."""
    if SQUARES:
        return q
    else:
        q = tl.maximum(q + ROOT, 1e-30)
        return tl.exp2(exponent * tl.log2(q))


@triton.jit
def variation_slope(
    z, k, inside, height, width, channels, tv_weight, half_beta, SQUARES: tl.constexpr, ROOT: tl.constexpr
):
    """The gradient of tv_weight · TV_β at elements k of an image."""
    up = inside & (k >= width * channels)
    left = inside & (k // channels % width > 0)
    dy, dx, q = squares(z, k, inside, height, width, channels)
    dy_up, _, q_up = squares(z, k - width * channels, up, height, width, channels)
    _, dx_left, q_left = squares(z, k - channels, left, height, width, channels)
    if SQUARES:
        slope = dy_up + dx_left - dy - dx
    else:
        slope = dy_up * power(q_up, half_beta - 1.0, False, ROOT)
        slope += dx_left * power(q_left, half_beta - 1.0, False, ROOT)
        slope -= (dy + dx) * power(q, half_beta - 1.0, False, ROOT)
    return tv_weight * 2.0 * half_beta * slope


@triton.jit
def objective(
    z, part, size, tiles, height, width, channels, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ part + tv_weight · Σ (dy² + dx²)^(β/2) for one image [size] and its parts [tiles], in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.load(part + k, mask=k < tiles, other=0.0).to(tl.float64)
    if TV:
        for start in range(0, size, BLOCK):
            k = start + tl.arange(0, BLOCK)
            _, _, q = squares(z, k, k < size, height, width, channels)
            variation = tl.where(k < size, power(q, half_beta, SQUARES, ROOT), 0.0)
            total += tv_weight * variation.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _value_kernel(
    z, part, value, size, tiles, height, width, channels, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """value[n] = the objective of z[n], [N, size], whose residual's squares are summed in part [N, tiles]."""
    n = tl.program_id(0)
    found = objective(
        z + n * size, part + n * tiles, size, tiles, height, width, channels, tv_weight, half_beta,
        TV, SQUARES, ROOT, BLOCK,
    )  # fmt: skip
    tl.store(value + n, found)


@triton.jit
def _gradient_kernel(
    z, gradient, out, size, tiles, height, width, channels, tv_weight, half_beta,
    TV: tl.constexpr, SQUARES: tl.constexpr, ROOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gradient + that of tv_weight · TV_β at z. gradient: [N, size] of any type; z, out: float32."""
    n = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    g = tl.load(gradient + n * size + k, mask=inside, other=0.0).to(tl.float32)
    if TV:
        g += variation_slope(z + n * size, k, inside, height, width, channels, tv_weight, half_beta, SQUARES, ROOT)
    tl.store(out + n * size + k, g, mask=inside)


def tiles(size: int) -> int:
    """Programs for one image of so many elements."""
    return ceil_div(size, BLOCK)


def block_of(size: int) -> int:
    """Elements of an image that a program takes at once."""
    return min(BLOCK, power_of_two(size))


def launch_residual(y: Any, v: Any, out: Any, part: Any, epilogue: Epilogue) -> Launch:
    """y, out: [N, size] or more axes, out may be None; v: float32 like y; part: float32 [N, `tiles(size)`]."""
    size = y[0].numel()
    args = {"y": y, "v": v, "out": out, "part": part, **epilogue.args, "size": size, "tiles": tiles(size)}
    return Launch(_residual_kernel, len(y) * tiles(size), args, {"KIND": epilogue.kind, "BLOCK": block_of(size)})


@dataclass(frozen=True)
class Variation:
    """λ·TV_β of images: shape (height, width, channels), weight λ, and β."""

    shape: tuple[int, int, int]
    weight: float
    beta: float

    @property
    def args(self) -> dict[str, Any]:
        """What kernels take of it, but for `constants`."""
        height, width, channels = self.shape
        sides = {"size": height * width * channels, "height": height, "width": width, "channels": channels}
        return {**sides, "tv_weight": self.weight, "half_beta": self.beta / 2}

    @property
    def constants(self) -> dict[str, Any]:
        root = ROOT if self.beta < 2 else 0.0
        constants = {"TV": self.weight > 0, "SQUARES": self.beta == 2, "ROOT": root}
        return {**constants, "BLOCK": block_of(self.args["size"])}

    def launch_value(self, z: Any, part: Any, value: Any) -> Launch:
        """z: float32 [N, size]; part: float32 [N, tiles]; value: float64 [N]."""
        args = {"z": z, "part": part, "value": value, **self.args, "tiles": part.shape[1]}
        return Launch(_value_kernel, len(z), args, self.constants)

    def launch_gradient(self, z: Any, gradient: Any, out: Any) -> Launch:
        """z, out: float32 [N, size]; gradient like them, of any type."""
        programs = tiles(self.args["size"])
        args = {"z": z, "gradient": gradient, "out": out, **self.args, "tiles": programs}
        return Launch(_gradient_kernel, len(z) * programs, args, self.constants)
