"""From aten calls to steps: sums and products of computed values and constants. `fastinv.aten` lists them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastinv.aten.conversion import Conversion, Value
from fastinv.ops.activation import Activation
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.mul import Mul

MASKED = -1e30  # for −∞ in a softmax: its exponential is 0 beside any other


def linear_map(to: Conversion, x: Value, scale: Any, shift: Any) -> Value:
    """scale · x + shift with constants that broadcast over the images, as torch's shapes are."""
    constants = [torch.as_tensor(v, dtype=torch.float64) for v in (scale, shift)]
    for constant in constants:
        if constant.ndim > x.rank or (constant.ndim == x.rank and constant.shape[0] != 1):
            to.unsupported("arithmetic with a constant that differs from image to image")
    return affine(to, x, *(c[0] if c.ndim > len(x.shape) else c for c in constants))


def affine(to: Conversion, x: Value, scale: torch.Tensor, shift: torch.Tensor) -> Value:
    """The same with constants that broadcast to x's own shape."""
    rank = len(x.shape)
    padded = (c.reshape(*[1] * (rank - c.ndim), *c.shape) for c in (scale, shift))
    scales, shifts = torch.broadcast_tensors(*padded)  # type: ignore[no-untyped-call]
    try:
        wide = np.broadcast_shapes(scales.shape, x.shape) != x.shape
    except ValueError:
        wide = True
    if wide:
        to.unsupported(f"arithmetic of shape {list(x.shape)} with a constant of shape {list(scales.shape)}")
    return to.emit(Affine(), [x], scale=scales, shift=shifts)


def _aligned(to: Conversion, a: Value, b: Value) -> list[Value]:
    if len(a.shape) != len(b.shape) or a.merged != b.merged:
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
        return mul(to, a, reciprocal(to, b))
    return linear_map(to, a, 1 / torch.as_tensor(b, dtype=torch.float64), 0.0)


def addcmul(to: Conversion, x: Any, a: Any, b: Any, *, value: float = 1) -> Value:
    """x + value · a · b"""
    product = mul(to, a, b) if isinstance(a, Value) or isinstance(b, Value) else a * b
    return add(to, x, product, alpha=value)


def reciprocal(to: Conversion, x: Value) -> Value:
    return to.emit(Activation("reciprocal"), [x])


def where(to: Conversion, condition: Any, a: Any, b: Any) -> Value:
    """a where a constant condition holds, else b."""
    if isinstance(condition, Value):
        to.unsupported("a condition that is computed")
    parts = [
        linear_map(to, x, holds, 0.0) if isinstance(x, Value) else torch.where(holds, x, 0.0)
        for x, holds in ((a, condition), (b, ~condition))
    ]
    return add(to, *parts)


def masked_fill(to: Conversion, x: Any, mask: Any, value: Any) -> Value:
    """What is filled with −∞, or close to it, is masked out before a softmax: that much is added to it."""
    if isinstance(value, (int, float)) and value < MASKED / 1e20 and not isinstance(mask, Value):
        return linear_map(to, x, 1.0, torch.where(mask, MASKED, 0.0))
    return where(to, mask, value, x)


def neg(to: Conversion, x: Value) -> Value:
    return linear_map(to, x, -1.0, 0.0)
