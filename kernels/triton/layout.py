"""The doors: features as users hold them into [N, H, W, C], and results back into [N, C, H, W]."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import stored
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two


@triton.jit
def _layout_kernel(
    x, out, scale, zero_point, flag,
    pixels, channels, x_n, x_p, x_c, out_n, out_p, out_c, pixel_tiles, channel_tiles,
    BYTES: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[n, p, c] = (x[n, p, c] − zero_point[c]) · scale[c], each with its own strides and type.

    scale and zero_point: float32 [channels], or None. flag: int32 [1], set to 1 where a value is NaN or Inf; or None.
    """
    program = tl.program_id(0)
    c = program % channel_tiles * BC + tl.arange(0, BC)
    p = program // channel_tiles % pixel_tiles * BP + tl.arange(0, BP)
    n = program // (channel_tiles * pixel_tiles)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    value = tl.load(x + n * x_n + (p * x_p)[:, None] + (c * x_c)[None, :], mask=inside, other=0).to(tl.float32)
    if scale is not None:
        value -= tl.load(zero_point + c, mask=c < channels, other=0.0)[None, :]
        value *= tl.load(scale + c, mask=c < channels, other=0.0)[None, :]
    if flag is not None:
        wrong = inside & ((value != value) | (tl.abs(value) == float("inf")))
        tl.store(flag + tl.zeros((BP, BC), tl.int32), tl.full((BP, BC), 1, tl.int32), mask=wrong)
    place = n * out_n + (p * out_p)[:, None] + (c * out_c)[None, :]
    tl.store(out + place, stored(value, BYTES).to(out.dtype.element_ty), mask=inside)


def launch_channels_last(
    x: Any, out: Any, pixels: int, channels: int, scale: Any, zero_point: Any, flag: Any
) -> Launch:
    """x [N, C, pixels], contiguous, to out [N, pixels, C]."""
    strides = {
        "x_n": channels * pixels,
        "x_p": 1,
        "x_c": pixels,
        "out_n": channels * pixels,
        "out_p": channels,
        "out_c": 1,
    }
    return _launch(x, out, pixels, channels, strides, scale, zero_point, flag)


def launch_channels_first(x: Any, out: Any, pixels: int, channels: int) -> Launch:
    """x [N, pixels, C] to out [N, C, pixels], contiguous; a uint8 `out` gets round(255 · x)."""
    strides = {
        "x_n": channels * pixels,
        "x_p": channels,
        "x_c": 1,
        "out_n": channels * pixels,
        "out_p": 1,
        "out_c": pixels,
    }
    return _launch(x, out, pixels, channels, strides, None, None, None)


def _launch(
    x: Any, out: Any, pixels: int, channels: int, strides: dict[str, int], scale: Any, zero_point: Any, flag: Any
) -> Launch:
    wide = min(64, power_of_two(channels))
    high = min(4096 // wide, power_of_two(pixels))
    tiles = {"pixel_tiles": ceil_div(pixels, high), "channel_tiles": ceil_div(channels, wide)}
    args = {
        "x": x, "out": out, "scale": scale, "zero_point": zero_point, "flag": flag,
        "pixels": pixels, "channels": channels, **strides, **tiles,
    }  # fmt: skip
    constants = {"BYTES": out.dtype.itemsize == 1, "BP": high, "BC": wide}
    return Launch(_layout_kernel, len(x) * tiles["pixel_tiles"] * tiles["channel_tiles"], args, constants)
