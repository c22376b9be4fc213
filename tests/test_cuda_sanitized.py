"""The kernels of layers in CUDA C++, in their stand-in on the host, under AddressSanitizer and UBSan.

They are compiled by the C++ compiler alone: nvcc is not needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-fsanitize=address,undefined"]


def test_layers_stay_within_their_memory(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    sources = HERE.parent / "kernels" / "cuda"
    if compiler is None or not sources.is_dir():
        pytest.skip("needs g++, and a clone of the repository")
    program = tmp_path / "layers_on_host"
    command = [compiler, *FLAGS, f"-I{sources}", str(HERE / "layers_on_host.cpp"), "-o", str(program)]
    subprocess.run([*command, "-fno-sanitize-recover=undefined"], check=True)
    # Stacks are the threads' own, which this check does not know.
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "LD_PRELOAD": ""}
    run = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
