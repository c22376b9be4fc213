"""From aten calls to steps: norms, on constants or on the statistics of the image itself. `fastinv.aten` lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastinv.aten.axes import reshaped
from fastinv.aten.conversion import Conversion, Value, holds
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
    spread = (-1, *[1] * (len(x.shape) - 1))
    return to.emit(Affine(), [x], scale=scale.reshape(spread), shift=shift.reshape(spread))


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


def _over_last_axes(to: Conversion, x: Value, count: int, op: Normalize, weight: Constant, bias: Constant) -> Value:
    """Statistics over the last `count` axes, weights for each of their elements."""
    if count == 1 and len(x.shape) == 3:  # of an image whose channels were put last: a permutation that was there goes
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
