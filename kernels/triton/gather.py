"""Elementwise ops, and all that moves elements: add, mul, affine, concat, permute, activations, …; forward and back.

One kernel does them all: tables say for one image which elements of the inputs make an element of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish, slope
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

BLOCK = 1024  # elements of a program


@triton.jit
def _gather_kernel(
    x, y, out, x_index, y_index, out_index, scale, shift, addend, saved, a, b, slope_a, slope_b,
    elements, count, x_size, y_size, out_size, period, terms,
    OP: tl.constexpr, SLOPE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, out_index[j]] = finish(scale[q] · Σ_t op(x[n, x_index[t, j]], y[n, y_index[t, j]]) + shift[q]).

    For each image n and 0 <= j < count; q = j % period. op: "copy" (no y), "add", "mul", or "slope", x · SLOPE'(y). An
    index that is None is j itself (then there is one term), a scale or shift that is None is left out. x: [N, x_size],
    y: [N, y_size], out, addend and saved: [N, out_size].
    """
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = p < elements
    n = p // count
    j = p % count
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(0, terms):
        if x_index is not None:
            at = tl.load(x_index + t * count + j)
        else:
            at = j
        value = tl.load(x + n * x_size + at, mask=inside, other=0.0).to(tl.float32)
        if OP != "copy":
            if y_index is not None:
                at = tl.load(y_index + t * count + j)
            else:
                at = j
            other = tl.load(y + n * y_size + at, mask=inside, other=1.0).to(tl.float32)
            if OP == "add":
                value += other
            elif OP == "mul":
                value *= other
            else:
                value *= slope(other, slope_a, slope_b, SLOPE)
        total += value
    if scale is not None:
        total *= tl.load(scale + j % period)
    if shift is not None:
        total += tl.load(shift + j % period)
    if out_index is not None:
        j = tl.load(out_index + j)
    position = n * out_size + j
    total = finish(total, position, inside, addend, saved, a, b, KIND)
    tl.store(out + position, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, eq=False)
class Gather:
    """What `_gather_kernel` does, for one image, beside its inputs.

    Attributes:
        count: elements written.
        op: "copy", "add", "mul" or "slope".
        x_index, y_index: int32 [terms, count] on the device, or None; y's has as many terms.
        out_index: int32 [count], or None.
        scale, shift: float32 [period], or None.
        slope: (kind, a, b) of the activation of "slope".
    """

    count: int
    op: str = "copy"
    x_index: Any = None
    y_index: Any = None
    out_index: Any = None
    scale: Any = None
    shift: Any = None
    slope: tuple[str, float, float] = ("identity", 0.0, 0.0)

    def launch(self, x: Any, y: Any, out: Any, epilogue: Epilogue) -> Launch:
        """For x, y (None for "copy") and out, each [N, elements]."""
        index = self.x_index if self.x_index is not None else self.y_index
        period = len(self.scale) if self.scale is not None else len(self.shift) if self.shift is not None else 1
        elements = len(out) * self.count
        block = min(BLOCK, power_of_two(elements))
        args = {
            "x": x, "y": y, "out": out, "x_index": self.x_index, "y_index": self.y_index, "out_index": self.out_index,
            "scale": self.scale, "shift": self.shift, **epilogue.args,
            "slope_a": self.slope[1], "slope_b": self.slope[2],
            "elements": elements, "count": self.count, "x_size": x[0].numel(),
            "y_size": 0 if y is None else y[0].numel(), "out_size": out[0].numel(), "period": period,
            "terms": 1 if index is None else len(index),
        }  # fmt: skip
        constants = {"OP": self.op, "SLOPE": self.slope[0], "KIND": epilogue.kind, "BLOCK": block}
        return Launch(_gather_kernel, ceil_div(elements, block), args, constants)
