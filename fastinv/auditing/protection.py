"""What the edge's owner does to features before they are sent, so that they give less away."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastinv.errors import FastinvError, FeatureError
from fastinv.experiment import results
from fastinv.split import Split
from fastinv.training import seeded

Protect = Callable[[torch.Tensor], torch.Tensor]  # features [n, ...] to as many of the same shape


def protected(features: npt.NDArray[np.float32], protect: Protect | None) -> npt.NDArray[np.float32]:
    """Features [N, ...] as they are sent.

    Raises:
        FeatureError: `protect` fails, or gives no features of the same shape, or NaN or Inf.
    """
    if protect is None:
        return features
    try:
        with torch.no_grad():
            found = protect(torch.tensor(features))
    except Exception as error:  # of the user's code, any
        raise FeatureError(
            f"protect: fails on features {list(features.shape)} ({type(error).__name__}: {error!s:.200})"
        ) from error
    if not isinstance(found, torch.Tensor) or found.shape != features.shape or not found.isfinite().all():
        what = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise FeatureError(
            f"protect: gives {what} for features {list(features.shape)}, expected a tensor of the same shape without "
            "NaN and Inf"
        )
    return found.to("cpu", torch.float32).numpy()


class Query:
    """The system under attack: images to features as they are sent."""

    def __init__(self, split: Split, protect: Protect | None) -> None:
        self.mean, self.std = split.mean, split.std
        self._split, self._protect = split, protect

    def __call__(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return protected(self._split.features(images), self._protect)


class Protection(nn.Module):
    """What is sent, as a layer between edge and cloud."""

    def __init__(self, protect: Protect) -> None:
        super().__init__()
        self._protect = (protect,)  # in a tuple: a module would become a part of this one, and be put into eval mode

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(protected(features.cpu().numpy(), self._protect[0])).to(features.device)


def describe(protect: Protect, shape: tuple[int, ...], seed: int) -> str:
    """What tells one from another: its name, and a digest of what it makes of some features [2, *shape]."""
    name = getattr(protect, "__qualname__", repr(protect))
    probe = np.linspace(-2, 2, 2 * math.prod(shape), dtype=np.float32).reshape(2, *shape)
    try:
        with seeded(seed):
            digest = results.sha256([protected(probe, protect)])[:16]
    except FastinvError:  # it is for features of another shape
        digest = results.sha256([np.frombuffer(_source(protect), np.uint8)])[:16]
    return f"{name:.200} {digest}"


def _source(protect: Protect) -> bytes:
    try:
        return inspect.getsource(protect).encode()
    except (OSError, TypeError):
        return b""
