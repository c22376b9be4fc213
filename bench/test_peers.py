"""The decoders by fastinv and by every peer that is installed; `python bench/peers.py` compares them in turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contenders import PEERS, TOLERANCES, Contender, error, fastinv, forget
from peers import fitting

from fastinv import benchmark
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject

SUBJECTS = benchmark.decoders
BATCH = 32
THREADS = 1


@pytest.fixture(autouse=True)
def _same_terms() -> Iterator[None]:
    with torch_threads(THREADS), torch.no_grad():
        yield
    forget()


@pytest.mark.parametrize("contender", [fastinv("float32"), *PEERS], ids=lambda c: c.name.replace(" ", "-"))
def test_peer(subject: Subject, contender: Contender, benchmark) -> None:
    if (reason := contender.missing()) is not None:
        pytest.skip(reason)
    benchmark.group = subject.name
    x = subject.inputs(fitting(subject, BATCH, THREADS))
    call = contender.build(subject, x, THREADS)
    assert error(subject, x, call()) <= TOLERANCES[contender.precision]
    benchmark(call)
