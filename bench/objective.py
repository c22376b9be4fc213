"""Time to the objective that the paper's recipe reaches: 500 steps of Adam, lr 1e-2, λ 0.1, β 2, nothing clamped.

    python bench/objective.py --case conv11 --batch 16 --threads 2
    python bench/objective.py --case ReLU22 --steps 5000 --warm 10

Features are those of crops of photographs, edges have random weights. Each method takes as few steps as bring the mean
objective down to Adam's; what the peers would need is the time of some of Adam's steps, times all over their number.
Methods that start warm begin with what an inverse network gives, which has learned from other crops; their time is that
of the network and the steps, not of the training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contenders import SOLVER_PEERS, Call, Contender, forget
from peers import choose, named, present, race, surroundings

from fastinv import _core, benchmark
from fastinv.attacks.inverse_network import train_inverse_network
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject
from fastinv.cli.arguments import positive, table
from fastinv.cli.files import expect_place, replacing
from fastinv.data import MAX_SIDE, photographs
from fastinv.engine import Solver, compile
from fastinv.export import export
from fastinv.inverters import RMLE, InverseNetwork
from fastinv.metrics import psnr
from fastinv.ops.base import Shape

EXACT_PEERS = [peer for peer in SOLVER_PEERS if peer.precision == "float32"]
PEER_STEPS = 20  # that are timed of a peer: each takes as long as the next
TRAINING_CROPS = 4000

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An optimizer, and whether it begins with what an inverse network gives."""

    optimizer: str
    warm: bool = False

    def __str__(self) -> str:
        return f"{self.optimizer}, warm" if self.warm else self.optimizer


ADAM = Method("adam")
METHODS = (ADAM, Method("lbfgs"), Method("exact"), Method("adam", warm=True), Method("lbfgs", warm=True))


def crops(shape: Shape, count: int, train: bool = False) -> npt.NDArray[np.float32]:
    """Crops of photographs, [count, *shape], grey where there is one channel, enlarged where they are too small."""
    factor = math.ceil(max(shape[1:]) / MAX_SIDE)
    sets = photographs(train=count, test=count, side=math.ceil(max(shape[1:]) / factor))
    chosen = sets[0 if train else 1]
    pixels = chosen.pixels(np.linspace(0, len(chosen) - 1, count).astype(np.int64))
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)[:, :, : shape[1], : shape[2]]
    return pixels.mean(axis=1, keepdims=True) if shape[0] == 1 else pixels


def inverse_network(subject: Subject, epochs: int) -> InverseNetwork:
    """One that has learned from crops of the training photographs."""
    assert subject.recipe is not None
    images = torch.from_numpy(crops(subject.recipe.input_shape, TRAINING_CROPS, train=True))
    with torch.enable_grad():
        decoder = train_inverse_network(subject.eager, images, epochs=epochs, progress=True)
    return InverseNetwork(export(decoder, torch.zeros(2, *subject.network.output_shape)))


def recipe_of(subject: Subject, method: Method, steps: int, start: InverseNetwork | None) -> RMLE:
    assert subject.recipe is not None
    recipe = dataclasses.replace(subject.recipe, optimizer=method.optimizer, steps=steps)
    return dataclasses.replace(recipe, init=start) if method.warm and start is not None else recipe


