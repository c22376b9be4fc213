"""Run the experiments of the paper's tables, one after another, and keep what comes out."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastinv
from fastinv.errors import DataError, FastinvError, SplitError
from fastinv.experiment import MODELS, Experiment, Pixels, Scores
from fastinv.inverters import Inverter
from fastinv.places import sweep
from fastinv.reproduce import results
from fastinv.reproduce.paper import TABLES, Cell, cells
from fastinv.reproduce.recipe import CHOSEN_ON, choose
from fastinv.reproduce.report import RECORDS, REPORT, write_report
from fastinv.reproduce.results import Result
from fastinv.reproduce.settings import EFFORTS, Effort, identity
from fastinv.schedule import Schedule
from fastinv.split import Split, normalise


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
        threads: of rMLE and inverse networks; training takes those that torch is set to.
        progress: whether to show progress bars.
        device: what trains, as of `fastinv.schedule.Schedule`.
    """

    data: str
    out: Path
    tables: Sequence[str] = tuple(TABLES)
    splits: Sequence[str] | None = None
    changes: dict[str, Any] | None = None
    seed: int = 0
    threads: int | None = None
    progress: bool = True
    device: str | None = None


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
    known = dict.fromkeys(at for table in job.tables for at in TABLES[table].splits(name))
    beyond = [at for at in job.splits or () if at not in known]
    if beyond or not chosen:
        where = f" at {beyond[0]}" if beyond else ""
        there = f"; they have {', '.join(known)}" if known else ""
        raise SplitError(f"tables {', '.join(job.tables)} have nothing for {name}{where}{there}")
    Schedule(effort.target_epochs, 1, 1.0, seed=job.seed, device=job.device)  # refuses what none trains with
    results.expect_ours(job.out, [model.name for model in MODELS.values()], (REPORT, RECORDS))
    folder = job.out / name
    results.claim(folder, identity(experiment, effort))
    sweep(job.out)
    waiting = [cell for cell in chosen if results.read(folder, cell) is None]
    before = len(chosen) - len(waiting)
    print(f"{name}: experiments: {len(chosen)}, done before: {before}", flush=True)
    write_report(job.out)  # refuses what is damaged
    failed = 0
    if waiting or not results.knows_target(folder):
        runner = _Runner.with_target(experiment, effort, folder, job.threads, job.progress, job.device)
        for cell in waiting:
            title = f"{cell.split:7} {cell.attack.title:55}"
            try:
                found = runner.run(cell)
            except FastinvError as error:
                failed += 1
                print(f"{title} failed: {' '.join(str(error).split())}", flush=True)
                continue
            runner.keep(cell, found)
            print(f"{title} {_summary(cell, found.result)}", flush=True)
            write_report(job.out)  # whatever ends the run, it tells what there is
    return Outcome(len(waiting) - failed, before, failed, write_report(job.out))


@dataclass(frozen=True)
class _Found:
    """What an experiment gave."""

    inverter: Inverter
    recovered: Pixels
    scores: Scores
    result: Result


