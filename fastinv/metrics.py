"""How close recovered images are to the truth: PSNR and SSIM per image, with a fixed data range of 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import FeatureError
from fastinv.pixels import KINDS, expect_pixels
from fastinv.tensors import as_float32, as_numpy, chunks

WINDOW = 7  # side of SSIM's uniform window, as in scikit-image
CHUNK = 256  # images filtered at once, in float64

Doubles = npt.NDArray[np.float64]


def psnr(a: Any, b: Any) -> Doubles:
    """Peak signal-to-noise ratio in dB, 10·log10(1 / MSE), of every image; infinite for equal ones.

    Args:
        a, b: images [N, C, H, W], numpy or torch: float pixels, clamped to [0, 1] first, or uint8, whose 255 is 1.

    Returns:
        [N].

    Raises:
        FeatureError: shapes that differ or are not [N, C, H, W], NaN, or float pixels of 0 to 255.
    """
    x, y = _images(a, b)
    result = np.empty(len(x))
    for start, stop in chunks(len(x), CHUNK):
        error = np.square(_pixels(x[start:stop]) - _pixels(y[start:stop])).mean(axis=(1, 2, 3))
        with np.errstate(divide="ignore"):
            result[start:stop] = 10 * np.log10(1 / error)
    return result


def ssim(a: Any, b: Any) -> Doubles:
    """Structural similarity (Wang et al. 2004) of every image, the mean over channels; 1 for equal ones.

    A uniform 7×7 window, sample covariances and K = 0.01, 0.03: what `skimage.metrics.structural_similarity` computes
    with data_range=1.

    Args:
        a, b: images [N, C, H, W] of at least 7×7 pixels, as of `psnr`.

    Returns:
        [N].

    Raises:
        FeatureError: as of `psnr`, or images that are too small.
    """
    x, y = _images(a, b)
    if min(x.shape[2:]) < WINDOW:
        raise FeatureError(f"ssim: images of {x.shape[2]}×{x.shape[3]} pixels, expected at least {WINDOW}×{WINDOW}")
    result = np.empty(len(x))
    for start, stop in chunks(len(x), CHUNK):
        result[start:stop] = _ssim(_pixels(x[start:stop]), _pixels(y[start:stop]))
    return result


def _ssim(x: Doubles, y: Doubles) -> Doubles:
    from scipy.ndimage import uniform_filter

    def local_mean(v: Doubles) -> Doubles:
        filtered: Doubles = uniform_filter(v, size=(1, 1, WINDOW, WINDOW))
        return filtered

    sample = WINDOW**2 / (WINDOW**2 - 1)
    c1, c2 = 0.01**2, 0.03**2
    mx, my = local_mean(x), local_mean(y)
    vx = sample * (local_mean(x * x) - mx * mx)
    vy = sample * (local_mean(y * y) - my * my)
    vxy = sample * (local_mean(x * y) - mx * my)
    similarity = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    edge = WINDOW // 2  # windows that leave the image do not count
    means: Doubles = similarity[:, :, edge:-edge, edge:-edge].mean(axis=(1, 2, 3))
    return means


def _images(a: Any, b: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    (x, x_type, _), (y, y_type, _) = as_numpy(a, "images"), as_numpy(b, "images")
    if x.shape != y.shape or x.ndim != 4 or 0 in x.shape[1:]:
        raise FeatureError(f"images of shapes {list(x.shape)} and {list(y.shape)}, expected two equal [N, C, H, W]")
    return _checked(x, x_type), _checked(y, y_type)


def _checked(v: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Images as they are, but for bfloat16, which numpy lacks."""
    if dtype not in KINDS:
        raise FeatureError(f"images of dtype {dtype}, expected float pixels in [0, 1], or uint8")
    v = as_float32(v, dtype) if dtype == "bfloat16" else v
    if dtype != "uint8":
        expect_pixels(v)
    return v


def _pixels(v: npt.NDArray[Any]) -> Doubles:
    doubles = v.astype(np.float64)
    clamped: Doubles = doubles / 255 if v.dtype == np.uint8 else np.clip(doubles, 0.0, 1.0)
    return clamped
