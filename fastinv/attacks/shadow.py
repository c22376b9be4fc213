"""Shadow models: stand-ins for an edge that cannot be seen (paper, Algorithm 3 and Table 8).

A shadow is attacked by rMLE as the edge itself would be: export it, and give it to `fastinv.RMLE`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastinv.attacks.inverse_network import CACHE_BYTES, Features
from fastinv.errors import TrainingError
from fastinv.schedule import Schedule, place_of
from fastinv.training import class_indices, cross_entropy, fit, normalised, seeded, takes_channels_last, trainable

Architecture = nn.Module | Callable[[], nn.Module]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def train_shadow(
    cloud: nn.Module,
    images: Any,
    labels: Any,
    architecture: Architecture,
    *,
    loss: str | Loss = "cross_entropy",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    optimizer: str = "adam",
    seed: int = 0,
    precision: str = "float32",
    device: str | torch.device | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Learn f'_θ1 such that cloud(f'_θ1(z)) classifies the labelled data (query-free, Algorithm 3).

    The four cases of the paper come from `images` (the target's training set or another) and `architecture` (the
    edge's structure or another).

    Args:
        cloud: f_θ2; it is copied and frozen, and stays as it is.
        images, labels: the attacker's data: images [N, C, H, W], of float pixels in [0, 1] or uint8, and class
            indices [N].
        architecture: the shadow to train (in place), or a callable that makes one.
        loss: "cross_entropy", or a callable (logits, labels) -> scalar.
        mean, std: the target's normalisation.
        epochs, batch_size, lr, optimizer, seed, precision, device, progress, checkpoint: as of `train_inverse_network`.

    Returns:
        The shadow, in eval mode: normalised images to features.

    Raises:
        TrainingError: arguments that do not go together, divergence, or a checkpoint of another run or that cannot be
            written.
        FeatureError: images that are no array or tensor on the CPU, or a normalisation that does not fit them.
    """
    schedule = Schedule(epochs, batch_size, lr, optimizer, seed, precision, device)
    z = normalised(images, mean, std)
    classes = class_indices(labels, len(z))
    criterion = _criterion(loss)
    if not isinstance(cloud, nn.Module):
        raise TrainingError(f"cloud: a {type(cloud).__name__}, expected a torch.nn.Module")
    with seeded(seed):
        shadow = trainable("architecture", architecture)
    frozen = copy.deepcopy(cloud).eval().requires_grad_(False).to(device or place_of(shadow))
    whole = nn.Sequential(shadow, frozen if takes_channels_last(frozen) else nn.Sequential(_ChannelsFirst(), frozen))

    def batch_loss(indices: torch.Tensor) -> torch.Tensor:
        logits = schedule.forward(whole, z[indices])
        return criterion(logits, classes[indices].to(place_of(shadow)))

    bar = "shadow" if progress else False
    data = (z, classes, *cloud.state_dict().values())
    return fit(shadow, batch_loss, len(z), schedule, progress=bar, checkpoint=checkpoint, data=data)


class _ChannelsFirst(nn.Module):
    """Lays features out as they come from an edge."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()


def fit_shadow(
    query: Callable[[Any], Any],
    images: Any,
    architecture: Architecture,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    optimizer: str = "adam",
    seed: int = 0,
    precision: str = "float32",
    device: str | torch.device | None = None,
    cache_bytes: float = CACHE_BYTES,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Learn f'_θ1 with f'_θ1(z) ≈ query(x) by the mean of squared differences (black-box reconstruction, Table 8).

    Args:
        query: the system under attack: any callable from images [N, C, H, W] to features, as of
            `train_inverse_network`.
        images: what to query it with, as of `train_inverse_network`.
        architecture: the shadow to train (in place), or a callable that makes one.
        mean, std: the target's normalisation; None takes the query's own where it is a `Split`, else none.
        epochs, batch_size, lr, optimizer, seed, precision, device, cache_bytes, progress, checkpoint: as of
            `train_inverse_network`.

    Returns:
        The shadow, in eval mode: normalised images to features.

    Raises:
        TrainingError: as `train_shadow`, or a query that gives no usable features.
        FeatureError: as `train_inverse_network`.
    """
    schedule = Schedule(epochs, batch_size, lr, optimizer, seed, precision, device)
    mean = getattr(query, "mean", (0.0,)) if mean is None else mean
    std = getattr(query, "std", (1.0,)) if std is None else std
    z = normalised(images, mean, std)
    features = Features.queried(query, images, epochs, cache_bytes)
    with seeded(seed):
        shadow = trainable("architecture", architecture)

    def batch_loss(indices: torch.Tensor) -> torch.Tensor:
        found, wanted = schedule.forward(shadow, z[indices]), features[indices]
        if found.shape != wanted.shape:
            raise TrainingError(
                f"the shadow gives features {list(found.shape[1:])}, but the query {list(wanted.shape[1:])}; "
                "choose an architecture whose result has the query's shape"
            )
        return nn.functional.mse_loss(found, wanted.to(found.device))

    bar = "shadow" if progress else False
    data = (z, features[slice(0, 8)])
    return fit(shadow, batch_loss, len(z), schedule, progress=bar, checkpoint=checkpoint, data=data)


def _criterion(loss: str | Loss) -> Loss:
    if loss == "cross_entropy":
        return cross_entropy
    if callable(loss):
        return loss
    raise TrainingError(f"loss {loss!r:.40}, expected 'cross_entropy' or a callable (logits, labels) -> scalar")
