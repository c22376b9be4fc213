"""Images as users hold them: pixels in [0, 1], or bytes, whose 255 is 1; and what is most likely wrong with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import FastinvError, FeatureError
from fastinv.ops.base import Shape
from fastinv.tensors import FLOATS, Array, as_float32, finite

if TYPE_CHECKING:
    import torch

KINDS = ("uint8", *FLOATS)

# Images that go through a model at once: more are hardly faster, and take much memory.
MAX_IMAGES = 256
MAX_BYTES = 16 * 2**20  # of float32 pixels


def as_pixels(data: npt.NDArray[Any], dtype: str) -> Array:
    """What `tensors.as_numpy` gives of images, one of `KINDS`, as float32 pixels."""
    values = as_float32(data, dtype)
    return values / np.float32(255) if dtype == "uint8" else values


def checked(data: npt.NDArray[Any], dtype: str, error: type[FastinvError] = FeatureError) -> Array:
    """As `as_pixels`; raise `error` where they hold NaN or Inf, or are of 0 to 255."""
    values = as_pixels(data, dtype)
    if not finite(values):
        raise error("images hold NaN or Inf; drop or mend them")
    expect_pixels(values, error)
    return values


def expect_pixels(values: npt.NDArray[Any], error: type[FastinvError] = FeatureError) -> None:
    """Raise `error` where images hold NaN, or are of 0 to 255: where of what is not black the most is above 2.

    Noise, and images that no clamp has bounded, may leave [0, 1].
    """
    highest = values.max(initial=0)
    if np.isnan(highest):
        raise error("images hold NaN; drop or mend them")
    if highest > 2 and 2 * np.count_nonzero(values > 2) > np.count_nonzero(values > 0):
        raise error(
            f"images with pixels up to {highest:g}, most of them above 2; expected pixels in [0, 1]: divide those of "
            "0 to 255 by 255, or pass them as uint8"
        )


def at_once(shape: Shape) -> int:
    """How many images [C, H, W] to ask a model about at once."""
    return max(1, min(MAX_IMAGES, MAX_BYTES // max(1, 4 * math.prod(shape))))


def joined(first: torch.Tensor, ask: Callable[[slice], torch.Tensor], count: int) -> torch.Tensor:
    """`first`, what a model gives for the first images, and what `ask` gives for the others, as many at once: in one
    tensor [count, ...], and in memory once."""
    size = len(first)
    if count <= size:
        return first
    whole = first.new_empty((count, *first.shape[1:]))
    whole[:size] = first
    for start in range(size, count, size):
        whole[start : start + size] = ask(slice(start, start + size))
    return whole


def to_channels_first(what: str) -> str:
    """What to do with images or features whose channels come last."""
    return f"pass {what}.transpose(0, 3, 1, 2), or .permute(0, 3, 1, 2) in torch"


def channels_last_hint(shape: Shape) -> str:
    """What to do where images of this shape were refused because their channels come last; else nothing."""
    if len(shape) != 3 or shape[2] not in (1, 3) or shape[0] in (1, 3):
        return ""
    return f"; the channels seem to come last: {to_channels_first('images')}"
