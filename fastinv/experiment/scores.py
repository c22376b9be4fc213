"""How close recovered images are to the truth, as one experiment's figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastinv.metrics import psnr, ssim

Pixels = npt.NDArray[np.float32]

MOST_PSNR = 100.0  # dB; an image without any error has infinite PSNR, which no mean can hold
RECOGNISABLE = 0.3  # SSIM below which the paper calls an image not recognisable


@dataclass(frozen=True)
class Scores:
    """How close recovered images are to the truth, for each image."""

    psnr: npt.NDArray[np.float64]
    ssim: npt.NDArray[np.float64]

    @classmethod
    def of(cls, truth: Pixels, recovered: Pixels) -> Scores:
        """Scores of images [N, C, H, W]."""
        return cls(psnr(truth, recovered), ssim(truth, recovered))

    @property
    def means(self) -> tuple[float, float]:
        """Mean PSNR in dB, for which an image counts `MOST_PSNR` at most, and mean SSIM."""
        return float(self.psnr.clip(max=MOST_PSNR).mean()), float(self.ssim.mean())

    @property
    def recognisable(self) -> float:
        """The fraction of images whose SSIM is at least `RECOGNISABLE`."""
        return float((self.ssim >= RECOGNISABLE).mean())

    def captions(self) -> list[str]:
        """One text an image."""
        return [f"{p:.1f} dB / {s:.2f}" for p, s in zip(self.psnr, self.ssim, strict=True)]

    def __str__(self) -> str:
        psnr, ssim = self.means
        return f"PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"
