"""From a torch.export graph to a network: walks the calls, computes constants, collects the steps of the rest."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.fx import Node

from fastinv.errors import NetworkError, UnsupportedOp
from fastinv.network import Network, Step
from fastinv.ops.activation import Activation
from fastinv.ops.base import Op, Shape
from fastinv.simplify import simplify


@dataclass(frozen=True)
class Value:
    """A value of the network being built: what depends on the input. Everything else is a constant.

    Attributes:
        index: its number.
        shape: without the batch axis, or, where something is merged into it, with that in its place.
        batch: which of torch's axes that is. Only what moves axes, or takes parts along one, is told of any but 0.
        merged: whether torch's batch axis has several rows of each image, as windows of attention.
    """

    index: int
    shape: Shape
    batch: int = 0
    merged: bool = False

    @property
    def rank(self) -> int:
        """Axes that torch has."""
        return len(self.shape) + (not self.merged)


Converters = Mapping[str, Callable[..., Any]]  # by aten call; each takes the Conversion and the call's arguments

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)  # numbers that depend on the batch size
# What may be told sizes: the converters go by the shape that torch traced.
RESHAPES = (
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unflatten.int"),
    *("aten.expand.default", "aten.repeat.default"),
)
FILLED = ("aten.zeros.default", "aten.ones.default", "aten.full.default")  # sizes come first
# What takes values whose batch axis is not the first.
MOVES = frozenset(
    (
        *("aten.permute.default", "aten.transpose.int", "aten.movedim.int", "aten.movedim.intlist"),
        *("aten.swapaxes.default", "aten.swapdims.default", "aten.select.int", "aten.unbind.int"),
        *("aten.contiguous.default", "aten.clone.default", "aten.mean.dim", "aten.sum.dim_IntList"),
    )
)
# What takes a part of a value.
PARTS = frozenset(
    f"aten.{name}"
    for name in (
        *("select.int", "unbind.int", "slice.Tensor", "narrow.default", "index_select.default"),
        *("chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default"),
    )
)
# What would take a batch axis into which something is merged for channels, or something else for the batch axis.
OF_WHOLE_IMAGES = frozenset(
    f"aten.{name}"
    for name in (
        *("conv1d.default", "conv1d.padding", "conv_transpose1d.default", "conv_transpose2d.input"),
        *("instance_norm.default", "group_norm.default", "max_pool2d_with_indices.default"),
        *("max_pool1d.default", "avg_pool1d.default", "adaptive_avg_pool1d.default", "adaptive_max_pool2d.default"),
        *("upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_nearest2d.default"),
        *("upsample_bilinear2d.default", "_upsample_nearest_exact2d.vec", "upsample_bicubic2d.vec"),
        *("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec", "pixel_shuffle.default"),
        *("pixel_unshuffle.default", "im2col.default", "channel_shuffle.default", "repeat.default"),
    )
) | {"the result"}


class Conversion:
    """The state of one conversion: the steps so far and what every graph node stands for."""

    def __init__(self, program: torch.export.ExportedProgram, input_shape: Shape, converters: Converters) -> None:
        self.program = program
        self.converters = converters
        self.input_shape = input_shape
        self.steps: list[Step] = []
        self.shapes: list[Shape] = [input_shape]
        self.known: dict[Node, Any] = {}
        self.node: Node | None = None  # the one being converted, for messages

    def network(self) -> Network:
        inputs = self._bind_placeholders()
        if inputs != 1:
            raise NetworkError(f"export: the module takes {inputs} inputs, expected one tensor")
        return self._finish(self._run(self.program.graph_module))

    def _run(self, module: torch.fx.GraphModule) -> Any:
        """What its graph gives, once its placeholders are known."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                self.node = node
                self.known[node] = self._call(node)
            elif node.op == "get_attr":
                self.known[node] = getattr(module, node.target)
            elif node.op == "output":
                return self._resolve(node.args[0])
        raise NetworkError("export: the graph has no output")

    def _run_within(self, name: str, args: Sequence[Any]) -> Any:
        """A part of the graph that stands by itself: within `torch.no_grad` or `torch.autocast`."""
        before = args[: next(i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule))]
        if name == "wrap_with_autocast" and before[0] == "cpu" and before[2]:
            self.unsupported("autocast, which rounds,")
        module, *given = args[len(before) :]
        placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
        self.known |= zip(placeholders, given, strict=True)
        return self._run(module)

    def _bind_placeholders(self) -> int:
        """Give every placeholder its parameter, buffer or constant, and the user's input value 0."""
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        targets = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        inputs = 0
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in targets:
                self.known[node] = state[targets[node.name]].detach()
            else:
                self.known[node] = Value(0, self.input_shape)
                inputs += 1
        return inputs

    def _finish(self, outputs: Any) -> Network:
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 1:
            raise NetworkError("export: the module gives several outputs, expected one tensor")
        if not isinstance(outputs[0], Value):
            raise NetworkError("export: the output does not depend on the input")
        value = outputs[0]
        self._expect_plain("the result", [value])
        if value.index != len(self.steps):  # the last step must be the output: end with a copy
            self.emit(Activation(), [value])
        return simplify(Network(self.input_shape, tuple(self.steps)))

    def _call(self, node: Node) -> Any:
        if isinstance(node.meta.get("val"), SYMBOLS):
            return node.meta["val"]
        args = self._resolve(node.args)
        kwargs = self._resolve(node.kwargs)
        name = str(node.target)
        if node.target is operator.getitem:
            piece = args[0][args[1]]
            if piece is None and node.users:
                self.unsupported("the positions of maxima")
            return piece
        if name in ("wrap_with_autocast", "wrap_with_set_grad_enabled"):
            return self._run_within(name, args)
        if holds((args, kwargs), SYMBOLS) and name not in RESHAPES and name not in FILLED:
            self._refuse_batch_size(name)
        given = list(instances((args, kwargs), Value))
        if not given:
            if holds(args, SYMBOLS):
                args = self._for_one_image(name, args)
            with torch.no_grad():
                assert callable(node.target)
                return node.target(*args, **kwargs)
        if name not in self.converters:
            self.unsupported(f"the operation {name}")
        self._expect_plain(name, given)
        result = self.converters[name](self, *args, **kwargs)
        if name.split(".")[1].endswith("_"):  # in place: who reads the argument from now on sees the result
            changed = node.args[0]
            assert isinstance(changed, Node)
            self.known[changed] = result
        return result

    def only_parts_are_read(self) -> bool:
        """Whether what the node being converted takes a part of is read in parts by all."""
        x = self.node.args[0] if self.node is not None else None
        return isinstance(x, Node) and all(str(user.target) in PARTS for user in x.users)

    def _for_one_image(self, name: str, args: Any) -> Any:
        """The arguments of a call that gives a constant to each image of the batch, for one, which broadcasts."""
        place = 0 if name in FILLED else 1
        sizes = list(args[place]) if len(args) > place and isinstance(args[place], (list, tuple)) else []
        if not sizes or not isinstance(sizes[0], SYMBOLS) or holds((sizes[1:], args[place + 1 :]), SYMBOLS):
            self._refuse_batch_size(name)
        return *args[:place], [1, *sizes[1:]], *args[place + 1 :]

    def _refuse_batch_size(self, name: str) -> NoReturn:
        self.unsupported(f"the operation {name} on the batch size, which must not change what one image gives")

    def _expect_plain(self, name: str, values: Sequence[Value]) -> None:
        """What this call, or "the result", is made of has the batch first and is a value, but for what takes others."""
        if name not in MOVES and any(value.batch for value in values):
            self.unsupported("a permutation that moves the batch axis")
        if name in OF_WHOLE_IMAGES and any(value.merged for value in values):
            self.unsupported(f"{name} of parts of images, merged into the batch axis,")

    def _resolve(self, argument: Any) -> Any:
        """`argument` with nodes replaced by what they stand for."""
        if isinstance(argument, Node):
            return self.known[argument]
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._resolve(a) for a in argument)
        if isinstance(argument, dict):
            return {key: self._resolve(a) for key, a in argument.items()}
        return argument

    def emit(self, op: Op, inputs: Sequence[Value], **weights: torch.Tensor) -> Value:
        """Append a step and return its value."""
        arrays = {key: w.detach().to(torch.float32).contiguous().numpy() for key, w in weights.items()}
        step = Step(op, tuple(v.index for v in inputs), arrays, source=self.place())
        shape = op.shape([v.shape for v in inputs], step.weight_shapes)
        self.steps.append(step)
        self.shapes.append(shape)
        return Value(len(self.steps), shape, merged=inputs[0].merged)

    def place(self) -> str:
        """The module path of the node being converted."""
        stack = self.node.meta.get("nn_module_stack") if self.node is not None else None
        return str(list(stack.values())[-1][0]) if stack else ""

    def unsupported(self, what: str) -> NoReturn:
        """Raise UnsupportedOp for the node being converted."""
        raise UnsupportedOp(
            f"export: {what}, in module {self.place() or '(top)'!r}{self._line()}, cannot be exported; README.md says "
            "what can. Replace it, or cut the model elsewhere; an inverse network (black-box) needs no exported edge"
        )

    def _line(self) -> str:
        """Where the node being converted was called: the innermost line that is not PyTorch's own."""
        trace = self.node.meta.get("stack_trace") or "" if self.node is not None else ""
        own = str(Path(torch.__file__).parent)
        lines = [f"{path}:{line}" for path, line in re.findall(r'File "(.+?)", line (\d+)', trace) if own not in path]
        return f" ({lines[-1]})" if lines else ""

    def result_shape(self) -> Shape:
        """The node's own result shape without the batch axis, as torch traced it."""
        assert self.node is not None
        sizes = self.node.meta["val"].shape
        if len(sizes) == 0 or isinstance(sizes[0], int) or not all(isinstance(s, int) for s in sizes[1:]):
            raise NetworkError(
                f"export: module {self.place() or '(top)'!r} reshapes the batch axis away (to {tuple(sizes)}); every "
                "image must be computed by itself, with the batch axis first"
            )
        return tuple(sizes[1:])

    def in_result_shape(self, x: Value) -> Value:
        """x in the shape that torch gives its elements; what that merges into the batch axis is the first axis."""
        shape = self.result_shape()
        rows, rest = divmod(math.prod(x.shape), math.prod(shape))
        if rest or rows == 0:
            raise NetworkError(
                f"export: module {self.place() or '(top)'!r} moves elements between images (to {list(shape)})"
            )
        return Value(x.index, shape) if rows == 1 else Value(x.index, (rows, *shape), merged=True)


def instances(argument: Any, kinds: type | tuple[type, ...]) -> Iterator[Any]:
    """All of these types anywhere in the argument."""
    if isinstance(argument, dict):
        argument = tuple(argument.values())
    if isinstance(argument, (tuple, list)):
        for a in argument:
            yield from instances(a, kinds)
    elif isinstance(argument, kinds):
        yield argument


def holds(argument: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether something of these types is anywhere in the argument."""
    return any(True for _ in instances(argument, kinds))
