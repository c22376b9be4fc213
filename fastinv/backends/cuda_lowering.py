"""A network turned into launches for the GPU. `LOWERINGS` is the one table that says how each op becomes nodes.

Nothing here needs a GPU: the same launches run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda_nodes import (
    AttentionNode,
    ConvolutionNode,
    GatherNode,
    Index,
    MaxPoolNode,
    Node,
    NormalizeNode,
    ResampleNode,
    inverse,
    is_identity,
    listed,
    places,
)
from fastinv.backends.cuda_pair import join_pairs
from fastinv.backends.cuda_plan import Buffer, Ending, Stage
from fastinv.backends.cuda_planar import use_planar
from fastinv.backends.cuda_tuning import tuned
from fastinv.backends.cuda_window import use_windows
from fastinv.backends.cuda_window_halves import in_halves
from fastinv.backends.fusion import fused
from fastinv.errors import BackendError
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Pair, Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.normalize import Normalize
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.resample import Resample

if TYPE_CHECKING:
    import torch

SMALL_GROUP = 16  # channels: groups with fewer, in or out, would leave tiles of a matrix product empty


@dataclass(frozen=True)
class Numbers:
    """What a precision means.

    Attributes:
        dtype: of values in memory, and of what products are computed from; sums are always float32.
        dot: how products are computed: `tl.dot`'s input_precision, or "tf32x3" (`kernels/triton/halves.py`): of
            float32, three tf32 products on the tensor cores, as exact as the order of a sum is.
    """

    dtype: str
    dot: str


PRECISIONS = {
    "bfloat16": Numbers("bfloat16", "ieee"),
    "float16": Numbers("float16", "ieee"),
    "tf32": Numbers("float32", "tf32"),
    "float32": Numbers("float32", "tf32x3"),
}


class Lowering:
    """The nodes of a network, with their weights on a device.

    Attributes:
        input: the buffer that the first node reads.
        output: the buffer with the result, in the layout of the kernels.
        nodes: in the order in which they run.
    """

    def __init__(
        self,
        network: Network,
        device: Any,
        numbers: Numbers,
        input_dtype: str | None = None,
        differentiable: bool = False,
    ) -> None:
        import torch

        self.network = network
        self.device = device
        self.numbers = numbers
        self.dtype: torch.dtype = getattr(torch, numbers.dtype)
        self.differentiable = differentiable
        self.nodes: list[Node] = []
        self._own_slope: set[Buffer] = set()  # results whose activation's slope their node takes care of
        self.steps: list[tuple[int, ...]] = []  # those behind every node
        self.input = Buffer(math.prod(network.input_shape), input_dtype or numbers.dtype)
        values = {0: self.input}
        for part in fused(network):
            inputs = [values[i] for i in part.inputs]
            value = self._value(part.step, inputs, part.shapes, network.shapes[part.number + 1])
            values |= dict.fromkeys(part.results, value)
            self.steps += [(part.number,)] * (len(self.nodes) - len(self.steps))
        self.output = values[len(network.steps)]
        if not differentiable:  # the way back needs what lies between
            join_pairs(self.nodes, self.steps, self.output)
            use_windows(self.nodes)
            use_planar(self.nodes, self.input, self.dtype)

    def _value(self, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
        lower = LOWERINGS[step.op.name]
        activation = step.activation
        if self.differentiable and not _known_from_result(activation, self.dtype):  # then its argument is kept
            value = lower(self, replace(step, activation=IDENTITY), inputs, shapes, shape)
            return self.activated(value, activation)
        return lower(self, step, inputs, shapes, shape)

    def activated(self, value: Buffer, activation: Activation) -> Buffer:
        """The activation as a node of its own."""
        from fastinv.kernels.triton.gather import Gather

        slope = (activation.kind, activation.a, activation.b)
        back = Gather(value.elements, "slope", slope=slope)
        output = self.buffer(value.elements)
        # To the nodes that follow, this one's result has been through nothing: its slope is in `back`.
        node = GatherNode((value,), output, Gather(value.elements), [(back, 0)], Ending(activation))
        self._own_slope.add(output)
        return self.add(node)

    def buffer(self, elements: int) -> Buffer:
        return Buffer(elements, self.numbers.dtype)

    def add(self, node: Node) -> Buffer:
        self.nodes.append(node)
        return node.output

    def index(self, index: Index) -> Any:
        """A table [count] or [terms, count] for the kernels; None for the identity."""
        import torch

        one = index.ndim == 1 or len(index) == 1
        return (
            None if one and is_identity(index) else torch.from_numpy(index.astype(np.int32, order="C")).to(self.device)
        )

    def floats(self, values: Any) -> Any:
        import torch

        return torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def forward(self) -> list[Stage]:
        return [node.forward() for node in self.nodes]

    def backward(self, seed: Callable[[Buffer, Ending], Stage]) -> tuple[list[Stage], Buffer]:
        """The stages from the gradient of the output, which `seed` writes, to that of the input, and its buffer."""
        nodes = self.nodes[::-1]
        endings = {node.output: node.ending for node in nodes if node.output not in self._own_slope}
        left = Counter([self.output, *(source for node in nodes for source in node.inputs)])
        gradients: dict[Buffer, Buffer] = {}

        def into(source: Buffer) -> tuple[Buffer, Ending]:
            """Where a gradient of `source` goes, and what is done to it: the last one is taken through its slope."""
            left[source] -= 1
            before = gradients.get(source)
            gradients.setdefault(source, self.buffer(source.elements))
            activation = endings[source].activation if source in endings and left[source] == 0 else IDENTITY
            saved = None if activation == IDENTITY else source
            return gradients[source], Ending(activation, before, saved)

        stages = [seed(*into(self.output))]
        for node in nodes:
            for which, source in enumerate(node.inputs):
                stages.append(node.backward(which, gradients[node.output], *into(source)))
        return stages, gradients[self.input]


def _known_from_result(activation: Activation, dtype: torch.dtype) -> bool:
    """Whether the activation's slope can be told from its result, as it is kept."""
    import torch

    from fastinv.kernels.triton.epilogue import FROM_RESULT

    bounds = torch.tensor((activation.a, activation.b))
    if activation.kind == "hardtanh" and not torch.equal(bounds.to(dtype).float(), bounds):
        return False  # what is held at a bound would be rounded to the inside
    return activation.kind in FROM_RESULT and not (activation.kind == "leaky_relu" and activation.a < 0)


