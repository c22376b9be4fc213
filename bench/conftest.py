"""What the suites share: contenders, and the way one of them is checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from contenders import forget

from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject, call, compiled, contenders

EAGER = ("eager", "")
THREADS = 1
Race = Callable[[Subject, int], None]


@pytest.fixture(params=[EAGER, *contenders()], ids=lambda c: "-".join(filter(None, c)))
def race(request: pytest.FixtureRequest, benchmark, monkeypatch: pytest.MonkeyPatch) -> Iterator[Race]:
    """Times a subject on so many images, by PyTorch eager or by one backend, whose results are checked first."""
    backend, isa = request.param

    def run(subject: Subject, batch: int) -> None:
        benchmark.group = subject.name
        x = subject.inputs(subject.batch(batch))
        if (backend, isa) == EAGER:
            benchmark(subject.run_eager, x)
            return
        if isa:
            monkeypatch.setenv("FASTINV_ISA", isa)
        machine = compiled(subject, backend, THREADS)
        assert machine.isa == isa or not isa
        benchmark(call, machine, x)

    with torch_threads(THREADS):
        yield run


@pytest.fixture
def same_terms() -> Iterator[None]:
    """What the contenders of the peers harness need around them."""
    with torch_threads(THREADS), torch.no_grad():
        yield
    forget()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A suite says what it times in `SUBJECTS`."""
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", list(metafunc.module.SUBJECTS()), ids=lambda s: s.name.replace(" ", "-"))
