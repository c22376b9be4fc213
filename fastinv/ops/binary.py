"""Elementwise ops of two inputs: what add and mul have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastinv.ops.base import Op, Shape, expect, expect_inputs, expect_weights


@dataclass(frozen=True)
class Binary(Op):
    """Base of the ops of two inputs of equal rank, which broadcast over axes of size 1."""

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 2)
        expect_weights(self, weights)
        a, b = inputs
        expect(
            len(a) == len(b) and all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True)),
            f"{self.name}: shapes {list(a)} and {list(b)} do not broadcast",
        )
        return tuple(max(m, n) for m, n in zip(a, b, strict=True))


BROADCASTS: tuple[tuple[str, tuple[Shape, Shape]], ...] = (
    ("same-shape", ((19, 6, 5), (19, 6, 5))),
    ("per-channel", ((20, 5, 4), (20, 1, 1))),
    ("per-pixel", ((1, 5, 4), (18, 5, 4))),
    ("both-ways", ((6, 1, 5), (1, 4, 5))),
    ("flat", ((37,), (37,))),
    ("flat-scalar", ((37,), (1,))),
)
