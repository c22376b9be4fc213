"""The pipeline: one thread reads rows ahead, the engine inverts them, one thread writes what it gives."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
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
from fastinv.bulk.images import FORMATS, Output, Recovered, listed
from fastinv.bulk.job import Job
from fastinv.bulk.progress import Progress, Tell
from fastinv.bulk.shards import Shard
from fastinv.errors import FastinvError, FeatureError, FormatError
from fastinv.invert import invert
from fastinv.places import make_folder

# Features and images of a block: some batches for every core, while the blocks that are read, inverted and written at
# the same time, five at most, stay small.
BLOCK_BYTES = 2**26
IMAGES_PER_CORE = 4  # of a block at least, however large they are
AHEAD = 2  # blocks that are read before they are needed, and that wait to be written

NOT_FINITE = "features hold NaN or Inf"

Item = TypeVar("Item")
_Read = tuple[Shard, int, Block | FastinvError]  # a shard, how many rows it has, and some of them
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
        self._rows = max(IMAGES_PER_CORE * len(os.sched_getaffinity(0)), BLOCK_BYTES // one)
        self._stats: dict[Shard, record.Stats] = {}
        self._finished: set[Shard] = set()

    def compile(self) -> None:
        """Raise what `fastinv.invert` has against the arguments, before anything is written."""
        dtype = np.float32 if self._job.scale is None and self._job.zero_point is None else np.uint8
        invert(np.empty((0, *self._shape), dtype), self._job.inverter, **self._options)

    def stats(self, shard: Shard) -> record.Stats | None:
        """What became of a shard, now or before; None where it is not done."""
        if shard not in self._stats and self._folder is not None:
            endings = FORMATS[self._job.format].endings
            found = record.done(self._folder / shard.name, (self._job.digest, *_file_of(shard)), endings)
            if found is not None:
                self._stats[shard] = found
        return self._stats.get(shard)

    def is_done(self, shard: Shard, retry_failed: bool) -> bool:
        """Whether nothing is left to do for a shard."""
        stats = self.stats(shard)
        return stats is not None and not (retry_failed and stats.failed)

    def survey(self, shards: Sequence[Shard]) -> None:
        """Count the rows of shards, and see whether the first of each file fits."""
        for path, group in groupby(shards, key=lambda shard: shard.path):
            parts = list(group)
            try:
                file = open_file(path, self._shape, self._job.choice)
                with told_of(path):
                    for block in file.blocks(0, min(1, file.count), 1):
                        tensors.source(block.features, self._shape, **self._quantised)
                self.surveyed += sum(file.count if part.rows is None else part.rows[1] - part.rows[0] for part in parts)
            except FastinvError as error:
                self.errors |= dict.fromkeys(parts, error)

    def go_through(self, shards: Sequence[Shard], tell: Tell) -> None:
        """Recover all images of shards.

        Raises:
            FormatError: images cannot be written.
            KeyboardInterrupt: Ctrl-C; its message says how many shards are done.
        """
        pace = _Pace(shards, tell)
        for shard in shards:  # until they are done anew
            self._stats.pop(shard, None)
        try:
            with _Behind() as behind, closing(_ahead(self._read(shards))) as items:
                for shard, read in groupby(items, key=itemgetter(0)):
                    writing = _Writing(self._job, self._folder, shard)
                    try:
                        error = self._invert(shard, read, writing, behind, pace)
                        if error is None:
                            behind.do(self._finish, shard, writing)
                        else:
                            self.errors[shard] = error
                            behind.do(writing.fail, error)
                    except BaseException:
                        behind.clean_up(writing.abandon)
                        raise
                    pace.end(shard)
                behind.drain()
        except KeyboardInterrupt:
            count = f"{len(self._finished):,} of {len(shards):,}"
            raise KeyboardInterrupt(f"interrupted: {count} shards are done; the same again does the others") from None

    def _read(self, shards: Sequence[Shard]) -> Iterator[_Read]:
        """The rows of shards, block by block, or an error that ends a shard; a file of several is read through."""
        for _, parts in groupby(shards, key=lambda shard: shard.path):
            for run in _follow(parts):
                yield from self._read_run(run)

    def _read_run(self, run: Sequence[Shard]) -> Iterator[_Read]:
        """Shards of one file that follow each other."""
        left = deque(run)
        try:
            first = run[0]
            file = open_file(first.path, self._shape, self._job.choice)
            if first.rows is None and self._job.rows_per_file is not None:
                raise FormatError(f"{first.path}: could not be read when files were cut, and can be now: run it again")
            start, stop = (0, file.count) if first.rows is None else (first.rows[0], (run[-1].rows or first.rows)[1])
            parts = max(1, -(-(stop - start) // self._rows))
            rows = max(1, -(-(stop - start) // parts))  # alike: none is short
            with told_of(first.path):
                first.expect_unchanged()
                if stop > file.count:
                    raise FormatError(f"holds {file.count:,} rows, expected {stop:,}: it changed; run it again")
                for block in file.blocks(start, stop, rows):
                    while left:
                        shard = left[0]
                        begin, end = shard.rows or (start, stop)
                        low, high = max(begin, block.start), min(end, block.start + block.count)
                        if shard not in self.errors:  # else refused: what is left is not looked at
                            yield shard, end - begin, block.between(low - block.start, high - block.start)
                        if high < end:
                            break
                        left.popleft()
                    if self.errors.keys() >= set(left):
                        return
                    first.expect_unchanged()
                raise FormatError("holds fewer rows than it says: cut off?")
        except FastinvError as error:
            for shard in left:
                yield shard, 0, error

    def _invert(
        self, shard: Shard, read: Iterator[_Read], writing: _Writing, behind: _Behind, pace: _Pace
    ) -> FastinvError | None:
        """Recover a shard's images and have them written; the error that ended it before its time."""
        for _, count, block in read:
            if isinstance(block, FastinvError):
                return block
            try:
                part = self._recover(block, pace.within)
            except FeatureError as error:
                return type(error)(f"{shard.path}: {error}")
            behind.do(writing.add, part, count)
            pace.add(shard, part, count)
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
        try:
            with told_of(shard.path):
                shard.expect_unchanged()
        except FormatError as error:
            self.errors[shard] = error
            writing.fail(error)
            return
        stats = writing.finish()
        self._stats[shard] = stats
        self._finished.add(shard)
        self.images += stats.recovered


