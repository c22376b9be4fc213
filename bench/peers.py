"""Time fastinv beside other engines: same network, batch, data and threads; every result checked against float64.

    python bench/peers.py --case CIFAR --batch 1,256 --threads 2
    python bench/peers.py --rmle --case ReLU2 --batch 64

needs `pip install '.[peers]'`; what is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import (
    PEERS,
    SOLVER_PEERS,
    TOLERANCES,
    Call,
    Contender,
    fastinv,
    fastinv_solver,
    forget,
    prepared,
    tolerance,
)

from fastinv import _core, benchmark
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject
from fastinv.cli.arguments import positive, table
from fastinv.cli.files import expect_place, replacing
from fastinv.errors import BackendError

HISTORY = Path(__file__).parent / "results" / "history.jsonl"
PACKAGES = ("fastinv", "torch", "onnxruntime", "onnx", "openvino")

# Several contenders hold all values of a whole batch at the same time, and the slowest calls should take two seconds.
MAX_BYTES = 2**31  # of all values of a batch in float32
MAX_FLOPS = 2**36  # of a call, for each thread
SOLVER_FLOPS = 2**38  # of a call of rMLE: the most of LEAST_STEPS steps, or as many as fit
LEAST_STEPS = 2

# After a call the threads of ONNX Runtime and OpenMP spin for a while, to be quick at the next one. Within a burst of
# calls that is part of the contender's speed. The next contender's would suffer from it: hence the pause before every
# burst, longer than any of them spins. After it come as many calls that are not timed: threads that have slept start
# cold, and often on the core of the one that woke them.
BURST = 0.03  # seconds of calls, at least
PAUSE = 0.15
NOISE = 0.1  # of the peak, from round to round, at most: rounds with more are repeated, and what is left is told
MOST_ROUNDS = 3  # for each that counts


@dataclass(frozen=True)
class Row:
    """What one contender did. Times are medians, for one call on the whole batch."""

    case: str
    batch: int
    contender: str
    precision: str
    error: float  # relative, against float64
    seconds: float
    images_per_second: float  # of rMLE: image-steps
    gflops: float  # of the direct form: an algorithm that needs fewer may pass the peak
    percent_of_peak: float  # of float32 multiply-adds, measured in the same rounds
    ratio: float | None  # to the best float32 peer; None where there is none
    steps: int | None = None  # of rMLE


@dataclass
class Outcome:
    """The rows of one case and batch, and why others are missing."""

    case: str
    batch: int
    wanted: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wrong: bool = False  # a result of fastinv's

    def __str__(self) -> str:
        cut = f" (of {self.wanted:,}: more take too long or too much memory)" if self.batch < self.wanted else ""
        lines = [f"\n{self.case}, batch {self.batch:,}{cut}"]
        lines += [as_table(self.rows)] if self.rows else []
        return "\n".join([*lines, *self.notes])


def as_table(rows: Sequence[Row]) -> str:
    """One line a contender."""
    rate = "images/s" if rows[0].steps is None else "image-steps/s"
    header = ["", "error", rate, "GFLOP/s", "% of peak", "to best peer"]
    return table(
        header,
        [
            [
                row.contender,
                f"{row.error:.0e}",
                f"{row.images_per_second:,.0f}",
                f"{row.gflops:,.1f}",
                f"{row.percent_of_peak:.1f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
            ]
            for row in rows
        ],
    )


def fitting(subject: Subject, wanted: int, threads: int) -> int:
    """As many images as wanted, or as fit."""
    by_memory = MAX_BYTES // (4 * sum(map(math.prod, subject.network.shapes)))
    flops, most = subject.network.flops, MAX_FLOPS
    if subject.recipe is not None:
        flops, most = with_steps(subject, LEAST_STEPS).flops, SOLVER_FLOPS
    return max(1, min(wanted, by_memory, most * threads // max(1, flops)))


def with_steps(subject: Subject, steps: int) -> Subject:
    """The subject for another number of steps."""
    assert subject.recipe is not None
    return dataclasses.replace(subject, recipe=dataclasses.replace(subject.recipe, steps=steps))


def fitting_steps(subject: Subject, batch: int, threads: int) -> int:
    """As many steps as the recipe's, or as fit: each takes the same time."""
    assert subject.recipe is not None
    by_time = SOLVER_FLOPS * threads // max(1, batch * with_steps(subject, 1).flops)
    return max(LEAST_STEPS, min(subject.recipe.steps, by_time))


