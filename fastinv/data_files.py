"""What single data files hold, as arrays: IDX, CIFAR-10 batches, Parquet tables, pictures. Damage is told by file."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import DataError

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

CIFAR_SHAPE = (3, 32, 32)
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def read_idx(path: Path) -> Bytes:
    """The array of bytes in an IDX file, gzipped or not.

    Raises:
        DataError: the file is missing, damaged or of another type.
    """
    data = _read(path)
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip ({error}); fetch it again") from None
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8 or not 1 <= data[3] <= 4:
        raise DataError(f"{path}: not an IDX file of bytes (it begins with {data[:4].hex()})")
    rank = data[3]
    header = 4 + 4 * rank
    shape = tuple(int.from_bytes(data[k : k + 4], "big") for k in range(4, min(header, len(data)), 4))
    if len(data) < header or len(data) - header != math.prod(shape):
        raise DataError(f"{path}: {len(data)} bytes do not hold shape {list(shape)}: truncated or damaged")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_cifar(path: Path) -> tuple[Bytes, Indices]:
    """Images [N, 3, 32, 32] and labels [N] of one of CIFAR-10's binary batches.

    Raises:
        DataError: the file is missing or not made of whole records.
    """
    data = _read(path)
    record = 1 + math.prod(CIFAR_SHAPE)
    if len(data) % record or not data:
        raise DataError(f"{path}: {len(data)} bytes, expected records of {record}: truncated or damaged")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    if rows[:, 0].max() > 9:
        raise DataError(f"{path}: a label {rows[:, 0].max()}, expected 0 to 9: not a CIFAR-10 batch, or damaged")
    return rows[:, 1:].reshape(-1, *CIFAR_SHAPE), rows[:, 0].astype(np.int64)


@dataclass(frozen=True)
class Table:
    """The rows of a Parquet file: images [C, H, W], class indices, and the classes' names where the file tells them."""

    images: list[Bytes]
    labels: list[int]
    classes: tuple[str, ...]


def read_parquet(path: Path) -> Table:
    """A Parquet file in Hugging Face's layout: a column of {bytes, path} and a column of class indices.

    Raises:
        DataError: pyarrow is not installed, or the file is missing, damaged or of other columns.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; install it with pip install 'fastinv[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error!s:.120})") from None
    image = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
    label = next((name for name in LABEL_COLUMNS if name in table.column_names), None)
    if image is None or label is None:
        raise DataError(f"{path}: columns {table.column_names}, expected img (or image) and label")
    cells = table[image].to_pylist()
    encoded: list[Any] = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
    labels: list[Any] = table[label].to_pylist()
    if not all(isinstance(e, bytes) for e in encoded) or not all(type(v) is int and v >= 0 for v in labels):
        raise DataError(f"{path}: expected images as bytes and labels as integers >= 0")
    images = [_decode(io.BytesIO(data), f"{path}, image {index}") for index, data in enumerate(encoded)]
    return Table(images, labels, _class_names(table.schema, label))


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The class names that Hugging Face's library notes in a file; none where there is no such note."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, note["info"]["features"][label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def read_image(path: Path, size: tuple[int, int] | None = None) -> Bytes:
    """A picture as [C, H, W], C = 1 for grey and 3 for all others, resized to (H, W) where asked for.

    Raises:
        DataError: the file is missing or no picture that Pillow can read.
    """
    return _decode(path, str(path), size)


def _decode(data: io.BytesIO | Path, where: str, size: tuple[int, int] | None = None) -> Bytes:
    from PIL import Image

    try:
        with Image.open(data) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            converted = image.convert("L" if image.mode in ("L", "1") else "RGB")
            if size is not None and converted.size != size[::-1]:
                converted = converted.resize(size[::-1], Image.Resampling.LANCZOS)
            pixels: Bytes = np.asarray(converted, np.uint8)
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(f"{where}: not a readable image ({error!s:.80})") from None
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
