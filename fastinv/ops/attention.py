"""attention: y = softmax(scale · q · kᵀ + bias) · v, for each head of each window by itself."""

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

    A head's channels lie side by side. The softmax is over the S keys. `bias` [B, T, S], where there is one, is added
    to the scores: positions relative to each other, or a mask, which has large negative numbers. Head h of window w
    takes number (w · heads + h) modulo B.

    Attributes:
        heads: of channels.
        scale: times which scores are taken.
        windows: of tokens side by side, [windows · T, …] and [windows · S, …], none of which attends to another.
    """

    name: ClassVar[str] = "attention"
    affine: ClassVar[bool] = False
    heads: int = 1
    scale: float = 1.0
    windows: int = 1

    def validate(self) -> None:
        expect(self.heads >= 1, f"attention: {self.heads} heads, expected >= 1")
        expect(self.windows >= 1, f"attention: {self.windows} windows, expected >= 1")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 3, rank=2)
        q, k, v = inputs
        expect(q[1] == k[1], f"attention: keys of {k[1]} channels, expected {q[1]}, those of the queries")
        expect(k[0] == v[0], f"attention: {v[0]} values, expected {k[0]}, one for each key")
        for name, x in (("queries", q), ("values", v)):
            expect(
                x[1] % self.heads == 0,
                f"attention: {name} of {x[1]} channels, expected a multiple of {self.heads} heads",
            )
        for name, x in (("queries", q), ("keys", k)):
            expect(x[0] % self.windows == 0, f"attention: {x[0]} {name}, expected a multiple of {self.windows} windows")
        if "bias" not in weights:
            expect_weights(self, weights)
            return (q[0], v[1])
        count, *_ = (*weights["bias"], 0)
        expect_weights(self, weights, bias=(count, q[0] // self.windows, k[0] // self.windows))
        expect(
            count >= 1 and self.windows * self.heads % count == 0,
            f"attention: {count} biases, expected as many as divide {self.windows} windows times {self.heads} heads",
        )
        return (q[0], v[1])

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (
            x.reshape(len(x), self.windows, x.shape[1] // self.windows, self.heads, x.shape[2] // self.heads)
            for x in inputs
        )
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))  # [N, windows, heads, T, D]
        scores = self.scale * (q @ k.mT)
        if "bias" in weights:
            bias = weights["bias"]
            bias = bias.repeat(self.windows * self.heads // len(bias), 1, 1)
            scores = scores + bias.reshape(self.windows, self.heads, *bias.shape[1:])
        y = scores.softmax(-1) @ v
        return y.transpose(2, 3).reshape(len(y), inputs[0].shape[1], inputs[2].shape[2])

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        q, k, v = inputs
        pairs = q[0] * k[0] // self.windows
        return 2 * pairs * (q[1] + v[1]) + (6 if weights else 5) * pairs * self.heads

    @staticmethod
    def cases() -> tuple[Case, ...]:
        return (
            Case("heads", Attention(3, 0.5), ((7, 15), (7, 15), (7, 15))),
            Case("one-head", Attention(1, 0.3), ((5, 12), (9, 12), (9, 7))),
            Case("tiles", Attention(2, 0.2), ((21, 34), (37, 34), (37, 40))),
            Case("one-key", Attention(2, 1.0), ((3, 4), (1, 4), (1, 6))),
            Case("windows", Attention(2, 0.4, 3), ((15, 8), (18, 8), (18, 10))),
            Case("bias", Attention(2, 0.4), ((7, 8), (9, 8), (9, 10)), {"bias": (1, 7, 9)}),
            Case("bias-of-heads", Attention(3, 0.4, 2), ((8, 15), (8, 15), (8, 15)), {"bias": (3, 4, 4)}),
            Case("bias-of-windows", Attention(2, 0.4, 2), ((50, 34), (66, 34), (66, 6)), {"bias": (4, 25, 33)}),
        )
