"""Experiments on a model of the user's: what is learned, and by whom; what is told of them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Sequence
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
from fastinv.auditing.attacks import ATTACKS
from fastinv.auditing.points import Cuts, Point, exported
from fastinv.auditing.protection import Protect, Protection, Query, describe, protected
from fastinv.auditing.report import FOLDER, REPORT, REPORTS, strongest, write_report
from fastinv.data import noise
from fastinv.errors import FormatError, SplitError, TrainingError
from fastinv.experiment import results
from fastinv.experiment.cells import Cell
from fastinv.experiment.results import Result
from fastinv.experiment.run import Runner
from fastinv.experiment.scores import Pixels, Scores
from fastinv.inverters import RMLE, InverseNetwork, load_start
from fastinv.places import sweep
from fastinv.split import Split
from fastinv.training import accuracy, seeded

NOISE = 1000  # apart from the seeds of training: what is sent has other noise than what attackers learn from


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

    @property
    def strongest(self) -> dict[str, str]:
        """By split point the attack of the highest mean SSIM."""
        return dict(strongest(self.results))


@dataclass(frozen=True)
class Effort:
    """How much work goes into each attack; see `audit`."""

    kind: str
    width: int
    depth: int
    epochs: int
    shadow_epochs: int
    optimizer: str
    precision: str


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

    def audit(self, chosen: Sequence[str], attacks: Collection[str]) -> AuditReport:
        """Do what is not done yet."""
        out = self.folder.parent
        results.expect_ours(out, [FOLDER], REPORTS)
        results.claim(self.folder, self._identity())
        sweep(out)
        if not (self.folder / results.TRUTH).exists():
            results.write_truth(self.folder, self.truth)
        wanted = [*(["inverse_network"] if "refined" in attacks else []), *attacks]  # which the latter starts from
        cells = [Cell(name, ATTACKS[attack]) for name in chosen for attack in dict.fromkeys(wanted)]
        waiting = [cell for cell in cells if self._known(cell) is None]
        self.tell(f"experiments: {len(cells):,}, done before: {len(cells) - len(waiting):,}")
        before = results.split_points(self.folder)
        names = list(dict.fromkeys([*self.cuts.names, *before, *chosen]))
        nothing = self._nothing()
        points: dict[str, Point] = {}
        whole = self._accuracy(lambda: self.cuts.model) if self.protect is None else None  # the same wherever it is cut

        def report(failed: dict[Cell, str]) -> dict[Cell, Result]:
            everything = (Cell(name, attack) for name in names for attack in ATTACKS.values())
            found = {cell: known for cell in everything if (known := self._known(cell)) is not None}
            for at in dict.fromkeys(cell.split for cell in found):
                points[at] = points.get(at) or self._point(at, whole)
            named = {cell: replace(result, attack=_key(cell)[1]) for cell, result in found.items()}
            write_report(out, type(self.cuts.model).__name__, points, named, nothing, failed)
            return found

        report({})  # refuses what is damaged
        failed = self.run(waiting, report)
        found = report(failed)
        return AuditReport(
            results={_key(cell): result for cell, result in found.items()},
            points=[points[at] for at in dict.fromkeys(cell.split for cell in found)],
            nothing=nothing.means,
            failed={_key(cell): reason for cell, reason in failed.items()},
            ran=len(waiting) - len(failed),
            path=out / REPORT,
        )

    def split(self, at: str) -> Split:
        return self.cuts.split(at)

    def sent(self, features: Pixels) -> Pixels:
        with seeded((self.seed + NOISE) % 2**32):
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
        network = exported(module, self._feature_shape(split))
        return InverseNetwork(network, split.mean, split.std, provenance=self._provenance(cell))

    def rmle(self, cell: Cell, split: Split, edge: nn.Module) -> Callable[[dict[str, Any]], RMLE]:
        network = exported(edge, self.truth.shape[1:])
        start = RMLE(network, mean=split.mean, std=split.std, clamp=None, provenance=self._provenance(cell))
        if cell.attack.kind == "refined":
            file = self.folder / f"{Cell(cell.split, ATTACKS['inverse_network']).name}.finv"
            start = replace(start, init=load_start(file))
        return lambda options: replace(start, **options)

    def attacker_images(self, cell: Cell, count: int) -> Pixels:
        chosen = self._images_of(cell)[:count]
        return pixels.as_pixels(chosen, str(chosen.dtype))

    def _images_of(self, cell: Cell) -> npt.NDArray[Any]:
        """All that the attacker has."""
        if cell.attack.knowledge != "noise":
            return self.images
        shape = self.images.shape[1:]
        return noise(len(self.images), shape, seed=self.seed, mean=self.cuts.mean, std=self.cuts.std)

    def untrained_edge(self, split: Split, variant: int) -> nn.Module:
        """What a shadow starts from; another variant has other weights."""
        assert self.untrained is not None
        try:
            with seeded((self.seed + 1 + variant) % 2**32):
                made = self.untrained()
        except Exception as error:  # of the user's code, any
            raise TrainingError(f"audit: untrained() fails ({type(error).__name__}: {error!s:.200})") from error
        edge = replace(self.cuts, model=made).split(split.at).edge
        fresh, known = (dict(e.named_parameters()) for e in (edge, split.edge))
        if {name: p.shape for name, p in fresh.items()} != {name: p.shape for name, p in known.items()}:
            raise TrainingError("audit: untrained() gives a model of another structure; expected the model's own")
        if known and all(torch.equal(fresh[name].cpu(), known[name].cpu()) for name in known):
            raise TrainingError(
                f"audit: untrained() gives, up to {split.at!r}, the model's own weights, with which nobody needs a "
                "shadow; expected others, such as those that a new model starts from"
            )
        return edge

    def facts(self, cell: Cell) -> dict[str, Any]:
        if cell.attack.kind != "shadow" or self.labels is None:
            return {}
        return {"labels": results.sha256([self.labels])}

    def _known(self, cell: Cell) -> Result | None:
        """What the folder knows of an experiment."""
        known = results.read(self.folder, cell)
        if known is None or known.ran_on.items() >= self.facts(cell).items():
            return known
        raise FormatError(
            f"{self.folder}: holds {cell.name} of other labels; choose another folder, or go on with the same"
        )

    def _point(self, at: str, whole: float | None) -> Point:
        """What is told of a split point, of a model that gets so many classes right where nothing is protected."""
        right = whole if self.protect is None else self._accuracy(lambda: self._as_sent(at))
        return replace(self.cuts.point(at, self.truth.shape[1:]), accuracy=right)

    def _as_sent(self, at: str) -> nn.Module:
        """The model that sees what is sent."""
        assert self.protect is not None
        split = self.split(at)
        return nn.Sequential(split.edge, Protection(self.protect), split.cloud)

    def _accuracy(self, model: Callable[[], nn.Module]) -> float | None:
        """How many of the true images a model puts into their class; None where that is not known."""
        if self.truth_labels is None:
            return None
        try:
            with seeded((self.seed + NOISE) % 2**32):
                return accuracy(model(), self.truth, self.truth_labels, mean=self.cuts.mean, std=self.cuts.std)
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

    def _feature_shape(self, split: Split) -> tuple[int, ...]:
        shape: tuple[int, ...] = split.features(self.truth[:1]).shape[1:]
        return shape

    def _probed_shape(self) -> tuple[int, ...]:
        """Of the features that tell one protection from another: the same whatever is attacked now."""
        names = self.cuts.names
        return self._feature_shape(self.split(names[0])) if names else self.truth.shape[1:]

    def _identity(self) -> dict[str, Any]:
        """What has to agree for two results to be of one audit, as JSON values."""
        state = self.cuts.model.state_dict().values()
        weights = (v.detach().cpu().reshape(-1).view(torch.uint8).numpy() for v in state if isinstance(v, torch.Tensor))
        protect = None if self.protect is None else describe(self.protect, self._probed_shape(), self.seed)
        return {
            "model": type(self.cuts.model).__name__,
            "code": hashlib.sha256(self.cuts.code.encode()).hexdigest(),
            "weights": results.sha256(weights),
            "images": results.sha256([self.images]),
            "truth": results.sha256([self.truth]),
            "mean": list(self.cuts.mean),
            "std": list(self.cuts.std),
            "seed": self.seed,
            "protect": protect,
            **asdict(self.effort),
        }


def _key(cell: Cell) -> tuple[str, str]:
    return cell.split, next(name for name, attack in ATTACKS.items() if attack == cell.attack)
