"""How much faster all threads are than one: `python bench/scaling.py`.

Engines with one thread and with all run in turns, each for long enough that its threads are awake and its memory is in
the cache as it is when a log is worked through; the first quarter of each turn is left out. The median of its calls is
a turn's time, and the median over pairs of turns the figure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import numpy.typing as npt

import fastinv
from fastinv import _core, benchmark
from fastinv.engine import Engine

TURN_SECONDS = 0.6
LEAST_CALLS = 4


def turn(engine: Engine, x: npt.NDArray[np.float32]) -> float:
    """Seconds of a call, the median of a turn's."""
    seconds = []
    end = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < end or len(seconds) < LEAST_CALLS:
        begin = time.perf_counter()
        engine(x)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[len(seconds) // 4 :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images in a call")
    parser.add_argument("--threads", type=int, default=_core.available_threads(), help="compared with one")
    parser.add_argument("--turns", type=int, default=9, help="of each engine")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.turns) < 1 or arguments.threads < 2:
        parser.error("expected at least 1 image, 1 turn and 2 threads")
    print(f"{'':20}  batch  1 thread, ms  {arguments.threads} threads, ms  ratio  (from, to)")
    for subject in benchmark.decoders():
        x = subject.inputs(subject.batch(arguments.batch)).numpy()
        engines = [fastinv.compile(subject.network, backend="cpu", threads=n) for n in (1, arguments.threads)]
        pairs = [(turn(engines[0], x), turn(engines[1], x)) for _ in range(arguments.turns)]
        one, many = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(first / second for first, second in pairs)
        print(
            f"{subject.name:20}  {len(x):5}  {one:12.3f}  {many:13.3f}  {statistics.median(ratios):5.2f}"
            f"  ({ratios[0]:.2f}, {ratios[-1]:.2f})",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
