"""rMLE through the paper's edges, on every backend and instruction set, beside PyTorch eager."""

from __future__ import annotations

from fastinv import benchmark

SUBJECTS = benchmark.solvers
BATCH = 8


def test_solver(subject, race) -> None:
    race(subject, BATCH)
