"""The peers harness: what it times, what it leaves out, what it reports; with contenders made up here."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastinv import _core, benchmark
from fastinv.benchmark import Subject
from fastinv.errors import BackendError

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("peers")
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "BURST", 1e-4)
    return module


@pytest.fixture(scope="module")
def subject() -> Subject:
    return next(iter(benchmark.decoders()))


def contender(peers: ModuleType, name: str, factor: float = 1.0, **options: Any) -> Any:
    """Runs the module in PyTorch and multiplies what it gives."""

    def build(subject: Subject, x: torch.Tensor, threads: int) -> Callable[[], Any]:
        return lambda: factor * subject.run_eager(x)

    return peers.Contender(name, build, **options)


def failing(peers: ModuleType, name: str, reason: Exception) -> Any:
    def build(*given: Any) -> Any:
        raise reason

    return peers.Contender(name, build)


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_rates_and_ratios(peers: ModuleType, subject: Subject) -> None:
    contenders = [
        contender(peers, "fastinv"),
        contender(peers, "slow"),
        contender(peers, "good"),
        contender(peers, "half", precision="bfloat16"),
    ]
    seconds = {"fastinv": 1.0, "slow": 4.0, "good": 2.0, "half": 0.5}
    rows = peers.as_rows(
        subject, 8, contenders, seconds, dict.fromkeys(seconds, 1e-7), peak=1e-9 * subject.network.flops
    )
    assert {row.contender: row.ratio for row in rows} == {"fastinv": 2.0, "slow": 0.5, "good": 1.0, "half": 4.0}
    assert [row.images_per_second for row in rows] == [8.0, 2.0, 4.0, 16.0]
    assert rows[0].gflops == pytest.approx(8e-9 * subject.network.flops)
    assert rows[0].percent_of_peak == pytest.approx(800)
    lines = peers.as_table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(seconds)
    assert lines[1].split()[-1] == "2.00"


def test_no_peer_no_ratio(peers: ModuleType, subject: Subject) -> None:
    (row,) = peers.as_rows(subject, 1, [contender(peers, "fastinv")], {"fastinv": 1.0}, {"fastinv": 0.0}, 1.0)
    assert row.ratio is None
    assert peers.as_table([row])


# ---- measurements --------------------------------------------------------------------------------------------------


def test_only_what_runs_and_is_right_is_timed(peers: ModuleType, subject: Subject) -> None:
    contenders = [
        peers.fastinv("float32"),
        contender(peers, "twin"),
        contender(peers, "double", 2.0),
        contender(peers, "nan", math.nan),
        failing(peers, "broken", RuntimeError("no such luck\nand more")),
        failing(peers, "fastinv int3", BackendError("no precision int3")),
    ]
    outcome = peers.measure(subject, 3, contenders, threads=1, repeat=2)
    assert [row.contender for row in outcome.rows] == ["fastinv", "twin"]
    assert all(row.seconds > 0 and row.error < 1e-4 for row in outcome.rows)
    text = str(outcome)
    assert f"{subject.name}, batch 3\n" in text
    for words in ("double is wrong by 1", "nan is wrong by nan", "broken cannot run it: RuntimeError: no such luck"):
        assert words in text
    assert "fastinv int3 cannot run it: BackendError: no precision int3" in text
    assert not outcome.wrong


def test_a_wrong_result_of_ours_is_told(peers: ModuleType, subject: Subject) -> None:
    outcome = peers.measure(subject, 2, [contender(peers, "fastinv", 1.01)], threads=1, repeat=1)
    assert outcome.wrong
    assert not outcome.rows


def test_our_own_bugs_are_raised(peers: ModuleType, subject: Subject) -> None:
    with pytest.raises(ZeroDivisionError):
        peers.measure(subject, 2, [failing(peers, "fastinv", ZeroDivisionError())], threads=1, repeat=1)


def test_every_result_is_checked_from_first_to_last_image(peers: ModuleType, subject: Subject) -> None:
    x = subject.inputs(40)
    result = subject.run_eager(x).numpy()
    error = importlib.import_module("contenders").error
    assert error(subject, x, result) < 1e-4
    result[-1] = 0
    assert error(subject, x, result) > 0.1


def test_bursts_take_turns(peers: ModuleType) -> None:
    called: list[str] = []
    seconds, peak = peers.race({name: lambda name=name: called.append(name) for name in "ab"}, 3, lambda: 5.0)
    assert set(seconds) == {"a", "b"}
    assert peak == [5.0] * 3
    assert len([i for i in range(1, len(called)) if called[i] != called[i - 1]]) >= 4


def test_batches_are_cut(peers: ModuleType) -> None:
    subjects = list(benchmark.decoders())
    small, large = subjects[0], subjects[-1]
    assert peers.fitting(small, 2048, 2) == 2048
    assert peers.fitting(large, 1, 1) == 1
    cut = peers.fitting(large, 2048, 2)
    assert 4 * cut * sum(map(math.prod, large.network.shapes)) <= peers.MAX_BYTES
    assert peers.fitting(large, 2048, 1) * large.network.flops <= peers.MAX_FLOPS
    assert "batch 5 (of 2,048: more take too long or too much memory)" in str(peers.Outcome("x", 5, 2048))


def solver_subject(name: str) -> Subject:
    return next(subject for subject in benchmark.solvers() if name in subject.name)


def test_steps_are_cut(peers: ModuleType) -> None:
    small, large = solver_subject("conv1,"), solver_subject("ReLU32")
    assert peers.fitting_steps(small, 64, 1) == small.recipe.steps
    assert peers.fitting(large, 10**6, 1) < 10**6
    batch = peers.fitting(large, 512, 1)
    steps = peers.fitting_steps(large, batch, 1)
    assert peers.LEAST_STEPS <= steps < large.recipe.steps
    assert batch * steps * large.flops <= peers.SOLVER_FLOPS * large.recipe.steps


def test_solvers_agree_and_are_timed(peers: ModuleType) -> None:
    """All but the compiled ones, which take long to build."""
    contenders = [peers.fastinv_solver("float32"), *(peer for peer in peers.SOLVER_PEERS if "compile" not in peer.name)]
    outcome = peers.measure(solver_subject("conv1,"), 3, contenders, threads=1, repeat=1)
    names = ["fastinv", "eager", "eager channels-last", "eager bfloat16"]
    assert [row.contender for row in outcome.rows] == names
    most = {"float32": 1e-4, "bfloat16": 1e-2}
    assert all(row.error < most[row.precision] and row.steps == benchmark.SOLVER_STEPS for row in outcome.rows)
    first = outcome.rows[0]
    assert first.images_per_second == pytest.approx(3 * first.steps / first.seconds)
    assert "image-steps/s" in str(outcome)


def test_a_wrong_solver_is_told(peers: ModuleType) -> None:
    def build(subject: Subject, x: torch.Tensor, threads: int) -> Callable[[], Any]:
        return lambda: subject.run_eager(x) + 0.01

    outcome = peers.measure(solver_subject("conv1,"), 2, [peers.Contender("fastinv", build)], threads=1, repeat=1)
    assert outcome.wrong
    assert not outcome.rows


PEAKS_A_ROUND = 4  # before and after the bursts, each with one to warm up


@pytest.mark.parametrize("others", [[100.0] * 2, [100.0, 50.0, 100.0]], ids=["quiet", "one of four disturbed"])
def test_disturbed_rounds_are_repeated(peers: ModuleType, others: list[float]) -> None:
    peaks = iter([peak for peak in [100.0, *others] for _ in range(PEAKS_A_ROUND)])
    _, used = peers.race({"a": lambda: None}, 3, lambda: next(peaks))
    assert used == [100.0] * 3
    assert next(peaks, None) is None


def test_a_busy_machine_is_told(peers: ModuleType, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100.0] * PEAKS_A_ROUND + [50.0] * (3 * peers.MOST_ROUNDS - 1) * PEAKS_A_ROUND)
    monkeypatch.setattr(_core, "fma_peak", lambda *given: next(peaks))
    outcome = peers.measure(subject, 1, [peers.fastinv("float32")], threads=1, repeat=3)
    assert "busy" in str(outcome)


def test_fma_peak() -> None:
    for isa, runnable in _core.isas():
        if runnable:
            assert 0.1 < _core.fma_peak(isa, 1, 0.01) < 1e4
    for threads, seconds in ((0, 0.1), (1, 0.0), (1, math.nan)):
        with pytest.raises(ValueError, match="fma_peak"):
            _core.fma_peak("", threads, seconds)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_missing_peer_is_named(peers: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    absent = contender(peers, "absent", packages=("no_such_package", "json"))
    there = contender(peers, "there", packages=("json",))
    assert list(peers.present([absent, there])) == [there]
    assert capsys.readouterr().out == "absent needs no_such_package: pip install '.[peers]'\n"


def test_names(peers: ModuleType) -> None:
    assert [peer.name for peer in peers.named("onnxruntime,Eager Channels-Last", peers.PEERS)] == [
        "ONNX Runtime",
        "eager channels-last",
    ]
    with pytest.raises(ValueError, match="no peer 'tvm', expected some of eager"):
        peers.named("eager,tvm", peers.SOLVER_PEERS)
    cases = list(benchmark.decoders())
    assert peers.choose(cases, []) == cases
    assert [case.name for case in peers.choose(cases, ["relu22", "style"])] == ["CIFAR ReLU22", "ResNet-18 style"]


def test_command(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, history = tmp_path / "rows.json", tmp_path / "results" / "history.jsonl"
    monkeypatch.setattr(peers, "HISTORY", history)
    options = ["--case", "conv1", "--batch", "1,2", "--threads", "1", "--peers", "eager", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["bench/peers.py", *options, "--json", str(target), "--record"])
    assert peers.main() == 0
    assert peers.main() == 0
    found = json.loads(target.read_text())
    pairs = [(row["case"], row["batch"], row["contender"]) for row in found["rows"]]
    names = [name for name in benchmark.DECODERS if "conv1" in name]
    assert pairs == [(name, batch, who) for name in names for batch in (1, 2) for who in ("fastinv", "eager")]
    assert all(np.isfinite(row["ratio"]) for row in found["rows"])
    runs = [json.loads(line) for line in history.read_text().splitlines()]
    assert len(runs) == 2
    assert set(runs[0]) == {"date", "cpu", "cores", "isa", "threads", "commit", "versions", "command", "rows"}
    assert runs[0]["versions"]["torch"] == torch.__version__
    assert "MNIST conv1, batch 2" in capsys.readouterr().out


def test_interrupted_runs_keep_what_they_have(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, history = tmp_path / "rows.json", tmp_path / "history.jsonl"
    monkeypatch.setattr(peers, "HISTORY", history)
    measure = peers.measure

    def interrupted(subject: Subject, wanted: int, *given: Any) -> Any:
        if wanted == 2:
            raise KeyboardInterrupt
        return measure(subject, wanted, *given)

    monkeypatch.setattr(peers, "measure", interrupted)
    options = ["--case", "MNIST conv1", "--batch", "1,2", "--peers", "eager", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["bench/peers.py", *options, "--json", str(target), "--record"])
    with pytest.raises(KeyboardInterrupt):
        peers.main()
    for text in (target.read_text(), history.read_text()):
        assert [row["contender"] for row in json.loads(text)["rows"]] == ["fastinv", "eager"]


def test_command_for_rmle(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "rows.json"
    options = ["--rmle", "--case", "ReLU2,", "--batch", "2", "--peers", "eager", "--repeat", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench/peers.py", *options, "--json", str(target)])
    assert peers.main() == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["case"], row["contender"]) for row in rows] == [
        ("rMLE ReLU2, 50 steps", "fastinv"),
        ("rMLE ReLU2, 50 steps", "eager"),
    ]


@pytest.mark.parametrize(
    "options", [["--case", "nothing"], ["--precision", "int3"], ["--batch", "0"], ["--peers", "tvm"]]
)
def test_wrong_usage(peers: ModuleType, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench/peers.py", *options])
    with pytest.raises(SystemExit) as stop:
        peers.main()
    assert stop.value.code == 2
