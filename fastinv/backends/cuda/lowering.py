"""A network turned into launches for the GPU.

Nothing here needs a GPU: the same launches run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda.nodes import GatherNode, Index, Node, is_identity
from fastinv.backends.cuda.ops import LOWERINGS
from fastinv.backends.cuda.pair import join_pairs
from fastinv.backends.cuda.plan import Buffer, Ending, Stage
from fastinv.backends.cuda.planar import use_planar
from fastinv.backends.cuda.window import use_windows
from fastinv.backends.fusion import fused
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.base import Shape

if TYPE_CHECKING:
    import torch


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
