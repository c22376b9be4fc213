"""How far a log is: for a function of the caller's, as a bar on a terminal, or as lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LINES_EVERY = 30  # seconds, where there is no terminal


@dataclass(frozen=True)
class Progress:
    """How far a log is.

    Attributes:
        shards, done: how many there are to do, and how many are done, with those that failed whole.
        images: recovered so far.
        failed: rows that could not be.
        part: of the bytes to read, 0 to 1.
        seconds: since the start.
    """

    shards: int
    done: int = 0
    images: int = 0
    failed: int = 0
    part: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.images / self.seconds if self.seconds else 0.0
        failed = f", failed rows: {self.failed:,}" if self.failed else ""
        return f"{self.done:,} of {self.shards:,} shards, {self.images:,} images, {rate:,.0f} images/s{failed}"


Tell = Callable[[Progress], object]


@contextmanager
def shown(progress: bool | Tell) -> Iterator[Tell]:
    """What is told how far a log is."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda _: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:

            def update(state: Progress) -> None:
                bar.set_postfix_str(str(state), refresh=False)
                bar.update(state.part - bar.n)

            yield update
    else:
        last = time.monotonic()

        def line(state: Progress) -> None:
            nonlocal last
            if state.done == state.shards or time.monotonic() - last > LINES_EVERY:
                last = time.monotonic()
                print(f"{state.part:.0%}: {state}", file=sys.stderr, flush=True)

        yield line
