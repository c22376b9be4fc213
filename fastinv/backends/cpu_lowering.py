"""How networks become programs of the compiled core, `fastinv._core`.

`LOWERINGS` is the one table that says how each op becomes launches. A program takes and gives images as [C, H, W];
between its nodes they lie so or channels last, [H, W, C], as the core chooses (`csrc/program.h`). Of the order of
elements in a `gather` it is told as if all lay channels last.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fastinv import _core
from fastinv.backends.base import Array
from fastinv.backends.compiled import channels_last
from fastinv.backends.fusion import chain_of_small_convolutions, fused
from fastinv.errors import BackendError
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.matmul import Matmul
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.normalize import Normalize
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.resample import Resample

ACTIVATION_CODES = {  # the order of ActivationKind in csrc/kernels.h
    kind: code
    for code, kind in enumerate(
        (
            "identity",
            "relu",
            "leaky_relu",
            "sigmoid",
            "tanh",
            "silu",
            "gelu",
            "gelu_tanh",
            "softplus",
            "hardtanh",
            "clamp",
            "elu",
            "exp",
            "sqrt",
            "reciprocal",
        )
    )
}


class Lowering:
    """A network turned into a program of the core, step by step."""

    def __init__(self, network: Network, *, differentiable: bool = False, bfloat16: bool = False) -> None:
        self.network = network
        isa = current_isa()
        abreast = not differentiable and chain_of_small_convolutions(network, _core.vector_width(isa))
        self.program: _core.Program = _core.Program(isa, list(network.input_shape), differentiable, abreast, bfloat16)
        values = {0: 0}  # the program's value for values of the network
        self.launches: list[int] = []  # the step behind every launch
        # The gradient goes back through upsampling and convolution apart: both are fast that way, and stride 2 is not.
        for part in fused(network, upsampling=not differentiable):
            inputs = [values[i] for i in part.inputs]
            lower = LOWERINGS[part.step.op.name]
            value = lower(self, part.step, inputs, part.shapes, network.shapes[part.number + 1])
            values |= dict.fromkeys(part.results, value)
            self.launches += [part.number] * (value - len(self.launches))
        last = self.program.finish(values[len(network.steps)])
        self.launches += [len(network.steps) - 1] * (last - len(self.launches))

    def rearrange(self, value: int, index: npt.NDArray[np.int64], source: Shape, target: Shape, act: Activation) -> int:
        """Elements in a new order; `index` holds positions in the row-major input, shaped as the output.

        Nothing is launched where the order in memory stays the same.
        """
        position = np.empty(index.size, np.int64)  # where each element of the row-major input lies
        position[channels_last(np.arange(index.size).reshape(source)).ravel()] = np.arange(index.size)
        order = position[channels_last(index.reshape(target)).ravel()]
        if np.array_equal(order, np.arange(order.size)):
            if act is IDENTITY or act == IDENTITY:
                # The value keeps its own shape in the program; a later step may need the new one.
                return value if source == target else self._gather(value, order, target, act)
            if source == target:
                return self.program.activate(value, encode(act))
        return self._gather(value, order, target, act)

    def _gather(self, value: int, order: npt.NDArray[np.int64], target: Shape, act: Activation) -> int:
        return self.program.gather(value, order.astype(np.int32), list(target), encode(act))


def encode(activation: Activation) -> tuple[int, float, float]:
    """An activation as the core takes it."""
    return ACTIVATION_CODES[activation.kind], activation.a, activation.b


def current_isa() -> str:
    """The instruction set that programs are for."""
    try:
        return _core.resolve_isa(os.environ.get("FASTINV_ISA", ""))
    except ValueError as error:
        raise BackendError(f"FASTINV_ISA: {error}; unset it to take the best") from None


NO_BIAS: Array = np.zeros(0, np.float32)  # of attention by the scores alone


# ---- one function per op: (lowering, step, input values, input shapes, output shape) -> value ----------------------

Lower = Callable[[Lowering, Step, list[int], list[Shape], Shape], int]


def _convolution(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, (Conv2d, ConvTranspose2d))
    transposed = isinstance(op, ConvTranspose2d)
    return to.program.convolution(
        values[0],
        step.weights["weight"],
        step.weights["bias"],
        output=list(output),
        stride=op.stride,
        padding=op.padding if isinstance(op, ConvTranspose2d) else (op.padding[0], op.padding[2]),
        dilation=op.dilation,
        groups=op.groups,
        transposed=transposed,
        activation=encode(step.activation),
        addend=values[1] if len(values) > 1 else -1,
    )


def _linear(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    (value,), (shape,) = values, shapes
    weight, bias = step.weights["weight"], step.weights["bias"]
    if len(shape) != 3:
        return to.program.linear(value, weight, bias, list(output), encode(step.activation))
    # The last axis of an image is not contiguous in the core: work on it as a matrix.
    rows = shape[0] * shape[1]
    flat_in, flat_out = (rows, shape[2]), (rows, output[2])
    value = to.rearrange(value, np.arange(rows * shape[2]), shape, flat_in, IDENTITY)
    value = to.program.linear(value, weight, bias, list(flat_out), encode(step.activation))
    return to.rearrange(value, np.arange(rows * output[2]), flat_out, output, IDENTITY)


def _max_pool(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, MaxPool2d)
    return to.program.max_pool(
        values[0], list(output), op.kernel, op.stride, op.padding, op.dilation, encode(step.activation)
    )


def _resample(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Resample)
    rows, columns = (matrix.astype(np.float32) for matrix in op.matrices(shapes[0], step.weights))
    return to.program.resample(values[0], rows, columns, encode(step.activation))


def _rearrange(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Rearrange)
    return to.rearrange(values[0], step.op.source_index(shapes[0]), shapes[0], output, step.activation)


def _concat(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Concat)
    return to.program.concat(values, step.op.axis, list(output), encode(step.activation))


def _add(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    return to.program.add(values[0], values[1], list(output), encode(step.activation))


def _mul(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    return to.program.mul(values[0], values[1], list(output), encode(step.activation))


def _affine(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Affine)
    scale, shift = step.weights["scale"], step.weights["shift"]
    (shape,) = shapes
    per_channel = len(shape) == 3 and scale.shape[1:] == (1, 1)
    target = shape[:1] if per_channel else shape  # channels are innermost: one entry for each is enough
    arrays = (np.broadcast_to(w.reshape(-1) if per_channel else w, target) for w in (scale, shift))
    scale, shift = (np.ascontiguousarray(channels_last(w)).ravel() for w in arrays)
    return to.program.affine(values[0], scale, shift, encode(step.activation))


def _normalize(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Normalize)
    return to.program.normalize(
        values[0],
        step.weights["weight"],
        step.weights["bias"],
        groups=op.groups,
        spatial=op.spatial,
        centered=op.centered,
        eps=op.eps,
        activation=encode(step.activation),
    )


def _attention(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Attention)
    q, k, v = values
    return to.program.attention(
        q,
        k,
        v,
        step.weights.get("bias", NO_BIAS),
        windows=op.windows,
        heads=op.heads,
        scale=op.scale,
        activation=encode(step.activation),
    )


def _matmul(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Matmul)
    a, b = values
    return to.program.matmul(a, b, groups=op.groups, transposed=op.transposed, activation=encode(step.activation))


def _softmax(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    value = to.program.softmax(values[0])
    return value if step.activation == IDENTITY else to.program.activate(value, encode(step.activation))


def _activation(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Activation)
    value = to.program.activate(values[0], encode(step.op))
    return value if step.activation == IDENTITY else to.program.activate(value, encode(step.activation))


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
    "add": _add,
    "mul": _mul,
    "affine": _affine,
    "normalize": _normalize,
    "attention": _attention,
    "matmul": _matmul,
    "softmax": _softmax,
    "concat": _concat,
    "activation": _activation,
}
