"""Every case of every op, on every backend and instruction set, beside PyTorch eager."""

from __future__ import annotations

from fastinv import benchmark

SUBJECTS = benchmark.ops
BATCH = 32


def test_op(subject, race) -> None:
    race(subject, BATCH)
