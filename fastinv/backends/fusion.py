"""Steps that compiled backends do together: what a convolution can take over from its neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY
from fastinv.ops.base import Case, Pair, Shape
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.permute import Permute
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.upsample import Upsample

if TYPE_CHECKING:
    import torch

Weight = npt.NDArray[np.float32]


class Part(NamedTuple):
    """A step, and what it has taken over from its neighbours.

    Attributes:
        number: which step of the network.
        step: with the activation of the addition, as a transposed convolution where there was an upsampling before it.
        inputs: values of the network, last the one that is added.
        shapes: of the step's own inputs.
        results: values of the network that its result stands for.
    """

    number: int
    step: Step
    inputs: tuple[int, ...]
    shapes: list[Shape]
    results: list[int]


@dataclass(frozen=True)
class Rearrangements(Rearrange):
    """Several, one after the other, in one. No op of networks: to backends it is any permutation."""

    name: ClassVar[str] = Permute.name
    ops: tuple[Rearrange, ...] = ()

    def __post_init__(self) -> None:
        pass  # no attributes of a file's

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        for op in self.ops:
            inputs = [op.shape(inputs, weights)]
        return inputs[0]

    def rearranged(self, array: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        for op in self.ops:
            array = op.rearranged(array)
        return array

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        for op in self.ops:
            inputs = [op.reference(inputs, weights)]
        return inputs[0]

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return ()


def fused(network: Network, *, upsampling: bool = True) -> Iterator[Part]:
    """The network's steps in their order, as far as its output depends on them.

    Args:
        upsampling: whether convolutions take over the upsampling before them.
    """
    sums, enlarged = _sums(network), _upsampling(network) if upsampling else {}
    passed = _passed(network)
    taken = {*(add for add, _ in sums.values()), *enlarged.values(), *passed}
    for index, step in enumerate(network.steps):
        if index in taken or index not in network.live:  # no gradient would reach the latter
            continue
        inputs, results = step.inputs, [index + 1]
        if index in enlarged:
            before = network.steps[enlarged[index]]
            inputs = before.inputs
            step = _upsampled(step, before, network.shapes[inputs[0]])
        if isinstance(step.op, Rearrange):
            step, inputs = _rearranged_at_once(network, step)
        shapes = [network.shapes[value] for value in inputs]
        if index in sums:
            add, other = sums[index]
            step = replace(step, activation=network.steps[add].activation)
            inputs = (*inputs, other)
            results.append(add + 1)
        yield Part(index, step, inputs, shapes, results)


MOST_REPEATS = 4  # of a row or column: the weights grow by its square
SMALL_BYTES = 512 * 1024  # of a layer's images abreast, in and out: half of the smallest L2


def chain_of_small_convolutions(network: Network, width: int) -> bool:
    """Whether `width` images can go through all layers at once, and stay in cache."""
    elements = [math.prod(shape) for shape in network.shapes]
    return all(
        isinstance(step.op, (Conv2d, ConvTranspose2d))
        and step.inputs == (index,)
        and 4 * width * (elements[index] + elements[index + 1]) <= SMALL_BYTES
        for index, step in enumerate(network.steps)
    )


def _sums(network: Network) -> dict[int, tuple[int, int]]:
    """Convolutions that can do the addition which follows: the step, to the addition's and the value it adds."""
    uses = _uses(network)
    found = {}
    for index, step in enumerate(network.steps):
        if step.op.name != "add" or len(set(step.inputs)) != 2:
            continue
        other, value = sorted(step.inputs)
        before = network.steps[value - 1]
        if (
            isinstance(before.op, (Conv2d, ConvTranspose2d))
            and before.activation == IDENTITY
            and uses[value] == 1
            and network.shapes[other] == network.shapes[value]
        ):
            found[value - 1] = (index, other)
    return found


def _passed(network: Network) -> set[int]:
    """Rearrangements whose results only others read, which do theirs with their own."""
    moves = {i for i, step in enumerate(network.steps) if isinstance(step.op, Rearrange)}
    return {
        i
        for i in moves
        if network.steps[i].activation == IDENTITY
        and i + 1 < len(network.steps)
        and all(reader in moves for reader in network.consumers[i + 1] if reader in network.live)
    }