@dataclass(frozen=True)
class _Runner:
    """Runs experiments on one target."""

    experiment: Experiment
    effort: Effort
    folder: Path
    target: nn.Module
    threads: int | None
    progress: bool
    device: str | None

    @classmethod
    def with_target(
        cls,
        experiment: Experiment,
        effort: Effort,
        folder: Path,
        threads: int | None,
        progress: bool,
        device: str | None,
    ) -> _Runner:
        """With the target trained, or read where it was before."""
        file, checkpoint = folder / results.WEIGHTS, folder / results.CHECKPOINT
        target = experiment.target(
            effort.target_epochs,
            file=file,
            checkpoint=checkpoint,
            progress=progress,
            precision=effort.precision,
            device=device,
        )
        checkpoint.unlink(missing_ok=True)
        accuracy = experiment.accuracy(target, progress)
        content = hashlib.sha256()
        for weights in target.state_dict().values():
            content.update(weights.numpy().tobytes())
        results.write_target(folder, content.hexdigest(), accuracy, experiment.held_out(effort.scored))
        print(f"{experiment.model.name}: {accuracy:.2%} of the test images classified right", flush=True)
        return cls(experiment, effort, folder, target, threads, progress, device)

    def run(self, cell: Cell) -> _Found:
        """Learn, choose, recover and score."""
        model = self.experiment.model
        split = Split(self.target, cell.split, model.mean, model.std)
        seconds: dict[str, float] = {}
        with _timed(seconds, "learn"):
            learned = self._learn(cell, split)
        chosen: dict[str, Any] = {"chosen_on": 0, "recipe": {}, "trials": []}
        if cell.attack.kind == "inverse_network":
            inverter: Inverter = self.experiment.inverse_network(split, learned, **self._provenance(cell))
        else:
            with _timed(seconds, "choose"):
                images = self._attacker_images(cell.attack.knowledge or "distribution", CHOSEN_ON)
                features = self._features_to_choose_by(cell, split, images)
                best, trials = choose(
                    self.experiment,
                    split,
                    learned,
                    images,
                    features,
                    self.effort.optimizer,
                    self.threads,
                    self.progress,
                )
            inverter = self.experiment.rmle(split, learned, best.options, **self._provenance(cell))
            records = [trial.record() for trial in trials]
            chosen = {"chosen_on": len(images), "recipe": best.record(), "trials": records}
        truth = self.experiment.held_out(self.effort.scored)
        features = split.features(truth)
        with _timed(seconds, "recover"):
            recovered, report = fastinv.invert(
                features, inverter, return_report=True, threads=self.threads, progress=self.progress
            )
        ran_on = {
            "fastinv": fastinv.__version__,
            "torch": torch.__version__,
            "backend": report.backend,
            "isa": report.isa,
            "threads": torch.get_num_threads(),
        }
        scores = Scores.of(truth, recovered)
        result = Result.of(cell, scores, **chosen, seconds=seconds, ran_on=ran_on)
        return _Found(inverter, recovered, scores, result)

    def keep(self, cell: Cell, found: _Found) -> None:
        """Write what an experiment gave; it is done then."""
        found.inverter.save(self.folder / f"{cell.name}.finv")
        results.write(self.folder, cell, found.result, found.scores, found.recovered)
        for checkpoint in self.folder.glob(f"{cell.name}*.checkpoint"):
            checkpoint.unlink()

    def _learn(self, cell: Cell, split: Split, variant: int = 0) -> nn.Module:
        """An inverse network, a shadow, or the edge itself; another variant is another shadow of the same images."""
        attack = cell.attack
        if attack.knowledge is None:
            return split.edge
        options: dict[str, Any] = {
            "seed": (self.experiment.seed + variant) % 2**32,
            "progress": self.progress,
            "precision": self.effort.precision,
            "device": self.device,
            "checkpoint": self.folder / f"{cell.name}{f'-{variant}' if variant else ''}.checkpoint",
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the features of .* queried again")  # this system may be asked as often
            images = self._attacker_images(attack.knowledge, self.effort.images)
            if attack.kind == "inverse_network":
                epochs = self.effort.inverse_network_epochs
                learned: nn.Module = fastinv.train_inverse_network(split, images, epochs=epochs, **options)
                return learned
            assert attack.architecture is not None
            options |= {"epochs": self.effort.shadow_epochs, "variant": variant}
            return self.experiment.shadow(
                attack.kind, split, attack.knowledge, attack.architecture, len(images), **options
            )

    def _features_to_choose_by(self, cell: Cell, split: Split, images: Pixels) -> Pixels:
        """Features of images such as the attacker will see: the edge's, or if he may not ask it another shadow's."""
        if cell.attack.kind != "shadow":
            found: Pixels = split.features(images)
            return found
        other = self._learn(cell, split, variant=1)
        with torch.no_grad():
            return np.asarray(other(normalise(torch.from_numpy(images), split.mean, split.std)))

    def _attacker_images(self, knowledge: str, limit: int | None) -> Pixels:
        """As many images as an attacker has, but for a limit."""
        limits = (len(self.experiment.half(knowledge)), limit, self.effort.images)
        return self.experiment.attacker_images(knowledge, min(n for n in limits if n is not None))

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
