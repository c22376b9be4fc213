"""Steps of rMLE by fastinv and by every peer; `python bench/peers.py --rmle` compares them in turns."""

from __future__ import annotations

from functools import partial

import pytest
from conftest import THREADS
from contenders import SOLVER_PEERS, Contender, fastinv_solver, prepared, tolerance
from peers import fitting, fitting_steps

from fastinv import benchmark
from fastinv.benchmark import Subject

SUBJECTS = benchmark.solvers
BATCH = 64


@pytest.mark.usefixtures("same_terms")
@pytest.mark.parametrize(
    "contender", [fastinv_solver("float32"), *SOLVER_PEERS], ids=lambda c: c.name.replace(" ", "-")
)
def test_solver_peer(subject: Subject, contender: Contender, benchmark) -> None:
    benchmark.group = subject.name
    x = subject.inputs(fitting(subject, BATCH, THREADS))
    error, call = prepared(contender, subject, x, THREADS)
    assert error <= tolerance(contender, subject)
    benchmark(partial(call, fitting_steps(subject, len(x), THREADS)))
