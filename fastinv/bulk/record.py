"""What a folder of recovered images says of itself: `manifest.json`, and beside each shard's images what became of it.

    manifest.json         the job (what decides the images) and, once all is done, the counts
    NAME.stats.json       counts of one shard, written after its images: it is done when this is there
    NAME.errors.jsonl     one line for each row without an image: row, id, error; or one for a whole shard, without row

A folder is gone on with by the same job alone. Nothing here is trusted further than to skip what is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import fastinv
from fastinv import strict_json
from fastinv.errors import FormatError
from fastinv.places import make_folder, new_file

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Stats:
    """What became of one shard.

    Attributes:
        size, modified: of the file of features, in bytes and nanoseconds: another one is not this shard.
        rows: from which to which, of the file's.
        recovered, failed: how many of them have images, and how many do not.
        objective: of rMLE, the sum over the images that have a finite one; None for inverse networks.
        seconds: what it took.
        ran_on: the backend and its instruction set.
    """

    size: int
    modified: int
    rows: tuple[int, int]
    recovered: int
    failed: int
    objective: float | None
    seconds: float
    ran_on: str


def claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Make a folder the place of this job's images, or find that it is.

    Raises:
        FormatError: it holds something else, or the images of another job.
    """
    make_folder(folder)
    path = folder / MANIFEST
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise FormatError(f"{folder}: the folder holds files but no {MANIFEST}; choose a new one")
        _write(path, {"version": VERSION, "fastinv": fastinv.__version__, "job": job})
        return
    found = _read(path).get("job")
    if not isinstance(found, dict):
        raise FormatError(f"{path}: describes no job; choose another folder")
    given = json.loads(strict_json.dumps(job))
    for name in sorted(given | found):
        if given.get(name) != found.get(name):
            raise FormatError(
                f"{folder}: holds images of another job, with {name} {found.get(name)!r:.80} instead of "
                f"{given.get(name)!r:.80}: choose a new folder, or go on with the same"
            )


def conclude(folder: Path, shards: Sequence[Stats | None]) -> None:
    """Add to the manifest what became of all shards of the log, None for those that are not done."""
    done = [stats for stats in shards if stats is not None]
    counts: dict[str, Any] = {
        "shards": len(shards),
        "done": len(done),
        "recovered": sum(stats.recovered for stats in done),
        "failed": sum(stats.failed for stats in done),
    }
    path = folder / MANIFEST
    _write(path, _read(path) | {"counts": counts})


def stats_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.stats.json")


def errors_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.errors.jsonl")


def done(stem: Path, size: int, modified: int) -> Stats | None:
    """What became of a shard whose file has this size and time; None where it is still to be done."""
    try:
        found = _read(stats_path(stem))
        stats = Stats(**{field.name: found[field.name] for field in fields(Stats)})
    except (FormatError, KeyError):
        return None
    return stats if (stats.size, stats.modified) == (size, modified) else None


def mark(stem: Path, stats: Stats) -> None:
    """Say that a shard is done."""
    _write(stats_path(stem), asdict(stats))


def tell_errors(stem: Path, errors: Iterable[Mapping[str, Any]]) -> None:
    """List the rows of a shard that failed, or why it failed whole; no file where nothing did."""
    lines = [json.dumps(error) for error in errors]
    path = errors_path(stem)
    if lines:
        with new_file(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = strict_json.loads(path.read_bytes(), str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: no JSON object; choose another folder")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with new_file(path) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")
    except OSError as error:
        raise FormatError(f"{path}: cannot write it ({error.strerror})") from error
