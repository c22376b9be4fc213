"""From the aten calls of a torch.export graph to steps: one converter for each call, listed in `CONVERTERS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastinv import aten_layers as layers
from fastinv.aten_layers import axis_of, expect_image
from fastinv.conversion import Conversion, Value
from fastinv.errors import NetworkError
from fastinv.network import Network
from fastinv.ops.activation import Activation
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.base import MAX_FLOAT, Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.mul import Mul
from fastinv.ops.permute import Permute
from fastinv.ops.reshape import Reshape


def convert(program: torch.export.ExportedProgram, input_shape: Shape) -> Network:
    """The network of an exported program with one input and one output.

    Raises:
        UnsupportedOp: a call without a converter, or with arguments that its converter cannot express.
        NetworkError: several inputs or outputs, or a step that mixes images of a batch.
    """
    return Conversion(program, input_shape, CONVERTERS).network()


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _linear_map(to: Conversion, x: Value, scale: Any, shift: Any) -> Value:
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


def _add(to: Conversion, a: Any, b: Any, *, alpha: float = 1) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        scaled = b if alpha == 1 else _linear_map(to, b, alpha, 0.0)
        return to.emit(Add(), _aligned(to, a, scaled))
    if isinstance(a, Value):
        return _linear_map(to, a, 1.0, torch.as_tensor(b, dtype=torch.float64) * alpha)
    return _linear_map(to, b, alpha, a)


def _sub(to: Conversion, a: Any, b: Any, *, alpha: float = 1) -> Value:
    return _add(to, a, b, alpha=-alpha)


def _mul(to: Conversion, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return to.emit(Mul(), _aligned(to, a, b))
    return _linear_map(to, a, b, 0.0) if isinstance(a, Value) else _linear_map(to, b, a, 0.0)


def _div(to: Conversion, a: Any, b: Any) -> Value:
    if isinstance(b, Value):
        to.unsupported("division by a computed value")
    return _linear_map(to, a, 1 / torch.as_tensor(b, dtype=torch.float64), 0.0)


def _neg(to: Conversion, x: Value) -> Value:
    return _linear_map(to, x, -1.0, 0.0)


# ---- rearranging ---------------------------------------------------------------------------------------------------


def _reshape(to: Conversion, x: Value, *_: Any, **__: Any) -> Value:
    """flatten, view, reshape, unflatten, squeeze, unsqueeze: torch has worked out the shape."""
    target = to.result_shape()
    if math.prod(target) != math.prod(x.shape):
        raise NetworkError(
            f"export: module {to.place() or '(top)'!r} moves elements between images (to {list(target)})"
        )
    return to.emit(Reshape(target), [x])


def _permute(to: Conversion, x: Value, axes: Sequence[int]) -> Value:
    axes = [axis % (len(x.shape) + 1) for axis in axes]
    if axes[0] != 0:
        to.unsupported("a permutation that moves the batch axis")
    return to.emit(Permute(tuple(axis - 1 for axis in axes[1:])), [x])


def _transpose(to: Conversion, x: Value, first: int, second: int) -> Value:
    axes = list(range(len(x.shape)))
    i, j = axis_of(to, x, first), axis_of(to, x, second)
    axes[i], axes[j] = axes[j], axes[i]
    return to.emit(Permute(tuple(axes)), [x])


def _cat(to: Conversion, values: Sequence[Any], axis: int = 0) -> Value:
    if not all(isinstance(v, Value) for v in values):
        to.unsupported("joining computed values with constants")
    return values[0] if len(values) == 1 else to.emit(Concat(axis_of(to, values[0], axis)), values)


def _pad(to: Conversion, x: Value, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Zero padding: a depthwise 1×1 convolution that copies, which `simplify` folds into a convolution after it."""
    expect_image(to, x, "padding")
    left, right, top, bottom = (*padding, 0, 0, 0, 0)[:4]
    if mode != "constant" or value or len(padding) > 4 or min(padding) < 0:
        to.unsupported("padding with anything but zeros around rows and columns")
    channels = x.shape[0]
    op = Conv2d(padding=(top, bottom, left, right), groups=channels)
    return to.emit(op, [x], weight=torch.ones(channels, 1, 1, 1), bias=torch.zeros(channels))


# ---- activations ---------------------------------------------------------------------------------------------------


def _activation(kind: str, *defaults: float) -> Callable[..., Value]:
    def converter(to: Conversion, x: Value, *parameters: float) -> Value:
        given = (*parameters, *defaults[len(parameters) :])
        return to.emit(Activation(kind, *map(float, given)), [x])

    return converter


