"""Time to the objective that the paper's recipe reaches: 500 steps of Adam, lr 1e-2, λ 0.1, β 2, nothing clamped.

    python bench/objective.py --case conv11 --batch 16 --threads 2

Features are those of crops of photographs, edges have random weights. Each method takes as few steps as bring the mean
objective down to Adam's; what the peers would need is the time of some of Adam's steps, times 500 over their number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contenders import SOLVER_PEERS, Call, Contender, forget
from peers import choose, named, present, race, surroundings

from fastinv import _core, benchmark
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject
from fastinv.cli.arguments import positive, table
from fastinv.data import MAX_SIDE, photographs
from fastinv.engine import Solver, compile
from fastinv.inverters import RMLE
from fastinv.metrics import psnr
from fastinv.ops.base import Shape

STEPS = 500  # of Adam
PEER_STEPS = 20  # that are timed of a peer: each takes as long as the next
METHODS = ("adam", "lbfgs", "exact")
MOST_STEPS = 2000

Row = dict[str, Any]


def crops(shape: Shape, count: int) -> npt.NDArray[np.float32]:
    """Crops of photographs, [count, *shape], grey where there is one channel, enlarged where they are too small."""
    factor = math.ceil(max(shape[1:]) / MAX_SIDE)
    _, test = photographs(train=1, test=count, side=math.ceil(max(shape[1:]) / factor))
    pixels = test.pixels(np.linspace(0, len(test) - 1, count).astype(np.int64))
    pixels = pixels.repeat(factor, axis=2).repeat(factor, axis=3)[:, :, : shape[1], : shape[2]]
    return pixels.mean(axis=1, keepdims=True) if shape[0] == 1 else pixels


def recipe_of(subject: Subject, method: str, steps: int) -> RMLE:
    assert subject.recipe is not None
    return dataclasses.replace(subject.recipe, optimizer=method, steps=steps)


def fewest_steps(subject: Subject, method: str, features: Any, goal: float, threads: int) -> int | None:
    """The fewest steps that bring the mean objective to the goal; None where `MOST_STEPS` do not."""

    def reaches(steps: int) -> bool:
        _, report = compile(recipe_of(subject, method, steps), "cpu", threads=threads).solve(features)
        assert report.objective is not None
        return bool(report.objective.mean() <= goal * (1 + 1e-6))

    low, high = 0, 1
    while not reaches(high):
        low, high = high, 2 * high
        if low >= MOST_STEPS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def measure(subject: Subject, batch: int, threads: int, peers: Sequence[Contender], repeat: int) -> list[Row]:
    """One row a method and a peer: steps, seconds and PSNR."""
    assert subject.recipe is not None
    truth = crops(subject.recipe.input_shape, batch)
    with torch_threads(threads), torch.no_grad():
        x = subject.eager(torch.from_numpy(truth))
        features = x.numpy()
        _, report = compile(recipe_of(subject, "adam", STEPS), "cpu", threads=threads).solve(features)
        assert report.objective is not None
        goal = float(report.objective.mean())
        calls: dict[str, Call] = {}
        rows: dict[str, Row] = {}
        for method in METHODS:
            if method == "exact" and recipe_of(subject, "auto", STEPS).method != "exact":
                continue
            steps = fewest_steps(subject, method, features, goal, threads)
            if steps is None:
                print(f"{subject.name}: {method} is not there after {MOST_STEPS} steps")
                continue
            solver: Solver = compile(recipe_of(subject, method, steps), "cpu", threads=threads)
            images, report = solver.solve(features)
            assert report.objective is not None
            name = f"fastinv {method}"
            calls[name] = partial(solver.solve, features)
            objective, quality = float(report.objective.mean()), float(psnr(truth, images).mean())
            rows[name] = {"steps": steps, "objective": objective, "psnr": quality, "factor": 1.0}
        for peer in peers:
            calls[peer.name] = partial(peer.build(subject, x, threads), PEER_STEPS)
            rows[peer.name] = {"steps": STEPS, "objective": goal, "psnr": None, "factor": STEPS / PEER_STEPS}
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
    result.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each contender")
    result.add_argument("--peers", help="as in eager,torch.compile; all where left out")
    result.add_argument("--repeat", type=positive, default=5, help="bursts of each, in turns; medians count")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    cases = choose(list(benchmark.solvers(STEPS)), args.case)
    if not cases:
        arguments.error(f"--case: no name holds {' or '.join(args.case)}")
    try:
        peers = list(present(SOLVER_PEERS if args.peers is None else named(args.peers, SOLVER_PEERS)))
    except ValueError as unknown_peer:
        arguments.error(f"--peers: {unknown_peer}")
    facts = surroundings(args.threads)
    print(f"{facts['cpu']}, {facts['isa']}, threads {args.threads}, medians of {args.repeat} bursts")
    rows: list[Row] = []
    for subject in cases:
        found = measure(subject, args.batch, args.threads, peers, args.repeat)
        print(f"\n{subject.name}, batch {args.batch}\n{as_table(found)}", flush=True)
        rows += found
        forget()
    if args.json is not None:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