class _Writing:
    """A shard's results as they come, in the thread that writes; their files are begun with the first."""

    def __init__(self, job: Job, folder: Path | None, shard: Shard) -> None:
        self._job, self._folder, self._shard = job, folder, shard
        self._begun = time.perf_counter()
        self._output: Output | None = None
        self._errors: list[dict[str, Any]] = []
        self._count = self._recovered = 0
        self._objective: float | None = None
        self._ran_on = ""

    def add(self, part: Recovered, count: int) -> None:
        """Write what became of the next of `count` rows."""
        report = part.report
        if self._folder is not None:
            if self._output is None:
                stem = self._folder / self._shard.name
                make_folder(stem.parent)
                record.unmark(stem)
                kind, image_shape = FORMATS[self._job.format], self._job.inverter.image_shape
                self._output = kind(self._folder, self._shard.name, image_shape, self._job.dtype, count)
            self._output.write(part)
        self._count = count
        self._recovered += len(part.images)
        self._ran_on = f"{report.backend} {report.isa}"
        if report.objective is not None:
            finite = report.objective[np.isfinite(report.objective)]
            self._objective = (self._objective or 0.0) + float(finite.sum())
        if part.failed:
            names = listed(part.names())
            for place, why in sorted(part.failed.items()):
                self._errors.append({"row": part.start + place, "id": names[place], "error": why})

    def finish(self) -> record.Stats:
        """Let the files appear, and say that the shard is done."""
        start = self._shard.rows[0] if self._shard.rows else 0
        stats = record.Stats(
            self._job.digest,
            *_file_of(self._shard),
            rows=(start, start + self._count),
            files={},
            recovered=self._recovered,
            failed=len(self._errors),
            objective=self._objective,
            seconds=time.perf_counter() - self._begun,
            ran_on=self._ran_on,
        )
        if self._folder is not None and self._output is not None:
            stem = self._folder / self._shard.name
            self._output.finish()
            record.tell_errors(stem, self._errors)
            stats = replace(stats, files=record.sizes(stem, self._output.endings))
            record.mark(stem, stats)
        return stats

    def fail(self, error: FastinvError) -> None:
        """Remove what there is of the shard, and say why."""
        self.abandon()
        if self._folder is not None:
            stem = self._folder / self._shard.name
            record.unmark(stem)
            record.tell_errors(stem, [{"error": str(error)}])

    def abandon(self) -> None:
        """Remove what there is of the shard."""
        if self._output is not None:
            self._output.abandon()


def _file_of(shard: Shard) -> tuple[str, int, int]:
    """What says that a file is the same: its real path, its size, and its time."""
    return os.path.realpath(shard.path), shard.size, shard.modified


def _follow(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Shards of one file in groups that each follow without a gap."""
    run: list[Shard] = []
    for shard in shards:
        if run and (run[-1].rows is None or shard.rows is None or run[-1].rows[1] != shard.rows[0]):
            yield run
            run = []
        run.append(shard)
    if run:
        yield run


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


def _ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
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
        self._rows += part.count / max(1, count)
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
