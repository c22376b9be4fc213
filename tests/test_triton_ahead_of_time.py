"""Every Triton kernel compiled for a GPU that need not be there, in a process that does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

SHARED = 232448  # bytes of shared memory that one program can have on sm_90


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # for debuggers: a seventh of the time
    script = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_kernel_is_compiled(compiled) -> None:
    sources = Path(__import__("fastinv.kernels", fromlist=["triton"]).__file__).parent / "triton"
    defined = {
        line.split("(")[0].removeprefix("def ")
        for file in sources.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert {row["kernel"] for row in compiled} == defined


def test_matrix_products_are_on_tensor_cores(compiled) -> None:
    kinds = ("_convolution_kernel", "_boxes_kernel", "_pair_kernel", "_matmul_kernel")
    products = [row for row in compiled if row["kernel"] in kinds or row["kernel"].startswith("_attention")]
    assert len(products) > 20
    assert sum(row["kernel"] == "_pair_kernel" for row in products) > 20
    assert [row for row in products if not row["wgmma"]] == []


def test_nothing_spills(compiled) -> None:
    assert [row for row in compiled if row["stack"] > 0] == []


def test_shared_memory_suffices(compiled) -> None:
    assert max(row["shared"] for row in compiled) <= SHARED
