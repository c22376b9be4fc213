"""What nvcc made of the kernels in CUDA C++, as cuobjdump shows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.F32\S* R(\d+), R(\d+), ")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")


def dump(file: str, *options: str) -> str:
    """What cuobjdump says of an extension."""
    tool = shutil.which("cuobjdump") or str(
        Path(__import__("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    )
    # It asks others of its folder for help.
    path = f"{os.environ['PATH']}:{Path(tool).parent}"
    command = [tool, *options, file]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout


def kernels(file: str, architecture: str) -> list[list[str]]:
    """The instructions of every kernel, without what predicates them."""
    text = dump(file, "--dump-sass", "--gpu-architecture", architecture)
    found = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?(.*?) ?;", re.MULTILINE)
    return [found.findall(kernel) for kernel in re.split(r"Function : ", text)[1:]]


def touched_in_flight(instructions: Iterable[str]) -> list[str]:
    """Those that read or write registers of products that are not done: their sums, or left factors."""
    wrong: list[str] = []
    under_way: list[set[int]] = []  # registers, group by group
    group: set[int] = set()  # of the one that is being made
    for instruction in instructions:
        if product := PRODUCT.search(instruction):
            columns, sums, left = (int(n) for n in product.groups())
            group.update(range(sums, sums + columns // 2), range(left, left + 4))
            if "gsb0" in instruction:
                under_way.append(group)
                group = set()
        elif wait := WAIT.search(instruction):
            del under_way[: max(0, len(under_way) - int(wait[1]))]
        elif _registers(instruction) & group.union(*under_way):
            wrong.append(instruction)
    return wrong


def _registers(instruction: str) -> set[int]:
    """At least those that an instruction reads or writes."""
    found = [int(n) for n in re.findall(r"\bR(\d+)", instruction)]
    registers = set(found)
    if found and instruction.startswith("LDSM") and ".4 " in instruction:
        registers.update(range(found[0], found[0] + 4))
    return registers
