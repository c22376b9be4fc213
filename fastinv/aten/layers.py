"""From aten calls to steps: layers with weights, pools and resampling. `fastinv.aten` lists them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.ops.activation import Activation
from fastinv.ops.adaptive_avg_pool2d import AdaptiveAvgPool2d
from fastinv.ops.affine import Affine
from fastinv.ops.avg_pool2d import AvgPool2d
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.linear import Linear
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.permute import Permute
from fastinv.ops.pixel_shuffle import PixelShuffle
from fastinv.ops.reshape import Reshape
from fastinv.ops.separable import Separable
from fastinv.ops.upsample import Upsample


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


def axis_of(to: Conversion, x: Value, axis: int) -> int:
    """An axis as torch counts it (with the batch) as fastinv counts it (without)."""
    axis = axis % x.rank
    if axis == x.batch:
        to.unsupported("an operation along the batch axis")
    return axis - (axis > x.batch and not x.merged)


def along_channels(to: Conversion, x: Value, constant: torch.Tensor) -> torch.Tensor:
    """A number for each of the channels, torch's second axis, in a shape that broadcasts to x."""
    spread = [1] * len(x.shape)
    spread[axis_of(to, x, 1)] = -1
    return constant.reshape(spread)


def expect_image(to: Conversion, x: Any, what: str) -> None:
    if not isinstance(x, Value) or len(x.shape) != 3:
        to.unsupported(f"{what} of anything but a batch of images [N, C, H, W]")


