"""Time the paper's decoders beside PyTorch eager, each checked first."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastinv.backends import select
from fastinv.cli.arguments import positive, table, threads
from fastinv.cli.files import expect_place, replacing

if TYPE_CHECKING:
    from fastinv.benchmark import Timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", action="store_true", help="time every op, too")
    parser.add_argument("--rmle", action="store_true", help="time rMLE through the paper's edges, too")
    parser.add_argument("--batch", type=positive, default=256, help="images at once, or as many as fit")
    parser.add_argument("--threads", type=threads, help="for both sides; all cores where left out")
    parser.add_argument("--repeat", type=positive, default=7, help="samples of each, in turns; medians count")
    parser.add_argument("--backend", default="auto", help="cuda, cpu or torch; auto: the first that can run it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the timings there, too")


def run(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from fastinv import benchmark

    if args.json is not None:
        expect_place(args.json)
    select(args.backend, "float32", ())
    count = args.threads or len(os.sched_getaffinity(0))
    chosen = [benchmark.decoders()]
    chosen += [benchmark.ops()] if args.ops else []
    chosen += [benchmark.solvers()] if args.rmle else []
    options = {"backend": args.backend, "batch": args.batch, "threads": count, "repeat": args.repeat}
    subjects = list(itertools.chain(*chosen))
    with tqdm(subjects, desc="bench", unit="subject", leave=False, disable=None) as bar:
        timings = [benchmark.measure(subject, **options) for subject in bar]
    print(f"PyTorch {torch.__version__} eager, medians of {args.repeat}, threads on both sides: {count}")
    print(as_table(timings))
    if args.json is not None:
        with replacing(args.json) as temporary:
            rows = [dataclasses.asdict(timing) | {"ratio": timing.ratio} for timing in timings]
            temporary.write_text(json.dumps({"torch": torch.__version__, "timings": rows}, indent=2) + "\n")


def as_table(timings: list[Timing]) -> str:
    """One line a timing."""
    header = ["", "backend", "batch", "error", "images/s", "PyTorch's", "ratio"]
    rows = [
        [
            timing.name,
            f"{timing.backend} {timing.isa}",
            str(timing.batch),
            f"{timing.error:.0e}",
            f"{timing.batch / timing.seconds:,.0f}",
            f"{timing.batch / timing.eager_seconds:,.0f}",
            f"{timing.ratio:.2f}",
        ]
        for timing in timings
    ]
    return table(header, rows)