def measure(subject: Subject, wanted: int, contenders: Sequence[Contender], threads: int, repeat: int) -> Outcome:
    """Build and check every contender, then time those that are right, in turns."""
    with torch_threads(threads), torch.no_grad():
        outcome = Outcome(subject.name, fitting(subject, wanted, threads), wanted)
        x = subject.inputs(outcome.batch)
        steps = None if subject.recipe is None else fitting_steps(subject, outcome.batch, threads)
        calls: dict[str, Call] = {}
        errors: dict[str, float] = {}
        for contender in contenders:
            try:
                errors[contender.name], call = prepared(contender, subject, x, threads)
            except Exception as reason:  # whatever a peer raises; of ours, only that it does not offer something
                if contender.ours and not isinstance(reason, BackendError):
                    raise
                line = str(reason).strip().partition("\n")[0]
                outcome.notes.append(f"{contender.name} cannot run it: {type(reason).__name__}: {line:.200}")
                continue
            if errors[contender.name] <= tolerance(contender, subject):
                calls[contender.name] = call if steps is None else partial(call, steps)
            else:
                outcome.notes.append(f"{contender.name} is wrong by {errors[contender.name]:.1g}, and not timed")
                outcome.wrong |= contender.ours
        isa = os.environ.get("FASTINV_ISA", "")
        seconds, peaks = race(calls, repeat, lambda: _core.fma_peak(isa, threads, BURST))
    if min(peaks) < (1 - NOISE) * max(peaks):
        outcome.notes.append(f"The peak varied, {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s: a busy machine?")
    timed = subject if steps is None else with_steps(subject, steps)
    right = [contender for contender in contenders if contender.name in calls]
    outcome.rows = as_rows(timed, outcome.batch, right, seconds, errors, statistics.median(peaks))
    return outcome


def race(calls: Mapping[str, Call], repeat: int, peak: Callable[[], float]) -> tuple[dict[str, float], list[float]]:
    """Median seconds of one call of each, from bursts in an order that varies from round to round; and the peaks.

    A round counts by the lower of the peaks before and after it. Where others use the machine (in a virtual one the
    cores may be two threads of a single real one for a while), disturbed rounds are repeated, and the quietest count.
    """
    counts = {}
    for name, call in calls.items():
        time.sleep(PAUSE)
        call()
        counts[name] = max(1, math.ceil(BURST / _seconds(call, 3)))
    rounds: list[tuple[float, dict[str, float]]] = []
    order = list(calls)
    shuffle = random.Random(0).shuffle

    def warm_peak() -> float:
        time.sleep(PAUSE)
        peak()
        return peak()

    def quiet() -> list[tuple[float, dict[str, float]]]:
        most = max((speed for speed, _ in rounds), default=0.0)
        return [entry for entry in rounds if entry[0] >= (1 - NOISE) * most]

    while len(quiet()) < repeat and len(rounds) < MOST_ROUNDS * repeat:
        shuffle(order)
        before = warm_peak()
        times = {}
        for name in order:
            time.sleep(PAUSE)
            _seconds(calls[name], counts[name])
            times[name] = _seconds(calls[name], counts[name])
        rounds.append((min(before, warm_peak()), times))
    used = sorted(rounds, key=lambda entry: -entry[0])[:repeat]
    return {name: statistics.median(times[name] for _, times in used) for name in calls}, [speed for speed, _ in used]


