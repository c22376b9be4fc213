"""Audit a model of the user's: the door, which refuses what cannot work before anything is done."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from fastinv import pixels, tensors
from fastinv.auditing.attacks import ATTACKS, DEFAULT, SHADOWS
from fastinv.auditing.points import Cuts
from fastinv.auditing.protection import Protect
from fastinv.auditing.report import FOLDER
from fastinv.auditing.runner import AuditReport, AuditRunner, Effort
from fastinv.engine import expect_choice
from fastinv.errors import FeatureError, FormatError, SplitError, TrainingError
from fastinv.experiment.recipe import STEPS
from fastinv.models import make_decoder
from fastinv.schedule import Schedule
from fastinv.training import class_indices


def audit(
    model: nn.Module,
    images: Any,
    truth: Any,
    out: str | Path,
    *,
    at: Sequence[str] | None = None,
    mean: Sequence[float] | float = (0.0,),
    std: Sequence[float] | float = (1.0,),
    attacks: Collection[str] = DEFAULT,
    labels: Any = None,
    untrained: Callable[[], nn.Module] | None = None,
    protect: Protect | None = None,
    truth_labels: Any = None,
    example: torch.Tensor | None = None,
    kind: str = "paper",
    width: int = 64,
    depth: int = 4,
    epochs: int = 10,
    shadow_epochs: int = 10,
    optimizer: str = "lbfgs",
    precision: str = "float32",
    seed: int = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: bool = False,
    tell: Callable[[str], object] | None = None,
) -> AuditReport:
    """How much of its inputs a model gives away where it is cut: attack it there, and score what is recovered.

    What the attacks do not recover, others may: the figures are what leaks at least. What is done is kept in the
    folder `out`, and not done again by a call with the same images and settings.

    Args:
        model: the model to be cut, as of `fastinv.Split`.
        images: the attacker's, pixels [N, C, H, W] as of `Split.features`: such as the model's inputs, or the best that
            he may have.
        truth: [M, C, H, W], of which none is among the attacker's: what he wants to recover, from their features alone.
        out: the folder for `report.md`, `results.json` and pictures; in its folder `attacks` every attack's `.finv`.
        at: split points; None takes all that `fastinv.split_points` finds.
        mean, std: the model's input normalisation.
        attacks: some of `ATTACKS`: "rmle" (he has the edge), "inverse_network" (he may query it), "refined" (he has it,
            and images: rMLE that starts from what the inverse network gives, which is run, too),
            "inverse_network-noise" (he may query it, but has no images), "fit_shadow" (he may, and knows its
            structure) and "shadow" (he has the cloud, the edge's structure and labels, and may query nothing).
        labels: of the attacker's images, class indices [N], for "shadow".
        untrained: makes an untrained model of the same structure, for "fit_shadow" and "shadow".
        protect: what is done to features before they are sent, such as adding noise: tensors [n, ...] to tensors of
            the same shape. Attackers see what it gives; rMLE goes through the edge without it.
        truth_labels: of `truth`, class indices [M]: the report says how many the model gets right from what is sent.
        example: an input [N >= 2, C, H, W] of the model, as of `Split`; None takes one where torch.fx cannot trace it.
        kind, width, depth, epochs: of inverse networks, as of `fastinv.train_inverse_network`.
        shadow_epochs: of shadows.
        optimizer: of rMLE: "lbfgs", or "adam", the paper's, which takes longer. λ, β and the number of steps are chosen
            on images of the attacker's.
        precision, seed, device: of all training, as of `fastinv.schedule.Schedule`.
        threads: of rMLE and inverse networks; training takes those that torch is set to.
        progress: whether to show progress bars.
        tell: takes a line about each experiment, such as `print`.

    Raises:
        SplitError: the model cannot be cut, or has no such layer.
        TrainingError: attacks or options that are none, or lack what they need.
        FeatureError: images that the model does not take, or that are none.
        FormatError: the folder holds something else, or results of other settings.
    """
    _expect_attacks(attacks, labels, untrained)
    if not isinstance(out, (str, os.PathLike)):
        raise FormatError(f"audit: out {out!r:.60}, expected the path of a folder")
    own, wanted = _images("images", images), _images("truth", truth)
    if own.shape[1:] != wanted.shape[1:]:
        raise TrainingError(
            f"audit: images {list(own.shape)} and truth {list(wanted.shape)}, expected [N, C, H, W] and [M, C, H, W]"
        )
    schedule, of_shadows = (Schedule(n, 1, 1.0, "adam", seed, precision, device) for n in (epochs, shadow_epochs))
    if not isinstance(optimizer, str) or optimizer not in STEPS:
        raise TrainingError(f"audit: optimizer {optimizer!r:.40}, expected one of {', '.join(STEPS)}")
    expect_choice(None, "float32", threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes, which are told when they come
        make_decoder((1,), own.shape[1:], kind, width=width, depth=depth)  # raises
    effort = Effort(kind, int(width), int(depth), schedule.epochs, of_shadows.epochs, optimizer, precision)
    names = [at] if isinstance(at, str) else at
    if not (names is None or (isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names))):
        raise SplitError(f"audit: at {at!r:.60}, expected names of layers, or None for all after which it can be cut")
    cuts = Cuts.of(model, mean, std, example, own.shape[1:], named=names is not None)
    chosen = list(cuts.names if names is None else dict.fromkeys(names))
    if not chosen:
        raise SplitError("audit: the model has no layer after which it can be cut; name some by at=")
    runner = AuditRunner(
        folder=Path(out) / FOLDER,
        truth=pixels.as_pixels(wanted, str(wanted.dtype)),
        optimizer=optimizer,
        threads=threads,
        progress=progress,
        tell=tell or (lambda _: None),
        cuts=cuts,
        images=own,
        labels=None if labels is None else class_indices(labels, len(own)).numpy(),
        untrained=untrained,
        protect=protect,
        truth_labels=None if truth_labels is None else class_indices(truth_labels, len(wanted)).numpy(),
        effort=effort,
        seed=schedule.seed,
        device=device,
    )
    for name in chosen:
        if name not in cuts.names:
            runner.split(name)  # raises where there is no such layer
    last = runner.split(chosen[-1])
    runner.sent(last.features(runner.truth[:1]))  # raises where the model does not take them
    if any(attack in SHADOWS for attack in attacks):
        runner.untrained_edge(last, 0)  # raises where it is none
    return runner.audit(chosen, attacks)


def _expect_attacks(attacks: Collection[str], labels: Any, untrained: Any) -> None:
    several = isinstance(attacks, Collection) and not isinstance(attacks, str) and len(attacks) > 0
    if not (several and all(isinstance(attack, str) and attack in ATTACKS for attack in attacks)):
        raise TrainingError(f"audit: attacks {attacks!r:.80}, expected some of {', '.join(ATTACKS)}")
    shadows = [attack for attack in attacks if attack in SHADOWS]
    if shadows and (not callable(untrained) or isinstance(untrained, nn.Module)):
        raise TrainingError(
            f"audit: {shadows[0]} needs untrained=, a function that makes an untrained model of the same structure"
        )
    if labels is None and "shadow" in attacks:
        raise TrainingError("audit: shadow needs labels=, the classes of the attacker's images")


def _images(what: str, data: Any) -> npt.NDArray[Any]:
    """Images [N, C, H, W], at least one: bytes as they are, pixels as float32."""
    found, dtype, _ = tensors.as_numpy(data, what)
    if found.ndim != 4 or dtype not in pixels.KINDS or not found.size:
        raise FeatureError(
            f"audit: {what} {list(found.shape)} {dtype}, expected float pixels in [0, 1], or uint8, [N, C, H, W], at "
            "least one"
        )
    return found if dtype == "uint8" else pixels.checked(found, dtype)
