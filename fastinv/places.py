"""Places for what is written: a file or folder takes the place of another whole, or leaves it as it was."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastinv.errors import FormatError

FRESH = 2  # seconds; a file may be younger that is about to be locked
OLD = 86_400  # seconds; after that one of another machine is left over, whose locks may not be seen here

_PREFIX, _SUFFIX = ".fastinv-", ".tmp"
_HERE = f"{_PREFIX}{zlib.crc32(os.uname().nodename.encode()):08x}-"  # by this machine


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A name for a new file or folder that takes the place of `path` when all went well; a link there stays one.

    What the system refuses is raised as it comes, an OSError.
    """
    target = _real(path)
    temporary = target.with_name(f"{_HERE}{secrets.token_hex(8)}{_SUFFIX}")  # fits where a long name of `path` does
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
        with suppress(OSError):  # where files cannot be locked, none is swept
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
        file.flush()
        os.fsync(file.fileno())


def sweep(folder: Path) -> None:
    """Remove what processes that were killed had begun to write `beside` files in this folder, and below it."""
    for temporary in folder.rglob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError), open(temporary, "rb") as file:
            least = FRESH if temporary.name.startswith(_HERE) else OLD
            if time.time() - os.fstat(file.fileno()).st_mtime > least:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while somebody writes it
                temporary.unlink()


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
