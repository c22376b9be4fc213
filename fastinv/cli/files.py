"""Where commands write. A file is replaced whole or left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastinv.errors import FormatError
from fastinv.places import beside, try_beside


@contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A name beside `path` for a new file or folder; it takes the place of `path` when all went well.

    Raises:
        FormatError: the place cannot be written to, a file or a filled folder is in the way of a folder, or a
            folder in the way of a file.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and path.is_dir() != folder:
        raise FormatError(f"{path}: is {'a file' if folder else 'a folder'}; choose another place")
    if folder and path.exists() and any(path.iterdir()):
        raise FormatError(f"{path}: the folder is not empty; choose a new one")
    try:
        with beside(path) as temporary:
            if folder:
                temporary.mkdir()
            yield temporary
    except OSError as error:
        reason = error.strerror or error
        raise FormatError(f"{path}: cannot write it ({reason}); choose another place") from error


def expect_place(path: Path) -> None:
    """Raise FormatError where no file can be written to `path`."""
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise FormatError(f"{path}: {reason}; choose another place")
    try:
        try_beside(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot write it ({error.strerror}); choose another place") from error


def expect_apart(out: Path, **others: Path | None) -> None:
    """Raise FormatError where writing `out` would destroy what is read, or written there, too."""
    for name, path in others.items():
        if path is not None and _same(out, path):
            raise FormatError(f"{out}: is the file of the {name.replace('_', ' ')}, too; choose another place")


def _same(one: Path, other: Path) -> bool:
    """Whether both names are of one file, which there may not be yet."""
    same = os.path.realpath(one) == os.path.realpath(other)
    return same or (one.exists() and other.exists() and one.samefile(other))
