"""Which files make up a log, and what their results are called."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastinv.bulk.features import SUFFIXES, Choice, open_file
from fastinv.errors import FastinvError, FormatError
from fastinv.ops.base import Shape

MAX_NAME = 255 - len("-000000.errors.jsonl")  # bytes, of a file's name without its ending


@dataclass(frozen=True)
class Shard:
    """One file of a log, or some of its rows.

    Attributes:
        path: the file.
        name: what its results are called, a path below the folder of results without an ending.
        size, modified: of the file, in bytes and nanoseconds.
        rows: from which to which; None: all.
        part: of the file, 0 to 1.
    """

    path: Path
    name: str
    size: int
    modified: int
    rows: tuple[int, int] | None = None
    part: float = 1.0

    @property
    def whole_name(self) -> str:
        """What the results of the whole file would be called, of one that was cut."""
        return self.name.rpartition("-")[0]

    def expect_unchanged(self) -> None:
        """Raise FormatError where the file is another than when it was found."""
        if _seen(self.path) != (self.size, self.modified):
            raise FormatError("changed since the log was looked at: run it again")


def find(log: Sequence[Path]) -> list[Shard]:
    """The shards of a log, in the order of their names.

    Args:
        log: files, and folders: all files in them and below them that may hold features, but hidden ones.

    Raises:
        FormatError: there are none, a folder cannot be read, or results cannot have the names that theirs would.
    """
    found: dict[str, Path] = {}
    for path in (path for given in log for path in _files(given)):
        found.setdefault(os.path.realpath(path), path)
    paths = list(found.values())
    if not paths:
        where = ", ".join(map(str, log)) or "an empty log"
        raise FormatError(f"{where}: no files of features; expected some with a suffix of {', '.join(SUFFIXES)}")
    root = os.path.commonpath([os.path.abspath(given if given.is_dir() else given.parent) for given in log])
    names: dict[str, Path] = {}
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), root).removesuffix(path.suffix)
        if name in names:
            raise FormatError(f"{path} and {names[name]} would have results of one name: recover them to two folders")
        if len(os.fsencode(os.path.basename(name))) > MAX_NAME:
            raise FormatError(f"{path}: its results' names would be too long; rename it to at most {MAX_NAME} bytes")
        names[name] = path
    for name, path in names.items():
        for folder in Path(name).parents:
            if folder.suffix and str(folder.with_suffix("")) in names:
                raise FormatError(f"{path}: its folder may have the name of another file's results: rename it")
    return [Shard(path, name, *_seen(path)) for name, path in sorted(names.items())]


def cut(files: Sequence[Shard], rows: int, shape: Shape, choice: Choice) -> Iterator[Shard]:
    """Each file as one or several shards of at most so many rows; as one without rows where it cannot be read."""
    for file in files:
        try:
            count = open_file(file.path, shape, choice).count
        except FastinvError:  # is told of when it is to be read
            yield replace(file, name=piece_name(file.name, 0))
            continue
        for number, start in enumerate(range(0, max(1, count), rows)):
            stop = min(start + rows, count)
            share = (stop - start) / max(1, count)
            yield replace(file, name=piece_name(file.name, number), rows=(start, stop), part=share)


def piece_name(name: str, number: int) -> str:
    """What the results of one of several parts of a file are called."""
    return f"{name}-{number:06}"


def expect_apart(log: Sequence[Path], out: Path) -> None:
    """Raise FormatError where results would lie among the files of the log, and be taken for some."""
    folder = os.path.realpath(out)
    for given in log:
        if given.is_dir() and os.path.commonpath([folder, os.path.realpath(given)]) == os.path.realpath(given):
            raise FormatError(f"{out}: lies in the log's own folder {given}; choose another place")


def _files(given: Path) -> Iterator[Path]:
    """A file, or all files of features in a folder."""
    if not given.is_dir():
        yield given
        return
    entered = set()
    for folder, folders, files in os.walk(given, onerror=_refuse, followlinks=True):
        folders.sort()
        if os.path.realpath(folder) in entered:  # by a link to a folder above
            folders.clear()
            continue
        entered.add(os.path.realpath(folder))
        folders[:] = (name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                yield path


def _refuse(error: OSError) -> None:
    raise FormatError(f"{error.filename}: cannot be read ({error.strerror})")


def _seen(path: Path) -> tuple[int, int]:
    """A file's size and time."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns
