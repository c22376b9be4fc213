"""From aten calls to steps: what works along axes, and what moves elements. `fastinv.aten` lists them.

What picks, repeats, leaves out or sums along an axis is one thing: y's axis is a constant matrix times x's axis.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from fastinv.aten.arithmetic import linear_map
from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.aten.layers import axis_of, expect_image
from fastinv.ops.activation import IDENTITY
from fastinv.ops.adaptive_avg_pool2d import AdaptiveAvgPool2d
from fastinv.ops.base import Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.linear import Linear
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.permute import Permute
from fastinv.ops.resample import MAX_MATRIX
from fastinv.ops.reshape import Reshape
from fastinv.ops.roll import Roll
from fastinv.ops.separable import Separable
from fastinv.ops.upsample import Upsample

Pieces = list[Any]  # of a call with several results: values, or None for one that cannot be exported


def along(to: Conversion, x: Value, axis: int, matrix: torch.Tensor) -> Value:
    """`matrix` times the axis (without the batch), all else by itself."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    count = len(matrix)
    shape = (*before, count, *after)
    if len(x.shape) == 3 and axis > 0:
        return to.emit(Separable(), [x], **{"rows" if axis == 1 else "columns": matrix})
    if len(before) == 1 and math.prod(after) ** 2 > MAX_MATRIX:
        order = (1, 0, *range(2, len(x.shape)))
        turned = along(to, to.emit(Permute(order), [x]), 0, matrix)
        return to.emit(Permute(order), [turned])
    if math.prod(before) == 1 and after:  # a 1×1 convolution, in which the axis is the channels
        image = reshaped(to, x, (size, *(after if len(after) == 2 else (1, math.prod(after)))))
        weights = {"weight": matrix[:, :, None, None], "bias": torch.zeros(count)}
        return reshaped(to, to.emit(Conv2d(), [image], **weights), shape)
    image = reshaped(to, x, (math.prod(before), size, math.prod(after)))
    return reshaped(to, to.emit(Separable(), [image], rows=matrix), shape)


