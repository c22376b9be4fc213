"""What every op says of itself: attributes, shape rule, torch reference, cost and test cases.

An op is a frozen dataclass whose fields are its attributes. Shapes never include the batch axis; every op
works on each image by itself.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastinv.errors import NetworkError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
Pair = tuple[int, int]

MAX_ELEMENTS = 2**28  # of one value of one image (1 GiB of float32); a larger one is a mistake or an attack
MAX_FLOAT = 3.4e38  # of an attribute; just inside float32
MAX_RANK = 6  # axes of a value, without the batch
MAX_ATTRIBUTE = 2**16  # a kernel side, stride, padding or size beyond this is a mistake or an attack


@dataclass(frozen=True)
class Cost:
    """Work per image, of the direct form. `flops` counts a multiply-add as two."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Case:
    """One example of an op for tests and benchmarks: `op` on inputs and weights of these shapes."""

    name: str
    op: Op
    inputs: tuple[Shape, ...]
    weights: Mapping[str, Shape] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Op(ABC):
    """Base of all ops. Subclasses are frozen dataclasses; their fields are the op's attributes."""

    name: ClassVar[str]
    affine: ClassVar[bool] = True  # in all its inputs together

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            checked = _checked(f"{self.name}.{field.name}", getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, checked)
        self.validate()

    def validate(self) -> None:  # noqa: B027 - most ops need no more than the check of the types
        """Raise NetworkError where attributes of the right types make no sense together."""

    @abstractmethod
    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        """Shape of the result for these input and weight shapes; NetworkError when they do not fit."""

    @abstractmethod
    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The definition: [N, *inputs] -> [N, *shape] with torch ops, differentiable, in any float dtype."""

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        """FLOPs per image of the direct form; one per output element unless the op says otherwise."""
        return math.prod(self.shape(inputs, weights))

    def cost(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Cost:
        """FLOPs and float32 bytes (inputs and weights read, output written) for one image."""
        moved = [*inputs, *weights.values(), self.shape(inputs, weights)]
        return Cost(self.flops(inputs, weights), 4 * sum(math.prod(shape) for shape in moved))

    @staticmethod
    @abstractmethod
    def cases() -> tuple[Case, ...]:
        """Examples that cover the attributes, odd shapes included."""

    def attributes(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Op:
        """The op with these attributes, as read from JSON; NetworkError for a wrong name or type."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(attributes) != known:
            raise NetworkError(f"{cls.name}: attributes {sorted(attributes)}, expected {sorted(known)}")
        return cls(**attributes)


def expect(condition: bool, message: str) -> None:
    """Raise NetworkError(message) unless the condition holds."""
    if not condition:
        raise NetworkError(message)


def expect_inputs(op: Op, inputs: Sequence[Shape], count: int, rank: int | None = None) -> None:
    """Check the number of inputs of a step and, where given, their rank (without the batch axis)."""
    expect(len(inputs) == count, f"{op.name}: {len(inputs)} inputs, expected {count}")
    for shape in inputs:
        if rank is not None:
            expect(len(shape) == rank, f"{op.name}: input shape {list(shape)}, expected rank {rank}")


def expect_weights(op: Op, weights: Mapping[str, Shape], **expected: Shape) -> None:
    """Check that exactly these weights are there, in these shapes."""
    expect(set(weights) == set(expected), f"{op.name}: weights {sorted(weights)}, expected {sorted(expected)}")
    for key, shape in expected.items():
        expect(
            tuple(weights[key]) == tuple(shape),
            f"{op.name}: {key} has shape {list(weights[key])}, expected {list(shape)}",
        )


def _checked(where: str, value: Any, hint: Any) -> Any:
    """`value` if it has the annotated type (lists become tuples); NetworkError otherwise."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        expect(isinstance(value, (tuple, list)), f"{where}: {value!r:.80}, expected a list of {args[0].__name__}")
        if args[-1] is Ellipsis:
            expect(len(value) <= 16, f"{where}: {len(value)} entries, expected at most 16")
            args = args[:1] * len(value)
        expect(len(value) == len(args), f"{where}: {value!r:.80}, expected {len(args)} entries")
        return tuple(_checked(where, v, a) for v, a in zip(value, args, strict=True))
    if hint is float:
        expect(type(value) in (int, float), f"{where}: {value!r:.80}, expected a number")
        expect(abs(value) <= MAX_FLOAT, f"{where}: {value!r}, expected a finite float32")  # false for NaN too
        return float(value)
    expect(type(value) is hint, f"{where}: {value!r:.80}, expected {hint.__name__}")
    if hint is int:
        expect(-MAX_ATTRIBUTE <= value <= MAX_ELEMENTS, f"{where}: {value!r:.80} is out of range")
    return value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
