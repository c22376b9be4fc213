"""Graph rewrites that leave what a network computes as it is: constants fold, activations fuse, dead steps go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fastinv.network import Network, Step, sources
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.base import Shape
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.linear import Linear
from fastinv.ops.mul import Mul
from fastinv.ops.normalize import Normalize, channel_axis
from fastinv.ops.permute import Permute
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.reshape import Reshape
from fastinv.ops.roll import Roll
from fastinv.ops.separable import Separable
from fastinv.picking import picked_early

Doubles = npt.NDArray[np.float64]


def simplify(network: Network) -> Network:
    """An equal network with no more steps. Weights are folded in float64 and rounded to float32."""
    merged = _merged(network)
    picked = picked_early(merged)
    return merged if picked is merged else _merged(picked)


def _merged(network: Network) -> Network:
    graph = _Graph(network.input_shape)
    live = network.live
    values = [0]  # in the graph, for each of the network's
    for index, step in enumerate(network.steps):
        if index not in live:
            values.append(-1)  # read by nobody
            continue
        readers = sum(reader in live for reader in network.consumers[index + 1])
        inputs = [values[i] for i in step.inputs]
        values.append(graph.add(step, inputs, network.shapes[index + 1], readers))
    return graph.network()


def with_denormalisation(network: Network, mean: Sequence[float], std: Sequence[float]) -> Network:
    """`network`, whose results are normalised images z, extended to give pixels: clamp(z·std + mean, 0, 1).

    Args:
        network: its output is [C, H, W].
        mean, std: one number for all channels or one for each.
    """
    channels = network.output_shape[0]
    scale, shift = (
        np.broadcast_to(np.asarray(v, np.float32), (channels,)).reshape(channels, 1, 1) for v in (std, mean)
    )
    clamp, last = Activation("clamp", 0.0, 1.0), (len(network.steps),)
    if (scale == 1).all() and (shift == 0).all():
        step = Step(clamp, last, source="denormalise")
    else:
        step = Step(Affine(), last, {"scale": scale, "shift": shift}, clamp, "denormalise")
    return simplify(Network(network.input_shape, (*network.steps, step)))


CHANNELS_LAST, CHANNELS_FIRST = Permute((1, 2, 0)), Permute((2, 0, 1))


class _Graph:
    """The simplified network, built step by step: each new step is merged with those before it as far as it goes."""

    def __init__(self, input_shape: Shape) -> None:
        self.shapes = [input_shape]  # of every value; value k + 1 is the result of step k
        self.readers = [0]
        self.steps: list[Step | None] = []  # None where the step went into a later one
        self.inputs: list[list[int]] = []

    def add(self, step: Step, inputs: list[int], shape: Shape, readers: int) -> int:
        """Append `step`, whose result `readers` steps will read; the value that stands for the result."""
        while True:
            if _is_identity(step, self.shapes[inputs[0]]):
                self.readers[inputs[0]] += readers - 1
                return inputs[0]
            behind = self._behind(step, inputs)
            if behind is not None:
                step, inputs = behind
                continue
            producer = self._producer(inputs)
            if producer is not None:
                before = self.inputs[inputs[0] - 1]
                shape_before = self.shapes[before[0]]
                swapped = _moved_later(producer, step, shape_before)
                if swapped is not None:
                    first, step = swapped
                    self._reads_instead(inputs[0], before[0])
                    inputs = [self.add(first, before, first.op.shape([shape_before], first.weight_shapes), 1)]
                    continue
            if self._is_of_channels_last(step, inputs):
                return self._as_of_images(step, inputs, readers)
            merged = self._merged(step, inputs)
            if merged is None:
                break
            value = inputs[0]
            step, inputs = merged, self.inputs[value - 1]
            self.steps[value - 1] = None
        return self._append(step, inputs, shape, readers)

    def _behind(self, step: Step, inputs: list[int]) -> tuple[Step, list[int]] | None:
        """One rearrangement for this one and that before it, which others read, too."""
        value, producer = inputs[0], self._producer(inputs)
        if producer is None or self.readers[value] == 1:
            return None
        before = self.inputs[value - 1][0]
        both = _compose_rearrangements(producer, step, self.shapes[before], self.shapes[value])
        if both is None:
            return None
        self._reads_instead(value, before)
        return dataclasses.replace(both, source=sources(producer, step)), [before]

    def _reads_instead(self, value: int, before: int) -> None:
        """One reader of `value` reads `before`, of which that is made, instead."""
        self.readers[value] -= 1
        if self.readers[value] > 0:
            self.readers[before] += 1
        else:
            self.steps[value - 1] = None

    def _is_of_channels_last(self, step: Step, inputs: list[int]) -> bool:
        """Whether step computes element by element of values of an image's rank whose last axis lies together.

        Of channels that were put last, or of tokens in several rows: as images they lie so in memory, with their
        channels first; as they are the first axis would.
        """
        shapes = {self.shapes[v] for v in inputs}
        if not isinstance(step.op, (Add, Mul, Affine)) or len(shapes) != 1 or len(min(shapes)) != 3:
            return False
        if isinstance(step.op, Affine) and step.weights["scale"].shape[1:] == (1, 1):
            return False  # a number for each of the first axis: channels
        if all(self._keeps_last_axis(v) for v in inputs):
            return True
        return len(set(inputs)) == 2 and any(self._has_channels_last(v) for v in inputs)

    def _has_channels_last(self, value: int) -> bool:
        step = self._producer([value])
        return step is not None and step.op == CHANNELS_LAST and step.activation == IDENTITY

    def _keeps_last_axis(self, value: int) -> bool:
        step = self._producer([value])
        if step is None or step.activation != IDENTITY:
            return False
        before = self.shapes[self.inputs[value - 1][0]]
        return (
            isinstance(step.op, Roll)
            or (isinstance(step.op, Reshape) and before[-1] == self.shapes[value][-1])
            or (isinstance(step.op, Permute) and step.op.axes[-1] == len(before) - 1)
        )

    def _as_of_images(self, step: Step, inputs: list[int], readers: int) -> int:
        """The same of values with their channels first, and then those put last."""
        images = []
        for value in inputs:
            if self._has_channels_last(value):
                before = self.inputs[value - 1][0]
                self._reads_instead(value, before)
                images.append(before)
            else:
                turned = CHANNELS_FIRST.shape([self.shapes[value]], {})
                images.append(self.add(Step(CHANNELS_FIRST, (0,), source=step.source), [value], turned, 1))
        weights = {key: weight.transpose(CHANNELS_FIRST.axes) for key, weight in step.weights.items()}
        step, shape = dataclasses.replace(step, weights=weights), self.shapes[images[0]]
        value, last = self._append(step, images, shape, 1), CHANNELS_LAST.shape([shape], {})
        return self.add(Step(CHANNELS_LAST, (0,), source=step.source), [value], last, readers)

    def _append(self, step: Step, inputs: list[int], shape: Shape, readers: int) -> int:
        self.steps.append(step)
        self.inputs.append(inputs)
        self.shapes.append(shape)
        self.readers.append(readers)
        return len(self.steps)

    def _merged(self, step: Step, inputs: list[int]) -> Step | None:
        """One step for `step` and the producer of its input, by the first rewrite that fits; None where none does."""
        value, producer = inputs[0], self._only_producer(inputs)
        if producer is None:
            return None
        before = self.shapes[self.inputs[value - 1][0]]
        for rewrite in REWRITES:
            merged = rewrite(producer, step, before, self.shapes[value])
            if merged is not None:
                return dataclasses.replace(merged, source=sources(producer, step))
        return None

    def _producer(self, inputs: list[int]) -> Step | None:
        """The step whose result is the one input of another."""
        return self.steps[inputs[0] - 1] if len(inputs) == 1 and inputs[0] > 0 else None

    def _only_producer(self, inputs: list[int]) -> Step | None:
        """The same, where no other reads it."""
        return self._producer(inputs) if self.readers[inputs[0]] == 1 else None

    def network(self) -> Network:
        """The steps that are left, with their values numbered anew."""
        numbers = {0: 0}
        steps: list[Step] = []
        for value, step in enumerate(self.steps, start=1):
            if step is not None:
                inputs = tuple(numbers[i] for i in self.inputs[value - 1])
                steps.append(dataclasses.replace(step, inputs=inputs))
                numbers[value] = len(steps)
        return Network(self.shapes[0], tuple(steps))


def _is_identity(step: Step, shape: Shape) -> bool:
    op = step.op
    nothing = (
        op == IDENTITY
        or (isinstance(op, Reshape) and op.target == shape)
        or (isinstance(op, Permute) and op.axes == tuple(range(len(shape))))
    )
    return nothing and step.activation == IDENTITY


# ---- the rewrites: (producer, step, producer's input shape, shape between) -> one step for both, or None -----------
#
# `step` is the only reader of `producer`. The caller sets inputs and source of the result.


def _fuse_activation(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    if not isinstance(step.op, Activation) or step.activation != IDENTITY or producer.activation != IDENTITY:
        return None
    return dataclasses.replace(producer, activation=step.op)


def _drop_clamp(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    """A clamp of what lies between its bounds anyway: pixels of a decoder that ends in a sigmoid."""
    clamp, last = step.op, producer.activation
    if not isinstance(clamp, Activation) or clamp.kind != "clamp" or step.activation != IDENTITY:
        return None
    if last == IDENTITY and isinstance(producer.op, Activation):
        last = producer.op
    ranges = {"sigmoid": (0.0, 1.0), "clamp": (last.a, last.b), "hardtanh": (last.a, last.b)}
    low, high = ranges.get(last.kind, (-np.inf, np.inf))
    return producer if clamp.a <= low and high <= clamp.b else None


def _fold_affine(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    """a·(W x + b) + c = (a·W) x + (a·b + c), where a and c are constant over each output channel."""
    if not isinstance(step.op, Affine) or producer.activation != IDENTITY:
        return None
    scale, shift = (step.weights[key].astype(np.float64) for key in ("scale", "shift"))
    if isinstance(producer.op, Affine):
        first, offset = (producer.weights[key].astype(np.float64) for key in ("scale", "shift"))
        a, b = np.broadcast_arrays(scale * first, scale * offset + shift)
        return _with_weights(producer, step, scale=a, shift=b)
    axis = _channel_axis(producer, between)
    if axis is None or any(size != 1 for k, size in enumerate(scale.shape) if k != axis):
        return None
    channels = between[axis]
    a, c = (np.broadcast_to(v.ravel(), (channels,)) for v in (scale, shift))
    weight, bias = (producer.weights[key].astype(np.float64) for key in ("weight", "bias"))
    if isinstance(producer.op, ConvTranspose2d):  # [C, O / groups, kh, kw]: outputs follow the inputs of their group
        groups = producer.op.groups
        by_group = weight.reshape(groups, -1, *weight.shape[1:])
        factors = a.reshape(groups, 1, -1, 1, 1)
        return _with_weights(producer, step, weight=(by_group * factors).reshape(weight.shape), bias=a * bias + c)
    factors = a.reshape(-1, *[1] * (weight.ndim - 1))
    return _with_weights(producer, step, weight=weight * factors, bias=a * bias + c)


def _fold_padding(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    """Zero padding, which export writes as a depthwise 1×1 convolution that copies, followed by a convolution."""
    op, pad = step.op, producer.op
    if not isinstance(op, Conv2d) or not isinstance(pad, Conv2d) or producer.activation != IDENTITY:
        return None
    if pad != Conv2d(padding=pad.padding, groups=before[0]) or producer.weights["weight"].shape != (
        before[0],
        1,
        1,
        1,
    ):
        return None
    if (producer.weights["weight"] != 1).any() or producer.weights["bias"].any():
        return None
    top, bottom, left, right = (a + b for a, b in zip(op.padding, pad.padding, strict=True))
    return dataclasses.replace(step, op=dataclasses.replace(op, padding=(top, bottom, left, right)))


def _compose_rearrangements(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    if producer.activation != IDENTITY:
        return None
    if isinstance(step.op, Reshape) and isinstance(producer.op, Reshape):
        return step
    if isinstance(step.op, Permute) and isinstance(producer.op, Permute):
        return dataclasses.replace(step, op=Permute(tuple(producer.op.axes[axis] for axis in step.op.axes)))
    return None


def _compose_separable(producer: Step, step: Step, before: Shape, between: Shape) -> Step | None:
    """Two crops, or the sums of rows and columns."""
    if not isinstance(step.op, Separable) or not isinstance(producer.op, Separable) or producer.activation != IDENTITY:
        return None
    weights = {key: matrix.astype(np.float64) for key, matrix in producer.weights.items()}
    for key, matrix in step.weights.items():
        weights[key] = matrix.astype(np.float64) @ weights[key] if key in weights else matrix.astype(np.float64)
    return _with_weights(producer, step, **weights)


Rewrite = Callable[[Step, Step, Shape, Shape], Step | None]
REWRITES: tuple[Rewrite, ...] = (
    _fuse_activation,
    _drop_clamp,
    _fold_affine,
    _fold_padding,
    _compose_rearrangements,
    _compose_separable,
)


# ---- rewrites of other forms ---------------------------------------------------------------------------------------


def _moved_later(producer: Step, step: Step, before: Shape) -> tuple[Step, Step] | None:
    """An equal step before what moves elements, and that after it.

    Activations go to what computes the elements, and so do factors and shifts of the last axis, where a reshape leaves
    that as it is. A linear layer over channels that were put last is a 1×1 convolution then; where they are put back,
    the permutation goes.
    """
    move, op = producer.op, step.op
    if not isinstance(move, Rearrange) or producer.activation != IDENTITY:
        return None
    if isinstance(op, Activation):
        return step, producer
    if isinstance(op, Affine) and isinstance(move, Reshape) and before[-1] == move.target[-1]:
        spread = (*[1] * (len(before) - 1), -1)
        if any(size != 1 for size in step.weights["scale"].shape[:-1]):
            return None
        weights = {key: weight.reshape(spread) for key, weight in step.weights.items()}
        return dataclasses.replace(step, weights=weights), producer
    if not isinstance(move, Permute) or len(move.axes) != 3 or move.axes[2] != 0:
        return None
    if isinstance(op, Linear):
        weights = {"weight": step.weights["weight"][:, :, None, None], "bias": step.weights["bias"]}
        return dataclasses.replace(step, op=Conv2d(), weights=weights), producer
    if isinstance(op, Affine):
        back = np.argsort(move.axes)
        weights = {key: weight.transpose(back) for key, weight in step.weights.items()}
        return dataclasses.replace(step, weights=weights), producer
    return None


def _channel_axis(step: Step, shape: Shape) -> int | None:
    """The axis of the step's result that its bias runs along; None for ops without one."""
    if isinstance(step.op, (Conv2d, ConvTranspose2d)):
        return 0
    if isinstance(step.op, Normalize):
        return channel_axis(shape)
    return len(shape) - 1 if isinstance(step.op, Linear) else None


def _with_weights(producer: Step, step: Step, **weights: Doubles) -> Step | None:
    """`producer` with other weights and `step`'s activation; None where they leave float32."""
    if not all(np.abs(w).max(initial=0) < np.finfo(np.float32).max for w in weights.values()):
        return None
    rounded = {key: w.astype(np.float32) for key, w in weights.items()}
    return dataclasses.replace(producer, weights=rounded, activation=step.activation)
