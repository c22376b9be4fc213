"""`invert_log`: a whole log of features into as many files of images."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastinv import tensors
from fastinv.bulk import record
from fastinv.bulk.features import Choice
from fastinv.bulk.images import FORMATS
from fastinv.bulk.job import Job
from fastinv.bulk.progress import Tell, shown
from fastinv.bulk.run import Run
from fastinv.bulk.shards import Shard, cut, expect_apart, find, piece_name
from fastinv.errors import FeatureError, FormatError
from fastinv.invert import name_of, resolve
from fastinv.inverters import Inverter
from fastinv.places import sweep


@dataclass(frozen=True)
class LogReport:
    """What became of a log, or of the part of it that was asked for.

    Attributes:
        shards: how many files of images it makes.
        skipped: how many of them were there before.
        rows: of all shards that could be read.
        recovered, failed: rows with an image and without one; after a dry run those of shards that were there before.
        images: recovered this time.
        seconds: that took.
        errors: why files failed whole, by their path.
    """

    shards: int
    skipped: int
    rows: int
    recovered: int
    failed: int
    images: int
    seconds: float
    errors: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing failed."""
        return not self.failed and not self.errors


def invert_log(
    log: Any,
    inverter: str | Path | Inverter | None = None,
    out: str | Path | None = None,
    *,
    format: str = "parquet",
    dtype: str = "uint8",
    key: str | None = None,
    ids: str | None = None,
    layout: str = "NCHW",
    stored_as: str | None = None,
    rows_per_file: int | None = None,
    part: tuple[int, int] = (1, 1),
    retry_failed: bool = False,
    dry_run: bool = False,
    progress: bool | Tell = False,
    backend: str | None = "auto",
    precision: str = "float32",
    threads: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    scale: Any = None,
    zero_point: Any = None,
) -> LogReport:
    """Recover the images of a whole log: files of features in, as many files of images out.

    While a block of rows is inverted the next are read and the last images written, in memory that does not grow with
    the log. What a shard gives appears whole or not at all. After an interruption the same call goes on with the shards
    that are not done; those whose file has changed since, or that failed whole, are done again.

    A row whose features cannot be read, or hold NaN or Inf, has no image and a status that says why; a file that cannot
    be read is told of in the report. Neither ends the job.

    Args:
        log: a file, a folder (all files in it and below it that may hold features), or several files: `.npy`, `.npz`,
            `.safetensors`, `.pt` (tensors alone), `.h5`, `.hdf5`, `.parquet`, `.arrow` or `.feather`.
        inverter: as of `invert`.
        out: a folder, new or with a part of the same job done; not needed with the format "none".
        format: "parquet" (`id`, `image`, of rMLE `objective`, `steps`, `converged`, and `status`), "npy" (an array,
            and the rest in `.rows.npz`), "webdataset" (a tar of PNGs) or "none", for benchmarks.
        dtype: of the images, as of `invert`.
        key: which array, tensor or column holds the features, in files of several.
        ids: which one holds the rows' names; None: the column "id" of a table that has one, else the rows' numbers.
        layout: "NCHW", or "NHWC" for features whose channels come last.
        stored_as: the dtype of numbers that a table holds as bytes, or as lists of bfloat16's bits; None: float32.
        rows_per_file: cut shards after so many rows, each into files NAME-000000 and on: an interruption costs no
            more. None: one file for each shard.
        part: (k, n) does the k-th of n parts of these files: n processes or machines share a log so, that does not
            change meanwhile. The manifest tells what is left, which a call without `part` does.
        retry_failed: whether to do those shards again of which rows failed.
        dry_run: whether to write nothing, and look at no more than a row of each file (a `.pt`, a `.npz` or a
            compressed Arrow file is read whole for that); the report says what would fail.
        progress: whether to show progress; or a function that is told how things stand, a `Progress`.
        backend, precision, threads, batch_size, device, scale, zero_point: as of `invert`.

    Raises:
        FormatError: no log, a folder of another job, images that do not fit the format, or that cannot be written.
        FeatureError: arguments that do not fit; or no shard at all has features that do.
        NetworkError, BackendError: as of `invert`.
        KeyboardInterrupt: Ctrl-C; its message says how many shards are done.
    """
    if isinstance(log, (str, os.PathLike)):
        log = [log]
    if isinstance(log, bytes) or not isinstance(log, Iterable):
        raise FormatError(f"log {log!r:.40}, expected a path, or several")
    paths = [Path(path) for path in log]
    found, choice = resolve(inverter), Choice(key, ids, layout, stored_as)
    job = Job(found, choice, format, name_of(dtype), precision, scale, zero_point, rows_per_file)
    if not (tensors.is_shape(part, 2) and part[0] <= part[1]):
        raise FeatureError(f"part {part!r:.40}, expected (k, n) with 1 <= k <= n")
    if out is None and format != "none":
        raise FormatError(f"out is None, but the format {format!r} needs a folder")
    folder = None if out is None or format == "none" else Path(out)
    if folder is not None:
        expect_apart(paths, folder)
    shards = find(paths)
    if rows_per_file is not None:
        shards = list(cut(shards, rows_per_file, found.feature_shape, choice))
    run = Run(job, folder, {"backend": backend, "threads": threads, "batch_size": batch_size, "device": device})
    run.compile()
    own = shards[len(shards) * (part[0] - 1) // part[1] : len(shards) * part[0] // part[1]]
    if folder is not None:
        (record.expect_ours if dry_run else record.claim)(folder, job.record())
    todo = [shard for shard in own if not run.is_done(shard, retry_failed)]
    since = time.perf_counter()
    if dry_run:
        run.survey(todo)
    else:
        if folder is not None:
            sweep(folder)
        with shown(progress) as tell:
            run.go_through(todo, tell)
        if folder is not None:
            _tidy(folder, shards, FORMATS[format].endings)
            record.conclude(folder, job.record(), [run.stats(shard) for shard in shards])
    if run.errors and len(run.errors) == len(shards):
        raise next(iter(run.errors.values()))
    left = set(todo) if dry_run else set()
    done = [stats for shard in own if shard not in left and (stats := run.stats(shard))]
    return LogReport(
        shards=len(own),
        skipped=len(own) - len(todo),
        rows=run.surveyed + sum(stats.recovered + stats.failed for stats in done),
        recovered=sum(stats.recovered for stats in done),
        failed=sum(stats.failed for stats in done),
        images=run.images,
        seconds=time.perf_counter() - since,
        errors={str(shard.path): str(error) for shard, error in run.errors.items()},
    )


def _tidy(folder: Path, shards: Sequence[Shard], endings: Sequence[str]) -> None:
    """Remove what killed processes left, and results of pieces that files do not have any more."""
    sweep(folder)
    for _, group in itertools.groupby((shard for shard in shards if shard.rows), key=lambda shard: shard.path):
        pieces = list(group)
        numbers = itertools.count(len(pieces))
        while record.remove(folder / piece_name(pieces[0].whole_name, next(numbers)), endings):
            pass
