"""attention: y = softmax(scale · q · kᵀ) · v, for each head by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Attention(Op):
    """Queries q [T, heads · D], keys k [S, heads · D] and values v [S, heads · E] to [T, heads · E].

    A head's channels lie side by side. The softmax is over the S keys.
    """

    name: ClassVar[str] = "attention"
    affine: ClassVar[bool] = False
    heads: int = 1
    scale: float = 1.0

    def validate(self) -> None:
        expect(self.heads >= 1, f"attention: {self.heads} heads, expected >= 1")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 3, rank=2)
        expect_weights(self, weights)
        q, k, v = inputs
        expect(q[1] == k[1], f"attention: keys of {k[1]} channels, expected {q[1]}, those of the queries")
        expect(k[0] == v[0], f"attention: {v[0]} values, expected {k[0]}, one for each key")
        for name, x in (("queries", q), ("values", v)):
            expect(
                x[1] % self.heads == 0,
                f"attention: {name} of {x[1]} channels, expected a multiple of {self.heads} heads",
            )
        return (q[0], v[1])

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads).transpose(1, 2) for x in inputs)
        y = (self.scale * (q @ k.mT)).softmax(-1) @ v
        return y.transpose(1, 2).flatten(2)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        q, k, v = inputs
        return 2 * q[0] * k[0] * (q[1] + v[1]) + 5 * q[0] * k[0] * self.heads

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("heads", Attention(3, 0.5), ((7, 15), (7, 15), (7, 15))),
            Case("one-head", Attention(1, 0.3), ((5, 12), (9, 12), (9, 7))),
            Case("tiles", Attention(2, 0.2), ((21, 34), (37, 34), (37, 40))),
            Case("one-key", Attention(2, 1.0), ((3, 4), (1, 4), (1, 6))),
        )
