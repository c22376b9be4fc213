"""Features in a column of a table, Parquet or Arrow IPC: lists of numbers, nested or flat, tensors, and bytes.

Rows that do not fit (null, of another length) are told of one by one; a column of another kind is refused whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.bulk.features import Block, Choice, choose
from fastinv.errors import FeatureError, FormatError
from fastinv.ops.base import Shape

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    raise FormatError("Parquet and Arrow need pyarrow; install it with pip install 'fastinv[parquet]'") from None

NAMES = "id"  # the column of the rows' names, where nothing else is said
GROUPS = 4  # blocks that a row group may have, to be read whole
BYTES_OF = {4: "float32", 8: "float64"}  # what so many bytes a number are, where nothing else is said


class Table:
    """What all tables share: which columns are read, and what becomes of their rows."""

    count: int

    def __init__(self, schema: pa.Schema, shape: Shape, choice: Choice) -> None:
        ids = choice.ids
        if ids is None and NAMES in schema.names and choice.key != NAMES:
            ids = NAMES
        if ids is not None and ids not in schema.names:
            raise FormatError(f"has no column {ids!r} of the rows' names; it holds {', '.join(schema.names)}")
        names = schema.names if choice.key else [field.name for field in schema if _holds_rows(field.type)]
        self._key = choose(names, choice.key, but=ids, what="column")
        self._ids = ids
        self._shape = choice.stored_shape(shape)
        self._choice = choice
        self.columns = [self._key] if ids is None else list(dict.fromkeys([self._key, ids]))
        if not _holds_rows(schema.field(self._key).type):
            raise FormatError(
                f"column {self._key!r} is of {schema.field(self._key).type}, expected lists, tensors or bytes"
            )

    def _parts(self, at: int, batch: pa.RecordBatch, start: int, stop: int, rows: int) -> Iterator[Block]:
        """Those of rows start to stop that are in a batch, which begins with row `at`."""
        for low in range(max(start - at, 0), min(stop - at, len(batch)), rows):
            yield self._block(at + low, batch.slice(low, min(rows, stop - at - low)))

    def _block(self, start: int, batch: pa.RecordBatch) -> Block:
        data, dtype, failed = rows(batch.column(self._key), self._shape, self._choice.stored_as)
        ids = None if self._ids is None else batch.column(self._ids)
        return Block(start, len(batch), self._choice.channels_first(data), dtype, ids, failed)


class ParquetFile(Table):
    """A Parquet file, read by row groups."""

    def __init__(self, path: Path, shape: Shape, choice: Choice) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        super().__init__(self._file.schema_arrow, shape, choice)
        self.count = self._file.metadata.num_rows

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[Block]:
        metadata = self._file.metadata
        sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        first, last = (int(np.searchsorted(ends, row, "right")) for row in (start, max(start, stop - 1)))
        at = int(ends[first - 1]) if first else 0
        if start == stop:
            return
        # Whole groups come mapped where they hold plain bytes (9 GB/s); a part of one is a copy (2 to 3 GB/s).
        group = max(sizes)
        wanted = group if group <= GROUPS * rows else rows
        for batch in self._file.iter_batches(wanted, row_groups=list(range(first, last + 1)), columns=self.columns):
            yield from self._parts(at, batch, start, stop, rows)
            at += len(batch)


class ArrowFile(Table):
    """An Arrow IPC file or stream, mapped."""

    def __init__(self, path: Path, shape: Shape, choice: Choice) -> None:
        self._path = path
        reader = self._open()
        super().__init__(reader.schema, shape, choice)
        self.count = sum(len(batch) for batch in _batches(reader))

    def _open(self) -> Any:
        source = pa.memory_map(str(self._path))
        try:
            return pa.ipc.open_file(source)
        except pa.ArrowInvalid:  # no file's magic number
            source.seek(0)
            return pa.ipc.open_stream(source)

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[Block]:
        at = 0
        for batch in _batches(self._open()):
            yield from self._parts(at, batch.select(self.columns), start, stop, rows)
            at += len(batch)


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from reader


def rows(column: pa.Array, shape: Shape, stored_as: str | None) -> tuple[npt.NDArray[Any], str, dict[int, str]]:
    """A column's rows as an array [n, *shape], in the same memory where that can be.

    Args:
        column: lists of numbers (flat, or nested as `shape` is), tensors, or bytes.
        shape: of one row.
        stored_as: the dtype of numbers held as bytes, or "bfloat16" of lists of their bits.

    Returns:
        The rows that fit, their dtype's name (bfloat16 as its bits), and by place what is wrong with the others.

    Raises:
        FeatureError: no row of this column can be one of features of this shape.
    """
    failed: dict[int, str] = {}
    places = np.arange(len(column))
    if column.null_count:
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        failed = dict.fromkeys(places[~valid].tolist(), "null")
        places, column = places[valid], column.drop_null()
    if isinstance(column.type, pa.BaseExtensionType):
        column = _storage(column, shape)
    find, read = (_fitting_bytes, _bytes) if _is_binary(column.type) else (_fitting_lists, _numbers)
    fits = find(column, shape, stored_as)
    if not fits.all():
        failed |= dict.fromkeys(places[~fits].tolist(), f"holds null, or not {list(shape)} numbers")
        column = column.filter(pa.array(fits))
    values = read(column, shape, stored_as)
    assert values is not None
    dtype = "bfloat16" if stored_as == "bfloat16" and values.dtype == np.uint16 else values.dtype.name
    return values.reshape(-1, *shape), dtype, failed


def _holds_rows(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return _is_list(kind) or _is_binary(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _storage(column: pa.Array, shape: Shape) -> pa.Array:
    """What an array of an extension type is made of."""
    kind = column.type
    if isinstance(kind, pa.FixedShapeTensorType):
        if tuple(kind.shape) != shape and tuple(kind.shape) != (math.prod(shape),):
            raise FeatureError(_another_shape(list(kind.shape), shape))
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            raise FeatureError(f"tensors that are stored permuted ({kind.permutation}), expected them in order")
    return column.storage


def _fitting_lists(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[np.bool_]:
    """Which rows are lists of as many numbers as they should be: told one by one where not all are."""
    if _numbers(column, shape, stored_as) is not None:
        return np.ones(len(column), np.bool_)
    rows = (column.take([k]) for k in range(len(column)))  # a slice would be cast with what is beside it
    return np.array([_numbers(row, shape, stored_as) is not None for row in rows], np.bool_)


def _numbers(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[Any] | None:
    """The numbers of all lists, flat; None where some list does not fit."""
    sizes: list[int | None] = []  # None: they vary
    kind = column.type
    while _is_list(kind):
        sizes.append(kind.list_size if pa.types.is_fixed_size_list(kind) else None)
        kind = kind.value_type
    wanted = shape if len(sizes) == len(shape) else (math.prod(shape),)
    if len(sizes) != len(wanted) or any(size not in (None, n) for size, n in zip(sizes, wanted, strict=True)):
        raise FeatureError(_another_shape(["any" if size is None else size for size in sizes], shape))
    for size in reversed(wanted):
        kind = pa.list_(kind, size)
    try:
        values = column.cast(kind)
    except pa.ArrowInvalid:
        return None
    for _ in wanted:
        values = values.flatten()  # without what is null
    if len(values) != len(column) * math.prod(shape) or values.null_count:
        return None
    found: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return found


def _fitting_bytes(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[np.bool_]:
    """Which rows have as many bytes as they should, or where nothing says how many that are, as most have."""
    offsets = _offsets(column)
    widths: npt.NDArray[np.int64] = offsets[1:] - offsets[:-1]
    if stored_as is not None:
        return np.equal(widths, math.prod(shape) * _stored(stored_as).itemsize)
    found, counts = np.unique(widths, return_counts=True)
    return np.equal(widths, found[counts.argmax()] if len(found) else 0)


def _offsets(column: pa.Array) -> npt.NDArray[np.int64]:
    """Where in an array's bytes each row begins, and the last one ends."""
    if pa.types.is_fixed_size_binary(column.type):
        return np.arange(column.offset, column.offset + len(column) + 1, dtype=np.int64) * int(column.type.byte_width)
    if not len(column):  # may have no offsets at all
        return np.zeros(1, np.int64)
    kind = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    ends: npt.NDArray[Any] = np.frombuffer(column.buffers()[1], kind)
    return ends[column.offset : column.offset + len(column) + 1].astype(np.int64)


