"""The pipeline: one thread reads rows ahead, the engine inverts them, one thread writes what it gives."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.bulk import record
from fastinv.bulk.features import Block, open_file, told_of
from fastinv.bulk.images import FORMATS, Output, Recovered
from fastinv.bulk.job import Job
from fastinv.bulk.progress import Progress, Tell
from fastinv.bulk.shards import Shard
from fastinv.errors import FastinvError, FeatureError, FormatError
from fastinv.invert import invert
from fastinv.places import make_folder

# Features and images of a block: some batches for every core, while the blocks that are read, inverted and written at
# the same time, five at most, stay small.
BLOCK_BYTES = 2**26
LEAST_ROWS = 64  # of a block, however large they are: enough for all cores
AHEAD = 2  # blocks that are read before they are needed, and that wait to be written

NOT_FINITE = "features hold NaN or Inf"

Item = TypeVar("Item")
_Read = tuple[tuple[Shard, tuple[int, int]], Block | FastinvError | None]
_END: Any = object()


class Run:
    """One pass over shards of a log.

    Attributes:
        errors: why shards failed whole.
        images: how many were recovered, of shards that are done.
        surveyed: rows that `survey` counted.
    """

    def __init__(self, job: Job, folder: Path | None, how: Mapping[str, Any]) -> None:
        self.errors: dict[Shard, FastinvError] = {}
        self.images = self.surveyed = 0
        self._job, self._folder = job, folder
        self._quantised = {"scale": job.scale, "zero_point": job.zero_point}
        self._options = {**how, **self._quantised, "precision": job.precision, "dtype": job.dtype}
        self._shape = job.inverter.feature_shape
        one = 4 * (math.prod(self._shape) + math.prod(job.inverter.image_shape))
        self._rows = max(LEAST_ROWS, BLOCK_BYTES // one)
        self._stats: dict[Shard, record.Stats] = {}

    def stem(self, shard: Shard) -> Path | None:
        """Where a shard's results go, without their endings."""
        return None if self._folder is None else self._folder / shard.name

    def stats(self, shard: Shard) -> record.Stats | None:
        """What became of a shard, now or before; None where it is not done."""
        stem = self.stem(shard)
        if shard not in self._stats and stem is not None:
            endings = FORMATS[self._job.format].endings
            found = record.done(stem, shard.size, shard.modified)
            if found and all(stem.with_name(stem.name + ending).exists() for ending in endings):
                self._stats[shard] = found
        return self._stats.get(shard)

    def is_done(self, shard: Shard, retry_failed: bool) -> bool:
        """Whether nothing is left to do for a shard."""
        stats = self.stats(shard)
        return stats is not None and not (retry_failed and stats.failed)

    def survey(self, shards: Sequence[Shard]) -> None:
        """Count the rows of shards, and see whether the first of each fits."""
        for shard in shards:
            try:
                with told_of(shard.path):
                    file = open_file(shard.path, self._shape, self._job.choice)
                    start, stop = shard.rows or (0, file.count)
                    for block in file.blocks(start, min(start + 1, stop), 1):
                        tensors.source(block.features, self._shape, **self._quantised)
                self.surveyed += stop - start
            except FastinvError as error:
                self.errors[shard] = error

    def go_through(self, shards: Sequence[Shard], tell: Tell) -> None:
        """Recover all images of shards.

        Raises:
            FormatError: images cannot be written.
            KeyboardInterrupt: Ctrl-C; its message says how many shards are done.
        """
        pace = _Pace(shards, tell)
        try:
            with _Behind() as behind:
                for (shard, rows), read in groupby(_ahead(self._read(shards)), key=itemgetter(0)):
                    writing = _Writing(self._job, self.stem(shard), rows)
                    try:
                        error = self._invert(shard, (block for _, block in read), writing, behind, pace)
                    except BaseException:
                        behind.clean_up(writing.abandon)
                        raise
                    if error is None:
                        behind.do(self._finish, shard, writing)
                    else:
                        self.errors[shard] = error
                        behind.do(writing.fail, error)
                    pace.end(shard)
                behind.drain()
        except KeyboardInterrupt:
            count = f"{len(self.errors) + sum(shard in self._stats for shard in shards):,} of {len(shards):,}"
            raise KeyboardInterrupt(f"interrupted: {count} shards are done; the same again does the others") from None

    def _read(self, shards: Sequence[Shard]) -> Iterator[_Read]:
        """What there is in shards, block by block: none to begin with, or an error that ends a shard."""
        for shard in shards:
            key = (shard, shard.rows or (0, 0))
            try:
                file = open_file(shard.path, self._shape, self._job.choice)
                key = (shard, shard.rows or (0, file.count))
                yield key, None
                start, stop = key[1]
                parts = max(1, -(-(stop - start) // self._rows))
                with told_of(shard.path):
                    for block in file.blocks(start, stop, max(1, -(-(stop - start) // parts))):  # alike: none is short
                        if shard in self.errors:
                            break
                        yield key, block
            except FastinvError as error:
                yield key, error

    def _invert(
        self,
        shard: Shard,
        blocks: Iterator[Block | FastinvError | None],
        writing: _Writing,
        behind: _Behind,
        pace: _Pace,
    ) -> FastinvError | None:
        """Recover a shard's images and have them written; the error that ended it before its time."""
        rows = 0
        for block in blocks:
            if isinstance(block, FastinvError):
                return block
            if block is None:
                continue
            try:
                part = self._recover(block, pace.within)
            except FeatureError as error:
                return type(error)(f"{shard.path}: {error}")
            rows += part.count
            behind.do(writing.add, part)
            pace.add(shard, part, writing.count)
        if rows != writing.count:
            return FormatError(
                f"{shard.path}: gave {rows:,} rows of {writing.count:,}: cut off, or written to meanwhile"
            )
        return None

    def _recover(self, block: Block, tell: Callable[[int, int], object]) -> Recovered:
        """The images of a block, without the rows that hold NaN or Inf."""
        images: Any
        try:
            images, report = self._inverted(block, tell)
        except FeatureError:
            bad = self._not_finite(block)
            if not bad.any():
                raise
            block = block.without(bad, NOT_FINITE)
            images, report = self._inverted(block, tell)
        return Recovered(block.start, block.count, block.ids, block.places, images, report, block.failed)

    def _inverted(self, block: Block, tell: Callable[[int, int], object]) -> Any:
        return invert(block.features, self._job.inverter, return_report=True, progress=tell, **self._options)

    def _not_finite(self, block: Block) -> npt.NDArray[np.bool_]:
        """Which rows hold NaN or Inf, as float32."""
        source = tensors.source(block.features, self._shape, **self._quantised)
        values = source.chunk(0, len(source), finite=lambda _: True)
        return np.logical_not(np.isfinite(values.reshape(len(values), -1)).all(axis=1))

    def _finish(self, shard: Shard, writing: _Writing) -> None:
        stats = writing.finish(shard)
        self._stats[shard] = stats
        self.images += stats.recovered


class _Writing:
    """A shard's results as they come, in the thread that writes; their files are begun with the first."""

    def __init__(self, job: Job, stem: Path | None, rows: tuple[int, int]) -> None:
        self.count = rows[1] - rows[0]
        self._job, self._stem, self._rows = job, stem, rows
        self._begun = time.perf_counter()
        self._output: Output | None = None
        self._errors: list[dict[str, Any]] = []
        self._recovered = 0
        self._objective: float | None = None
        self._ran_on = ""

    def add(self, part: Recovered) -> None:
        """Write what became of the next rows."""
        if self._stem is not None:
            self._opened(self._stem).write(part)
        report = part.report
        self._recovered += len(part.images)
        self._ran_on = f"{report.backend} {report.isa}"
        if report.objective is not None:
            finite = report.objective[np.isfinite(report.objective)]
            self._objective = (self._objective or 0.0) + float(finite.sum())
        if part.failed:
            names = part.names()
            for place, why in sorted(part.failed.items()):
                self._errors.append({"row": part.start + place, "id": names[place].item(), "error": why})

    def finish(self, shard: Shard) -> record.Stats:
        """Let the files appear, and say that the shard is done."""
        stats = record.Stats(
            shard.size,
            shard.modified,
            self._rows,
            self._recovered,
            len(self._errors),
            self._objective,
            time.perf_counter() - self._begun,
            self._ran_on,
        )
        if self._stem is not None:
            self._opened(self._stem).finish()
            record.tell_errors(self._stem, self._errors)
            record.mark(self._stem, stats)
        return stats

    def fail(self, error: FastinvError) -> None:
        """Remove what there is of the shard, and say why."""
        self.abandon()
        if self._stem is not None:
            make_folder(self._stem.parent)
            record.tell_errors(self._stem, [{"error": str(error)}])

    def abandon(self) -> None:
        """Remove what there is of the shard."""
        if self._output is not None:
            self._output.abandon()

    def _opened(self, stem: Path) -> Output:
        if self._output is None:
            make_folder(stem.parent)
            kind = FORMATS[self._job.format]
            self._output = kind(stem, self._job.inverter.image_shape, self._job.dtype, self.count)
        return self._output


class _Behind:
    """Does things one after another in a thread of its own, at most `AHEAD` of them later than asked for.

    After one that went wrong no other is done: they may have built on it.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "fastinv-write")
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def clean_up(self, what: Callable[[], None]) -> None:
        """Do it after all else, whatever went wrong; it is waited for at the end alone."""
        self._pool.submit(what)

    def do(self, what: Callable[..., None], *args: Any) -> None:
        """Do it after all else; raises what went wrong before."""
        self._pending.append(self._pool.submit(self._try, what, *args))
        while len(self._pending) > AHEAD:
            self._pending.popleft().result()

    def drain(self) -> None:
        """Wait for all."""
        while self._pending:
            self._pending.popleft().result()

    def _try(self, what: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            what(*args)
        except BaseException:
            self._failed = True
            raise


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, of which a thread makes the next `AHEAD` while one is looked at."""
    with ThreadPoolExecutor(1, "fastinv-read") as pool:
        pending = deque(pool.submit(next, items, _END) for _ in range(AHEAD))
        while (item := pending.popleft().result()) is not _END:
            pending.append(pool.submit(next, items, _END))
            yield item


class _Pace:
    """Tells how far shards are, by the bytes of their files."""

    def __init__(self, shards: Sequence[Shard], tell: Tell) -> None:
        self._state = Progress(len(shards))
        self._whole = max(1.0, sum(shard.size * shard.part for shard in shards))
        self._read = 0.0  # bytes of shards that are done
        self._rows = 0.0  # part of the present one that is
        self._since = time.perf_counter()
        self._tell = tell

    def within(self, images: int, steps: int) -> None:
        """So many images of the present block are done."""
        self._say(images=self._state.images + images)

    def add(self, shard: Shard, part: Recovered, count: int) -> None:
        """A block of a shard of `count` rows is done."""
        self._rows += part.count / count
        at = self._read + self._rows * shard.size * shard.part
        state = self._state
        self._state = replace(
            state, images=state.images + len(part.images), failed=state.failed + len(part.failed), part=at / self._whole
        )
        self._say()

    def end(self, shard: Shard) -> None:
        """A shard is done."""
        self._read += shard.size * shard.part
        self._rows = 0.0
        self._state = replace(self._state, done=self._state.done + 1, part=self._read / self._whole)
        self._say()

    def _say(self, **changes: Any) -> None:
        self._tell(replace(self._state, seconds=time.perf_counter() - self._since, **changes))