def take(to: Conversion, x: Value, axis: int, index: torch.Tensor) -> Value:
    """Element k of the result's axis is element index[k] of x's."""
    size, count = x.shape[axis], len(index)
    index = index % size
    if count == 0:
        to.unsupported("a slice that leaves nothing")
    if count == size and torch.equal(index, positions(x, axis)):
        return x
    if to.only_parts_are_read() and (layer := _of_layer(to, x, axis, index)) is not None:
        return layer
    block = _block(index, size) if len(x.shape) in (1, 2) else 1
    if block > 1:  # a small matrix that takes whole blocks
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        blocks = take(to, reshaped(to, x, (*before, size // block, block, *after)), axis, index[::block] // block)
        return reshaped(to, blocks, (*before, count, *after))
    if count * size > MAX_MATRIX:
        to.unsupported(f"picking {count} of {size} elements, which lie in no order,")
    matrix = torch.zeros(count, size)
    matrix[torch.arange(count), index] = 1
    return along(to, x, axis, matrix)


def _of_layer(to: Conversion, x: Value, axis: int, index: torch.Tensor) -> Value | None:
    """The same, where x is a linear layer's result in another shape or order, of those of its columns alone.

    Queries, keys and values are often made so: the layer of all has no reader then, and goes.
    """
    step = to.steps[x.index - 1] if x.index > 0 else None
    if step is None or step.activation != IDENTITY or len(index) >= x.shape[axis]:
        return None
    before = Value(step.inputs[0], to.shapes[step.inputs[0]], merged=x.merged)
    shape = (*x.shape[:axis], len(index), *x.shape[axis + 1 :])
    if isinstance(step.op, Permute):
        taken = _of_layer(to, before, step.op.axes[axis], index)
        return None if taken is None else to.emit(step.op, [taken])
    if isinstance(step.op, Linear) and axis == len(x.shape) - 1:
        return to.emit(Linear(), [before], **{key: torch.tensor(w[index.numpy()]) for key, w in step.weights.items()})
    if not isinstance(step.op, Reshape):
        return None
    columns = before.shape[-1]
    within = next((k for k in range(len(x.shape)) if math.prod(x.shape[k:]) == columns), len(x.shape))
    if axis < within:  # the result's axes from there on are the columns
        return None
    places = torch.arange(columns).reshape(x.shape[within:]).index_select(axis - within, index)
    taken = _of_layer(to, before, len(before.shape) - 1, places.flatten())
    return None if taken is None else reshaped(to, taken, shape)


def _block(index: torch.Tensor, size: int) -> int:
    """The largest number of elements side by side that the index takes together, each time from a multiple of it."""
    whole = math.gcd(size, len(index))
    for block in (b for b in range(whole, 1, -1) if whole % b == 0):
        blocks = index.reshape(-1, block)
        if bool((blocks[:, 0] % block == 0).all()) and torch.equal(blocks, blocks[:, :1] + torch.arange(block)):
            return block
    return 1


def positions(x: Value, axis: int) -> torch.Tensor:
    """0, 1, … along the axis: what an operation does with them, `take` does with x."""
    return torch.arange(x.shape[axis])


def reshaped(to: Conversion, x: Value, shape: Shape) -> Value:
    return x if x.shape == tuple(shape) else to.emit(Reshape(tuple(shape)), [x])


def permuted(to: Conversion, x: Value, axes: Sequence[int]) -> Value:
    return x if list(axes) == list(range(len(x.shape))) else to.emit(Permute(tuple(axes)), [x])


# ---- other shapes and orders ---------------------------------------------------------------------------------------


def reshape(to: Conversion, x: Value, *_: Any, **__: Any) -> Value:
    """flatten, view, reshape, unflatten, squeeze, unsqueeze: torch has worked out the shape."""
    y = to.in_result_shape(x)
    return replace(to.emit(Reshape(y.shape), [x]), merged=y.merged)


def reordered(to: Conversion, x: Value, *args: Any, **kwargs: Any) -> Value:
    """permute, transpose, movedim, …: torch says where the axes of a tensor whose sizes tell them apart go."""
    assert to.node is not None
    assert callable(to.node.target)
    found = list(to.node.target(torch.empty(*range(x.rank), device="meta"), *args, **kwargs).shape)
    axes = [axis - (axis > x.batch and not x.merged) for axis in found if axis != x.batch or x.merged]
    return replace(to.emit(Permute(tuple(axes)), [x]), batch=found.index(x.batch))


def expand(to: Conversion, x: Value, *_: Any, **__: Any) -> Value:
    """A view of axes of size 1 as many; of rows and columns the nearest upsampling."""
    target = to.result_shape()
    if x.merged:
        target = (x.shape[0], *target)
    if len(target) != len(x.shape):
        to.unsupported("an expansion to more axes")
    if len(target) == 3 and target[1:] != x.shape[1:] and not x.merged:
        x = to.emit(Upsample((target[1], target[2])), [x])
    for axis, size in enumerate(target):
        if size != x.shape[axis]:
            x = take(to, x, axis, torch.zeros(size, dtype=torch.int64))
    return x


def channel_shuffle(to: Conversion, x: Value, groups: int) -> Value:
    expect_image(to, x, "channel_shuffle")
    c, h, w = x.shape
    turned = to.emit(Permute((1, 0, 2, 3)), [reshaped(to, x, (groups, c // groups, h, w))])
    return reshaped(to, turned, x.shape)


def pixel_unshuffle(to: Conversion, x: Value, factor: int) -> Value:
    expect_image(to, x, "pixel_unshuffle")
    c, h, w = x.shape
    blocks = reshaped(to, x, (c, h // factor, factor, w // factor, factor))
    turned = to.emit(Permute((0, 2, 4, 1, 3)), [blocks])
    return reshaped(to, turned, (c * factor**2, h // factor, w // factor))


# ---- parts ---------------------------------------------------------------------------------------------------------


def slice_(to: Conversion, x: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    whole = start in (None, 0) and (end is None or end == sys.maxsize) and step == 1
    if whole:  # as of the batch in x[:, 2]
        return x
    axis = axis_of(to, x, axis)
    return take(to, x, axis, positions(x, axis)[start:end:step])


def narrow(to: Conversion, x: Value, axis: int, start: int, length: int) -> Value:
    axis = axis_of(to, x, axis)
    return take(to, x, axis, positions(x, axis).narrow(0, start, length))


def select(to: Conversion, x: Value, axis: int, position: int) -> Value:
    place = axis % x.rank
    axis = axis_of(to, x, axis)
    y = _without(to, take(to, x, axis, positions(x, axis)[position].reshape(1)), [axis])
    return replace(y, batch=x.batch - (place < x.batch))


def index_select(to: Conversion, x: Value, axis: int, index: Any) -> Value:
    if holds(index, Value):
        to.unsupported("an index that is computed")
    return take(to, x, axis_of(to, x, axis), index)


def index(to: Conversion, x: Value, indices: Sequence[Any]) -> Value:
    """x[:, [2, 0, 1]]: one axis by a list of positions."""
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if holds(indices, Value):
        to.unsupported("an index that is computed")
    if len(given) != 1 or indices[given[0]].ndim != 1 or indices[given[0]].dtype is torch.bool:
        to.unsupported("an index that is not one list of positions")
    return index_select(to, x, given[0], indices[given[0]])


def split(how: Callable[..., Any]) -> Callable[..., Pieces]:
    def converter(to: Conversion, x: Value, size: Any, axis: int = 0) -> Pieces:
        axis = axis_of(to, x, axis)
        return [take(to, x, axis, index) for index in how(positions(x, axis), size)]

    return converter


def unbind(to: Conversion, x: Value, axis: int = 0) -> Pieces:
    return [select(to, x, axis, position) for position in range(x.shape[axis_of(to, x, axis)])]


def windows(to: Conversion, x: Value, axis: int, size: int, step: int) -> Value:
    """x.unfold: windows along an axis, whose elements become the last one."""
    axis = axis_of(to, x, axis)
    places = positions(x, axis).unfold(0, size, step)
    count, last = len(places), len(x.shape)
    y = take(to, x, axis, places.flatten())
    y = reshaped(to, y, (*x.shape[:axis], count, size, *x.shape[axis + 1 :]))
    return to.emit(Permute((*(k for k in range(last + 1) if k != axis + 1), axis + 1)), [y])


def _without(to: Conversion, x: Value, axes: Sequence[int]) -> Value:
    """x without these axes, whose size is 1."""
    return reshaped(to, x, tuple(size for axis, size in enumerate(x.shape) if axis not in axes))


# ---- other orders and repetitions along an axis --------------------------------------------------------------------


def flip(to: Conversion, x: Value, axes: Sequence[int]) -> Value:
    for axis in [axis_of(to, x, axis) for axis in axes]:
        x = take(to, x, axis, positions(x, axis).flip(0))
    return x


def roll(to: Conversion, x: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> Value:
    if len(axes) != len(shifts):
        to.unsupported("a roll of the flattened tensor")
    by_axis = [0] * len(x.shape)
    for axis, shift in zip([axis_of(to, x, axis) for axis in axes], shifts, strict=True):
        by_axis[axis] = (by_axis[axis] + shift) % x.shape[axis]
    return to.emit(Roll(tuple(by_axis)), [x])


def repeat(to: Conversion, x: Value, counts: Sequence[int]) -> Value:
    if len(counts) != x.rank or counts[0] != 1 or min(counts) < 1:
        to.unsupported("a repetition of the batch, along new axes, or zero times")
    for axis, count in enumerate(counts[1:]):
        x = x if count == 1 else to.emit(Concat(axis), [x] * count)
    return x


def repeat_interleave(to: Conversion, x: Value, count: int, axis: int | None = None, **_: Any) -> Value:
    if axis is None or not isinstance(count, int):
        to.unsupported("repeat_interleave of the flattened tensor, or by different counts")
    if axis % x.rank == x.batch == 0 and not x.merged:  # an image's rows lie together
        rows = take(to, reshaped(to, x, (1, *x.shape)), 0, torch.zeros(count, dtype=torch.int64))
        return replace(rows, merged=True)
    axis = axis_of(to, x, axis)
    return take(to, x, axis, positions(x, axis).repeat_interleave(count))


def stack(to: Conversion, values: Sequence[Any], axis: int = 0) -> Value:
    if not all(isinstance(v, Value) for v in values):
        to.unsupported("stacking computed values and constants")
    like = values[0]
    place = axis % (like.rank + 1)
    at = place - (place > like.batch and not like.merged)
    single = [reshaped(to, v, (*v.shape[:at], 1, *v.shape[at:])) for v in values]
    y = single[0] if len(single) == 1 else to.emit(Concat(at), single)
    return replace(y, batch=like.batch + (place <= like.batch))


def cat(to: Conversion, values: Sequence[Any], axis: int = 0) -> Value:
    like = next(v for v in values if isinstance(v, Value))
    axis = axis_of(to, like, axis)
    joined = [v if isinstance(v, Value) else _constant(to, v, like, axis) for v in values]
    return like if len(joined) == 1 else to.emit(Concat(axis), joined)


def _constant(to: Conversion, constant: torch.Tensor, like: Value, axis: int) -> Value:
    """A constant [1, ...], as a class token is, for each image: nothing times a part of what it is to be joined to."""
    if constant.ndim != like.rank or constant.shape[0] != 1:
        to.unsupported("joining computed values and a constant that differs from image to image")
    part = take(to, like, axis, torch.zeros(constant.shape[axis + (not like.merged)], dtype=torch.int64))
    return linear_map(to, part, 0.0, constant)


def pad(to: Conversion, x: Value, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    """Zeros around rows and columns are a depthwise 1×1 convolution that copies: `simplify` folds it into the next."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))  # from the last axis on
    if len(pairs) >= x.rank:
        to.unsupported("padding of the batch axis")
    if mode == "constant" and value:
        if not math.isfinite(value):
            to.unsupported("padding with an infinite constant")
        shifted = pad(to, linear_map(to, x, 1.0, -value), padding)
        return linear_map(to, shifted, 1.0, value)
    for back, (low, high) in enumerate(pairs):
        axis = len(x.shape) - 1 - back
        if (
            mode == "circular" and min(low, high) >= 0
        ):  # joined: the gradient of one matrix would reach across the image
            index = positions(x, axis)
            ends = [index[index.numel() - low :], index[:high]]
            before, after = ([take(to, x, axis, end)] if end.numel() else [] for end in ends)
            x = cat(to, [*before, x, *after], axis + (not x.merged))
        elif mode != "constant":
            line = positions(x, axis).double()[None, None]
            x = take(to, x, axis, F.pad(line, (low, high), mode).flatten().long())
        elif min(low, high) < 0 or (max(low, high) > 0 and (len(x.shape) != 3 or axis == 0 or x.merged)):
            x = along(to, x, axis, F.pad(torch.eye(x.shape[axis]), (0, 0, low, high)))
            pairs[back] = (0, 0)
    if mode != "constant" or not any(map(any, pairs)):
        return x
    (left, right), (top, bottom) = (*pairs, (0, 0))[:2]
    weights = {"weight": torch.ones(x.shape[0], 1, 1, 1), "bias": torch.zeros(x.shape[0])}
    return to.emit(Conv2d(padding=(top, bottom, left, right), groups=x.shape[0]), [x], **weights)


# ---- sums, means and maxima ----------------------------------------------------------------------------------------


def _axes_of(to: Conversion, x: Value, axes: Any) -> list[int]:
    """The axes that a reduction is over; none given are all, the batch among them."""
    given = [axes] if isinstance(axes, int) else axes or range(x.rank)
    return sorted(axis_of(to, x, axis) for axis in given)


def mean(to: Conversion, x: Value, axes: Any, keepdim: bool = False, **_: Any) -> Value:
    return _total(to, x, _axes_of(to, x, axes), keepdim, mean=True)


def sum_(to: Conversion, x: Value, axes: Any, keepdim: bool = False, **_: Any) -> Value:
    return _total(to, x, _axes_of(to, x, axes), keepdim, mean=False)


def _total(to: Conversion, x: Value, axes: list[int], keepdim: bool, mean: bool) -> Value:
    left, batch = list(axes), x.batch
    if mean and len(x.shape) == 3 and left != [0]:  # of rows and columns: a pool
        height, width = (1 if axis in axes else x.shape[axis] for axis in (1, 2))
        x = to.emit(AdaptiveAvgPool2d((height, width)), [x])
        left = [axis for axis in left if axis == 0]
    for axis in left:
        x = along(to, x, axis, torch.full((1, x.shape[axis]), 1 / x.shape[axis] if mean else 1.0))
    if keepdim:
        return replace(x, batch=batch)
    return replace(_without(to, x, axes), batch=batch - sum(axis < batch for axis in axes))


def amax(to: Conversion, x: Value, axes: Any = (), keepdim: bool = False) -> Value:
    """A max pool over all of each axis. Of several that are largest the first gets the gradient."""
    axes = _axes_of(to, x, axes)
    shape, left = x.shape, list(axes)
    if len(shape) == 3 and 0 not in axes:
        height, width = (shape[axis] if axis in axes else 1 for axis in (1, 2))
        x, left = to.emit(MaxPool2d((height, width), (1, 1)), [x]), []
    for axis in left:
        size = shape[axis]
        image = reshaped(to, x, (math.prod(shape[:axis]), size, math.prod(shape[axis + 1 :])))
        shape = (*shape[:axis], 1, *shape[axis + 1 :])
        x = reshaped(to, to.emit(MaxPool2d((size, 1), (1, 1)), [image]), shape)
    return x if keepdim else _without(to, x, axes)


def max_along(to: Conversion, x: Value, axis: int, keepdim: bool = False) -> Pieces:
    return [amax(to, x, axis, keepdim), None]