def _bytes(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[Any]:
    """The numbers of all rows, which have as many bytes each, flat."""
    offsets = _offsets(column)
    if not len(column):
        return np.empty(0, np.float32)
    dtype = _dtype(int(offsets[1] - offsets[0]), shape, stored_as)
    size = int(offsets[-1] - offsets[0])
    return np.frombuffer(column.buffers()[-1], np.uint8, size, int(offsets[0])).view(dtype)


def _stored(stored_as: str) -> np.dtype[Any]:
    """The type that holds such numbers: of bfloat16 their bits'."""
    return np.dtype(np.uint16 if stored_as == "bfloat16" else stored_as)


def _dtype(width: int, shape: Shape, stored_as: str | None) -> np.dtype[Any]:
    """What numbers of this shape are that take so many bytes, bfloat16 as its bits.

    Raises:
        FeatureError: they take other numbers of bytes, or may be of two types, and nothing says of which.
    """
    if stored_as is not None:
        return _stored(stored_as)
    size, rest = divmod(width, math.prod(shape))
    if rest or size not in (1, 2, 4, 8):
        raise FeatureError(f"rows of {width} bytes, expected {list(shape)} numbers of 1, 2, 4 or 8 bytes each")
    if size not in BYTES_OF:
        names = "float16 or bfloat16" if size == 2 else "uint8 or int8"
        raise FeatureError(f"numbers of {size} byte(s), {names}: say which, with stored_as=")
    return np.dtype(BYTES_OF[size])


def _another_shape(found: list[Any], shape: Shape) -> str:
    sizes = ", ".join(map(str, found))
    return f"rows of [{sizes}], expected {list(shape)}: are these the features of another split point or model?"
