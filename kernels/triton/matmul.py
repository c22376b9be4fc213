"""matmul: products of two computed values, group by group; a gradient is such a product, too."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two


@triton.jit
def _matmul_kernel(
    x, y, out, addend, saved, a, b, rows, columns, depth, x_row, x_step, y_step, y_column,
    PRECISION: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[g, m, n] = finish(Σ_k x[g, m · x_row + k · x_step] · y[g, k · y_step + n · y_column])."""
    across = (columns + BN - 1) // BN
    blocks = (rows + BM - 1) // BM * across
    g = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    m = block // across * BM + tl.arange(0, BM)
    n = block % across * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            x + g * rows * depth + m[:, None] * x_row + k[None, :] * x_step,
            mask=(m < rows)[:, None] & (k < depth)[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            y + g * depth * columns + k[:, None] * y_step + n[None, :] * y_column,
            mask=(k < depth)[:, None] & (n < columns)[None, :], other=0.0,
        )  # fmt: skip
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = (g * rows + m[:, None]) * columns + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out + at, finish(sums, at, inside, addend, saved, a, b, KIND).to(out.dtype.element_ty), mask=inside)


class Matmul:
    """x [groups · rows, depth] times y [groups · depth, columns], or, where `transposed`, [groups · columns, depth].

    Args:
        precision: `tl.dot`'s input_precision.
    """

    def __init__(self, rows: int, columns: int, depth: int, transposed: bool, precision: str) -> None:
        self._sizes, self._transposed, self._precision = (rows, columns, depth), transposed, precision

    def launch(self, x: Any, y: Any, out: Any, epilogue: Epilogue) -> Launch:
        _, columns, depth = self._sizes
        right = (1, depth) if self._transposed else (columns, 1)
        return self._launch(x, y, out, self._sizes, (depth, 1), right, epilogue)

    def launch_backward(self, which: int, gradient: Any, x: Any, y: Any, out: Any, epilogue: Epilogue) -> Launch:
        """`out`: the gradient of x (0), gradient · yᵀ, or of y (1), xᵀ · gradient; or of y as it lies, where turned."""
        rows, columns, depth = self._sizes
        if which == 0:
            right = (depth, 1) if self._transposed else (1, columns)
            return self._launch(gradient, y, out, (rows, depth, columns), (columns, 1), right, epilogue)
        if self._transposed:
            return self._launch(gradient, x, out, (columns, depth, rows), (1, columns), (depth, 1), epilogue)
        return self._launch(x, gradient, out, (depth, columns, rows), (1, depth), (columns, 1), epilogue)

    def _launch(
        self,
        x: Any,
        y: Any,
        out: Any,
        sizes: tuple[int, int, int],
        left: tuple[int, int],
        right: tuple[int, int],
        epilogue: Epilogue,
    ) -> Launch:
        """A program for every tile of [rows, columns] of every group; `left`, `right`: strides of x and y."""
        rows, columns, depth = sizes
        groups = out.numel() // (rows * columns)
        tile = {"BM": 64, "BN": 64, "BK": 32}
        for key, size in zip(tile, sizes, strict=True):
            tile[key] = max(16, min(tile[key], power_of_two(size)))
        args = {
            "x": x, "y": y, "out": out, "rows": rows, "columns": columns, "depth": depth,
            "x_row": left[0], "x_step": left[1], "y_step": right[0], "y_column": right[1], **epilogue.args,
        }  # fmt: skip
        constants = {"PRECISION": self._precision, "KIND": epilogue.kind, **tile}
        programs = groups * ceil_div(rows, tile["BM"]) * ceil_div(columns, tile["BN"])
        return Launch(_matmul_kernel, programs, args, constants)
