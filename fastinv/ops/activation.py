"""Activations: y = a(x), elementwise. Any step can end in one; the op `activation` is one by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Activation(Op):
    """The activation `kind` with up to two parameters `a` and `b` (see `KINDS`); zero where it has none."""

    name: ClassVar[str] = "activation"
    affine: ClassVar[bool] = False
    kind: str = "identity"
    a: float = 0.0
    b: float = 0.0

    def validate(self) -> None:
        expect(self.kind in KINDS, f"activation: kind {self.kind!r:.40}, expected one of {', '.join(KINDS)}")
        if self.kind in ("clamp", "hardtanh"):
            expect(self.a <= self.b, f"{self.kind}: low {self.a} is above high {self.b}")
        if self.kind == "softplus":
            expect(self.a > 0, f"softplus: beta {self.a}, expected > 0")
        if self.kind == "elu":
            expect(self.a > 0 and self.b > 0, f"elu: alpha {self.a} and rate {self.b}, expected > 0")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1)
        expect_weights(self, weights)
        return inputs[0]

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return KINDS[self.kind](inputs[0], self.a, self.b)

    @staticmethod
    def cases() -> tuple[Case, ...]:
        examples = {
            "leaky_relu": (0.1, 0.0),
            "clamp": (-0.5, 0.7),
            "hardtanh": (0.0, 6.0),
            "softplus": (2.0, 20.0),
            "elu": (1.5, 0.7),
        }
        kinds = (kind for kind in KINDS if kind not in STEEP)
        image = tuple(Case(kind, Activation(kind, *examples.get(kind, (0.0, 0.0))), ((5, 7, 9),)) for kind in kinds)
        return (*image, Case("flat", Activation("relu"), ((37,),)))


def _functional(name: str) -> Callable[..., torch.Tensor]:
    def call(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        import torch.nn.functional as F

        result: torch.Tensor = getattr(F, name)(x, *args, **kwargs)
        return result

    return call


# kind -> (x, a, b) -> y in torch. `hardtanh` and `clamp` differ in one thing: the gradient at the very bounds is 0
# for hardtanh (ReLU6 among them) and 1 for clamp, as in PyTorch.
KINDS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "identity": lambda x, a, b: x,
    "relu": lambda x, a, b: x.relu(),
    "leaky_relu": lambda x, a, b: _functional("leaky_relu")(x, a),  # a: slope below zero
    "sigmoid": lambda x, a, b: x.sigmoid(),
    "tanh": lambda x, a, b: x.tanh(),
    "silu": lambda x, a, b: _functional("silu")(x),
    "gelu": lambda x, a, b: _functional("gelu")(x),
    "gelu_tanh": lambda x, a, b: _functional("gelu")(x, approximate="tanh"),
    "softplus": lambda x, a, b: _functional("softplus")(x, a, b),  # a: beta, b: threshold
    "hardtanh": lambda x, a, b: _functional("hardtanh")(x, a, b),  # a: low, b: high
    "clamp": lambda x, a, b: x.clamp(a, b),  # a: low, b: high
    "elu": lambda x, a, b: x.where(x > 0, a * (b * x).clamp(max=0).expm1()),  # a: alpha, b: rate
    "exp": lambda x, a, b: x.exp(),
    # 0 below zero; the gradient at 0 is 0, as that of PyTorch's norms, where a constant start may lie.
    "sqrt": lambda x, a, b: x.where(x > 0, 1).sqrt().where(x > 0, 0),
    "reciprocal": lambda x, a, b: x.reciprocal(),
}

# Those that enlarge the rounding of what they are applied to without bound: there is no example of them on any numbers.
STEEP = ("exp", "sqrt", "reciprocal")

IDENTITY = Activation()
