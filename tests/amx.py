"""What the tests of bfloat16 tiles share: where there are some, and what is rounded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from checks import ISAS
from torch import nn

import fastinv
from fastinv import _core
from fastinv.network import Network, Step

# Each factor of a product is off by 2^−9 at most, 1.7e-3 for two on average where numbers are spread evenly; the most
# of many random layers was 2.8e-3.
BOUND = 4e-3

PLACES = [isa for isa in ISAS if _core.has_tiles(isa)]


def use(isa: str, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("FASTINV_ISA", isa)
    patch.setattr(_core, "has_bfloat16", lambda isa: True)


def compiled(network: Network, threads: int = 1) -> fastinv.Engine:
    return fastinv.compile(network, backend="cpu", precision="bfloat16", threads=threads)


def rounded(x: np.ndarray) -> np.ndarray:
    return torch.tensor(x).bfloat16().float().numpy()


def with_rounded_weights(step: Step) -> Step:
    return dataclasses.replace(step, weights=step.weights | {"weight": rounded(step.weights["weight"])})


def layer(transposed: bool, *arguments: object, **options: object) -> nn.Module:
    made: nn.Module = (nn.ConvTranspose2d if transposed else nn.Conv2d)(*arguments, **options)  # type: ignore[arg-type]
    return made
