"""How training goes: how long, how fast, in which precision and where. Loads torch only where it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fastinv.errors import TrainingError
from fastinv.tensors import is_number, is_whole

if TYPE_CHECKING:
    import torch
    from torch import nn

OPTIMIZERS: dict[str, tuple[str, dict[str, float]]] = {  # what torch.optim calls them, with which options
    "adam": ("Adam", {}),
    "sgd": ("SGD", {"momentum": 0.9}),
}
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Schedule:
    """How long to train, how fast, and where.

    Args:
        epochs: passes over the data.
        batch_size: samples in a step; the last, smaller batch of an epoch counts too.
        lr: peak step size; it falls along a half cosine to zero.
        optimizer: "adam" or "sgd" (momentum 0.9).
        seed: of the order of the samples, from 0 to 2³² − 1; a seed makes a run repeat exactly, with the same number
            of threads, on a CPU.
        precision: of convolutions and products: "float32", or "bfloat16", whose weights and sums stay float32: faster
            on a GPU, and on a CPU with AMX; slower on one without bfloat16.
        device: what computes: "cpu", "cuda" or as in "cuda:1"; None: where the module to train is. The samples stay in
            the host's memory, and the trained module comes back to where it was.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    seed: int = 0
    precision: str = "float32"
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (is_whole(value) and value >= least) or (name == "seed" and value >= 2**32):
                most = " and below 2**32" if name == "seed" else ""
                raise TrainingError(f"{name} {value!r:.40}, expected an integer >= {least}{most}")
            object.__setattr__(self, name, int(value))  # a checkpoint cannot hold numpy's
        if not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise TrainingError(f"lr {self.lr!r:.40}, expected a number above 0")
        object.__setattr__(self, "lr", float(self.lr))
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise TrainingError(f"{name} {value!r:.40}, expected one of {', '.join(known)}")
        if self.device is not None:
            _expect_device(self.device)

    def identity(self) -> dict[str, Any]:
        """What has to agree for two runs to be one: all but the device."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "device"}

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer of parameters."""
        import torch

        name, options = OPTIMIZERS[self.optimizer]
        made: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, lr=self.lr, **options)
        return made

    def forward(self, module: nn.Module, x: torch.Tensor) -> Any:
        """What a module gives for x, computed in this precision where the module is; as float32."""
        import torch

        place = place_of(module)
        with torch.autocast(place.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = module(x.to(place))
        return found.float() if isinstance(found, torch.Tensor) and found.dtype is torch.bfloat16 else found


def _expect_device(device: Any) -> None:
    import torch

    try:
        found = torch.device(device)
        if found.type not in DEVICES:
            raise RuntimeError("not one that fastinv knows")
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, TypeError) as error:  # of a torch without CUDA the first
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"device {str(device)!r:.40} cannot be had here ({reason:.120}); expected 'cpu', 'cuda' or as in 'cuda:1', "
            "or None for where the module is"
        ) from None


def place_of(module: nn.Module) -> torch.device:
    """The device that a module's first parameter is on."""
    import torch

    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
