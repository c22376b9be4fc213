"""Run the attacks on a model of yours, at each split point, and report what they recover."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastinv import pixels, tensors
from fastinv.attacks.inverse_network import train_inverse_network
from fastinv.attacks.shadow import fit_shadow, train_shadow
from fastinv.auditing.points import Cuts, Point, exported
from fastinv.auditing.protection import Protect, Protection, Query, describe, protected
from fastinv.auditing.report import ATTACKS as FOLDER
from fastinv.auditing.report import RECORDS, REPORT, write_report
from fastinv.data import noise
from fastinv.errors import SplitError, TrainingError
from fastinv.experiment import results
from fastinv.experiment.cells import Attack, Cell
from fastinv.experiment.recipe import STEPS
from fastinv.experiment.results import Result
from fastinv.experiment.run import Runner
from fastinv.experiment.scores import Pixels, Scores
from fastinv.inverters import RMLE, InverseNetwork
from fastinv.models import make_decoder
from fastinv.places import sweep
from fastinv.schedule import Schedule
from fastinv.split import Split
from fastinv.training import accuracy, class_indices, seeded

ATTACKS = {
    "rmle": Attack("white-box: rMLE", "rmle"),
    "inverse_network": Attack("black-box: inverse network", "inverse_network", "distribution"),
    "inverse_network-noise": Attack("black-box: inverse network, from noise", "inverse_network", "noise"),
    "fit_shadow": Attack("black-box: shadow fitted to queries, rMLE", "fit_shadow", "distribution", "same"),
    "shadow": Attack("query-free: shadow, rMLE", "shadow", "distribution", "same"),
}
DEFAULT = ("rmle", "inverse_network")  # all that need only the model and images
SHADOWS = ("fit_shadow", "shadow")


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Attributes:
        results: of all experiments in the folder, by split point and attack, in the order of the model's forward.
        points: the split points that they are of.
        nothing: mean PSNR (dB) and SSIM of the mean of the attacker's images, which needs no features.
        failed: why other experiments failed, by split point and attack.
        ran: how many ran now; the others were done before.
        path: the report.
    """

    results: dict[tuple[str, str], Result]
    points: list[Point]
    nothing: tuple[float, float]
    failed: dict[tuple[str, str], str]
    ran: int
    path: Path


@dataclass(frozen=True)
class Effort:
    """How much work goes into each attack; see `audit`."""

    kind: str = "paper"
    width: int = 64
    depth: int = 4
    epochs: int = 10
    shadow_epochs: int = 10
    optimizer: str = "lbfgs"
    precision: str = "float32"


