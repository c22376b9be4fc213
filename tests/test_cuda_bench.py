"""The script for a machine with a GPU, `bench/gpu.py`, with what it measures made up here."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastinv
from fastinv import benchmark
from fastinv.backends.cuda import device as cuda_device

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("gpu")


@pytest.fixture
def checks() -> ModuleType:
    return importlib.import_module("gpu_checks")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("gpu_measure")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


# ---- gpu.py ----------------------------------------------------------------------------------------------------------


def test_nothing_but_the_standard_library_is_needed_to_build() -> None:
    code = "import gpu, sys; assert not {'numpy', 'torch', 'triton', 'fastinv'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BENCH, check=True)


def test_it_goes_on_in_a_new_process_once_it_is_built(script, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--repeat", "3"])
    monkeypatch.setattr(script, "build_fastinv", lambda: None)
    monkeypatch.setattr(script.os, "execv", lambda file, command: begun.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        script.main()
    (command,) = begun
    assert command[:-1] == [sys.executable, "gpu.py", "--repeat", "3", "--no-build", "--minutes"]
    assert 7.9 < float(command[-1]) <= 8


def test_a_build_that_fails_is_told(script, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(script, "build_fastinv", lambda: "no compiler")
    assert script.main() == 1
    assert capsys.readouterr().err.endswith("(--no-build takes it as it is):\nno compiler\n")


def test_it_says_what_it_lacks(script, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--no-build"])
    monkeypatch.setattr(cuda_device, "missing", lambda index: "no GPU is to be seen")
    assert script.main() == 1
    assert capsys.readouterr().err == "bench/gpu.py needs an NVIDIA GPU: no GPU is to be seen\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "float32,int3"], "--precision int3, expected some of bfloat16, float16"),
        (["--repeat", "0"], "--repeat 0, expected at least 1"),
    ],
)
def test_wrong_usage(script, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit):
        script.main()
    assert message in capsys.readouterr().err


class FakeWorker:
    """Is lost in the second case."""

    def __init__(self, lost: type[Exception], rows: list[object]) -> None:
        self._lost = lost
        self._rows = rows
        self.asked: list[tuple[object, ...]] = []

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *reason: object) -> None:
        pass

    def each(self, function: Callable[..., object], *args: object, seconds: float):
        results = importlib.import_module("gpu_results")
        if function.__name__ == "surroundings":
            yield {"gpu": "H0", "torch": "9", "CUDA C++": "built"}
        elif function.__name__ == "ceilings":
            yield results.Ceilings(1e12, {"float32": 1e12}, 1e12)
        elif function.__name__ == "cases":
            yield from (("first", "float32"), ("second", "float32"), ("third", "float32"))
        else:
            self.asked.append(args)
            yield "a note"
            for row in self._rows:
                yield dataclasses.replace(row, case=args[0])
                if args[0] == "second":
                    raise self._lost("not done after 90 s")


def test_what_a_lost_worker_found_is_kept(script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    row = importlib.import_module("gpu_results").Row("", 8, "fastinv", "float32", 1e-7, 1.0, 8.0, 1.0, 1.0, 50.0)
    worker = FakeWorker(script.Lost, [row, dataclasses.replace(row, contender="eager", seconds=2.0)])
    target = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--no-build", "--json", str(target)])
    monkeypatch.setattr(cuda_device, "missing", lambda index: None)
    monkeypatch.setattr(script, "SETTLE", 0)
    monkeypatch.setattr(script, "run_tests", lambda files, seconds: "FAILED: some")
    monkeypatch.setattr(script, "Worker", lambda: worker)
    assert script.main() == 1  # the tests failed
    told = capsys.readouterr().out
    assert "second, float32: broken off, not done after 90 s" in told
    assert "first, float32: eager, 8 images in 2,000,000.0 µs, 50.0% of the roofline, error 1e-07\n" in told
    found = json.loads(target.read_text())
    rows = [(row["case"], row["contender"], row["ratio"]) for row in found["rows"]]
    pair = [("fastinv", 2.0), ("eager", 1.0)]
    assert rows == [*(("first", *p) for p in pair), ("second", "fastinv", None), *(("third", *p) for p in pair)]
    assert found["notes"] == ["a note", "a note", "second, float32: broken off, not done after 90 s", "a note"]
    assert (found["gpu"], found["tests"], found["ceilings"]["memory"]) == ("H0", "FAILED: some", 1e12)
    assert worker.asked[0][2:] == (
        importlib.import_module("gpu_results").Ceilings(1e12, {"float32": 1e12}, 1e12),
        7,
        False,
    )


def test_what_there_is_no_time_for_is_named(script, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    worker = FakeWorker(script.Lost, [])
    args = script.parser().parse_args(["--case", "FIRST", "third"])
    script.measure(worker, args, time.monotonic() - 1, {})
    told = capsys.readouterr().out
    assert "first, float32: left out, the time is over" in told
    assert "third, float32: left out" in told
    assert "second" not in told
    assert worker.asked == []


# ---- gpu_worker.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def worker():
    with importlib.import_module("gpu_worker").Worker() as worker:
        yield worker


def has_ended(pid: int) -> bool:
    """Now or soon; one that nobody has waited for yet counts."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_one_process_takes_call_after_call(worker) -> None:
    (first,), (second,) = (worker.each(map, os.getpgid, [0], seconds=60) for _ in range(2))
    assert first == second != os.getpgid(0)
    assert list(worker.each(range, 3, seconds=60)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "args", "seconds", "message"),
    [
        (map, (time.sleep, [0, 1000]), 5, "not done after 5 s"),
        (map, (os._exit, [3]), 60, r"the process died \(exit code 3\)"),
        (os.abort, (), 60, r"the process died \(SIGABRT\)"),
        (map, (math.sqrt, [0, -1]), 60, "ValueError: "),
    ],
)
def test_a_lost_process_is_followed_by_a_new_one(worker, function, args, seconds: float, message: str) -> None:
    (before,) = worker.each(map, os.getpgid, [0], seconds=60)
    found = []
    with pytest.raises(importlib.import_module("gpu_worker").Lost, match=message):
        found.extend(worker.each(function, *args, seconds=seconds))
    (after,) = worker.each(map, os.getpgid, [0], seconds=60)
    assert after != before
    assert has_ended(before)


