"""How rMLE is set for a split point: λ, β and the number of steps, which the paper leaves open.

They are chosen on training images that the attacker has, from features such as he will see: those of the edge, if he
has it or may query it; otherwise those of a second shadow, which differs from the first as the edge does. A shadow's
own features would not do: it fits them exactly, so that a λ far too small seems best. This needs nothing that an
attacker lacks, and no test image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

import fastinv
from fastinv.errors import FeatureError
from fastinv.experiment.scores import Pixels, Scores
from fastinv.inverters import RMLE

CHOSEN_ON = 64  # training images
TV_WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
TV_BETAS = (2.0, 1.0)  # the published code's, the paper's
# By optimizer: the steps that λ and β are chosen with, and those that deep layers may need. Adam's are the paper's.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adam": ({"lr": 1e-2, "steps": 500}, {"lr": 1e-3, "steps": 5000}),
    "lbfgs": ({"optimizer": "lbfgs", "steps": 100}, {"steps": 300}),
}
NOTHING = (0.0, 0.0)  # PSNR and SSIM of images that are none
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
    rmle: Callable[[dict[str, Any]], RMLE],
    images: Pixels,
    features: Pixels,
    optimizer: str = "adam",
    *,
    deep: bool = True,
    threads: int | None = None,
    progress: bool = False,
) -> tuple[Trial, list[Trial]]:
    """The recipe by which rMLE recovers these images best, and all that were tried.

    λ and β are chosen with the fewer of the optimizer's `STEPS`. More are tried, too, and taken if they are better by
    more than `NO_WORSE`.

    Args:
        rmle: makes one of these options.
        images: pixels [N, C, H, W] that the attacker has.
        features: of these images, [N, ...], as the attacker will see them.
        deep: whether more steps are tried.
        progress: whether to show a progress bar.

    Raises:
        FeatureError: no recipe gives images.
    """

    def attempt(options: dict[str, Any]) -> Trial:
        recovered = fastinv.invert(features, rmle(options), threads=threads)
        try:
            return Trial(options, *Scores.of(images, recovered).means)
        except FeatureError:  # NaN: too large a step for this λ
            return Trial(options, *NOTHING)

    short, long = STEPS[optimizer]
    weights = [(0.0, TV_BETAS[0]), *((weight, beta) for beta in TV_BETAS for weight in TV_WEIGHTS)]
    trials = []
    for weight, beta in tqdm(weights, "recipes", unit="recipe", disable=not progress):
        trials.append(attempt({"tv_weight": weight, "tv_beta": beta, **short}))
    best = max(trials, key=lambda trial: trial.psnr)
    if deep:
        longer = attempt(best.options | long)
        trials.append(longer)
        if longer.psnr > best.psnr + NO_WORSE:
            best = longer
    if (best.psnr, best.ssim) == NOTHING:
        raise FeatureError("rMLE gives NaN, whatever its λ")
    return best, trials