def audit(
    model: nn.Module,
    images: Any,
    truth: Any,
    out: str | Path,
    *,
    at: Sequence[str] | None = None,
    mean: Sequence[float] | float = (0.0,),
    std: Sequence[float] | float = (1.0,),
    attacks: Sequence[str] = DEFAULT,
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
        attacks: some of `ATTACKS`: "rmle" (he has the edge), "inverse_network" (he may query it),
            "inverse_network-noise" (he may, but has no images), "fit_shadow" (he may, and knows its structure) and
            "shadow" (he has the cloud, its structure and labels, and may query nothing).
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
    own, own_type, _ = tensors.as_numpy(images, "images")
    wanted, wanted_type, _ = tensors.as_numpy(truth, "truth")
    _expect_images(own, wanted)
    effort = Effort(kind, width, depth, epochs, shadow_epochs, optimizer, precision)
    _expect_effort(effort, own.shape[1:], seed, device)
    cuts = Cuts.of(model, mean, std, example, own.shape[1:])
    chosen = cuts.names if at is None else list(dict.fromkeys([at] if isinstance(at, str) else at))
    if not chosen:
        raise SplitError("audit: the model has no layer after which it can be cut; name some by at=")
    runner = AuditRunner(
        folder=Path(out) / FOLDER,
        truth=pixels.checked(wanted, wanted_type),
        optimizer=optimizer,
        threads=threads,
        progress=progress,
        tell=tell or (lambda _: None),
        cuts=cuts,
        images=own if own_type == "uint8" else pixels.checked(own, own_type),
        labels=None if labels is None else class_indices(labels, len(own)).numpy(),
        untrained=untrained,
        protect=protect,
        truth_labels=None if truth_labels is None else class_indices(truth_labels, len(wanted)).numpy(),
        effort=effort,
        seed=seed,
        device=device,
    )
    for name in chosen:
        if name not in cuts.names:
            runner.split(name)  # raises where there is no such layer
    first = runner.split(chosen[0])
    runner.sent(first.features(runner.truth[:1]))  # raises where the model does not take them
    if any(attack in SHADOWS for attack in attacks):
        runner.untrained_edge(first, 0)  # raises where it is none
    return runner.audit(chosen, list(dict.fromkeys([*cuts.names, *chosen])), attacks)


@dataclass(frozen=True)
class AuditRunner(Runner):
    """Runs experiments on a model of the user's; but for `cuts`, its fields are arguments of `audit`."""

    cuts: Cuts
    images: npt.NDArray[Any]
    labels: npt.NDArray[Any] | None
    untrained: Callable[[], nn.Module] | None
    protect: Protect | None
    truth_labels: npt.NDArray[np.int64] | None
    effort: Effort
    seed: int
    device: str | torch.device | None

    def audit(self, chosen: Sequence[str], points: Sequence[str], attacks: Sequence[str]) -> AuditReport:
        """Do what is not done yet."""
        out = self.folder.parent
        results.expect_ours(out, [FOLDER], (REPORT, RECORDS))
        results.claim(self.folder, self._identity())
        sweep(out)
        results.write_truth(self.folder, self.truth)
        cells = [Cell(name, ATTACKS[attack]) for name in chosen for attack in dict.fromkeys(attacks)]
        waiting = [cell for cell in cells if results.read(self.folder, cell) is None]
        self.tell(f"experiments: {len(cells):,}, done before: {len(cells) - len(waiting):,}")
        everything = [Cell(name, attack) for name in points for attack in ATTACKS.values()]
        facts: dict[str, Point] = {}
        nothing = self._nothing()
        failed: dict[Cell, str] = {}

        def report() -> dict[Cell, Result]:
            found = {cell: known for cell in everything if (known := results.read(self.folder, cell)) is not None}
            for at in {cell.split for cell in found}.difference(facts):
                facts[at] = self._point(at)
            write_report(out, type(self.cuts.model).__name__, facts, found, nothing, failed)
            return found

        report()  # refuses what is damaged
        failed |= self.run(waiting, report)
        found = report()
        return AuditReport(
            results={_key(cell): result for cell, result in found.items()},
            points=[facts[name] for name in points if name in facts],
            nothing=nothing.means,
            failed={_key(cell): reason for cell, reason in failed.items()},
            ran=len(waiting) - len(failed),
            path=out / REPORT,
        )

    def split(self, at: str) -> Split:
        return self.cuts.split(at)

    def sent(self, features: Pixels) -> Pixels:
        with seeded(self.seed):
            return protected(features, self.protect)

    def learn(self, cell: Cell, split: Split, variant: int, **options: Any) -> nn.Module:
        options |= {"seed": (self.seed + variant) % 2**32, "precision": self.effort.precision, "device": self.device}
        images, query = self._images_of(cell), Query(split, self.protect)
        with warnings.catch_warnings(), seeded(options["seed"]):
            warnings.filterwarnings("ignore", "the features of .* queried again")  # this system may be asked as often
            if cell.attack.kind == "inverse_network":
                effort = self.effort
                options |= {"kind": effort.kind, "width": effort.width, "depth": effort.depth}
                return train_inverse_network(query, images, epochs=effort.epochs, **options)
            options |= {"epochs": self.effort.shadow_epochs}
            start = self.untrained_edge(split, variant)
            if cell.attack.kind == "fit_shadow":
                return fit_shadow(query, images, start, **options)
            assert self.labels is not None
            options |= {"mean": split.mean, "std": split.std}
            return train_shadow(split.cloud, images, self.labels, start, **options)

    def inverse_network(self, cell: Cell, split: Split, module: nn.Module) -> InverseNetwork:
        shape = split.features(self.truth[:1]).shape[1:]
        network = exported(module, shape)
        return InverseNetwork(network, split.mean, split.std, provenance=self._provenance(cell))

    def rmle(self, cell: Cell, split: Split, edge: nn.Module) -> Callable[[dict[str, Any]], RMLE]:
        network = exported(edge, self.truth.shape[1:])
        start = RMLE(network, mean=split.mean, std=split.std, clamp=None, provenance=self._provenance(cell))
        return lambda options: replace(start, **options)

    def attacker_images(self, cell: Cell, count: int) -> Pixels:
        chosen = self._images_of(cell)[:count]
        return pixels.as_pixels(chosen, str(chosen.dtype))

    def _images_of(self, cell: Cell) -> npt.NDArray[Any]:
        """All that the attacker has."""
        if cell.attack.knowledge != "noise":
            return self.images
        mean, std = tensors.normalisation(self.cuts.mean, self.cuts.std, self.images.shape[1], TrainingError)
        return noise(len(self.images), self.images.shape[1:], seed=self.seed, mean=mean, std=std)

    def untrained_edge(self, split: Split, variant: int) -> nn.Module:
        """What a shadow starts from; another variant has other weights."""
        assert self.untrained is not None
        with seeded((self.seed + 1 + variant) % 2**32):
            edge = Split(self.untrained(), split.at, example=self.cuts.example).edge
        fresh, known = edge.state_dict(), split.edge.state_dict()
        if fresh.keys() != known.keys():
            raise TrainingError("audit: untrained() gives a model of another structure; expected the model's own")
        if known and all(torch.equal(fresh[name].cpu(), known[name].cpu()) for name in known):
            raise TrainingError(
                "audit: untrained() gives the model's own weights, which no attacker without queries has; expected "
                "others, such as those that a new model starts from"
            )
        return edge

    def _point(self, at: str) -> Point:
        point = self.cuts.point(at, self.truth.shape[1:])
        return point if self.truth_labels is None else replace(point, accuracy=self._accuracy(at))

    def _accuracy(self, at: str) -> float | None:
        """How many of the true images the model puts into their class."""
        assert self.truth_labels is not None
        mean, std = tensors.normalisation(self.cuts.mean, self.cuts.std, error=SplitError)
        options: dict[str, Any] = {"mean": mean, "std": std}
        try:
            if self.protect is None:
                return accuracy(self.cuts.model, self.truth, self.truth_labels, **options)
            split = self.cuts.split(at, quiet=True)
            sent = nn.Sequential(split.edge, Protection(self.protect), split.cloud)
            with seeded(self.seed):
                return accuracy(sent, self.truth, self.truth_labels, **options)
        except (SplitError, TrainingError):  # there is no cloud, or the model is no classifier of these classes
            return None

    def _nothing(self) -> Scores:
        """What one recovers without any features: the mean of the attacker's images."""
        total = np.zeros(self.truth.shape[1:])
        for start, stop in tensors.chunks(len(self.images), pixels.at_once(self.truth.shape[1:])):
            part = self.images[start:stop]
            total += pixels.as_pixels(part, str(part.dtype)).sum(0, dtype=np.float64)
        mean = (total / len(self.images)).astype(np.float32)
        return Scores.of(self.truth, np.broadcast_to(mean, self.truth.shape))

    def _provenance(self, cell: Cell) -> dict[str, Any]:
        known = {"target": type(self.cuts.model).__name__, "split": cell.split, "seed": self.seed}
        return {**known, **cell.attack.provenance, "torch": torch.__version__}

    def _probed_shape(self) -> tuple[int, ...]:
        """Of the features that tell one protection from another: the same whatever is attacked now."""
        first = self.cuts.names[:1]
        return self.cuts.point(first[0], self.truth.shape[1:]).feature_shape if first else self.truth.shape[1:]

    def _identity(self) -> dict[str, Any]:
        """What has to agree for two results to be of one audit, as JSON values."""
        weights = (value.detach().cpu().numpy() for value in self.cuts.model.state_dict().values())
        mean, std = tensors.normalisation(self.cuts.mean, self.cuts.std, error=SplitError)
        return {
            "model": type(self.cuts.model).__name__,
            "weights": results.sha256(weights),
            "images": results.sha256([self.images]),
            "truth": results.sha256([self.truth]),
            "mean": list(mean),
            "std": list(std),
            "seed": self.seed,
            "protect": None if self.protect is None else describe(self.protect, self._probed_shape(), self.seed),
            **asdict(self.effort),
        }


def _key(cell: Cell) -> tuple[str, str]:
    return cell.split, next(name for name, attack in ATTACKS.items() if attack == cell.attack)


def _expect_attacks(attacks: Sequence[str], labels: Any, untrained: Any) -> None:
    unknown = [attack for attack in attacks if attack not in ATTACKS]
    if isinstance(attacks, str) or unknown or not attacks:
        raise TrainingError(f"audit: attacks {attacks!r:.80}, expected some of {', '.join(ATTACKS)}")
    if untrained is None and (shadows := [attack for attack in attacks if attack in SHADOWS]):
        raise TrainingError(
            f"audit: {shadows[0]} needs untrained=, a callable that makes an untrained model of the same structure"
        )
    if labels is None and "shadow" in attacks:
        raise TrainingError("audit: shadow needs labels=, the classes of the attacker's images")


def _expect_images(images: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
    if images.ndim != 4 or images.shape[1:] != truth.shape[1:] or 0 in (len(images), truth.size):
        raise TrainingError(
            f"audit: images {list(images.shape)} and truth {list(truth.shape)}, expected [N, C, H, W] and [M, C, H, W] "
            "of one shape, and at least one of each"
        )


def _expect_effort(effort: Effort, shape: tuple[int, ...], seed: int, device: Any) -> None:
    """Refuse before anything is trained what would fail after it."""
    if effort.optimizer not in STEPS:
        raise TrainingError(f"audit: optimizer {effort.optimizer!r:.40}, expected one of {', '.join(STEPS)}")
    for epochs in (effort.epochs, effort.shadow_epochs):
        Schedule(epochs, 1, 1.0, seed=seed, precision=effort.precision, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes, which are told when they come
        make_decoder((1,), shape, effort.kind, width=effort.width, depth=effort.depth)
