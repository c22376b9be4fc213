"""PSNR and SSIM against scikit-image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import skimage.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastinv
from fastinv import FeatureError
from fastinv.metrics import CHUNK

Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def pair(shape: tuple[int, ...], noise: float = 0.2, seed: int = 0) -> Pair:
    """Images and noisy ones, which leave [0, 1] here and there."""
    rng = np.random.default_rng(seed)
    truth = rng.random(shape, dtype=np.float32)
    return truth, (truth + noise * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)


def expected(truth: npt.NDArray[Any], found: npt.NDArray[Any]) -> tuple[list[float], list[float]]:
    clamped = np.clip(found, 0, 1)
    psnr, ssim = skimage.metrics.peak_signal_noise_ratio, skimage.metrics.structural_similarity
    return (
        [float(psnr(t, f, data_range=1)) for t, f in zip(truth, clamped, strict=True)],
        [float(ssim(t, f, data_range=1, channel_axis=0)) for t, f in zip(truth, clamped, strict=True)],
    )


@given(
    channels=st.sampled_from([1, 2, 3]),
    height=st.integers(7, 20),
    width=st.integers(7, 20),
    noise=st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_equal_to_scikit_image(channels: int, height: int, width: int, noise: float) -> None:
    truth, found = (v.astype(np.float64) for v in pair((2, channels, height, width), noise))
    psnr, ssim = expected(truth, found)
    assert fastinv.psnr(truth, found) == pytest.approx(psnr, abs=1e-6)
    assert fastinv.ssim(truth, found) == pytest.approx(ssim, abs=1e-6)


def test_many_images_at_once_are_as_each_alone() -> None:
    truth, found = pair((CHUNK + 3, 1, 9, 8))
    psnr, ssim = fastinv.psnr(truth, found), fastinv.ssim(truth, found)
    assert psnr.shape == ssim.shape == (CHUNK + 3,)
    for index in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        one = slice(index, index + 1)
        assert fastinv.psnr(truth[one], found[one])[0] == psnr[index]
        assert fastinv.ssim(truth[one], found[one])[0] == ssim[index]


def test_equal_images() -> None:
    truth, _ = pair((2, 3, 8, 8))
    assert fastinv.psnr(truth, truth).tolist() == [np.inf, np.inf]
    assert fastinv.ssim(truth, truth).tolist() == [1.0, 1.0]


def test_the_range_is_one_whatever_the_images_span() -> None:
    dark = np.full((1, 1, 8, 8), 0.1, np.float32)
    assert fastinv.psnr(dark, dark + np.float32(0.1)) == pytest.approx(20.0, abs=1e-5)


def test_images_are_clamped_first() -> None:
    truth = np.ones((1, 1, 8, 8), np.float32)
    assert fastinv.psnr(truth, truth + np.float32(0.7)) == np.inf


@pytest.mark.parametrize("metric", [fastinv.psnr, fastinv.ssim])
def test_bytes_are_255ths(metric: Any) -> None:
    truth, found = pair((3, 1, 8, 8))
    whole = np.rint(255 * np.clip(found, 0, 1)).astype(np.uint8)
    expected = metric(truth, whole / 255.0)
    assert metric(truth, whole).tolist() == expected.tolist()
    assert metric(torch.from_numpy(whole), truth).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert (metric(whole, whole) >= 1).all()


@pytest.mark.parametrize("metric", [fastinv.psnr, fastinv.ssim])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_taken_as_they_are(metric: Any, dtype: torch.dtype) -> None:
    truth, found = (torch.from_numpy(v) for v in pair((2, 1, 8, 8)))
    assert metric(truth, found.to(dtype)).tolist() == metric(truth, found.to(dtype).float()).tolist()


@pytest.mark.parametrize("metric", [fastinv.psnr, fastinv.ssim])
@pytest.mark.parametrize("share", [1.0, 0.1])  # 0.1: mostly black, as digits are
def test_float_pixels_of_0_to_255_are_refused(metric: Any, share: float) -> None:
    truth, found = pair((2, 1, 8, 8))
    truth[truth > share] = 0
    for a, b in ((255 * truth, found), (found, 255 * truth), (truth, torch.from_numpy(255 * truth))):
        with pytest.raises(FeatureError, match="divide those of 0 to 255 by 255"):
            metric(a, b)
    found[0] = 1e6  # an image that diverged is one among others
    assert np.isfinite(metric(np.concatenate([truth, truth]), np.concatenate([found, truth + 0.5]))).all()


def test_torch_and_numpy_may_be_mixed() -> None:
    truth, found = pair((2, 1, 8, 8))
    tensor = torch.from_numpy(found).requires_grad_()
    assert fastinv.ssim(truth, tensor).tolist() == fastinv.ssim(truth, found).tolist()
    assert fastinv.psnr(tensor, truth).tolist() == fastinv.psnr(found, truth).tolist()


def test_no_images() -> None:
    none = np.empty((0, 1, 8, 8), np.float32)
    assert fastinv.psnr(none, none).shape == fastinv.ssim(none, none).shape == (0,)


@pytest.mark.parametrize("metric", [fastinv.psnr, fastinv.ssim])
def test_wrong_images_are_refused(metric: Any) -> None:
    truth, _ = pair((2, 1, 8, 8))
    with pytest.raises(FeatureError, match="two equal"):
        metric(truth, truth[:1])
    with pytest.raises(FeatureError, match="two equal"):
        metric(truth[0], truth[0])
    with pytest.raises(FeatureError, match="two equal"):
        metric(truth[..., :0], truth[..., :0])
    for dtype in (np.int8, np.int64, np.complex64):
        with pytest.raises(FeatureError, match=f"dtype {dtype.__name__}"):
            metric(truth, truth.astype(dtype))
    with pytest.raises(FeatureError, match="a list"):
        metric(truth.tolist(), truth)
    truth[1, 0, 3, 3] = np.nan
    with pytest.raises(FeatureError, match="NaN"):
        metric(truth, truth)


def test_ssim_needs_a_whole_window() -> None:
    small = np.zeros((1, 1, 6, 9), np.float32)
    with pytest.raises(FeatureError, match="6×9"):
        fastinv.ssim(small, small)
    assert fastinv.psnr(small, small) == np.inf