def _gelu(to: Conversion, x: Value, *, approximate: str = "none") -> Value:
    return to.emit(Activation("gelu" if approximate == "none" else "gelu_tanh"), [x])


def _clamp(to: Conversion, x: Value, low: Any = None, high: Any = None) -> Value:
    if not all(v is None or isinstance(v, (int, float)) for v in (low, high)):
        to.unsupported("a clamp to tensors")
    bounds = (-MAX_FLOAT if low is None else low, MAX_FLOAT if high is None else high)
    return to.emit(Activation("clamp", *map(float, bounds)), [x])


def _clamp_max(to: Conversion, x: Value, high: Any) -> Value:
    return _clamp(to, x, None, high)


def _same(to: Conversion, x: Value, *_: Any, **__: Any) -> Value:
    """What changes nothing: contiguous, clone, detach."""
    return x


def _cast(to: Conversion, x: Value, *args: Any, **kwargs: Any) -> Value:
    for dtype in (*args, *kwargs.values()):
        if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.float64):
            to.unsupported(f"a cast to {dtype}, which rounds")
    return x


def _dropout(to: Conversion, x: Value, p: float, train: bool) -> Value:
    if train and p > 0:
        to.unsupported("dropout in training mode")
    return x


def _table() -> dict[str, Callable[..., Value]]:
    inplace: dict[str, Callable[..., Value]] = {
        "relu": _activation("relu"),
        "relu6": _activation("hardtanh", 0.0, 6.0),
        "hardtanh": _activation("hardtanh", -1.0, 1.0),
        "leaky_relu": _activation("leaky_relu", 0.01),
        "sigmoid": _activation("sigmoid"),
        "tanh": _activation("tanh"),
        "silu": _activation("silu"),
        "gelu": _gelu,
        "clamp": _clamp,
        "clamp_min": _clamp,
        "clamp_max": _clamp_max,
        "neg": _neg,
        "dropout": _dropout,
        "feature_dropout": _dropout,
        "alpha_dropout": _dropout,
        "feature_alpha_dropout": _dropout,
    }
    tensors: dict[str, Callable[..., Value]] = {"add": _add, "sub": _sub, "mul": _mul, "div": _div}
    table: dict[str, Callable[..., Value]] = {
        "aten.conv2d.default": layers.conv2d,
        "aten.conv2d.padding": layers.conv2d,
        "aten.conv_transpose2d.input": layers.conv_transpose2d,
        "aten.linear.default": layers.linear,
        "aten.batch_norm.default": layers.batch_norm,
        "aten.max_pool2d.default": layers.max_pool2d,
        "aten.avg_pool2d.default": layers.avg_pool2d,
        "aten.adaptive_avg_pool2d.default": layers.adaptive_avg_pool2d,
        "aten.mean.dim": layers.mean,
        "aten.upsample_nearest2d.vec": layers.upsample("nearest"),
        "aten.upsample_bilinear2d.vec": layers.upsample("bilinear"),
        "aten.upsample_nearest2d.default": layers.upsample_plain("nearest"),
        "aten.upsample_bilinear2d.default": layers.upsample_plain("bilinear"),
        "aten.expand.default": layers.expand,
        "aten.expand_as.default": layers.expand,
        "aten.pixel_shuffle.default": layers.pixel_shuffle,
        "aten.permute.default": _permute,
        "aten.transpose.int": _transpose,
        "aten.cat.default": _cat,
        "aten.pad.default": _pad,
        "aten.constant_pad_nd.default": lambda to, x, padding, value=0: _pad(to, x, padding, value=value),
        "aten.softplus.default": _activation("softplus", 1.0, 20.0),
    }
    for name in (
        "flatten.using_ints",
        "view.default",
        "_unsafe_view.default",
        "reshape.default",
        "unflatten.int",
    ):
        table[f"aten.{name}"] = _reshape
    for name in ("squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default"):
        table[f"aten.{name}"] = _reshape
    for name in ("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy"):
        table[f"aten.{name}.default"] = _same
    table["aten._assert_tensor_metadata.default"] = _same
    for name in ("to.dtype", "to.dtype_layout", "to.device", "_to_copy.default"):
        table[f"aten.{name}"] = _cast
    for name, converter in inplace.items():
        table |= {f"aten.{name}.default": converter, f"aten.{name}_.default": converter}
    for name, converter in tensors.items():
        table |= {f"aten.{name}{suffix}.{kind}": converter for suffix in ("", "_") for kind in ("Tensor", "Scalar")}
    table["aten.rsub.Scalar"] = lambda to, x, other, alpha=1: _linear_map(to, x, -alpha, other)
    return table


CONVERTERS: dict[str, Callable[..., Value]] = _table()
