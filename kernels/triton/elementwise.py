"""What kernels share of which a program has some elements of the output [N, H, W, C], and their launchers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants to see it
from fastinv.kernels.triton.epilogue import Epilogue
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

BLOCK = 1024  # elements of a program


@triton.jit
def place_of(p, height, width, channels):
    """Image, row, column and channel of element p of [N, height, width, channels]."""
    return p // (channels * width * height), p // (channels * width) % height, p // channels % width, p % channels


def launch_elements(
    kernel: Any, out: Any, args: Mapping[str, Any], constants: Mapping[str, Any], epilogue: Epilogue
) -> Launch:
    """A program for every `BLOCK` elements of `out`."""
    block = min(BLOCK, power_of_two(out.numel()))
    everything = {"out": out, **args, **epilogue.args, "elements": out.numel()}
    constants = {**constants, "KIND": epilogue.kind, "BLOCK": block}
    return Launch(kernel, ceil_div(out.numel(), block), everything, constants)
