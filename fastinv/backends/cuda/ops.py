"""How each op becomes nodes: `LOWERINGS` is the one table, with one function for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda.nodes import (
    AttentionNode,
    ConvolutionNode,
    GatherNode,
    Index,
    MatmulNode,
    MaxPoolNode,
    Node,
    NormalizeNode,
    ResampleNode,
    SoftmaxNode,
    inverse,
    is_identity,
    listed,
    places,
)
from fastinv.backends.cuda.plan import Buffer, Ending
from fastinv.backends.cuda.tuning import tuned
from fastinv.backends.cuda.window_halves import in_halves
from fastinv.errors import BackendError
from fastinv.network import Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Pair, Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.matmul import Matmul
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.normalize import Normalize
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.resample import Resample

if TYPE_CHECKING:
    from fastinv.backends.cuda.lowering import Lowering

SMALL_GROUP = 16  # channels: groups with fewer, in or out, would leave tiles of a matrix product empty

# From the lowering, a step, its inputs, their shapes and the output's shape to the buffer of the result.
Lower = Callable[["Lowering", Step, list[Buffer], list[Shape], Shape], Buffer]


def _convolution(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton import geometry

    op, weight = step.op, step.weights["weight"]
    assert isinstance(op, (Conv2d, ConvTranspose2d))
    source, target, kernel = _plane(shapes[0]), _plane(shape), _plane(weight.shape)
    grouped = weight.reshape(op.groups, -1, *weight.shape[1:])
    if isinstance(op, Conv2d):
        window = kernel, op.stride, (op.padding[0], op.padding[2]), op.dilation
        forward, back = geometry.correlation(source, target, *window), geometry.transposed(target, source, *window)
        weights = grouped, grouped.swapaxes(1, 2)
    else:
        window = kernel, op.stride, op.padding, op.dilation
        forward, back = geometry.transposed(source, target, *window), geometry.correlation(target, source, *window)
        weights = grouped.swapaxes(1, 2), grouped
    return _product(to, step, inputs, shape, (forward, back), weights)


def _plane(shape: Shape) -> Pair:
    """Height and width."""
    return (shape[-2], shape[-1])


def _product(to: Lowering, step: Step, inputs: list[Buffer], shape: Shape, geometries: Any, weights: Any) -> Buffer:
    forward = kernel_for(to, geometries[0], weights[0], step.weights["bias"])
    back = kernel_for(to, geometries[1], weights[1], None) if to.differentiable else None
    addend = inputs[1] if len(inputs) > 1 else None
    output = to.buffer(math.prod(shape))
    return to.add(ConvolutionNode(tuple(inputs), output, forward, back, Ending(step.activation, addend), weights[0]))


def kernel_for(to: Lowering, geometry: Any, weight: Any, bias: Any) -> Any:
    """The kernel for weights [groups, outputs, inputs, kh, kw]: by shapes and precision alone."""
    from fastinv.kernels.triton.convolution import Convolution
    from fastinv.kernels.triton.direct import DirectConvolution
    from fastinv.kernels.triton.grouped import GroupedConvolution

    groups, outputs, inputs = weight.shape[:3]
    if groups > 1 and min(outputs, inputs) < SMALL_GROUP:
        return GroupedConvolution(geometry, weight, bias, to.device, to.dtype)
    if DirectConvolution.fits(geometry, weight) and outputs <= _few(inputs, to.dtype.itemsize):
        return DirectConvolution(geometry, weight, bias, to.device)
    product = Convolution(geometry, weight, bias, to.device, to.dtype, to.numbers.dot)
    return in_halves(tuned(product, to.device), weight)


def _few(inputs: int, itemsize: int) -> int:
    """Up to how many outputs a convolution takes longer as a matrix product than product by product.

    On an H100 about 15 · 10^12 products a second are to be had without tensor cores. With them it is not products that
    count but what they read, gathered from memory: 10^12 values a second where a tap has 16 channels, fewer where tiles
    run over taps and channels, so that 16 products and more cost as much as a value; 3 · 10^12 with more channels.
    float32 values take longer, and become three tf32 products. With 16 channels boxes are faster than what is gathered.
    """
    if inputs >= 16:
        return 4 if inputs > 16 else 8
    return 16 if itemsize == 2 else 64


def _linear(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    """A 1×1 convolution of an image whose pixels are the rows."""
    from fastinv.kernels.triton import geometry

    (source,) = shapes
    if len(source) == 3:  # the last axis of an image does not lie side by side
        matrix = replace(step, activation=IDENTITY)
        flat, result = (math.prod(source[:2]), source[2]), (math.prod(source[:2]), shape[2])
        rows = _rearranged(to, inputs[0], np.arange(math.prod(source)).reshape(flat), source, flat, IDENTITY)
        product = _linear(to, matrix, [rows], [flat], result)
        return _rearranged(to, product, np.arange(math.prod(shape)).reshape(shape), result, shape, step.activation)
    size = (1, math.prod(source[:-1]))
    same = geometry.correlation(size, size, (1, 1), (1, 1), (0, 0), (1, 1))
    weight = step.weights["weight"][None, :, :, None, None]
    return _product(to, step, inputs, shape, (same, same), (weight, weight.swapaxes(1, 2)))


def _max_pool(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.pool import MaxPool

    op = step.op
    assert isinstance(op, MaxPool2d)
    kernel = MaxPool(shapes[0][1:], shape[1:], shape[0], op.kernel, op.stride, op.padding, op.dilation)
    size = math.prod(shape)
    taps = Buffer(size, kernel.tap_dtype) if to.differentiable else None
    return to.add(MaxPoolNode(tuple(inputs), to.buffer(size), kernel, Ending(step.activation), taps))


def _resample(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.resample import Resampling

    op = step.op
    assert isinstance(op, Resample)
    rows, columns = op.matrices(shapes[0], step.weights)
    kernel, back = (Resampling(r, c, shape[0], to.device) for r, c in ((rows, columns), (rows.T, columns.T)))
    return to.add(ResampleNode(tuple(inputs), to.buffer(math.prod(shape)), kernel, back, Ending(step.activation)))


def _rearrange(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    assert isinstance(step.op, Rearrange)
    return _rearranged(to, inputs[0], step.op.source_index(shapes[0]), shapes[0], shape, step.activation)


def _rearranged(
    to: Lowering, value: Buffer, index: Index, source: Shape, target: Shape, activation: Activation
) -> Buffer:
    """Elements in a new order; `index` holds positions in the row-major source, shaped as the target.

    Nothing is launched where the order in memory stays the same.
    """
    from fastinv.kernels.triton.gather import Gather

    order = listed(places(source).ravel()[index])
    if is_identity(order) and activation == IDENTITY:
        return value
    forward = Gather(order.size, x_index=to.index(order[None]))
    back = Gather(order.size, x_index=to.index(inverse(order, order.size)))
    return to.add(GatherNode((value,), to.buffer(order.size), forward, [(back, None)], Ending(activation)))


def _concat(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.gather import Gather

    assert isinstance(step.op, Concat)
    output = to.buffer(math.prod(shape))
    starts = np.cumsum([0, *(s[step.op.axis] for s in shapes)])
    parts = np.split(places(shape), starts[1:-1], axis=step.op.axis)
    for value, part in zip(inputs, parts, strict=True):
        order = listed(part)
        index = to.index(order)
        forward = Gather(order.size, out_index=index)
        back = Gather(order.size, x_index=None if index is None else index[None])
        to.add(GatherNode((value,), output, forward, [(back, None)], Ending(step.activation)))
    return output


def _binary(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.gather import Gather

    count = math.prod(shape)
    orders = [listed(np.broadcast_to(places(s), shape)) for s in shapes]
    x_index, y_index = (to.index(order[None]) for order in orders)
    backs: list[tuple[Any, int | None]] = []
    for which, value in enumerate(inputs):
        readers = inverse(orders[which], value.elements)
        index = to.index(readers)
        if step.op.name == "add":
            backs.append((Gather(value.elements, x_index=index), None))
        else:  # the gradient goes through times the other factor
            other = to.index(orders[1 - which][readers])
            backs.append((Gather(value.elements, "mul", x_index=index, y_index=other), 1 - which))
    kernel = Gather(count, step.op.name, x_index=x_index, y_index=y_index)
    return to.add(GatherNode(tuple(inputs), to.buffer(count), kernel, backs, Ending(step.activation)))


def _affine(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.gather import Gather

    assert isinstance(step.op, Affine)
    scale, shift = step.weights["scale"], step.weights["shift"]
    per_channel = len(shape) == 3 and scale.shape[1:] == (1, 1)
    target = (shape[0], 1, 1) if per_channel else shape  # channels are innermost: one entry for each is enough
    scales, shifts = (to.floats(listed(np.broadcast_to(w, target))) for w in (scale, shift))
    count = math.prod(shape)
    forward, back = Gather(count, scale=scales, shift=shifts), Gather(count, scale=scales)
    return to.add(GatherNode(tuple(inputs), to.buffer(count), forward, [(back, None)], Ending(step.activation)))


def _normalize(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.normalize import Normalization

    op = step.op
    assert isinstance(op, Normalize)
    weight, bias = (to.floats(step.weights[key]) for key in ("weight", "bias"))
    size = math.prod(shape)
    places = size // len(step.weights["weight"])
    rows, pixels = (1, places) if op.spatial else (places, 1)
    kernel = Normalization(weight, bias, rows, pixels, op.groups, op.centered, op.eps)
    statistics = Buffer(kernel.statistics, "float32") if to.differentiable else None
    return to.add(NormalizeNode(tuple(inputs), to.buffer(size), kernel, Ending(step.activation), statistics))


def _attention(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton import attention

    op = step.op
    assert isinstance(op, Attention)
    (queries, channels), (keys, value_channels) = shapes[0], shapes[2]
    widths = channels // op.heads, value_channels // op.heads
    if max(widths) > attention.MOST_CHANNELS:
        raise BackendError(
            f"cuda: attention of {max(widths)} channels a head, expected at most {attention.MOST_CHANNELS}, as "
            "tiles hold; use backend='cpu' or 'torch'"
        )
    bias = step.weights.get("bias")
    kernel = attention.Attention(
        *(op.windows, queries // op.windows, keys // op.windows, op.heads, *widths),
        scale=op.scale,
        bias=None if bias is None else to.floats(bias),
        precision=to.numbers.dot,
    )
    total = Buffer(kernel.totals, "float32") if to.differentiable else None

    def node(ending: Ending) -> Node:
        return AttentionNode(tuple(inputs), to.buffer(math.prod(shape)), kernel, ending, total)

    return _activated_apart(to, node, step.activation)


def _activated_apart(to: Lowering, node: Callable[[Ending], Node], activation: Activation) -> Buffer:
    """The result of a node whose way back reads what is before the activation."""
    apart = to.differentiable and activation != IDENTITY
    value = to.add(node(Ending(IDENTITY if apart else activation)))
    return to.activated(value, activation) if apart else value


def _matmul(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.matmul import Matmul as Kernel

    op = step.op
    assert isinstance(op, Matmul)
    kernel = Kernel(shape[0] // op.groups, shape[1], shapes[0][1], op.transposed, to.numbers.dot)
    return to.add(MatmulNode(tuple(inputs), to.buffer(math.prod(shape)), kernel, Ending(step.activation)))


def _softmax(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton.softmax import Softmax

    def node(ending: Ending) -> Node:
        return SoftmaxNode(tuple(inputs), to.buffer(math.prod(shape)), Softmax(shape[1]), ending)

    return _activated_apart(to, node, step.activation)


def _activation(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    assert isinstance(step.op, Activation)
    value = to.activated(inputs[0], step.op)
    return value if step.activation == IDENTITY else to.activated(value, step.activation)


LOWERINGS: dict[str, Lower] = {
    "conv2d": _convolution,
    "conv_transpose2d": _convolution,
    "linear": _linear,
    "max_pool2d": _max_pool,
    "avg_pool2d": _resample,
    "adaptive_avg_pool2d": _resample,
    "upsample": _resample,
    "separable": _resample,
    "pixel_shuffle": _rearrange,
    "reshape": _rearrange,
    "permute": _rearrange,
    "roll": _rearrange,
    "add": _binary,
    "mul": _binary,
    "affine": _affine,
    "normalize": _normalize,
    "attention": _attention,
    "matmul": _matmul,
    "softmax": _softmax,
    "concat": _concat,
    "activation": _activation,
}
