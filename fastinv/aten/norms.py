"""From aten calls to steps: norms, on constants or on the statistics of the image itself. `fastinv.aten` lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fastinv.aten.activations import absolute, sqrt, square
from fastinv.aten.arithmetic import div, linear_map, sub
from fastinv.aten.axes import mean, reshaped, sum_
from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.aten.layers import along_channels, is_image_of_channels_last
from fastinv.ops.affine import Affine
from fastinv.ops.normalize import Normalize, channel_axis
from fastinv.ops.permute import Permute

Constant = torch.Tensor | None


def batch_norm(
    to: Conversion,
    x: Value,
    weight: Constant,
    bias: Constant,
    mean: Constant,
    variance: Constant,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Value:
    if training or mean is None or variance is None:
        to.unsupported("a batch norm without running statistics, which mixes the images of a batch,")
    scale = 1 / (variance.double() + eps).sqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return to.emit(Affine(), [x], scale=along_channels(to, x, scale), shift=along_channels(to, x, shift))


def instance_norm(
    to: Conversion,
    x: Value,
    weight: Constant,
    bias: Constant,
    mean: Constant,
    variance: Constant,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Value:
    """A group for each channel, or, on running statistics, what a batch norm does."""
    if use_input_stats:
        return group_norm(to, x, x.shape[0], weight, bias, eps)
    return batch_norm(to, x, weight, bias, mean, variance, False, momentum, eps)


def group_norm(
    to: Conversion,
    x: Value,
    groups: int,
    weight: Constant = None,
    bias: Constant = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    """All that follows the channels is pixels."""
    channels, *sizes = x.shape
    if not sizes:
        return _normalized(to, x, Normalize(groups, eps=eps), weight, bias)
    image = reshaped(to, x, (channels, *(sizes if len(sizes) == 2 else (1, math.prod(sizes)))))
    return reshaped(to, _normalized(to, image, Normalize(groups, spatial=True, eps=eps), weight, bias), x.shape)


def layer_norm(
    to: Conversion,
    x: Value,
    sizes: Sequence[int],
    weight: Constant = None,
    bias: Constant = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Value:
    return _over_last_axes(to, x, len(sizes), Normalize(eps=eps), weight, bias)


def rms_norm(
    to: Conversion, x: Value, sizes: Sequence[int], weight: Constant = None, eps: float | None = None
) -> Value:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _over_last_axes(to, x, len(sizes), Normalize(centered=False, eps=eps), weight, None)


def vector_norm(to: Conversion, x: Value, order: Any = 2, axes: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """Of order 2, whose gradient at 0 is 0, or 1."""
    if order not in (1, 2):
        to.unsupported(f"a norm of order {order}")
    if order == 1:
        return sum_(to, absolute(to, x), axes, keepdim)
    return sqrt(to, sum_(to, square(to, x), axes, keepdim))


def quotient(to: Conversion, a: Any, b: Any) -> Value:
    """a / b; of a value by its own norm, as `F.normalize` has it, an RMS norm."""
    eps = _divided_by_own_norm(to) if isinstance(a, Value) else None
    if eps is None or eps > NEGLIGIBLE:
        return div(to, a, b)
    size = a.shape[-1]
    rows = reshaped(to, a, (math.prod(a.shape[:-1]), size))
    weight = torch.full((size,), size**-0.5)
    return reshaped(to, _normalized(to, rows, Normalize(centered=False, eps=eps**2 / size), weight, None), a.shape)


NEGLIGIBLE = 1e-6  # as the least length: of a vector a thousand times longer the same in the square makes 5e-7


def _divided_by_own_norm(to: Conversion) -> float | None:
    """What a norm over the last axis, by which the call being converted divides what it is the norm of, is at least."""
    assert to.node is not None
    x, by = to.node.args[:2]
    if isinstance(by, Node) and str(by.target) in ("aten.expand_as.default", "aten.expand.default"):
        by = by.args[0]
    if not isinstance(by, Node) or str(by.target) != "aten.clamp_min.default":
        return None
    norm, eps = by.args
    if not isinstance(norm, Node) or str(norm.target) != "aten.linalg_vector_norm.default" or norm.args[0] is not x:
        return None
    order, axes, keepdim = (*norm.args[1:], *(2, None, False)[len(norm.args) - 1 :])[:3]
    last = isinstance(x, Node) and axes in ([-1], [x.meta["val"].ndim - 1])
    return float(str(eps)) if order == 2 and keepdim and last else None


def variance(
    to: Conversion,
    x: Value,
    axes: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Value:
    correction = float(unbiased) if correction is None else correction
    difference = sub(to, x, mean(to, x, axes, keepdim=True))
    total = sum_(to, square(to, difference), axes, keepdim)
    elements = math.prod(x.shape) // math.prod(total.shape)
    return linear_map(to, total, 1 / (elements - correction), 0.0)


def deviation(to: Conversion, x: Value, *args: Any, **options: Any) -> Value:
    return sqrt(to, variance(to, x, *args, **options))


def _over_last_axes(to: Conversion, x: Value, count: int, op: Normalize, weight: Constant, bias: Constant) -> Value:
    """Statistics over the last `count` axes, weights for each of their elements."""
    if count == 1 and is_image_of_channels_last(to, x):  # the permutation that was there goes
        turned = _normalized(to, to.emit(Permute((2, 0, 1)), [x]), op, weight, bias)
        return to.emit(Permute((1, 2, 0)), [turned])
    if count == len(x.shape) == 3:
        y = _normalized(to, x, Normalize(1, spatial=True, centered=op.centered, eps=op.eps), None, None)
        if weight is None and bias is None:
            return y
        scale = torch.ones(x.shape) if weight is None else weight
        return to.emit(Affine(), [y], scale=scale, shift=torch.zeros(x.shape) if bias is None else bias)
    before, size = x.shape[: len(x.shape) - count], math.prod(x.shape[len(x.shape) - count :])
    rows = reshaped(to, x, (math.prod(before), size) if before else (size,))
    return reshaped(to, _normalized(to, rows, op, weight, bias), x.shape)


def _normalized(to: Conversion, x: Value, op: Normalize, weight: Any, bias: Any) -> Value:
    if holds((weight, bias), Value):
        to.unsupported("a norm with computed weights")
    channels = x.shape[channel_axis(x.shape)]
    weight = torch.ones(channels) if weight is None else weight.reshape(-1)
    return to.emit(op, [x], weight=weight, bias=torch.zeros(channels) if bias is None else bias.reshape(-1))
