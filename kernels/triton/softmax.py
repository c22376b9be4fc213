"""softmax: exp(x) / Σ exp(x) of each row, forward and back."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, interpreted, power_of_two


@triton.jit
def _row(u, e, units, columns):
    """Where elements e of rows u lie, and which exist."""
    return u.to(tl.int64)[:, None] * columns + e[None, :], (u < units)[:, None] & (e < columns)[None, :]


@triton.jit
def _exponents(x, u, e, units, columns):
    """x of these elements, −∞ for those beyond a row's end."""
    at, inside = _row(u, e, units, columns)
    return tl.where((e < columns)[None, :], tl.load(x + at, mask=inside, other=0.0).to(tl.float32), float("-inf"))


@triton.jit
def _softmax_kernel(
    x, out, addend, saved, a, b, units, columns, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = finish(softmax(x)), both [units, columns]."""
    u = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        most = tl.maximum(most, tl.max(_exponents(x, u, start + tl.arange(0, BLOCK), units, columns), axis=1))
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, BLOCK):
        e = tl.exp(_exponents(x, u, start + tl.arange(0, BLOCK), units, columns) - most[:, None])
        total += tl.sum(e, axis=1)
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        y = tl.exp(_exponents(x, u, place, units, columns) - most[:, None]) / total[:, None]
        at, inside = _row(u, place, units, columns)
        tl.store(out + at, finish(y, at, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_backward_kernel(
    gradient, y, out, addend, saved, a, b, units, columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x: y · (gradient − Σ gradient · y)."""
    u = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, BLOCK):
        at, inside = _row(u, start + tl.arange(0, BLOCK), units, columns)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(g * tl.load(y + at, mask=inside, other=0.0).to(tl.float32), axis=1)
    for start in range(0, columns, BLOCK):
        at, inside = _row(u, start + tl.arange(0, BLOCK), units, columns)
        g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32) - total[:, None]
        g *= tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, finish(g, at, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


TILE = 4096  # values that a program has at a time


class Softmax:
    """Of rows of so many columns."""

    def __init__(self, columns: int) -> None:
        self._columns = columns

    def launch(self, x: Any, out: Any, epilogue: Epilogue) -> Launch:
        return self._launch(_softmax_kernel, out, {"x": x}, epilogue)

    def launch_backward(self, gradient: Any, y: Any, out: Any, epilogue: Epilogue) -> Launch:
        """`out`: the gradient of x. `y`: the results."""
        return self._launch(_softmax_backward_kernel, out, {"gradient": gradient, "y": y}, epilogue)

    def _launch(self, kernel: Any, out: Any, tensors: dict[str, Any], epilogue: Epilogue) -> Launch:
        units, tile = out.numel() // self._columns, TILE * interpreted(out.device)
        block = min(power_of_two(self._columns), tile)
        rows = min(power_of_two(units), tile // block)
        args = {"out": out, **tensors, "columns": self._columns, **epilogue.args, "units": units}
        return Launch(kernel, ceil_div(units, rows), args, {"KIND": epilogue.kind, "ROWS": rows, "BLOCK": block})