def _of_parts(to: Conversion, x: Value, layer: Callable[[Value, int], Value]) -> Value:
    """A layer of images [C, H, W] on parts of images [parts, C, H, W], whose channels are those of one image then.

    Args:
        layer: what it does to an image, into which so many are joined.
    """
    if not x.merged:
        return layer(x, 1)
    parts, *sizes = x.shape
    if len(sizes) != 3:
        to.unsupported("a layer of images of anything but [N, C, H, W]")
    joined = to.emit(Reshape((parts * sizes[0], *sizes[1:])), [x])
    y = layer(replace(joined, merged=False), parts)
    whole = to.emit(Reshape((parts, y.shape[0] // parts, *y.shape[1:])), [y])
    return replace(whole, merged=True)


# ---- layers with weights -------------------------------------------------------------------------------------------


def conv2d(
    to: Conversion,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    if holds((weight, bias), Value):
        to.unsupported("conv2d with computed weights")
    dilation = _pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same":  # the odd one of an uneven total goes to the end
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in totals)
    else:
        top, left = _pair(padding)
        bottom, right = top, left
    bias = torch.zeros(len(weight)) if bias is None else bias

    def layer(image: Value, parts: int) -> Value:
        expect_image(to, image, "conv2d")
        op = Conv2d(_pair(stride), (top, bottom, left, right), dilation, groups * parts)
        return to.emit(op, [image], weight=weight.repeat(parts, 1, 1, 1), bias=bias.repeat(parts))

    return _of_parts(to, x, layer)


def conv_transpose2d(
    to: Conversion,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    expect_image(to, x, "conv_transpose2d")
    if holds((weight, bias), Value):
        to.unsupported("conv_transpose2d with computed weights")
    bias = torch.zeros(weight.shape[1] * groups) if bias is None else bias
    op = ConvTranspose2d(_pair(stride), _pair(padding), _pair(output_padding), _pair(dilation), groups)
    return to.emit(op, [x], weight=weight, bias=bias)


def linear(to: Conversion, x: Value, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Value:
    if holds((weight, bias), Value):
        to.unsupported("linear with computed weights")
    weights = {"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias}
    if len(x.shape) <= 2 or is_image_of_channels_last(to, x):
        return to.emit(Linear(), [x], **weights)
    rows = to.emit(Reshape((math.prod(x.shape[:-1]), x.shape[-1])), [x])
    return to.emit(Reshape((*x.shape[:-1], len(weight))), [to.emit(Linear(), [rows], **weights)])


def is_image_of_channels_last(to: Conversion, x: Value) -> bool:
    """Whether an image's channels were put last, and nothing since but what `simplify` does before that."""
    index = x.index
    while len(x.shape) == 3 and not x.merged and index > 0:
        step = to.steps[index - 1]
        if isinstance(step.op, Permute):
            return step.op.axes == (1, 2, 0)
        if not isinstance(step.op, (Linear, Affine, Activation)):
            break
        index = step.inputs[0]
    return False


# ---- pools and resampling ------------------------------------------------------------------------------------------


def max_pool2d(
    to: Conversion,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:
    op = MaxPool2d(_pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil_mode)
    return _of_parts(to, x, lambda image, _: _pool(to, op, image))


def _pool(to: Conversion, op: MaxPool2d | AvgPool2d | AdaptiveAvgPool2d, image: Value) -> Value:
    expect_image(to, image, op.name)
    return to.emit(op, [image])


def max_pool2d_with_indices(to: Conversion, x: Value, *args: Any, **kwargs: Any) -> list[Any]:
    return [max_pool2d(to, x, *args, **kwargs), None]


def adaptive_max_pool2d(to: Conversion, x: Value, output_size: Any) -> list[Any]:
    expect_image(to, x, "adaptive_max_pool2d")
    kernel = []
    for wanted, size in zip(_pair(output_size), x.shape[1:], strict=True):
        if size % wanted:
            to.unsupported(f"an adaptive max pool from {size} to {wanted} pixels, which do not divide evenly")
        kernel.append(size // wanted)
    return [max_pool2d(to, x, kernel), None]


def avg_pool2d(
    to: Conversion,
    x: Value,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Value:
    window = _pair(kernel), _pair(stride or kernel), _pair(padding)
    op = AvgPool2d(*window, ceil_mode, count_include_pad, divisor)
    return _of_parts(to, x, lambda image, _: _pool(to, op, image))


def adaptive_avg_pool2d(to: Conversion, x: Value, output_size: Any) -> Value:
    if not x.merged:
        expect_image(to, x, "adaptive_avg_pool2d")
    sizes = [output_size] * 2 if isinstance(output_size, int) else output_size
    target = tuple(size if wanted is None else wanted for wanted, size in zip(sizes, x.shape[-2:], strict=True))
    op = AdaptiveAvgPool2d((target[0], target[1]))
    return _of_parts(to, x, lambda image, _: _pool(to, op, image))


def upsample(mode: str) -> Callable[..., Value]:
    """(x, output_size, [align_corners,] scale_factors), of which one of the two is given."""

    def converter(to: Conversion, x: Value, output_size: Any, *rest: Any) -> Value:
        *corners, scales = rest
        factors = None if scales is None or output_size is not None else (float(scales[0]), float(scales[1]))
        return _upsampled(to, x, mode, corners, factors)

    return converter


def upsample_plain(mode: str) -> Callable[..., Value]:
    """(x, output_size, [align_corners,] scale of rows, scale of columns)"""

    def converter(to: Conversion, x: Value, output_size: Any, *rest: Any) -> Value:
        corners, scales = (rest[:1], rest[1:]) if mode == "bilinear" else ((), rest)
        given = len(scales) == 2 and None not in scales
        return _upsampled(to, x, mode, corners, (float(scales[0]), float(scales[1])) if given else None)

    return converter


def _upsampled(
    to: Conversion, x: Value, mode: str, corners: Sequence[bool], factors: tuple[float, float] | None
) -> Value:
    expect_image(to, x, "upsample")
    height, width = to.result_shape()[1:]
    return to.emit(Upsample((height, width), mode, any(corners), factors), [x])


def pixel_shuffle(to: Conversion, x: Value, factor: int) -> Value:
    expect_image(to, x, "pixel_shuffle")
    return to.emit(PixelShuffle(factor), [x])


def unfold(to: Conversion, x: Value, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    """A depthwise convolution with an output for each place of the window."""
    expect_image(to, x, "unfold")
    c, (kh, kw) = x.shape[0], _pair(kernel)
    weight = torch.eye(kh * kw).reshape(kh * kw, 1, kh, kw).repeat(c, 1, 1, 1)
    y = conv2d(to, x, weight, None, stride, padding, dilation, c)
    return to.emit(Reshape((y.shape[0], y.shape[1] * y.shape[2])), [y])


# Interpolations that are whatever matrices PyTorch computes: the call by its sizes, and the dtype it is made in.
RESIZES: dict[str, tuple[Callable[..., torch.Tensor], torch.dtype]] = {
    "_upsample_nearest_exact2d": (torch.ops.aten._upsample_nearest_exact2d, torch.float32),  # rounds positions
    "upsample_bicubic2d": (torch.ops.aten.upsample_bicubic2d, torch.float64),
    "_upsample_bilinear2d_aa": (torch.ops.aten._upsample_bilinear2d_aa, torch.float64),
    "_upsample_bicubic2d_aa": (torch.ops.aten._upsample_bicubic2d_aa, torch.float64),
}


def resize(plain: tuple[Callable[..., torch.Tensor], torch.dtype]) -> Callable[..., Value]:
    """(x, output_size, [align_corners,] scale_factors): what becomes of the rows of an identity is the matrix."""
    call, dtype = plain

    def converter(to: Conversion, x: Value, output_size: Any, *rest: Any) -> Value:
        expect_image(to, x, "interpolate")
        *corners, scales = rest
        factors = (None, None) if scales is None or output_size is not None else scales
        matrices = {}
        for key, size, count, factor in zip(
            ("rows", "columns"), x.shape[1:], to.result_shape()[1:], factors, strict=True
        ):
            unit = torch.eye(size, dtype=dtype)[:, None, :, None].repeat(1, 1, 1, 2)  # one column alone goes wrong
            matrices[key] = call(unit, [count, 2], *corners, factor, None)[:, 0, :, 0].mT
        return to.emit(Separable(), [x], **matrices)

    return converter


# ---- vectors of channels [C, L] ------------------------------------------------------------------------------------


def in_one_row(layer: Callable[..., Value], *across: int | None) -> Callable[..., Value]:
    """A 1-d layer as the 2-d one on images of one row; `across` is what each argument is along the other axis."""

    def converter(to: Conversion, x: Value, *args: Any) -> Value:
        if len(x.shape) != 2:
            to.unsupported("a 1-d layer of anything but [N, C, L]")
        image = to.emit(Reshape((x.shape[0], 1, x.shape[1])), [x])
        y = layer(to, image, *(_in_one_row(argument, a) for argument, a in zip(args, across, strict=False)))
        return to.emit(Reshape((y.shape[0], y.shape[2])), [y])

    return converter


def _in_one_row(argument: Any, across: int | None) -> Any:
    if isinstance(argument, torch.Tensor) and argument.ndim == 3:
        return argument[:, :, None]
    if across is None or isinstance(argument, str) or argument == []:
        return argument
    return (across, _pair(argument)[0])


LAYERS_1D: dict[str, Callable[..., Value]] = {
    "conv1d.default": in_one_row(conv2d, None, None, 1, 0, 1, None),
    "conv1d.padding": in_one_row(conv2d, None, None, 1, 0, 1, None),
    "conv_transpose1d.default": in_one_row(conv_transpose2d, None, None, 1, 0, 0, None, 1),
    "max_pool1d.default": in_one_row(max_pool2d, 1, 1, 0, 1, None),
    "avg_pool1d.default": in_one_row(avg_pool2d, 1, 1, 0, None, None),
    "adaptive_avg_pool1d.default": in_one_row(adaptive_avg_pool2d, 1),
}
