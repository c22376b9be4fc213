"""Compile Triton launches for a GPU that is not there. Not to be imported where Triton interprets.

Each launch is specialised as `triton.jit` would: integers that are 1 become constants, those divisible by 16 and all
pointers are said to be.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastinv.kernels.triton.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel in one configuration."""

    kernel: str
    constants: str
    wgmma: bool
    stack: int  # bytes of spilled registers and local arrays, for each thread
    registers: int  # for each thread
    shared: int  # bytes


def source_of(launch: Launch) -> tuple[ASTSource, str]:
    """The kernel with its types and constants, and all that decides what the compiler makes of it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    values = {**launch.args, **launch.constants}
    for index, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    key = f"{launch.kernel.__name__} {signature} {constants} {attributes} {launch.warps} {launch.stages}"
    return ASTSource(launch.kernel, signature, constants, attributes), key


def compile_all(launches: Iterable[Launch], capability: int = 90) -> list[Compiled]:
    """Every kernel in every configuration, once."""
    sources = {}
    for launch in launches:
        source, key = source_of(launch)
        sources.setdefault(key, (source, launch))
    return [_compiled(source, launch, capability) for source, launch in sources.values()]


def _compiled(source: ASTSource, launch: Launch, capability: int) -> Compiled:
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(binary.asm["cubin"])
    return Compiled(
        launch.kernel.__name__,
        " ".join(f"{key}={value}" for key, value in launch.constants.items()),
        "wgmma" in binary.asm["ptx"],
        usage["STACK"],
        usage["REG"],
        binary.metadata.shared,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    import tempfile

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text.stdout)}
