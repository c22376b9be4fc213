"""The decoders by fastinv and by every peer that is installed; `python bench/peers.py` compares them in turns."""

from __future__ import annotations

import pytest
from conftest import THREADS
from contenders import PEERS, Contender, fastinv, prepared, tolerance
from peers import fitting

from fastinv import benchmark
from fastinv.benchmark import Subject

SUBJECTS = benchmark.decoders
BATCH = 32


@pytest.mark.usefixtures("same_terms")
@pytest.mark.parametrize("contender", [fastinv("float32"), *PEERS], ids=lambda c: c.name.replace(" ", "-"))
def test_peer(subject: Subject, contender: Contender, benchmark) -> None:
    if (reason := contender.missing()) is not None:
        pytest.skip(reason)
    benchmark.group = subject.name
    x = subject.inputs(fitting(subject, BATCH, THREADS))
    error, call = prepared(contender, subject, x, THREADS)
    assert error <= tolerance(contender, subject)
    benchmark(call)
