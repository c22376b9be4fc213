"""How rMLE is set for a split point: λ, β and the number of steps, which the paper leaves open.

They are chosen on training images that the attacker has, through the model that the attack goes through, the edge or a
shadow of it: this needs nothing that an attacker lacks, and no test image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastinv
from fastinv.attacks.rmle import PAPER_PRESETS
from fastinv.experiment import Experiment, Pixels, Scores
from fastinv.split import Split, normalise

CHOSEN_ON = 64  # training images
TV_WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TV_BETAS = (2.0, 1.0)  # the published code's, the paper's
SHORT = {"lr": 1e-2, "steps": 500}  # the paper's for shallow layers
LONG = {"lr": 1e-3, "steps": 5000}  # for deep ones
NO_WORSE = 0.1  # dB that ten times the steps have to gain: less is within what another 64 images would change


@dataclass(frozen=True)
class Trial:
    """A recipe, and the mean PSNR (dB) and SSIM that it gave."""

    options: dict[str, Any]
    psnr: float
    ssim: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.options, "psnr": round(self.psnr, 3), "ssim": round(self.ssim, 4)}


def choose(experiment: Experiment, split: Split, edge: nn.Module, images: Pixels) -> tuple[dict[str, Any], list[Trial]]:
    """rMLE's options through `edge` that recover these images best, and all that were tried.

    λ and β are chosen with 500 steps of 1e-2. Where the paper takes 5,000 of 1e-3, these are tried too, and
    taken if they are better by more than `NO_WORSE`.

    Args:
        edge: the edge at `split`, or a shadow of it.
        images: pixels [N, C, H, W] that the attacker has.
    """
    with torch.no_grad():
        features = edge(normalise(torch.from_numpy(images), split.mean, split.std)).numpy()

    def attempt(**options: Any) -> Trial:
        recovered = fastinv.invert(features, experiment.rmle(split, edge, options))
        scores = Scores.of(images, recovered)
        return Trial(options, float(scores.psnr.mean()), float(scores.ssim.mean()))

    weights = [(0.0, TV_BETAS[0]), *((weight, beta) for beta in TV_BETAS for weight in TV_WEIGHTS)]
    trials = [attempt(tv_weight=weight, tv_beta=beta, **SHORT) for weight, beta in weights]
    best = max(trials, key=lambda trial: trial.psnr)
    if not is_shallow(split.at):
        longer = attempt(**best.options | LONG)
        trials.append(longer)
        if longer.psnr > best.psnr + NO_WORSE:
            best = longer
    return best.options, trials


def is_shallow(at: str) -> bool:
    """Whether the paper's recipe for the split point has few steps."""
    return bool(PAPER_PRESETS.get(at, LONG)["steps"] == SHORT["steps"])
