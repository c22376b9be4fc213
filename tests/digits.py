"""A few images of noise, and a cut LeNet-5, to train on."""

from __future__ import annotations

from pathlib import Path

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


def write_idx(folder: Path, train: int, test: int) -> None:
    """A data set of so many images of noise in MNIST's format."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count, np.uint8)
        for stem, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{part}-{stem}-ubyte").write_bytes(header + array.tobytes())


def states(*modules: nn.Module) -> list[list[np.ndarray]]:
    return [[v.numpy() for v in module.state_dict().values()] for module in modules]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(*states(a, b), strict=True):
        np.testing.assert_array_equal(x, y)
