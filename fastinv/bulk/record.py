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
STATS = ".stats.json"
ERRORS = ".errors.jsonl"


@dataclass(frozen=True)
class Stats:
    """What became of one shard.

    Attributes:
        job: the SHA-256 of the job's record: images of another are not these.
        path, size, modified: of the file of features, in bytes and nanoseconds: another one is not this shard.
        rows: from which to which, of the file's.
        files: of images, by their endings, with their sizes in bytes.
        recovered, failed: how many of them have images, and how many do not.
        objective: of rMLE, the sum over the images that have a finite one; None for inverse networks.
        seconds: what it took.
        ran_on: the backend and its instruction set.
    """

    job: str
    path: str
    size: int
    modified: int
    rows: tuple[int, int]
    files: Mapping[str, int]
    recovered: int
    failed: int
    objective: float | None
    seconds: float
    ran_on: str


def claim(folder: Path, job: Mapping[str, Any]) -> None:
    """Make a folder the place of this job's images.

    Raises:
        FormatError: as of `expect_ours`, or it cannot be written to.
    """
    if not expect_ours(folder, job):
        make_folder(folder)
        _write(folder / MANIFEST, {"fastinv": fastinv.__version__, "job": job})


def expect_ours(folder: Path, job: Mapping[str, Any]) -> bool:
    """Whether a folder is the place of this job's images already.

    Raises:
        FormatError: it holds something else, or images of another job.
    """
    path = folder / MANIFEST
    others = _others(folder)
    if not path.exists():  # asked after the files: another process may have just begun
        if others:
            raise FormatError(f"{folder}: the folder holds files but no {MANIFEST}; choose a new one")
        return False
    found = _read(path).get("job")
    if not isinstance(found, dict):
        raise FormatError(f"{path}: describes no job; choose another folder")
    given = json.loads(strict_json.dumps(job))
    for name in sorted(given | found):
        if given.get(name) != found.get(name):
            if not any(folder.rglob(f"*{STATS}")):  # nothing was done yet
                return False
            raise FormatError(
                f"{folder}: holds images of another job, with {name} {found.get(name)!r:.80} instead of "
                f"{given.get(name)!r:.80}: choose a new folder, or go on with the same"
            )
    return True


def conclude(folder: Path, job: Mapping[str, Any], shards: Sequence[Stats | None]) -> None:
    """Add to the manifest what became of all shards of the log, None for those that are not done.

    Raises:
        FormatError: the folder is not this job's any more.
    """
    claim(folder, job)
    done = [stats for stats in shards if stats is not None]
    counts: dict[str, Any] = {
        "shards": len(shards),
        "done": len(done),
        "recovered": sum(stats.recovered for stats in done),
        "failed": sum(stats.failed for stats in done),
    }
    path = folder / MANIFEST
    _write(path, _read(path) | {"counts": counts})


def done(stem: Path, what: tuple[str, str, int, int], endings: Iterable[str]) -> Stats | None:
    """What became of a shard; None where it is still to be done.

    Args:
        stem: where its results are, without their endings.
        what: the job, and the file's path, size and time, as in `Stats`.
        endings: of its files of images.
    """
    try:
        found = _read(_beside(stem, STATS))
        stats = Stats(**{field.name: found[field.name] for field in fields(Stats)})
        there = sizes(stem, endings)
    except (FormatError, KeyError, OSError):
        return None
    same = ((stats.job, stats.path, stats.size, stats.modified), stats.files) == (what, there)
    counts = (stats.recovered, stats.failed)
    return stats if same and all(type(count) is int and count >= 0 for count in counts) else None


def sizes(stem: Path, endings: Iterable[str]) -> dict[str, int]:
    """A shard's files of images, with their sizes in bytes."""
    return {ending: _beside(stem, ending).stat().st_size for ending in endings}


def mark(stem: Path, stats: Stats) -> None:
    """Say that a shard is done."""
    _write(_beside(stem, STATS), asdict(stats))


def unmark(stem: Path) -> None:
    """Say that a shard is not done, whatever files there are."""
    _beside(stem, STATS).unlink(missing_ok=True)


def remove(stem: Path, endings: Iterable[str]) -> bool:
    """Remove all that there is of a shard; whether there was anything."""
    paths = [_beside(stem, ending) for ending in (STATS, ERRORS, *endings)]
    there = [path for path in paths if path.exists()]
    for path in there:
        path.unlink()
    return bool(there)


def tell_errors(stem: Path, errors: Iterable[Mapping[str, Any]]) -> None:
    """List the rows of a shard that failed, or why it failed whole; no file where nothing did."""
    text = "".join(f"{json.dumps(error)}\n" for error in errors)
    path = _beside(stem, ERRORS)
    if text:
        make_folder(path.parent)
        _write_text(path, text)
    else:
        path.unlink(missing_ok=True)


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _others(folder: Path) -> bool:
    """Whether a folder holds files that are not hidden."""
    try:
        return folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    except OSError as error:
        raise FormatError(f"{folder}: cannot be read ({error.strerror}); choose another place") from None


def _read(path: Path) -> dict[str, Any]:
    return strict_json.read_object(path, "; choose another folder")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    _write_text(path, f"{json.dumps(content, indent=2)}\n")


def _write_text(path: Path, text: str) -> None:
    try:
        with new_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise FormatError(f"{path}: cannot write it ({error.strerror})") from error
