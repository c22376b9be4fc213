"""Network: an exported, frozen graph of ops with its weights. It is what every backend compiles."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import FastinvError, NetworkError
from fastinv.ops import OPS
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.base import MAX_ELEMENTS, MAX_RANK, Cost, Op, Shape, expect

Weights = Mapping[str, npt.NDArray[np.float32]]

MAX_STEPS = 4096
MAX_SOURCE = 256  # characters of a step's source that are kept
MAX_TOTAL = 2**30  # elements of all values of one image together (4 GiB of float32)
MAX_FLOPS = 2**40  # per image


@dataclass(frozen=True, eq=False)
class Step:
    """One op of a network, followed by an activation.

    Args:
        op: the op with its attributes.
        inputs: the values it reads. Value 0 is the network's input, value k + 1 the result of step k.
        weights: float32 arrays by the op's own names; copied and frozen here.
        activation: applied to the op's result.
        source: where the step comes from (module names), for messages and `fastinv info`; kept short and
            printable.
    """

    op: Op
    inputs: tuple[int, ...]
    weights: Weights = field(default_factory=dict, repr=False)
    activation: Activation = IDENTITY
    source: str = ""

    def __post_init__(self) -> None:
        frozen = {key: _frozen(f"{self.op.name}.{key}", value) for key, value in self.weights.items()}
        object.__setattr__(self, "weights", MappingProxyType(frozen))
        object.__setattr__(self, "inputs", tuple(self.inputs))
        printable = (c if c.isprintable() else "?" for c in str(self.source)[:MAX_SOURCE])
        object.__setattr__(self, "source", "".join(printable))

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        """Shapes of the weights by name."""
        return {key: value.shape for key, value in self.weights.items()}


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A graph of steps in topological order; the last value is the output.

    Networks of the same graph and weights are equal, and hash alike.

    Args:
        input_shape: shape of one input, without the batch axis.
        steps: the steps; each reads only earlier values.

    Raises:
        NetworkError: shapes, references or weights that do not fit, naming the step.
    """

    input_shape: Shape
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        object.__setattr__(self, "steps", tuple(self.steps))
        expect(len(self.steps) <= MAX_STEPS, f"{len(self.steps)} steps, expected at most {MAX_STEPS}")
        total = sum(map(math.prod, self.shapes))  # computing the shapes validates the graph
        expect(total <= MAX_TOTAL, f"{total} elements in all values of one image, expected at most {MAX_TOTAL}")
        expect(self.flops <= MAX_FLOPS, f"{self.flops} FLOPs for one image, expected at most {MAX_FLOPS}")

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Network) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        shapes = f"{list(self.input_shape)} -> {list(self.output_shape)}"
        return (
            f"Network({shapes}, {len(self.steps)} step{'s' * (len(self.steps) != 1)}, {self.parameters:,} parameters)"
        )

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shape of every value, the input first, without the batch axis."""
        shapes = [_sane("input", self.input_shape)]
        for index, step in enumerate(self.steps):
            where = f"step {index} ({step.op.name}{', ' + step.source if step.source else ''})"
            expect(
                all(type(i) is int and 0 <= i <= index for i in step.inputs),
                f"{where}: inputs {list(step.inputs)!r:.80}, expected values 0 to {index}",
            )
            try:
                result = step.op.shape([shapes[i] for i in step.inputs], step.weight_shapes)
            except NetworkError as error:
                raise NetworkError(f"{where}: {error}") from None
            shapes.append(_sane(where, result))
        return tuple(shapes)

    @property
    def output_shape(self) -> Shape:
        """Shape of one output, without the batch axis."""
        return self.shapes[-1]

    @functools.cached_property
    def costs(self) -> tuple[Cost, ...]:
        """Cost of each step for one image."""
        return tuple(step.op.cost([self.shapes[i] for i in step.inputs], step.weight_shapes) for step in self.steps)

    @property
    def flops(self) -> int:
        """FLOPs per image of the direct form, activations not counted."""
        return sum(cost.flops for cost in self.costs)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(value.size for step in self.steps for value in step.weights.values())

    @functools.cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """For every value, the steps that read it."""
        readers: list[list[int]] = [[] for _ in self.shapes]
        for index, step in enumerate(self.steps):
            for value in dict.fromkeys(step.inputs):
                readers[value].append(index)
        return tuple(map(tuple, readers))

    @functools.cached_property
    def live(self) -> frozenset[int]:
        """The steps that the output depends on."""
        live: set[int] = set()
        for index in reversed(range(len(self.steps))):
            if index == len(self.steps) - 1 or not live.isdisjoint(self.consumers[index + 1]):
                live.add(index)
        return frozenset(live)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over graph and weights: equal networks, equal fingerprints."""
        digest = hashlib.sha256(json.dumps(self.graph(), sort_keys=True).encode())
        for step in self.steps:
            for _, value in sorted(step.weights.items()):
                digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()

    def graph(self) -> dict[str, Any]:
        """The graph without its weights, as JSON values."""
        return {
            "input_shape": list(self.input_shape),
            "steps": [
                {
                    "op": step.op.name,
                    "attributes": step.op.attributes(),
                    "inputs": list(step.inputs),
                    "weights": {key: list(shape) for key, shape in step.weight_shapes.items()},
                    "activation": step.activation.attributes(),
                    "source": step.source,
                }
                for step in self.steps
            ],
        }

    @classmethod
    def from_graph(cls, graph: Any, weights: Mapping[tuple[int, str], npt.NDArray[np.float32]]) -> Network:
        """The inverse of `graph`, with the weights by (step, name).

        Raises:
            NetworkError: anything in `graph` that is not as `graph()` writes it.
        """
        expect(isinstance(graph, dict) and set(graph) == {"input_shape", "steps"}, "graph: wrong keys")
        expect(isinstance(graph["steps"], list), "graph: steps is not a list")
        expect(len(graph["steps"]) <= MAX_STEPS, f"graph: more than {MAX_STEPS} steps")
        steps = tuple(_step_from_json(index, raw, weights) for index, raw in enumerate(graph["steps"]))
        expect(isinstance(graph["input_shape"], list), "graph: input_shape is not a list")
        return cls(tuple(graph["input_shape"]), steps)


