"""max_pool2d, forward with the place of each maximum, and back by gathering: no atomics, one result."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.elementwise import launch_elements, place_of
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch


@triton.jit
def _max_pool_kernel(
    x, out, tap, addend, saved, a, b,
    elements, height, width, channels, out_height, out_width,
    stride_y, stride_x, top, left, dilation_y, dilation_x,
    KY: tl.constexpr, KX: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, i, j, c] = max over taps (u, v) of x[n, i·stride + u·dilation − top, …, c]; padding never wins.

    x: [N, height, width, C], out: [N, out_height, out_width, C]. tap, of integers like out, or None: u · KX + v of the
    maximum; of equal ones the first, as in PyTorch, and of NaNs the last.
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < elements
    n, i, j, c = place_of(p, out_height, out_width, channels)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), -1, tl.int32)
    for t in range(0, KY * KX):
        y = i * stride_y + t // KX * dilation_y - top
        z = j * stride_x + t % KX * dilation_x - left
        seen = inside & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        at = ((n * height + y) * width + z) * channels + c
        value = tl.load(x + at, mask=seen, other=float("-inf")).to(tl.float32)
        better = seen & ((value > best) | (value != value) | (place < 0))
        best = tl.where(better, value, best)
        place = tl.where(better, t, place)
    if tap is not None:
        tl.store(tap + p, place.to(tap.dtype.element_ty), mask=inside)
    tl.store(out + p, finish(best, p, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _max_pool_backward_kernel(
    gradient, tap, out, addend, saved, a, b,
    elements, height, width, channels, out_height, out_width,
    stride_y, stride_x, top, left, dilation_y, dilation_x,
    KY: tl.constexpr, KX: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, y, x, c] = Σ gradient[n, i, j, c] over the windows (i, j) whose maximum is (y, x)."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < elements
    n, y, z, c = place_of(p, height, width, channels)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, KY * KX):
        up = y + top - t // KX * dilation_y
        across = z + left - t % KX * dilation_x
        i = up // stride_y
        j = across // stride_x
        seen = inside & (up >= 0) & (i * stride_y == up) & (i < out_height)
        seen = seen & (across >= 0) & (j * stride_x == across) & (j < out_width)
        at = ((n * out_height + i) * out_width + j) * channels + c
        mine = seen & (tl.load(tap + at, mask=seen, other=-1).to(tl.int32) == t)
        total += tl.load(gradient + at, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + p, finish(total, p, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


class MaxPool:
    """One max pool: from [N, H, W, C] to [N, OH, OW, C].

    Args:
        inputs, outputs: (H, W) and (OH, OW).
        kernel, stride, padding, dilation: (down, across); padding is that at the top and at the left.
    """

    def __init__(self, inputs: Any, outputs: Any, channels: int, kernel: Any, stride: Any, padding: Any, dilation: Any):
        self._args = {
            "height": inputs[0], "width": inputs[1], "channels": channels,
            "out_height": outputs[0], "out_width": outputs[1], "stride_y": stride[0], "stride_x": stride[1],
            "top": padding[0], "left": padding[1], "dilation_y": dilation[0], "dilation_x": dilation[1],
        }  # fmt: skip
        self._constants = {"KY": kernel[0], "KX": kernel[1]}
        # A global max pool of 224 × 224 has 50,176 taps.
        self.tap_dtype = "int16" if kernel[0] * kernel[1] <= 2**15 else "int32"

    def launch(self, x: Any, out: Any, tap: Any, epilogue: Epilogue) -> Launch:
        """`tap`: of `tap_dtype` like `out`, or None where no gradient goes back."""
        return self._launch(_max_pool_kernel, out, {"x": x, "tap": tap}, epilogue)

    def launch_backward(self, gradient: Any, tap: Any, out: Any, epilogue: Epilogue) -> Launch:
        """`out`: the gradient of x."""
        return self._launch(_max_pool_backward_kernel, out, {"gradient": gradient, "tap": tap}, epilogue)

    def _launch(self, kernel: Any, out: Any, tensors: dict[str, Any], epilogue: Epilogue) -> Launch:
        return launch_elements(kernel, out, {**tensors, **self._args}, self._constants, epilogue)
