"""Rows of images with captions, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastinv.errors import FeatureError

if TYPE_CHECKING:
    from PIL import Image

TILE = 96  # pixels of a tile's side, at least; small images are enlarged by a whole factor
GAP = 8
LINE = 18  # height of a line of text
TEXT = 13


@dataclass(frozen=True)
class Row:
    """One row of a picture.

    Args:
        title: the text above it.
        images: [N, C, H, W], pixels in [0, 1], C 1 or 3.
        captions: a text under each image, or none.
    """

    title: str
    images: npt.NDArray[np.float32]
    captions: Sequence[str] = ()


def picture(rows: Sequence[Row]) -> Image.Image:
    """The rows below each other; images of all rows have the same shape.

    Raises:
        FeatureError: no row, rows of different shapes, or images that are not [N, 1 or 3, H, W].
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {row.images.shape for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or next(iter(shapes))[1] not in (1, 3):
        raise FeatureError(f"images of shapes {sorted(shapes)}, expected one shape [N, C, H, W] with 1 or 3 channels")
    count, _, height, width = rows[0].images.shape
    factor = max(1, -(-TILE // max(height, width)))
    step = width * factor + GAP
    heights = [2 * LINE + height * factor + GAP if row.captions else LINE + height * factor + GAP for row in rows]
    font = ImageFont.load_default(TEXT)
    titles = max(math.ceil(font.getlength(row.title)) for row in rows)
    canvas = Image.new("RGB", (GAP + max(count * step, titles + GAP), GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, space in zip(rows, heights, strict=True):
        draw.text((GAP, top), row.title, "black", font)
        for index, image in enumerate(row.images):
            left = GAP + index * step
            canvas.paste(_tile(image, factor), (left, top + LINE))
        for index, caption in enumerate(row.captions):
            draw.text((GAP + index * step, top + LINE + height * factor), caption, "dimgray", font)
        top += space
    return canvas


def _tile(image: npt.NDArray[np.float32], factor: int) -> Image.Image:
    """One image [C, H, W], every pixel enlarged to factor × factor."""
    from PIL import Image

    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).repeat(factor, 1).repeat(factor, 2)
    return Image.fromarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0).copy())