# ---- one function per op: (lowering, step, inputs, their shapes, output shape) -> the buffer of the result -----------

Lower = Callable[[Lowering, Step, list[Buffer], list[Shape], Shape], Buffer]


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
    return to.add(MaxPoolNode(tuple(inputs), to.buffer(size), kernel, taps, Ending(step.activation)))


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
    return to.add(NormalizeNode(tuple(inputs), to.buffer(size), kernel, statistics, Ending(step.activation)))


def _attention(to: Lowering, step: Step, inputs: list[Buffer], shapes: list[Shape], shape: Shape) -> Buffer:
    from fastinv.kernels.triton import attention

    op = step.op
    assert isinstance(op, Attention)
    (queries, channels), (keys, value_channels) = shapes[0], shapes[2]
    sizes = queries, keys, op.heads, channels // op.heads, value_channels // op.heads
    if max(sizes[3:]) > attention.MOST_CHANNELS:
        raise BackendError(
            f"cuda: attention of {max(sizes[3:])} channels a head, expected at most {attention.MOST_CHANNELS}, as "
            "tiles hold; use backend='cpu' or 'torch'"
        )
    kernel = attention.Attention(*sizes, op.scale, to.numbers.dot)
    total = Buffer(kernel.totals, "float32") if to.differentiable else None
    apart = to.differentiable and step.activation != IDENTITY  # the way back reads what is before it
    ending = Ending(IDENTITY if apart else step.activation)
    value = to.add(AttentionNode(tuple(inputs), to.buffer(math.prod(shape)), kernel, total, ending))
    return to.activated(value, step.activation) if apart else value


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
    "add": _binary,
    "mul": _binary,
    "affine": _affine,
    "normalize": _normalize,
    "attention": _attention,
    "concat": _concat,
    "activation": _activation,
}
