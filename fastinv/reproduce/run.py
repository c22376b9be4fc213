"""Run the experiments of the paper's tables, one after another, and keep what comes out."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastinv
from fastinv.errors import DataError, FastinvError, SplitError
from fastinv.experiment import Experiment, Scores
from fastinv.inverters import Inverter
from fastinv.places import sweep
from fastinv.reproduce import results
from fastinv.reproduce.paper import TABLES, Cell, cells
from fastinv.reproduce.recipe import CHOSEN_ON, Trial, choose
from fastinv.reproduce.report import write_report
from fastinv.reproduce.results import Result
from fastinv.reproduce.settings import EFFORTS, Effort, identity
from fastinv.split import Split


@dataclass(frozen=True)
class Reproduction:
    """What to run.

    Args:
        data: a data set's folder, or "photographs".
        out: the folder for the results; each target has one of its own in it.
        tables: of the paper, the names in `TABLES`.
        splits: the tables' split points to do; None takes all.
        changes: fields of the target's `Effort` that are to be others.
        seed: of everything.
        progress: whether to show progress bars.
    """

    data: str
    out: Path
    tables: Sequence[str] = tuple(TABLES)
    splits: Sequence[str] | None = None
    changes: dict[str, Any] | None = None
    seed: int = 0
    progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run ended: how many experiments ran, were done before, and failed; and the report."""

    ran: int
    before: int
    failed: int
    report: Path


def run(job: Reproduction) -> Outcome:
    """Do what is not done yet, and print what is found. An experiment that fails does not stop the others.

    Raises:
        DataError, SplitError, TrainingError, FormatError: the data, the split points or the folder do not fit.
    """
    unknown = [table for table in job.tables if table not in TABLES]
    if unknown:
        raise DataError(f"tables {', '.join(map(str, unknown))}: not the paper's; expected some of {', '.join(TABLES)}")
    experiment = Experiment.on(job.data, job.seed)
    name = experiment.model.name
    effort = replace(EFFORTS[name], **job.changes or {})
    chosen = cells(name, job.tables, job.splits)
    if not chosen:
        known = ", ".join(dict.fromkeys(at for table in job.tables for at in TABLES[table].splits(name)))
        raise SplitError(
            f"tables {', '.join(job.tables)} have nothing for {name} at {', '.join(job.splits or ())}"
            f"{f'; they have {known}' if known else ''}"
        )
    for cell in chosen:
        _check(experiment, cell)
    folder = job.out / name
    results.claim(folder, identity(experiment, effort))
    sweep(folder)
    waiting = [cell for cell in chosen if results.read(folder, cell) is None]
    print(f"{name}: {len(chosen)} experiments, {len(chosen) - len(waiting)} of them done before", flush=True)
    failed = 0
    if waiting or not results.knows_target(folder):
        runner = _Runner.with_target(experiment, effort, folder, job.progress)
        for cell in waiting:
            title = f"{cell.split:7} {cell.attack.title:55}"
            try:
                result = runner.run(cell)
            except FastinvError as error:
                failed += 1
                print(f"{title} failed: {' '.join(str(error).split())}", flush=True)
                continue
            print(f"{title} {_summary(cell, result)}", flush=True)
            write_report(job.out)  # whatever ends the run, it tells what there is
    return Outcome(len(waiting) - failed, len(chosen) - len(waiting), failed, write_report(job.out))


def _check(experiment: Experiment, cell: Cell) -> None:
    """Find out before the training what cannot be done."""
    experiment.untrained(cell.split)
    if cell.attack.architecture == "different":
        experiment.untrained_edge(cell.split, "different")


@dataclass(frozen=True)
class _Runner:
    """Runs experiments on one target."""

    experiment: Experiment
    effort: Effort
    folder: Path
    target: nn.Module
    progress: bool

    @classmethod
    def with_target(cls, experiment: Experiment, effort: Effort, folder: Path, progress: bool) -> _Runner:
        """With the target trained, or read where it was before."""
        file, checkpoint = folder / "target.pt", folder / "target.checkpoint"
        target = experiment.target(effort.target_epochs, file=file, checkpoint=checkpoint, progress=progress)
        checkpoint.unlink(missing_ok=True)
        accuracy = experiment.accuracy(target, progress)
        results.write_target(folder, accuracy, experiment.held_out(effort.scored))
        print(f"{experiment.model.name}: {accuracy:.2%} of the test images classified right", flush=True)
        return cls(experiment, effort, folder, target, progress)

    def run(self, cell: Cell) -> Result:
        """Learn, choose, recover, score, and keep all of it."""
        model = self.experiment.model
        split = Split(self.target, cell.split, model.mean, model.std)
        seconds: dict[str, float] = {}
        checkpoint = self.folder / f"{cell.name}.checkpoint"
        with _timed(seconds, "learn"):
            learned = self._learn(cell, split, checkpoint)
        trials: list[Trial] = []
        recipe: dict[str, Any] = {}
        if cell.attack.kind == "inverse_network":
            inverter: Inverter = self.experiment.inverse_network(split, learned, **self._provenance(cell))
        else:
            with _timed(seconds, "choose"):
                knowledge = cell.attack.knowledge or "distribution"
                count = min(CHOSEN_ON, len(self.experiment.half(knowledge)))
                images = self.experiment.attacker_images(knowledge, count)
                recipe, trials = choose(self.experiment, split, learned, images, self.effort.optimizer)
            inverter = self.experiment.rmle(split, learned, recipe, **self._provenance(cell))
        inverter.save(self.folder / f"{cell.name}.finv")
        truth = self.experiment.held_out(self.effort.scored)
        features = split.features(truth)
        with _timed(seconds, "recover"):
            recovered, report = fastinv.invert(features, inverter, return_report=True, progress=self.progress)
        scores = Scores.of(truth, recovered)
        result = Result.of(
            cell,
            scores,
            recipe=recipe,
            trials=[trial.record() for trial in trials],
            seconds=seconds,
            ran_on={
                "fastinv": fastinv.__version__,
                "torch": torch.__version__,
                "backend": report.backend,
                "isa": report.isa,
                "threads": len(os.sched_getaffinity(0)),
            },
        )
        results.write(self.folder, cell, result, scores, recovered)
        checkpoint.unlink(missing_ok=True)
        return result

    def _learn(self, cell: Cell, split: Split, checkpoint: Path) -> nn.Module:
        """An inverse network, a shadow, or the edge itself."""
        attack = cell.attack
        if attack.knowledge is None:
            return split.edge
        options: dict[str, Any] = {"seed": self.experiment.seed, "progress": self.progress, "checkpoint": checkpoint}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the features of .* queried again")  # this system may be asked as often
            if attack.kind == "inverse_network":
                images = self.experiment.attacker_images(attack.knowledge, self.effort.images)
                epochs = self.effort.inverse_network_epochs
                learned: nn.Module = fastinv.train_inverse_network(split, images, epochs=epochs, **options)
            else:
                assert attack.architecture is not None
                options["epochs"] = self.effort.shadow_epochs
                learned = self.experiment.shadow(
                    attack.kind, split, attack.knowledge, attack.architecture, self.effort.images, **options
                )
        return learned

    def _provenance(self, cell: Cell) -> dict[str, Any]:
        attack = cell.attack
        known = {"attack": attack.kind, "knowledge": attack.knowledge, "architecture": attack.architecture}
        return {name: value for name, value in known.items() if value is not None}


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
