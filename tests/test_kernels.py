"""What the build promises of the kernels' object code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = re.findall(r'"(\w+)\|(\d)\|([^"]*)"', (ROOT / "CMakeLists.txt").read_text())


def test_the_build_lists_its_instruction_sets() -> None:
    assert [line[0] for line in LINES] == ["portable", "avx2", "avx512"]


@pytest.mark.parametrize(("isa", "vectors", "flags"), LINES, ids=[line[0] for line in LINES])
def test_kernels_share_no_code_between_instruction_sets(isa: str, vectors: str, flags: str, tmp_path: Path) -> None:
    """A weak symbol compiled under two sets would be merged, and run on machines that lack one of them."""
    compiler, nm = shutil.which("g++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs g++ and nm")
    if "x86" not in subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("the flags are for x86-64")
    target = tmp_path / "kernels.o"
    defines = [
        f"-DFASTINV_ISA={isa}",
        f"-DFASTINV_MAX_VECTORS={vectors}",
        f'-DFASTINV_VECTOR_HEADER="vec/{isa}.h"',
    ]
    source = ROOT / "csrc/kernels/kernels.cpp"
    # Without optimisation nothing is inlined, so that every weak symbol shows; at -O3 this takes a minute and a half.
    command = [compiler, "-std=c++17", "-fno-exceptions", "-O0", "-w", f"-I{ROOT / 'csrc'}", *flags.split(), *defines]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    listing = subprocess.run([nm, "-C", str(target)], capture_output=True, text=True, check=True).stdout
    symbols = [
        line.split(maxsplit=2) if line[0] != " " else ["", *line.split(maxsplit=1)] for line in listing.splitlines()
    ]
    assert not [s for s in symbols if s[1] in "WVuwv"]
    assert [s[2] for s in symbols if s[1].isupper() and s[1] != "U"] == [f"fastinv::kernels_{isa}"]
    assert {s[2] for s in symbols if s[1] == "U"} <= {"memset", "memcpy", "memmove", "powf", "sqrtf"}
