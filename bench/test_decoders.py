"""The paper's decoders and a larger one, on every backend and instruction set, beside PyTorch eager."""

from __future__ import annotations

from fastinv import benchmark

SUBJECTS = benchmark.decoders
BATCH = 32


def test_decoder(subject, race) -> None:
    race(subject, BATCH)
