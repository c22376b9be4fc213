"""From aten calls to steps: products, with constants and as `einsum` names them. `fastinv.aten` lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastinv.aten.attention import matmul as matmul_of_two
from fastinv.aten.axes import along, reshaped
from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.linear import Linear
from fastinv.ops.permute import Permute


def matmul(to: Conversion, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return matmul_of_two(to, a, b)
    constant = b if isinstance(a, Value) else a
    if constant.ndim != 2:
        to.unsupported("a product with anything but a matrix")
    if isinstance(a, Value):
        return to.emit(Linear(), [a], weight=constant.mT, bias=torch.zeros(constant.shape[1]))
    if len(b.shape) < 2:
        to.unsupported("a product along the batch axis")
    return along(to, b, len(b.shape) - 2, constant)


def addmm(to: Conversion, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    if not isinstance(x, Value) or holds((bias, weight), Value):
        to.unsupported("addmm of anything but one computed value and constants")
    bias = (beta * bias).expand(weight.shape[1]) if bias.numel() == 1 else (beta * bias).reshape(-1)
    if len(bias) != weight.shape[1]:
        to.unsupported("addmm that differs from image to image")
    return to.emit(Linear(), [x], weight=alpha * weight.mT, bias=bias)


def einsum(to: Conversion, equation: str, operands: Sequence[Any], **_: Any) -> Value:
    """Of one computed value and a constant, as nchw,oc->nohw, or of two computed ones, as nhid,nhjd->nhij."""
    named, result = equation.replace(" ", "").partition("->")[::2]
    names = named.split(",")
    if len(names) != 2 or not result or any(len({*name}) != len(name) for name in (*names, result)) or "." in equation:
        to.unsupported(f"the einsum {equation}")
    if not isinstance(operands[0], Value):
        names, operands = names[::-1], operands[::-1]
    (x, other), (read, added) = operands, names
    batch = read[0]
    if result[0] != batch or {*result} - {*read, *added} or (batch in added) != isinstance(other, Value):
        to.unsupported(f"the einsum {equation}")
    if isinstance(other, Value):
        y, order = _of_two(to, (x, read), (other, added), result)
    else:
        y, order = _with_constant(to, (x, read), (other, added), result)
    axes = result if x.merged else result[1:]
    return to.emit(Permute(tuple(order.index(name) for name in axes)), [y])


def _with_constant(
    to: Conversion, x: tuple[Value, str], constant: tuple[torch.Tensor, str], result: str
) -> tuple[Value, str]:
    """The value, and the names of its axes: a matrix times one axis, or a matrix for each group of channels."""
    (value, read), (factor, named) = x, constant
    read = read if value.merged else read[1:]
    groups, summed, rest, new = _kinds(read, named, result)
    if len(groups) == 0 and len(summed) == len(new) == 1:
        matrix = factor if named[0] == new else factor.mT
        return along(to, value, read.index(summed), matrix), read.replace(summed, new)
    if read.translate(dict.fromkeys(map(ord, named + result))):  # summed over by itself
        to.unsupported(f"an einsum that sums over {read} alone")
    sizes = dict(zip(read, value.shape, strict=True)) | dict(zip(named, factor.shape, strict=True))
    turned = to.emit(Permute(tuple(read.index(name) for name in groups + summed + rest)), [value])
    count, depth, width, outputs = (math.prod(sizes[name] for name in part) for part in (groups, summed, rest, new))
    image = reshaped(to, turned, (count * depth, 1, width))
    weight = factor.permute(*(named.index(name) for name in groups + new + summed)).reshape(-1, depth, 1, 1)
    y = to.emit(Conv2d(groups=count), [image], weight=weight, bias=torch.zeros(count * outputs))
    order = groups + new + rest
    return reshaped(to, y, tuple(sizes[name] for name in order)), order


def _of_two(to: Conversion, a: tuple[Value, str], b: tuple[Value, str], result: str) -> tuple[Value, str]:
    """The same of two values, as a product of matrices for each of the axes that both and the result have."""
    (x, read), (y, other) = a, b
    if x.merged != y.merged or read[0] != other[0]:
        to.unsupported("an einsum of values whose batch axes differ")
    read, other = (names if x.merged else names[1:] for names in (read, other))
    groups, summed, rows, columns = _kinds(read, other, result)
    if {*rows, *columns} - {*result}:
        to.unsupported("an einsum that sums over an axis of one value alone")
    sizes = dict(zip(read, x.shape, strict=True)) | dict(zip(other, y.shape, strict=True))
    left = to.emit(Permute(tuple(read.index(name) for name in groups + rows + summed)), [x])
    right = to.emit(Permute(tuple(other.index(name) for name in groups + summed + columns)), [y])
    lead = tuple(sizes[name] for name in groups)
    height, depth, width = (math.prod(sizes[name] for name in part) for part in (rows, summed, columns))
    product = matmul_of_two(to, reshaped(to, left, (*lead, height, depth)), reshaped(to, right, (*lead, depth, width)))
    order = groups + rows + columns
    return reshaped(to, product, tuple(sizes[name] for name in order)), order


def _kinds(read: str, other: str, result: str) -> tuple[str, str, str, str]:
    """Axes of both and the result, of both alone, of the first alone, and of the second alone, in their order."""
    return (
        "".join(name for name in read if name in other and name in result),
        "".join(name for name in read if name in other and name not in result),
        "".join(name for name in read if name not in other),
        "".join(name for name in other if name not in read),
    )
