"""Which files make up a log, and what their results are called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastinv.bulk.features import SUFFIXES, Choice, open_file
from fastinv.errors import FastinvError, FormatError
from fastinv.ops.base import Shape


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


def find(log: Any) -> list[Shard]:
    """The shards of a log, in the order of their names.

    Args:
        log: a file, a folder (all files in it and below it that may hold features), or several files.

    Raises:
        FormatError: there are none, or two would have results of the same name.
    """
    if isinstance(log, (str, os.PathLike)):
        root = Path(log)
        paths = _below(root) if root.is_dir() else [root]
        root = root if root.is_dir() else root.parent
    else:
        paths = [Path(path) for path in log]
        root = Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths])) if paths else Path()
    if not paths:
        raise FormatError(f"{log}: no files of features; expected some with a suffix of {', '.join(SUFFIXES)}")
    names: dict[str, Path] = {}
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), os.path.abspath(root)).removesuffix(path.suffix)
        if name in names:
            raise FormatError(f"{path} and {names[name]} would have results of one name: recover them to two folders")
        names[name] = path
    return [_shard(path, name) for name, path in sorted(names.items())]


def _below(folder: Path) -> list[Path]:
    """All files of features in a folder; hidden ones are none."""
    paths = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _shard(path: Path, name: str) -> Shard:
    try:
        found = os.stat(path)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    return Shard(path, name, found.st_size, found.st_mtime_ns)


def cut(shards: list[Shard], rows: int, shape: Shape, choice: Choice) -> Iterator[Shard]:
    """Each shard as one or several of at most so many rows; whole where it cannot be read."""
    for shard in shards:
        try:
            count = open_file(shard.path, shape, choice).count
        except FastinvError:
            yield shard
            continue
        for number, start in enumerate(range(0, max(1, count), rows)):
            stop = min(start + rows, count)
            part = (stop - start) / max(1, count)
            yield replace(shard, name=f"{shard.name}-{number:05}", rows=(start, stop), part=part)


def expect_apart(log: Any, out: Path) -> None:
    """Raise FormatError where results would lie among the files of the log, and be taken for some."""
    folder = os.path.realpath(out)
    for path in [log] if isinstance(log, (str, os.PathLike)) else log:
        if os.path.isdir(path) and os.path.commonpath([folder, os.path.realpath(path)]) == os.path.realpath(path):
            raise FormatError(f"{out}: lies in the log's own folder {path}; choose another place")
