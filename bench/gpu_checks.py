"""What `gpu.py` does before it measures: fastinv is built, and its tests run on the GPU.

This is a plugin of pytest's, too, which prints failures as they come: what is cut short has told those that it met.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = sorted(
    path
    for pattern in ("test_triton*.py", "test_cuda_*.py")
    for path in (Path(__file__).parents[1] / "tests").glob(pattern)
    if path.stem != "test_triton_ahead_of_time"  # needs no GPU
)
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
    if importlib.util.find_spec("xdist") is not None:
        found = [_run([*pytest, "-n", str(os.cpu_count()), *files], "the tests", seconds)]
    else:
        with ThreadPoolExecutor(len(files)) as pool:
            found = list(pool.map(lambda file: _run([*pytest, file], file.name, seconds), files))
    wrong = [reason for reason in found if reason is not None]
    return f"FAILED: {', '.join(wrong)}" if wrong else "passed"


def _run(command: Sequence[str | Path], name: str, seconds: float) -> str | None:
    """Print what a run of pytest says; what is wrong with it."""
    try:
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        print(f"{name}: not done after {seconds:.0f} s: {said.strip()}", flush=True)
        return f"{name} took too long"
    wrong = done.returncode not in (0, NO_TESTS)
    print(f"{name}: {(done.stdout if wrong else done.stdout.splitlines()[-1]).strip()}", flush=True)
    return f"{name} failed" if wrong else None


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        print(f"\nFAILED {report.nodeid}: {report.longreprtext[-FAILURE:]}", flush=True)
