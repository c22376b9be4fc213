"""Inverse networks: the black-box attack (paper, Algorithm 2). It needs queries, or logged pairs, never the model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastinv import pixels, tensors
from fastinv.errors import TrainingError
from fastinv.models import make_decoder
from fastinv.schedule import Schedule
from fastinv.training import fit, normalised, seeded, trainable

CACHE_BYTES = 2 * 2**30


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
    precision: str = "float32",
    device: str | torch.device | None = None,
    scale: Any = None,
    zero_point: Any = None,
    cache_bytes: float = CACHE_BYTES,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Train g with g(edge(x)) ≈ z, z = (x − mean) / std, by the mean over pixels of (g(v) − z)².

    Args:
        query: the system under attack: any callable from images [N, C, H, W] to features [N, C, H, W] or [N, D], such
            as a `Split`. It is asked with float32 pixels, of the kind (numpy or torch) that `images` are, and
            about each image once; but see `cache_bytes`.
        images: what to query it with, the attacker's knowledge (`fastinv.knowledge`): float pixels in [0, 1], or
            uint8, whose 255 is 1.
        pairs: instead of both, logged (images, features). The features stay as they are, in a memory-mapped file or in
            half precision, and become float32 batch by batch; of images, channels first or last.
        decoder: the network to train (it is trained in place) or a callable that makes one; None:
            `make_decoder(..., kind, width, depth)`.
        mean, std: the target's normalisation; None takes the query's own where it is a `Split`, else none.
        epochs, batch_size, lr, optimizer, seed, precision, device: see `fastinv.schedule.Schedule`. The same seed gives
            the same network.
        scale, zero_point: of features that are uint8 or int8, as of `fastinv.invert`.
        cache_bytes: of the queries' features, as float32, that are kept in memory. Where all of them take more, every
            batch is queried again in every epoch, which a warning tells: about epochs · N queries; math.inf keeps all.
        progress: whether to show a progress bar.
        checkpoint: a file to write after every epoch, and to go on from where it exists, of the same options.

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
    schedule = Schedule(epochs, batch_size, lr, optimizer, seed, precision, device)
    if pairs is not None:
        if not (isinstance(pairs, (tuple, list)) and len(pairs) == 2):
            raise TrainingError("pairs: expected two, (images, features)")
        images, logged = pairs
        z = normalised(images, mean, std)
        source = Features.logged(logged, len(z), scale, zero_point)
        if z.shape[1] > 4 and len(source.shape) == 3 and source.shape[0] in (1, 3):
            warnings.warn(
                f"pairs: images of {list(z.shape[1:])} and features of {list(source.shape)} seem to be the other way "
                "round; expected (images, features)",
                UserWarning,
                stacklevel=2,
            )
    else:
        assert query is not None
        z = normalised(images, mean, std)
        source = Features.queried(query, images, epochs, cache_bytes, scale, zero_point)

    def made() -> nn.Module:
        return make_decoder(source.shape, tuple(z.shape[1:]), kind, width=width, depth=depth)

    with seeded(seed):
        module = trainable("decoder", made if decoder is None else decoder)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        found = schedule.forward(module, source[indices])
        if found.shape != z[indices].shape:
            raise TrainingError(
                f"the decoder gives {list(found.shape[1:])}, expected images {list(z.shape[1:])} from features "
                f"{list(source.shape)}"
            )
        return nn.functional.mse_loss(found, z[indices].to(found.device))

    bar = "inverse network" if progress else False
    return fit(module, loss, len(z), schedule, progress=bar, checkpoint=checkpoint, data=(z, source[slice(0, 8)]))


class Features:
    """The features of all training images: kept as they are, or queried again for every batch when too large."""

    def __init__(self, kept: tensors.Source | None, query: Callable[[Any], torch.Tensor] | None = None) -> None:
        self._kept = kept
        self._query = query
        self.shape = tuple(self[slice(0, 1)].shape[1:])

    @classmethod
    def logged(cls, features: Any, count: int, scale: Any = None, zero_point: Any = None) -> Features:
        """Features [count, ...] of any type and layout; NaN and Inf are refused."""
        source = _source(features, count, scale, zero_point)
        for start, stop in tensors.chunks(count, pixels.at_once(source.data.shape[1:])):
            source.chunk(start, stop)  # raises
        return cls(source)

    @classmethod
    def queried(
        cls,
        query: Callable[[Any], Any],
        images: Any,
        epochs: int,
        cache_bytes: float = CACHE_BYTES,
        scale: Any = None,
        zero_point: Any = None,
    ) -> Features:
        """Features of images [N, C, H, W], numpy or torch, for so many epochs."""
        if not callable(query):
            raise TrainingError(f"query: a {type(query).__name__}, expected a Split or a callable images -> features")
        if not (tensors.is_number(cache_bytes) and cache_bytes >= 0):
            raise TrainingError(f"cache_bytes {cache_bytes!r:.40}, expected a number >= 0")
        if len(images) == 0:
            raise TrainingError("no images to query with; pass at least one")

        def ask(indices: Any) -> torch.Tensor:
            data, dtype, is_torch = tensors.as_numpy(
                images[indices.numpy() if isinstance(indices, torch.Tensor) else indices], "images"
            )
            chosen = np.array(pixels.as_pixels(data, dtype))  # the query may write to it
            found = query(torch.from_numpy(chosen) if is_torch else chosen)
            return torch.from_numpy(_source(found, len(chosen), scale, zero_point).chunk(0, len(chosen)).copy())

        batch = pixels.at_once(images.shape[1:])
        first = ask(slice(0, batch))
        size = 4 * first[0].numel() * len(images)
        if size > cache_bytes:
            warnings.warn(
                f"the features of {len(images):,} images take {size / 2**30:.2g} GiB, more than cache_bytes: they are "
                f"queried again in every epoch, {max(1, epochs) * len(images):,} queries in all; pass a larger "
                "cache_bytes=, or fewer images",
                UserWarning,
                stacklevel=4,
            )
            return cls(None, ask)

        def alike(part: slice) -> torch.Tensor:
            more = ask(part)
            if more.shape[1:] != first.shape[1:]:
                raise TrainingError(
                    f"the query gives features {list(first.shape[1:])}, and {list(more.shape[1:])} from image "
                    f"{part.start} on; expected one shape"
                )
            return more

        kept = pixels.joined(first, alike, len(images)).numpy()
        return cls(tensors.Source(kept, "float32", torch=False))

    def __getitem__(self, indices: Any) -> torch.Tensor:
        """Features of some images, float32 [count, ...]."""
        if self._kept is None:
            assert self._query is not None
            return self._query(indices)
        rows = self._kept.data[indices.numpy() if isinstance(indices, torch.Tensor) else indices]
        values = dataclasses.replace(self._kept, data=rows).chunk(0, len(rows), finite=lambda _: True)  # checked before
        return torch.from_numpy(values.copy() if isinstance(indices, slice) else values)  # a slice is no copy yet


def _source(found: Any, count: int, scale: Any, zero_point: Any) -> tensors.Source:
    """What a query or a log gives, [count, ...], not checked for NaN and Inf yet."""
    data, dtype, _ = tensors.as_numpy(found, "features")
    quantised = dtype in tensors.QUANTISED
    if data.ndim < 2 or len(data) != count or not (quantised or dtype in tensors.FLOATS):
        raise TrainingError(
            f"features of shape {list(data.shape)} and dtype {dtype} for {count} images, expected floats [{count}, ...]"
        )
    return tensors.source(found, data.shape[1:], scale=scale, zero_point=zero_point)