def _seconds(call: Call, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def as_rows(
    subject: Subject,
    batch: int,
    contenders: Sequence[Contender],
    seconds: Mapping[str, float],
    errors: Mapping[str, float],
    peak: float,
) -> list[Row]:
    """Rates and ratios from times. The best peer in float32 is what all are compared with."""
    peers = [seconds[c.name] for c in contenders if not c.ours and c.precision == "float32"]
    steps = None if subject.recipe is None else subject.recipe.steps
    rows = []
    for contender in contenders:
        taken = seconds[contender.name]
        gflops = 1e-9 * batch * subject.flops / taken
        ratio = min(peers) / taken if peers else None
        rates = batch * (steps or 1) / taken, gflops, 100 * gflops / peak, ratio
        name, precision = contender.name, contender.precision
        rows.append(Row(subject.name, batch, name, precision, errors[name], taken, *rates, steps))
    return rows


def choose(cases: Sequence[Subject], wanted: Sequence[str]) -> list[Subject]:
    """The cases whose names hold one of the given parts; all where none is given."""
    return [case for case in cases if not wanted or any(part.lower() in case.name.lower() for part in wanted)]


def named(text: str, peers: Sequence[Contender]) -> list[Contender]:
    """Some of these by their names, as in `eager,onnxruntime`; capitals, spaces and hyphens do not count."""
    known = {_plain(peer.name): peer for peer in peers}
    try:
        return [known[_plain(name)] for name in text.split(",")]
    except KeyError as name:
        raise ValueError(f"no peer {name}, expected some of {', '.join(known)}") from None


def _plain(name: str) -> str:
    return re.sub(r"[ -]", "", name).lower()


def positives(text: str) -> list[int]:
    """`1,32,256`."""
    return [positive(part) for part in text.split(",")]


def present(contenders: Sequence[Contender]) -> Iterator[Contender]:
    """Those that are installed; the others are named."""
    for contender in contenders:
        if (reason := contender.missing()) is None:
            yield contender
        else:
            print(f"{contender.name} {reason}")


def surroundings(threads: int) -> dict[str, Any]:
    """What a result depends on beside the code that is timed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": _core.resolve_isa(os.environ.get("FASTINV_ISA", "")),
        "threads": threads,
        "commit": _commit(),
        "versions": versions,
        "command": shlex.join(["python", *sys.argv]),
    }


def _cpu() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else "unknown"


def _commit() -> str:
    """The commit, with "-dirty" where files differ from it; the results, to which every run may add, do not count."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("describe", "--always") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def as_json(facts: Mapping[str, Any], rows: Sequence[Row], indent: int | None = None) -> str:
    return json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=indent) + "\n"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument("--case", nargs="+", default=[], metavar="NAME", help="parts of names; all where left out")
    result.add_argument("--rmle", action="store_true", help="time steps of rMLE instead of decoders")
    result.add_argument("--batch", type=positives, help="images at once, or as many as fit, as in 1,256")
    result.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of each contender")
    result.add_argument("--peers", help="as in eager,onnxruntime; all where left out")
    result.add_argument("--precision", default="float32", help="fastinv's, as in float32,bfloat16")
    result.add_argument("--repeat", type=positive, default=7, help="bursts of each, in turns; medians count")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too, after every case")
    result.add_argument("--record", action="store_true", help=f"add them to {HISTORY.name}, one line a run")
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    precisions = args.precision.split(",")
    if unknown := set(precisions) - set(TOLERANCES):
        arguments.error(f"--precision {', '.join(unknown)}, expected some of {', '.join(TOLERANCES)}")
    cases = choose(list(benchmark.solvers() if args.rmle else benchmark.decoders()), args.case)
    if not cases:
        arguments.error(f"--case: no name holds {' or '.join(args.case)}")
    if args.json is not None:
        expect_place(args.json)
    ours = list(map(fastinv_solver if args.rmle else fastinv, precisions))
    peers = SOLVER_PEERS if args.rmle else PEERS
    try:
        peers = peers if args.peers is None else named(args.peers, peers)
    except ValueError as unknown_peer:
        arguments.error(f"--peers: {unknown_peer}")
    contenders = list(present([*ours, *peers]))
    batches = args.batch or ([1, 64, 512] if args.rmle else [1, 32, 256, 2048])
    facts = surroundings(args.threads)
    print(f"{facts['cpu']}, {facts['isa']}, threads {args.threads}, medians of {args.repeat} bursts")
    rows: list[Row] = []
    wrong = False
    try:
        for subject in cases:
            done: set[int] = set()
            for wanted in batches:
                batch = fitting(subject, wanted, args.threads)
                if batch in done:
                    print(f"\n{subject.name}, batch {wanted:,}: only {batch:,} fit, see above")
                    continue
                done.add(batch)
                outcome = measure(subject, wanted, contenders, args.threads, args.repeat)
                print(outcome, flush=True)
                rows += outcome.rows
                wrong |= outcome.wrong
                if args.json is not None:
                    with replacing(args.json) as temporary:
                        temporary.write_text(as_json(facts, rows, indent=2))
                forget()
                gc.collect()
    finally:
        if args.record and rows:
            HISTORY.parent.mkdir(exist_ok=True)
            with HISTORY.open("a") as history:
                history.write(as_json(facts, rows))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
