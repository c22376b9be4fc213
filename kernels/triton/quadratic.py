"""The gradient of a quadratic objective by its matrix: a convolution from image to image whose weights differ near the
border (`fastinv.backends.cuda.quadratic`)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

PIXELS = 256  # of a program


@triton.jit
def _quadratic_kernel(
    z, constant, out, weight, row_kind, column_kind, pixels, height, width, channels, column_kinds, taps_y, taps_x,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[n, y, x, c] = constant[n, y, x, c] + Σ_{i,j,k} weight[kind(y, x), i, j, k, c] · z[n, y', x', k].

    kind(y, x) = (row_kind[y], column_kind[x]); y' = y + i − ⌊taps_y/2⌋, and x' alike.
    z, out, constant (or None): float32 [N, H, W, C], pixels = N·H·W.
    """
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = p < pixels
    y = p // width % height
    x = p % width
    c = tl.arange(0, BC)
    known = inside[:, None] & (c < channels)[None, :]
    kind = tl.load(row_kind + y, mask=inside, other=0) * column_kinds + tl.load(column_kind + x, mask=inside, other=0)
    own = weight + (kind * (taps_y * taps_x * channels * channels))[:, None] + c[None, :]
    place = p[:, None] * channels + c[None, :]
    if constant is not None:
        total = tl.load(constant + place, mask=known, other=0.0)
    else:
        total = tl.zeros((BM, BC), tl.float32)
    for t in range(0, taps_y * taps_x * channels):
        dy = t // (channels * taps_x) - taps_y // 2
        dx = t // channels % taps_x - taps_x // 2
        seen = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        value = tl.load(z + (p + dy * width + dx) * channels + t % channels, mask=seen, other=0.0)
        total += value[:, None] * tl.load(own + t * channels, mask=known, other=0.0)
    tl.store(out + place, total, mask=known)


class Quadratic:
    """A quadratic form on a device.

    Args:
        form: a `QuadraticForm`.
    """

    def __init__(self, form: Any, device: Any) -> None:
        import torch

        self._tensors = {
            name: torch.from_numpy(getattr(form, name)).to(device) for name in ("weight", "row_kind", "column_kind")
        }
        height, width, channels = form.shape
        taps_y, taps_x = form.weight.shape[2:4]
        self._args = {
            "height": height, "width": width, "channels": channels, "column_kinds": form.weight.shape[1],
            "taps_y": taps_y, "taps_x": taps_x,
        }  # fmt: skip

    def launch(self, z: Any, constant: Any, out: Any) -> Launch:
        """out = H·z + constant, float32 [N, H·W·C]; the constant may be None."""
        pixels = len(z) * self._args["height"] * self._args["width"]
        block = min(PIXELS, power_of_two(pixels))
        args = {"z": z, "constant": constant, "out": out, **self._tensors, "pixels": pixels, **self._args}
        constants = {"BM": block, "BC": power_of_two(self._args["channels"])}
        return Launch(_quadratic_kernel, ceil_div(pixels, block), args, constants)
