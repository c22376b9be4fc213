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
from fastinv.experiment import Experiment, Pixels, Scores
from fastinv.split import Split, normalise

CHOSEN_ON = 64  # training images
SHALLOW = ("conv1", "conv11")  # where the paper takes the fewer steps
TV_WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TV_BETAS = (2.0, 1.0)  # the published code's, the paper's
# By optimizer: the steps that λ and β are chosen with, and those that deep layers may need. Adam's are the paper's.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam": ({"lr": 1e-2, "steps": 500}, {"lr": 1e-3, "steps": 5000}),
    "lbfgs": ({"optimizer": "lbfgs", "steps": 100}, {"steps": 300}),
}
NO_WORSE = 0.1  # dB that more steps have to gain: less is within what another 64 images would change


@dataclass(frozen=True)
class Trial:
    """A recipe, and the mean PSNR (dB) and SSIM that it gave."""

    options: dict[str, Any]
    psnr: float
    ssim: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.options, "psnr": round(self.psnr, 3), "ssim": round(self.ssim, 4)}


def choose(
    experiment: Experiment, split: Split, edge: nn.Module, images: Pixels, optimizer: str = "adam"
) -> tuple[dict[str, Any], list[Trial]]:
    """rMLE's options through `edge` that recover these images best, and all that were tried.

    λ and β are chosen with the fewer of the optimizer's `STEPS`. Where the paper takes more, these are tried, too, and
    taken if they are better by more than `NO_WORSE`.

    Args:
        edge: the edge at `split`, or a shadow of it.
        images: pixels [N, C, H, W] that the attacker has.
    """
    with torch.no_grad():
        features = edge(normalise(torch.from_numpy(images), split.mean, split.std)).numpy()

    def attempt(options: dict[str, Any]) -> Trial:
        recovered = fastinv.invert(features, experiment.rmle(split, edge, options))
        scores = Scores.of(images, recovered)
        return Trial(options, float(scores.psnr.mean()), float(scores.ssim.mean()))

    short, long = STEPS[optimizer]
    weights = [(0.0, TV_BETAS[0]), *((weight, beta) for beta in TV_BETAS for weight in TV_WEIGHTS)]
    trials = [attempt({"tv_weight": weight, "tv_beta": beta, **short}) for weight, beta in weights]
    best = max(trials, key=lambda trial: trial.psnr)
    if split.at not in SHALLOW:
        longer = attempt(best.options | long)
        trials.append(longer)
        if longer.psnr > best.psnr + NO_WORSE:
            best = longer
    return best.options, trials
