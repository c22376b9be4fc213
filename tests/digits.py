"""A few images of noise, and a cut LeNet-5, to train on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import fastinv
from fastinv.models import lenet5

NORM = {"mean": (0.5,), "std": (0.5,)}
IMAGES = np.random.default_rng(0).random((24, 1, 28, 28)).astype(np.float32)
LABELS = np.arange(24) % 10


def cut() -> fastinv.Split:
    """An untrained target, cut at ReLU2; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fastinv.Split(lenet5().eval(), at="ReLU2", **NORM)


def states(*modules: nn.Module) -> list[list[np.ndarray]]:
    return [[v.numpy() for v in module.state_dict().values()] for module in modules]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(*states(a, b), strict=True):
        np.testing.assert_array_equal(x, y)