def _rearranged_at_once(network: Network, step: Step) -> tuple[Step, tuple[int, ...]]:
    """A rearrangement together with all those before it, and what that reads."""
    assert isinstance(step.op, Rearrange)
    ops, inputs = [step.op], step.inputs
    while inputs[0] > 0:
        before = network.steps[inputs[0] - 1]
        if not isinstance(before.op, Rearrange) or before.activation != IDENTITY:
            break
        ops.insert(0, before.op)
        inputs = before.inputs
    return (step if len(ops) == 1 else replace(step, op=Rearrangements(tuple(ops)))), inputs


def _upsampling(network: Network) -> dict[int, int]:
    """Convolutions of an image that nearest upsampling has enlarged: the step, to the upsampling's."""
    uses = _uses(network)
    found = {}
    for index, step in enumerate(network.steps):
        value = step.inputs[0]
        before = network.steps[value - 1] if value > 0 else None
        if (
            before is not None
            and isinstance(before.op, Upsample)
            and before.activation == IDENTITY
            and uses[value] == 1
            and isinstance(step.op, Conv2d)
            and step.op.stride == step.op.dilation == (1, 1)
            and step.op.padding[0] < step.weights["weight"].shape[2]
            and step.op.padding[2] < step.weights["weight"].shape[3]
            and _repeats(before.op, network.shapes[before.inputs[0]]) is not None
        ):
            found[index] = value - 1
    return found


def _repeats(op: Upsample, shape: Shape) -> Pair | None:
    """How often an image [C, H, W] has each row and column repeated; None where that is too often, or no repetition."""
    if op.mode != "nearest":
        return None
    factors = []
    for axis, size in enumerate(shape[1:]):
        factor = op.output_size[axis] // size
        if not 1 <= factor <= MOST_REPEATS or not np.array_equal(
            op.source(axis, size), np.arange(factor * size) // factor
        ):
            return None
        factors.append(factor)
    return (factors[0], factors[1])


def _upsampled(step: Step, before: Step, shape: Shape) -> Step:
    """The convolution, with the upsampling of [C, H, W] before it, as one transposed convolution."""
    assert isinstance(step.op, Conv2d)
    assert isinstance(before.op, Upsample)
    factors = _repeats(before.op, shape)
    assert factors is not None
    top, _, left, _ = step.op.padding
    weight, padding = _transposed(step.weights["weight"], (top, left), factors, step.op.groups)
    op = ConvTranspose2d(stride=factors, padding=padding, groups=step.op.groups)
    return replace(step, op=op, weights={"weight": weight, "bias": step.weights["bias"]})


def _transposed(weight: Weight, padding: Pair, factors: Pair, groups: int) -> tuple[Weight, Pair]:
    """Weight and padding of the transposed convolution, of stride `factors`, that upsampling and convolution make.

    Output o of an axis is Σ_t w[t] · x[⌊(o + t − p) / s⌋]: input i counts with Σ w[t] over the t for which
    0 <= o + t − p − s·i < s. That is a transposed convolution of kernel k − 1 + s and padding k − 1 − p. Before a 3×3
    convolution this leaves 4 products of each output pixel instead of 9.

    Args:
        weight: of the convolution, [O, I / groups, kh, kw].
        padding: of the convolution, top and left.
    """
    outputs, inputs, *kernel = weight.shape
    sizes = [k - 1 + s for k, s in zip(kernel, factors, strict=True)]
    result = np.zeros((groups * inputs, outputs // groups, *sizes))
    turned = weight.reshape(groups, outputs // groups, inputs, *kernel).swapaxes(1, 2).reshape(-1, *weight.shape[2:])
    turned = turned.reshape(groups * inputs, outputs // groups, *kernel)[:, :, ::-1, ::-1]
    for y in range(factors[0]):
        for x in range(factors[1]):
            result[:, :, y : y + kernel[0], x : x + kernel[1]] += turned
    return result.astype(np.float32), (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])


def _uses(network: Network) -> Counter[int]:
    """How many steps read each value; the network's result counts as read once more."""
    return Counter([len(network.steps), *(value for step in network.steps for value in step.inputs)])
