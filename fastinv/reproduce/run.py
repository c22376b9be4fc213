"""Run the experiments of the paper's tables, one after another, and keep what comes out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import fastinv
from fastinv.errors import DataError, SplitError
from fastinv.experiment import results
from fastinv.experiment.cells import Cell
from fastinv.experiment.run import Runner
from fastinv.experiment.scores import Pixels
from fastinv.experiment.target import MODELS, Experiment
from fastinv.inverters import RMLE, InverseNetwork
from fastinv.places import sweep
from fastinv.reproduce.paper import SHALLOW, TABLES, cells
from fastinv.reproduce.report import RECORDS, REPORT, write_report
from fastinv.reproduce.settings import EFFORTS, Effort, identity
from fastinv.schedule import Schedule
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
    failed: dict[Cell, str] = {}
    if waiting or not results.knows_target(folder):
        runner = PaperRunner.with_target(experiment, effort, folder, job.threads, job.progress, job.device)
        failed = runner.run(waiting, lambda _: write_report(job.out))
    return Outcome(len(waiting) - len(failed), before, len(failed), write_report(job.out))


@dataclass(frozen=True)
class PaperRunner(Runner):
    """Runs experiments on one of the paper's targets."""

    experiment: Experiment
    effort: Effort
    target: nn.Module
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
    ) -> PaperRunner:
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
        truth = experiment.held_out(effort.scored)
        sha256 = results.sha256(weights.numpy() for weights in target.state_dict().values())
        results.write_target(folder, sha256, accuracy, truth)
        print(f"{experiment.model.name}: {accuracy:.2%} of the test images classified right", flush=True)
        tell = partial(print, flush=True)
        return cls(folder, truth, effort.optimizer, threads, progress, tell, experiment, effort, target, device)

    def split(self, at: str) -> Split:
        return Split(self.target, at, self.experiment.model.mean, self.experiment.model.std)

    def learn(self, cell: Cell, split: Split, variant: int, **options: Any) -> nn.Module:
        attack = cell.attack
        assert attack.knowledge is not None
        options |= {
            "seed": (self.experiment.seed + variant) % 2**32,
            "precision": self.effort.precision,
            "device": self.device,
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

    def inverse_network(self, cell: Cell, split: Split, module: nn.Module) -> InverseNetwork:
        return self.experiment.inverse_network(split, module, **cell.attack.provenance)

    def rmle(self, cell: Cell, split: Split, edge: nn.Module) -> Callable[[dict[str, Any]], RMLE]:
        return lambda options: self.experiment.rmle(split, edge, options, **cell.attack.provenance)

    def attacker_images(self, cell: Cell, count: int) -> Pixels:
        return self._attacker_images(cell.attack.knowledge or "distribution", count)

    def is_deep(self, at: str) -> bool:
        return at not in SHALLOW

    def _attacker_images(self, knowledge: str, limit: int | None) -> Pixels:
        """As many images as an attacker has, but for a limit."""
        limits = (len(self.experiment.half(knowledge)), limit, self.effort.images)
        return self.experiment.attacker_images(knowledge, min(n for n in limits if n is not None))
