"""From aten calls to steps: sums and products of computed values and constants. `fastinv.aten` lists them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastinv.aten.conversion import Conversion, Value
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.mul import Mul


def linear_map(to: Conversion, x: Value, scale: Any, shift: Any) -> Value:
    """scale · x + shift with constants that broadcast over the images."""
    constants = [torch.as_tensor(v, dtype=torch.float64) for v in (scale, shift)]
    rank = len(x.shape)
    for k, constant in enumerate(constants):
        if constant.ndim > rank:
            if constant.ndim > rank + 1 or constant.shape[0] != 1:
                to.unsupported("arithmetic with a constant that differs from image to image")
            constants[k] = constant[0]
        constants[k] = constants[k].reshape(*[1] * (rank - constants[k].ndim), *constants[k].shape)
    scales, shifts = torch.broadcast_tensors(*constants)  # type: ignore[no-untyped-call]
    try:
        wide = np.broadcast_shapes(scales.shape, x.shape) != x.shape
    except ValueError:
        wide = True
    if wide:
        to.unsupported(f"arithmetic of shape {list(x.shape)} with a constant of shape {list(scales.shape)}")
    return to.emit(Affine(), [x], scale=scales, shift=shifts)


def _aligned(to: Conversion, a: Value, b: Value) -> list[Value]:
    if len(a.shape) != len(b.shape):
        to.unsupported(f"arithmetic of values of shapes {list(a.shape)} and {list(b.shape)}")
    return [a, b]


def add(to: Conversion, a: Any, b: Any, *, alpha: float = 1) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        scaled = b if alpha == 1 else linear_map(to, b, alpha, 0.0)
        return to.emit(Add(), _aligned(to, a, scaled))
    if isinstance(a, Value):
        return linear_map(to, a, 1.0, torch.as_tensor(b, dtype=torch.float64) * alpha)
    return linear_map(to, b, alpha, a)


def sub(to: Conversion, a: Any, b: Any, *, alpha: float = 1) -> Value:
    return add(to, a, b, alpha=-alpha)


def mul(to: Conversion, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return to.emit(Mul(), _aligned(to, a, b))
    return linear_map(to, a, b, 0.0) if isinstance(a, Value) else linear_map(to, b, a, 0.0)


def div(to: Conversion, a: Any, b: Any) -> Value:
    if isinstance(b, Value):
        to.unsupported("division by a computed value")
    return linear_map(to, a, 1 / torch.as_tensor(b, dtype=torch.float64), 0.0)


def neg(to: Conversion, x: Value) -> Value:
    return linear_map(to, x, -1.0, 0.0)