def _step_from_json(index: int, raw: Any, weights: Mapping[tuple[int, str], npt.NDArray[np.float32]]) -> Step:
    where = f"graph: step {index}"
    keys = {"op", "attributes", "inputs", "weights", "activation", "source"}
    expect(isinstance(raw, dict) and set(raw) == keys, f"{where}: expected the keys {sorted(keys)}")
    expect(isinstance(raw["op"], str) and raw["op"] in OPS, f"{where}: unknown op {raw['op']!r:.80}")
    for key, kind in (
        ("attributes", dict),
        ("inputs", list),
        ("weights", dict),
        ("activation", dict),
        ("source", str),
    ):
        expect(isinstance(raw[key], kind), f"{where}: {key} is not a {kind.__name__}")
    arrays = {}
    for key, shape in raw["weights"].items():
        expect((index, key) in weights, f"{where}: weight {key!r:.80} is missing")
        arrays[key] = weights[index, key]
        same = isinstance(shape, list) and all(type(n) is int for n in shape) and tuple(shape) == arrays[key].shape
        expect(same, f"{where}: {key} has another shape than the graph says")
    try:
        op = OPS[raw["op"]].from_attributes(raw["attributes"])
        activation = Activation.from_attributes(raw["activation"])
        assert isinstance(activation, Activation)
        return Step(op, tuple(raw["inputs"]), arrays, activation, raw["source"])
    except FastinvError as error:
        raise NetworkError(f"{where}: {error}") from None


def _frozen(where: str, value: Any) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.asarray(value)
    if array.dtype != np.float32 or array.flags.writeable or not array.flags.c_contiguous or not array.flags.owndata:
        array = np.array(value, dtype=np.float32, order="C")  # frozen arrays of other steps are shared
    expect(
        bool(np.isfinite(array).all()),
        f"{where}: the weights hold NaN or Inf; export a trained, finite model",
    )
    array.setflags(write=False)
    return array


def _sane(where: str, shape: Shape) -> Shape:
    expect(
        len(shape) <= MAX_RANK and all(type(n) is int and n >= 1 for n in shape),
        f"{where}: shape {list(shape)!r:.80}, expected at most {MAX_RANK} positive sizes",
    )
    expect(math.prod(shape) <= MAX_ELEMENTS, f"{where}: {list(shape)} has more than {MAX_ELEMENTS} elements")
    return shape


def sources(*steps: Step) -> str:
    """Where a step comes from that does what several did."""
    return " + ".join(dict.fromkeys(step.source for step in steps if step.source))
