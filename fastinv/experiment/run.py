"""Run experiments one after another: learn, choose a recipe, recover, score, keep."""

from __future__ import annotations

import glob
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastinv
from fastinv.errors import FastinvError
from fastinv.experiment import results
from fastinv.experiment.cells import Cell
from fastinv.experiment.recipe import CHOSEN_ON, choose
from fastinv.experiment.results import Result
from fastinv.experiment.scores import Pixels, Scores
from fastinv.inverters import RMLE, InverseNetwork, Inverter
from fastinv.split import Split, normalise


@dataclass(frozen=True)
class Found:
    """What an experiment gave."""

    inverter: Inverter
    recovered: Pixels
    scores: Scores
    result: Result


@dataclass(frozen=True)
class Runner(ABC):
    """Runs experiments on one target; what they need of it, subclasses say.

    Attributes:
        folder: for the results.
        truth: the test images that are recovered, pixels [N, C, H, W].
        optimizer: of rMLE, a key of `fastinv.experiment.recipe.STEPS`.
        threads: of rMLE and inverse networks; training takes those that torch is set to.
        progress: whether to show progress bars.
        tell: takes a line about each experiment.
    """

    folder: Path
    truth: Pixels
    optimizer: str
    threads: int | None
    progress: bool
    tell: Callable[[str], object]

    @abstractmethod
    def split(self, at: str) -> Split:
        """The target, cut."""

    @abstractmethod
    def learn(self, cell: Cell, split: Split, variant: int, **options: Any) -> nn.Module:
        """An inverse network or a shadow; another variant is another shadow of the same images.

        Args:
            options: `progress` and `checkpoint` of the training.
        """

    @abstractmethod
    def inverse_network(self, cell: Cell, split: Split, module: nn.Module) -> InverseNetwork:
        """A trained inverse network, exported."""

    @abstractmethod
    def rmle(self, cell: Cell, split: Split, edge: nn.Module) -> Callable[[dict[str, Any]], RMLE]:
        """What makes rMLE through the edge or a shadow of it, of any options."""

    @abstractmethod
    def attacker_images(self, cell: Cell, count: int) -> Pixels:
        """The first images that the attacker has, as many at most."""

    def sent(self, features: Pixels) -> Pixels:
        """What the edge's owner sends of features [N, ...]."""
        return features

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What more is kept of an experiment, as JSON values."""
        return {}

    def is_deep(self, at: str) -> bool:
        """Whether rMLE may need more steps at this split point."""
        return True

    def run(self, waiting: Sequence[Cell], report: Callable[[dict[Cell, str]], object]) -> dict[Cell, str]:
        """Run experiments and keep what they give; of those that failed, why. One that fails does not stop the others.

        Args:
            report: called with those after each, so that whatever ends the run, it tells what there is.
        """
        failed: dict[Cell, str] = {}
        at = max((len(cell.split) for cell in waiting), default=0)
        attack = max((len(cell.attack.title) for cell in waiting), default=0)
        for cell in waiting:
            title = f"{cell.split:{at}}  {cell.attack.title:{attack}}"
            try:
                found = self.attempt(cell)
            except FastinvError as error:
                failed[cell] = " ".join(str(error).split())
                self.tell(f"{title}  failed: {failed[cell]}")
            else:
                self.keep(cell, found)
                self.tell(f"{title}  {_summary(cell, found.result)}")
            report(failed)
        return failed

    def attempt(self, cell: Cell) -> Found:
        """Learn, choose, recover and score."""
        split = self.split(cell.split)
        seconds: dict[str, float] = {}
        with _timed(seconds, "learn"):
            learned = self._learned(cell, split)
        chosen: dict[str, Any] = {"chosen_on": 0, "recipe": {}, "trials": []}
        if cell.attack.kind == "inverse_network":
            inverter: Inverter = self.inverse_network(cell, split, learned)
        else:
            rmle = self.rmle(cell, split, learned)
            with _timed(seconds, "choose"):
                images = self.attacker_images(cell, CHOSEN_ON)
                features = self._features_to_choose_by(cell, split, images)
                best, trials = choose(
                    rmle,
                    images,
                    features,
                    self.optimizer,
                    deep=self.is_deep(cell.split),
                    threads=self.threads,
                    progress=self.progress,
                )
            inverter = rmle(best.options)
            records = [trial.record() for trial in trials]
            chosen = {"chosen_on": len(images), "recipe": best.record(), "trials": records}
        features = self.sent(split.features(self.truth))
        with _timed(seconds, "recover"):
            recovered, report = fastinv.invert(
                features, inverter, return_report=True, threads=self.threads, progress=self.progress
            )
        ran_on = {
            **self.facts(cell),
            "fastinv": fastinv.__version__,
            "torch": torch.__version__,
            "backend": report.backend,
            "isa": report.isa,
            "threads": torch.get_num_threads(),
        }
        scores = Scores.of(self.truth, recovered)
        result = Result.of(cell, scores, **chosen, seconds=seconds, ran_on=ran_on)
        return Found(inverter, recovered, scores, result)

    def keep(self, cell: Cell, found: Found) -> None:
        """Write what an experiment gave; it is done then."""
        found.inverter.save(self.folder / f"{cell.name}.finv")
        results.write(self.folder, cell, found.result, found.scores, found.recovered)
        for checkpoint in self.folder.glob(f"{glob.escape(cell.name)}*.checkpoint"):
            checkpoint.unlink()

    def _learned(self, cell: Cell, split: Split, variant: int = 0) -> nn.Module:
        if cell.attack.knowledge is None:
            return split.edge
        checkpoint = self.folder / f"{cell.name}{f'-{variant}' if variant else ''}.checkpoint"
        return self.learn(cell, split, variant, progress=self.progress, checkpoint=checkpoint)

    def _features_to_choose_by(self, cell: Cell, split: Split, images: Pixels) -> Pixels:
        """Features of images such as the attacker will see: the edge's, or if he may not ask it another shadow's."""
        if cell.attack.kind != "shadow":
            return self.sent(split.features(images))
        other = self._learned(cell, split, variant=1)
        with torch.no_grad():
            return self.sent(np.asarray(other(normalise(torch.from_numpy(images), split.mean, split.std))))


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - begin, 2)


def _summary(cell: Cell, result: Result) -> str:
    text = f"{result.psnr:5.2f} dB, {result.ssim:.3f}"
    if cell.split in cell.attack.published:
        psnr, ssim = cell.attack.published[cell.split]
        text += f"  (paper: {psnr:.2f}, {ssim:.3f})"
    return f"{text}  {sum(result.seconds.values()):,.0f} s"
