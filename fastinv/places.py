"""Places for what is written: a file or folder takes the place of another whole, or leaves it as it was."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastinv.errors import FormatError


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A name for a new file or folder that takes the place of `path` when all went well; a link there stays one.

    What the system refuses is raised as it comes, an OSError.
    """
    target = _real(path)
    temporary = target.with_name(f".fastinv-{secrets.token_hex(8)}.tmp")  # fits where a long name of `path` does
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` as `beside` has it, once it is on the disk."""
    with beside(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def try_beside(path: str | Path) -> None:
    """Raise the OSError that writing `beside` this path would meet."""
    tempfile.TemporaryFile(dir=_real(path).parent).close()


def _real(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL in it
        raise OSError(errno.EINVAL, str(error)) from None


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none.

    Raises:
        FormatError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot make the folder ({error.strerror}); choose another") from None