def test_what_came_before_it_was_lost_is_given(worker) -> None:
    items = worker.each(map, math.sqrt, [4, 9, -1], seconds=60)
    assert [next(items), next(items)] == [2, 3]
    with pytest.raises(importlib.import_module("gpu_worker").Lost):
        next(items)


def test_a_process_ends_with_all_that_it_has_started(worker, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 1000 & echo $! > {file}.new; mv {file}.new {file}; wait"]
    assert list(worker.each(range, 1, seconds=60)) == [0]  # it has begun
    with pytest.raises(importlib.import_module("gpu_worker").Lost):
        list(worker.each(subprocess.check_output, command, seconds=5))
    assert has_ended(int(file.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_its_caller(number: int, tmp_path: Path) -> None:
    """In the middle of something, and with what it has started."""
    file = tmp_path / "pid"
    begun = f"sleep 1000 & echo $! $PPID > {file}.new; mv {file}.new {file}; wait"
    code = (
        "import subprocess; from gpu_worker import Worker\n"
        f"if __name__ == '__main__': list(Worker().each(subprocess.check_output, ['sh', '-c', {begun!r}], seconds=60))"
    )
    script = tmp_path / "caller.py"
    script.write_text(code)
    caller = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(BENCH)})
    try:
        for _ in range(600):
            if file.exists():
                break
            time.sleep(0.05)
    finally:
        caller.send_signal(number)
        caller.wait(30)
    assert all(map(has_ended, map(int, file.read_text().split())))


def test_what_is_not_asked_for_any_more_is_ended(worker) -> None:
    items = worker.each(range, 3, seconds=60)
    next(items)
    items.close()
    assert list(worker.each(range, 2, seconds=60)) == [0, 1]


# ---- gpu_contenders.py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solves", [False, True])
def test_peers_compute_what_fastinv_does(solves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without CUDA graphs, and with nothing compiled."""
    contenders = importlib.import_module("gpu_contenders")
    difference = importlib.import_module("contenders").difference
    monkeypatch.setattr(contenders, "DEVICE", "cpu")
    monkeypatch.setattr(contenders, "graph_of", lambda advance: advance)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    subject = next(benchmark.solvers(steps=3) if solves else benchmark.decoders())
    x = subject.inputs(4)
    expected = subject.run_eager(x, torch.float64)
    peers = dict(contenders.SOLVER_CONTENDERS if solves else contenders.NETWORK_CONTENDERS)
    del peers["fastinv"]
    for build in peers.values():
        with torch.set_grad_enabled(solves):
            call = build(subject, x, "float32")
            for _ in range(2):  # from the start again
                assert difference(call(x), expected) < 1e-4


# ---- gpu_checks.py ---------------------------------------------------------------------------------------------------


def test_tests_that_need_a_gpu_run_there(checks) -> None:
    names = {path.stem for path in checks.TESTS}
    assert {"test_cuda", "test_cuda_tail", "test_upload", "test_triton", *checks.DOORS} < names
    assert not set(checks.NO_GPU) & names
    assert all((Path(__file__).parent / f"{name}.py").exists() for name in checks.NO_GPU)


def files_of(folder: Path, **bodies: str) -> dict[str, Path]:
    files = {name: folder / f"test_{name}.py" for name in bodies}
    for name, file in files.items():
        file.write_text(bodies[name])
    return files


def test_tests_run_side_by_side(checks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no pytest-xdist
    monkeypatch.setattr(checks, "STUCK", 1)
    sleep = f"sh -c 'sleep 1000 & echo $! > {tmp_path}/pid; wait'"
    files = files_of(
        tmp_path,
        right="def test(): assert True",
        skipped="import pytest\ndef test(): pytest.skip()",
        wrong="def test(): assert 1 == 2",
        slow=f"import os\ndef test(): os.system({sleep!r})",
    )
    assert checks.run_tests([files["right"], files["skipped"]], 60) == "passed"
    assert checks.run_tests([files["right"], files["wrong"]], 60) == "FAILED: test_wrong.py failed"
    told = capsys.readouterr().out
    assert "assert 1 == 2" in told
    assert "FAILED" in told.partition("short test summary")[0]  # as it came
    assert checks.run_tests([files["slow"]], 10) == "FAILED: test_slow.py took too long"
    told = capsys.readouterr().out
    assert re.search(r'test_slow\.py", line 2 in test', told), told  # where it is stuck
    assert has_ended(int((tmp_path / "pid").read_text()))


def test_of_tests_of_every_backend_those_of_the_gpu_run(checks, tmp_path: Path, capsys) -> None:
    body = """
import pytest

@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_one(backend): assert backend == "cuda"

def test_two(): assert False
"""
    files = files_of(tmp_path, invert=body, other="def test(): pass")
    assert checks.run_tests(list(files.values()), 60) == "passed"
    assert "2 passed" in capsys.readouterr().out


LOST = """
import sys, types

def synchronize():
    raise RuntimeError("an illegal memory access was encountered")

def test_one():
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    assert False

def test_two():
    assert "torch" not in sys.modules
"""


def test_a_process_whose_gpu_is_lost_takes_no_more_tests(
    checks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("xdist")
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    files = files_of(tmp_path, lost=LOST)
    assert checks.run_tests([files["lost"]], 60) == "FAILED: the tests failed"
    told = capsys.readouterr().out
    assert "crashed while running" in told
    assert "2 failed, 1 passed" in told.splitlines()[-1]


# ---- gpu_measure.py --------------------------------------------------------------------------------------------------


def test_it_begins_with_the_most_telling(script, measure) -> None:
    """Every case comes in one precision before any comes in a second one."""
    assert tuple(measure.TOLERANCES) == script.PRECISIONS
    solvers = {name for name, subject in measure.subjects().items() if subject.recipe is not None}
    runs = list(measure.cases(script.PRECISIONS))
    cases = len(measure.subjects())
    assert cases == len(list(benchmark.decoders())) + len(solvers)
    assert {name for name, _ in runs[:cases]} == set(measure.subjects())
    assert [name for name, _ in runs[:5]] == list(benchmark.DECODERS)
    assert {(name in solvers, precision) for name, precision in runs[:cases]} == {
        (False, "bfloat16"),
        (True, "float32"),
    }
    assert len(set(runs)) == len(runs) == 4 * cases - len(solvers)


@pytest.fixture(scope="module")
def subject() -> benchmark.Subject:
    return next(benchmark.decoders())


@pytest.fixture
def top():
    return importlib.import_module("gpu_results").Ceilings(1e12, {"float32": 1e15, "float16": 1e15}, 1e12)


def test_like_is_compared_with_like(measure, subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """With contenders and times made up here, on the CPU."""
    results = importlib.import_module("gpu_results")
    x = torch.randn(40, *subject.network.input_shape)
    times = iter([1e-3, 4e-3, 2e-3])
    monkeypatch.setattr(measure, "inputs_of", lambda subject, batch, dtype: [x.to(dtype)])
    monkeypatch.setattr(measure, "batch_of", lambda subject: 40)
    monkeypatch.setattr(measure, "seconds_of", lambda call, inputs, repeat: next(times))

    def wrong_at_the_end(x: torch.Tensor) -> torch.Tensor:
        found = subject.eager(x)
        found[-1] += 1
        return found

    contenders = {
        "fastinv": lambda subject, x, precision: subject.eager,
        "eager": lambda subject, x, precision: subject.eager,
        "wrong": lambda subject, x, precision: wrong_at_the_end,
        "absent": lambda subject, x, precision: 1 / 0,
        "torch.compile": lambda subject, x, precision: subject.eager,
    }
    monkeypatch.setattr(measure, "NETWORK_CONTENDERS", contenders)
    top = results.Ceilings(memory=1e12, products={"float32": 40 * subject.flops / 0.5e-3, "float16": 1.0}, host=1e12)
    found = list(measure.on_gpu(subject, "float32", top, 3))
    notes = [item for item in found if isinstance(item, str)]
    assert "wrong is wrong by" in notes[0]
    assert "absent: ZeroDivisionError" in notes[1]
    ours, eager, compiled = results.compared([item for item in found if isinstance(item, results.Row)])
    assert [row.ratio for row in (ours, eager, compiled)] == [2.0, 0.5, 1.0]
    assert ours.percent_of_roofline == pytest.approx(50)
    assert ours.images_per_second == pytest.approx(40_000)
    assert "fastinv" in results.as_table([ours])


def test_what_goes_by_the_host_has_no_peer() -> None:
    results = importlib.import_module("gpu_results")
    row = results.Row("a", 8, "eager", "float32", 1e-7, 2.0, 8.0, 1.0, 1.0, 50.0)
    rows = [row, dataclasses.replace(row, contender=results.HOST_TO_HOST)]
    assert [row.ratio for row in results.compared(rows)] == [1.0, None]
    assert [row.ratio for row in results.compared(rows[1:])] == [None]


def test_a_product_of_float32_may_be_three_of_float16() -> None:
    top = importlib.import_module("gpu_results").Ceilings(
        1e12, {"float32": 50.0, "tf32": 380.0, "float16": 720.0}, 1e12
    )
    assert top.floor(720.0, 0, "float32") == pytest.approx(3)
    assert top.floor(720.0, 0, "float16") == pytest.approx(1)
    assert top.floor(380.0, 0, "tf32") == pytest.approx(1)
    assert top.floor(0.0, 4e12, "float32") == pytest.approx(4)


def test_a_peer_s_solver_may_be_less_exact_than_ours(measure) -> None:
    assert measure.bound("fastinv", "float32", True) == benchmark.SOLVER_TOLERANCE < 5e-3
    assert measure.bound("eager, captured", "float32", True) == 5e-2
    assert measure.bound("eager", "float32", False) == measure.bound("fastinv", "float32", False) == 1e-4


def test_a_step_of_rmle_is_small_enough_for_a_case(measure) -> None:
    batches = {name: measure.batch_of(subject) for name, subject in measure.subjects().items() if subject.recipe}
    assert {name.removeprefix("rMLE ").partition(",")[0]: batch for name, batch in batches.items()} == {
        "conv1": 4096, "ReLU2": 4096, "conv11": 4096, "ReLU22": 512, "ReLU32": 512, "layer1": 1024,
        "blocks": 1024,
    }  # fmt: skip


@pytest.fixture
def on_cpu(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu backend in the GPU's place."""
    monkeypatch.setattr(measure, "compile", lambda network, backend, precision: fastinv.compile(network, "cpu"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_way_from_host_to_host(
    measure, subject, top, on_cpu: None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a host so slow that it is the limit."""
    monkeypatch.setattr(measure, "HOSTED", 6)
    bytes_in = (2 if precision == "bfloat16" else 4) * 6 * 8 * 24 * 24
    top = dataclasses.replace(top, products={**top.products, "bfloat16": 1e15}, host=bytes_in / 1e-3)
    (row,) = measure.host_to_host(subject, precision, top, 3)
    assert row.error < 1e-4
    assert row.percent_of_roofline == pytest.approx(100 * 1e-3 / row.seconds)


def test_every_image_counts_from_host_to_host(measure, subject, top, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "HOSTED", 50)
    monkeypatch.setattr(measure, "REPEATED", 10)
    engine = fastinv.compile(subject.network, "cpu")

    def found_with(image: int, error: float) -> list[object]:
        def run(x):
            found = engine(x)
            found[image] += error
            return found

        monkeypatch.setattr(measure, "compile", lambda network, backend, precision: run)
        return list(measure.host_to_host(subject, "float32", top, 1))

    assert "is wrong by" in found_with(-1, 1.0)[0]
    assert "differs where features are the same" in found_with(23, 1e-6)[0]
    assert isinstance(found_with(-1, 1e-6)[0], importlib.import_module("gpu_results").Row)


def test_launches_are_told(measure, subject, on_cpu: None) -> None:
    (told,) = measure.launches(subject, "float32")
    assert told.startswith("MNIST conv1, float32: launches, ns an image: ")
    total, *each = [float(number) for number in re.findall(r"\d+\.\d", told)]
    assert total == pytest.approx(sum(each), abs=0.1 * len(each))


def test_what_fails_is_told_and_the_rest_goes_on(measure, subject, top, monkeypatch: pytest.MonkeyPatch) -> None:
    """The features, the expected results or a tuning that cannot be had are no end, either."""
    monkeypatch.setattr(measure, "subjects", lambda: {"some": subject})
    monkeypatch.setattr(measure, "compile", lambda network, backend, precision: 1 / 0)
    monkeypatch.setattr(measure, "tune", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(measure, "inputs_of", lambda subject, batch, dtype: [][0])
    assert list(measure.case("some", "float32", top, 3, True)) == [
        "some, float32: tuning: ZeroDivisionError: division by zero",
        "some, float32: fastinv, host to host: ZeroDivisionError: division by zero",
        "some, float32: launches: ZeroDivisionError: division by zero",
        "some, float32: IndexError: list index out of range",
    ]


def test_a_lost_gpu_ends_a_case(measure, subject, top, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "subjects", lambda: {"some": subject})
    monkeypatch.setattr(measure, "compile", lambda network, backend, precision: 1 / 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: torch.cuda.not_there)
    items = measure.case("some", "float32", top, 3, False)
    assert next(items) == "some, float32: fastinv, host to host: ZeroDivisionError: division by zero"
    with pytest.raises(measure.GpuLost, match=r"the GPU is lost \(.*not_there"):
        next(items)