def fewest_steps(reaches: Callable[[int], bool], most: int) -> int | None:
    """The fewest steps that reach the goal; None where `most` do not."""
    if reaches(0):
        return 0
    low, high = 0, 1
    while not reaches(high):
        low, high = high, 2 * high
        if low >= most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def measure(
    subject: Subject,
    batch: int,
    threads: int,
    peers: Sequence[Contender],
    repeat: int,
    adam_steps: int,
    start: InverseNetwork | None,
) -> list[Row]:
    """One row a method and a peer: steps, seconds and PSNR. Those that start warm need the start."""
    assert subject.recipe is not None
    truth = crops(subject.recipe.input_shape, batch)
    with torch_threads(threads), torch.no_grad():
        x = subject.eager(torch.from_numpy(truth))
        features = x.numpy()

        def solver(method: Method, steps: int) -> Solver:
            return compile(recipe_of(subject, method, steps, start), "cpu", threads=threads)

        def mean_objective(method: Method, steps: int) -> float:
            _, report = solver(method, steps).solve(features)
            assert report.objective is not None
            return float(report.objective.mean())

        goal = mean_objective(ADAM, adam_steps)

        def reaches(method: Method, steps: int) -> bool:
            return mean_objective(method, steps) <= goal * (1 + 1e-6)

        calls: dict[str, Call] = {}
        rows: dict[str, Row] = {}
        for method in METHODS:
            affine = recipe_of(subject, Method("auto"), adam_steps, None).method == "exact"
            if (method.optimizer == "exact" and not affine) or (method.warm and start is None):
                continue
            steps = fewest_steps(partial(reaches, method), 2 * adam_steps)
            if steps is None:
                print(f"{subject.name}: {method} is not there after {2 * adam_steps:,} steps")
                continue
            chosen = solver(method, steps)
            images, report = chosen.solve(features)
            assert report.objective is not None
            name = f"fastinv {method}"
            calls[name] = partial(chosen.solve, features)
            objective, quality = float(report.objective.mean()), float(psnr(truth, images).mean())
            rows[name] = {"steps": steps, "objective": objective, "psnr": quality, "factor": 1.0}
        for peer in peers:
            calls[peer.name] = partial(peer.build(subject, x, threads), PEER_STEPS)
            factor = adam_steps / PEER_STEPS
            rows[peer.name] = {"steps": adam_steps, "objective": goal, "psnr": None, "factor": factor}
        isa = os.environ.get("FASTINV_ISA", "")
        seconds, _ = race(calls, repeat, lambda: _core.fma_peak(isa, threads, 0.03))
    taken = {name: seconds[name] * row.pop("factor") for name, row in rows.items()}
    best = min((taken[peer.name] for peer in peers), default=None)
    return [
        {"case": subject.name, "batch": batch, "method": name, **row, "seconds": taken[name]}
        | {"ratio": None if best is None else best / taken[name]}
        for name, row in rows.items()
    ]


def as_table(rows: Sequence[Row]) -> str:
    header = ["", "steps", "objective", "PSNR", "ms an image", "to best peer"]
    return table(
        header,
        [
            [
                row["method"],
                f"{row['steps']:,}",
                f"{row['objective']:.5g}",
                "" if row["psnr"] is None else f"{row['psnr']:.2f}",
                f"{1e3 * row['seconds'] / row['batch']:,.3f}",
                "" if row["ratio"] is None else f"{row['ratio']:,.1f}",
            ]
            for row in rows
        ],
    )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument("--case", nargs="+", default=[], metavar="NAME", help="parts of names; all where left out")
    result.add_argument("--batch", type=positive, default=16, help="images")
    result.add_argument("--steps", type=positive, default=500, help="of Adam, whose objective is the goal")
    result.add_argument("--warm", type=positive, metavar="EPOCHS", help="train inverse networks as starts, too")
    result.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each contender")
    result.add_argument("--peers", help="as in eager,torch.compile; all where left out")
    result.add_argument("--repeat", type=positive, default=5, help="bursts of each, in turns; medians count")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too, after every case")
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    cases = choose(list(benchmark.solvers(args.steps)), args.case)
    if not cases:
        arguments.error(f"--case: no name holds {' or '.join(args.case)}")
    if args.json is not None:
        expect_place(args.json)
    try:
        peers = list(present(EXACT_PEERS if args.peers is None else named(args.peers, EXACT_PEERS)))
    except ValueError as unknown_peer:
        arguments.error(f"--peers: {unknown_peer}")
    facts = surroundings(args.threads)
    print(f"{facts['cpu']}, {facts['isa']}, threads {args.threads}, medians of {args.repeat} bursts")
    rows: list[Row] = []
    for subject in cases:
        start = None if args.warm is None else inverse_network(subject, args.warm)
        found = measure(subject, args.batch, args.threads, peers, args.repeat, args.steps, start)
        print(f"\n{subject.name}, batch {args.batch}\n{as_table(found)}", flush=True)
        rows += found
        if args.json is not None:
            with replacing(args.json) as temporary:
                temporary.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
