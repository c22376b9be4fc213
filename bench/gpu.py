"""The one script for a machine with an NVIDIA GPU: check the kernels, measure the ceilings, time fastinv and its peers.

    python bench/gpu.py --json bench/results/gpu.json

Everything that is timed is first compared with PyTorch in float64. What does not fit into --minutes is named and left
out. Inputs are random, and rotate through more memory than the L2 cache has; times are medians of event timings.

A worker measures (`gpu_measure.py`): one process, so that what is done once is paid once. A kernel that never ends, or
leaves its process without a GPU, costs a case the rest of its contenders; the next case has a new worker. Nothing of
fastinv is imported before it is built.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks import TESTS, build_fastinv, run_tests
from gpu_worker import Lost, Worker

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
CASE = 90  # seconds of one case, at most
BEGIN = 120  # seconds of what comes before the first, at most
SETTLE = 3  # seconds between the tests and what is timed


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument("--minutes", type=float, default=8, help="when no more is begun; what is left out is named")
    result.add_argument("--case", nargs="+", default=[], metavar="NAME", help="parts of names; all where left out")
    result.add_argument("--precision", default=",".join(PRECISIONS), help="as in bfloat16,float32")
    result.add_argument("--repeat", type=int, default=7, help="samples; medians count")
    result.add_argument("--no-build", action="store_true", help="take fastinv as it is, do not build it first")
    result.add_argument("--no-tests", action="store_true", help="do not run the tests of the kernels first")
    result.add_argument("--tune", action="store_true", help="first measure the tiles, and keep them for later runs")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too, as they come")
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    end = time.monotonic() + 60 * args.minutes
    if unknown := set(args.precision.split(",")) - set(PRECISIONS):
        arguments.error(f"--precision {', '.join(sorted(unknown))}, expected some of {', '.join(PRECISIONS)}")
    if args.repeat < 1:
        arguments.error(f"--repeat {args.repeat}, expected at least 1")
    if not args.no_build:
        if (failure := build_fastinv()) is not None:
            print(f"fastinv cannot be built (--no-build takes it as it is):\n{failure}", file=sys.stderr)
            return 1
        # What has been built is found by a new process only.
        os.execv(
            sys.executable, [sys.executable, *sys.argv, "--no-build", "--minutes", str((end - time.monotonic()) / 60)]
        )
    from fastinv.backends.cuda.device import missing
    from fastinv.cli.files import expect_place

    if (reason := missing(0)) is not None:
        print(f"bench/gpu.py needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 1
    if args.json is not None:
        expect_place(args.json)
    facts: dict[str, Any] = {}
    if not args.no_tests:
        facts["tests"] = run_tests(TESTS, 30 * args.minutes)
        time.sleep(SETTLE)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and so the worker ends, too
    with Worker() as worker:
        try:
            measure(worker, args, end, facts)
        except Lost as reason:
            print(f"nothing can be measured: {reason}", file=sys.stderr)
            return 1
    return int(facts.get("tests", "").startswith("FAILED"))


def measure(worker: Worker, args: argparse.Namespace, end: float, facts: dict[str, Any]) -> None:
    """Ceilings, and case after case until the end. All is printed and written as it comes; tables after each case.

    Raises:
        Lost: there is not even a ceiling.
    """
    import gpu_measure
    from gpu_results import Row, as_line, as_table, compared

    (found,) = worker.each(gpu_measure.surroundings, seconds=BEGIN)
    facts |= found
    print(f"kernels in CUDA C++: {facts['CUDA C++']}")
    (top,) = worker.each(gpu_measure.ceilings, seconds=BEGIN)
    facts["ceilings"] = vars(top)
    products = ", ".join(f"{name} {1e-12 * flops:.0f}" for name, flops in top.products.items())
    print(f"{facts['gpu']}: copy {1e-12 * top.memory:.2f} TB/s; products, TFLOP/s: {products}")
    print(f"from the host: {1e-9 * top.host:.0f} GB/s", flush=True)
    rows: list[Row] = []
    notes: list[str] = []
    for name, precision in list(worker.each(gpu_measure.cases, args.precision.split(","), seconds=BEGIN)):
        if args.case and not any(part.lower() in name.lower() for part in args.case):
            continue
        if time.monotonic() > end:
            print(f"{name}, {precision}: left out, the time is over")
            continue
        fresh: list[Row] = []
        for item in all_of(worker, name, precision, top, args.repeat, args.tune):
            (fresh if isinstance(item, Row) else notes).append(item)
            print(as_line(item) if isinstance(item, Row) else item, flush=True)
            if args.json is not None:
                found = [vars(row) for row in (*rows, *compared(fresh))]
                write(args.json, facts | {"rows": found, "notes": notes})
        rows += compared(fresh)
        if fresh:
            print(as_table(compared(fresh)), flush=True)
    print(as_table(rows))


def all_of(worker: Worker, name: str, precision: str, *args: Any) -> Iterator[Any]:
    """What the worker finds of a case; where it is lost, a line says so at the end."""
    import gpu_measure

    try:
        yield from worker.each(gpu_measure.case, name, precision, *args, seconds=CASE)
    except Lost as reason:
        yield f"{name}, {precision}: broken off, {reason}"


def write(path: Path, content: dict[str, Any]) -> None:
    from fastinv.cli.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
