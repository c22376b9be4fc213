"""What `gpu.py` does before it measures: fastinv is built, and its tests run on the GPU.

This is a plugin of pytest's, too. It prints failures as they come: what is cut short has told those that it met. And it
ends a worker of pytest-xdist whose GPU is lost, as after an illegal address: another takes its place, where in this one
all tests would fail from then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_worker import END

NO_GPU = ("test_triton_ahead_of_time", "test_cuda_sanitized", "test_cuda_bench")  # tests that need none
DOORS = ("test_engine", "test_exact", "test_invert", "test_rmle")  # tests of every backend that there is
TESTS = sorted(
    path
    for pattern in ("test_triton*.py", "test_cuda*.py", "test_upload.py", *(f"{name}.py" for name in DOORS))
    for path in (Path(__file__).parents[1] / "tests").glob(pattern)
    if path.stem not in NO_GPU
)
STUCK = 60  # seconds of a test, after which it is told where it is, or ended where pytest-timeout is installed
FAILURE = 1500  # characters of a failure that are printed as it comes
NO_TESTS = 5  # pytest's exit code for a file that is skipped as a whole


def build_fastinv() -> str | None:
    """Build fastinv from this folder, with what is installed; what the build says where it fails."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode != 0 else None


def run_tests(files: Sequence[Path], seconds: float) -> str:
    """Run the tests of all files on all cores, since most of their time goes to compiling kernels; what came of it.

    With pytest-xdist cores share the tests out, without it the files.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", Path(__file__).stem]
    pytest += ["-o", f"faulthandler_timeout={STUCK}"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        pytest += ["--timeout", str(STUCK), "--timeout-method", "thread"]
    if importlib.util.find_spec("xdist") is not None:
        found = [_run([*pytest, "-n", str(os.cpu_count()), *files], "the tests", seconds)]
    else:
        with ThreadPoolExecutor(len(files)) as pool:
            found = list(pool.map(lambda file: _run([*pytest, file], file.name, seconds), files))
    wrong = [reason for reason in found if reason is not None]
    return f"FAILED: {', '.join(wrong)}" if wrong else "passed"


def _run(command: Sequence[str | Path], name: str, seconds: float) -> str | None:
    """Print what a run of pytest says; what is wrong with it."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A session of its own, so that nothing that it starts is left when it is ended: what stays would be timed, too.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(END)
        log.seek(0)
        said = log.read().strip()
    if late:
        print(f"{name}: not done after {seconds:.0f} s: {said}", flush=True)
        return f"{name} took too long"
    wrong = process.returncode not in (0, NO_TESTS)
    print(f"{name}: {said if wrong else said.rpartition(chr(10))[2]}", flush=True)
    return f"{name} failed" if wrong else None


# ---- the plugin ------------------------------------------------------------------------------------------------------

_failed = False


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of the tests of every backend only those of this one."""

    def elsewhere(item: Any) -> bool:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        return item.path.stem in DOORS and backend != "cuda"

    config.hook.pytest_deselected(items=[item for item in items if elsewhere(item)])
    items[:] = [item for item in items if not elsewhere(item)]


def pytest_runtest_logreport(report: Any) -> None:
    global _failed
    if report.failed:
        _failed = True
        print(f"\nFAILED {report.nodeid}: {report.longreprtext[-FAILURE:]}", flush=True)


def pytest_runtest_logfinish() -> None:
    if _failed and "PYTEST_XDIST_WORKER" in os.environ and _gpu_is_lost():
        os._exit(1)


def _gpu_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
