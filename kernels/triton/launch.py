"""What the launchers give: a kernel with all that it needs, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a `triton.jit` function.
        programs: how many run.
        args: tensors (None: absent), integers and floats, by the kernel's names.
        constants: its `tl.constexpr` parameters.
        warps, stages: what the compiler is asked for.
    """

    kernel: Any
    programs: int
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3

    def __call__(self) -> None:
        """Launch on the current stream; without a GPU, in Triton's interpreter."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        self.kernel[(self.programs,)](**self.args, **self.constants, **options)


def processors(device: Any) -> int:
    """Multiprocessors of a GPU; those of an H100 where another device stands in for one."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def copies_boxes(device: Any) -> bool:
    """Whether a GPU has the copy engine (TMA) behind tensor descriptors: from compute capability 9.0 on. What stands in
    for a GPU counts as an H100, and has it."""
    import torch

    device = torch.device(device)
    return device.type != "cuda" or bool(torch.cuda.get_device_capability(device) >= (9, 0))


def interpreted(device: Any) -> int:
    """By how much tiles may be larger: on a CPU the interpreter takes as long for a program, however large its tile."""
    import torch

    return 16 if torch.device(device).type == "cpu" else 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
