"""Inverse networks: the black-box attack (paper, Algorithm 2). It needs queries, or logged pairs, never the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastinv import tensors
from fastinv.errors import TrainingError
from fastinv.models import make_decoder
from fastinv.training import Schedule, fit, normalised, seeded, trainable

CACHE_BYTES = 2 * 2**30  # of features kept in memory; beyond that every batch is queried anew
QUERY_BATCH = 256


def train_inverse_network(
    query: Callable[[Any], Any] | None = None,
    images: Any = None,
    *,
    pairs: tuple[Any, Any] | None = None,
    decoder: nn.Module | Callable[[], nn.Module] | None = None,
    kind: str = "paper",
    width: int = 64,
    depth: int = 4,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 4e-3,
    optimizer: str = "adam",
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Train g with g(edge(x)) ≈ z, z = (x − mean) / std, by the mean over pixels of (g(v) − z)².

    Args:
        query: the system under attack: any callable from images [N, C, H, W] to features [N, ...], such as a `Split`.
            It is asked with float32 pixels, of the kind (numpy or torch) that `images` are.
        images: what to query it with, the attacker's knowledge (`fastinv.knowledge`).
        pairs: instead of both, logged (images, features).
        decoder: the network to train (it is trained in place) or a callable that makes one; None:
            `make_decoder(..., kind, width, depth)`.
        mean, std: the target's normalisation; None takes the query's own where it is a `Split`, else none.
        epochs, batch_size, lr, optimizer, seed: see `fastinv.training.Schedule`. The same seed gives the same network.
        progress: whether to show a progress bar.
        checkpoint: a file to write after every epoch, and to go on from where it exists.

    Returns:
        g, in eval mode: features [N, ...] to normalised images [N, C, H, W].

    Raises:
        TrainingError: arguments that do not go together, a query that gives no usable features, divergence, or a
            checkpoint of another run or that cannot be written.
        FeatureError: images or features that are no array or tensor on the CPU, a normalisation that does not fit the
            images, features with NaN or Inf, or, from a `Split`, images that its model does not take.
        NetworkError: a `kind`, `width` or `depth` that no decoder has.
    """
    if (pairs is None) == (query is None or images is None):
        raise TrainingError("train_inverse_network: pass a query and images, or pairs=(images, features), not both")
    mean = getattr(query, "mean", (0.0,)) if mean is None else mean
    std = getattr(query, "std", (1.0,)) if std is None else std
    schedule = Schedule(epochs, batch_size, lr, optimizer, seed)
    if pairs is not None:
        if not (isinstance(pairs, (tuple, list)) and len(pairs) == 2):
            raise TrainingError("pairs: expected two, (images, features)")
        images, logged = pairs
        z = normalised(images, mean, std)
        source = Features(_as_features(logged, len(z)))
    else:
        assert query is not None
        z = normalised(images, mean, std)
        source = Features.queried(query, images)

    def made() -> nn.Module:
        return make_decoder(source.shape, tuple(z.shape[1:]), kind, width=width, depth=depth)

    with seeded(seed):
        module = trainable("decoder", made if decoder is None else decoder)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        found = module(source[indices])
        if found.shape != z[indices].shape:
            raise TrainingError(
                f"the decoder gives {list(found.shape[1:])}, expected images {list(z.shape[1:])} from features "
                f"{list(source.shape)}"
            )
        return nn.functional.mse_loss(found, z[indices])

    bar = "inverse network" if progress else False
    return fit(module, loss, len(z), schedule, progress=bar, checkpoint=checkpoint, data=(z, source[slice(0, 8)]))


class Features:
    """The features of all training images: kept in memory, or queried again for every batch when too large."""

    def __init__(self, kept: torch.Tensor | None, query: Callable[[Any], torch.Tensor] | None = None) -> None:
        self._kept = kept
        self._query = query
        self.shape = tuple(self[slice(0, 1)].shape[1:])

    @classmethod
    def queried(cls, query: Callable[[Any], Any], images: Any) -> Features:
        """Features of images [N, C, H, W], pixels, numpy or torch."""
        if not callable(query):
            raise TrainingError(f"query: a {type(query).__name__}, expected a Split or a callable images -> features")
        if len(images) == 0:
            raise TrainingError("no images to query with; pass at least one")

        def ask(indices: Any) -> torch.Tensor:
            chosen = images[indices.numpy() if isinstance(indices, torch.Tensor) else indices]
            whole = str(chosen.dtype).removeprefix("torch.") == "uint8"
            chosen = chosen.float() if isinstance(chosen, torch.Tensor) else chosen.astype(np.float32)
            return _as_features(query(chosen / 255 if whole else chosen), len(chosen))

        first = ask(slice(0, 1))
        if first.numel() * 4 * len(images) > CACHE_BYTES:
            return cls(None, ask)
        kept = torch.empty(len(images), *first.shape[1:])
        for start, stop in tensors.chunks(len(images), QUERY_BATCH):
            kept[start:stop] = ask(slice(start, stop))
        return cls(kept)

    def __getitem__(self, indices: Any) -> torch.Tensor:
        if self._kept is not None:
            return self._kept[indices]
        assert self._query is not None
        return self._query(indices)


def _as_features(found: Any, count: int) -> torch.Tensor:
    """What a query or a log gives, as a float32 tensor [count, ...]."""
    data, dtype, _ = tensors.as_numpy(found, "features")
    if data.ndim < 2 or len(data) != count or dtype not in tensors.FLOATS:
        raise TrainingError(
            f"features of shape {list(data.shape)} and dtype {dtype} for {count} images, expected floats [{count}, ...]"
        )
    return torch.from_numpy(tensors.Source(data, dtype, torch=False).chunk(0, count).copy())
