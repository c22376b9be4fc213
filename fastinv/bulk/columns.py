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
GROUPS = 2  # blocks that a row group may have, to be read whole
LEAST_BYTES = 2**22  # that are read of a larger one at once: each time pyarrow takes as long as for 100 rows or so
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class Table:
    """What all tables share: which columns are read, and what becomes of their rows."""

    count: int

    def __init__(self, schema: pa.Schema, shape: Shape, choice: Choice) -> None:
        ids = choice.ids
        if ids is None and NAMES in schema.names and choice.key != NAMES and _names_rows(schema.field(NAMES).type):
            ids = NAMES
        if ids is not None and ids not in schema.names:
            raise FormatError(f"has no column {ids!r} of the rows' names; it holds {', '.join(schema.names)}")
        if ids is not None and not _names_rows(schema.field(ids).type):
            kind = schema.field(ids).type
            raise FormatError(
                f"column {ids!r} of names is of {kind}, expected whole numbers or text: say which else, with ids="
            )
        names = schema.names if choice.key else [field.name for field in schema if _holds_rows(field.type)]
        if not names:
            raise FormatError(f"holds no column of lists, tensors or bytes, but {', '.join(schema.names)}")
        self._key = choose(names, choice.key, but=ids, what="column")
        self._ids = ids
        self._shape = choice.stored_shape(shape)
        self._choice = choice
        self.columns = [self._key] if ids is None else list(dict.fromkeys([self._key, ids]))
        if not _holds_rows(schema.field(self._key).type):
            raise FormatError(
                f"column {self._key!r} is of {schema.field(self._key).type}, expected lists, tensors or bytes"
            )
        self._none = pa.array([], _storage_type(schema.field(self._key).type))
        self._no_names = None if self._ids is None else _as_names(pa.array([], _storage_type(schema.field(ids).type)))

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[Block]:
        if start == stop:
            yield self._block(start, self._none, self._no_names)
            return
        for at, batch in self._batches(start, stop, rows):
            for low in range(max(start - at, 0), min(stop - at, len(batch)), rows):
                part = batch.slice(low, min(rows, stop - at - low))
                ids = None if self._ids is None else _as_names(part.column(self._ids))
                yield self._block(at + low, part.column(self._key), ids)
            if at + len(batch) >= stop:
                return

    def _batches(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The columns that are read, in batches that rows start to stop are in, and the number of each one's first."""
        raise NotImplementedError

    def _block(self, start: int, column: pa.Array, ids: pa.Array | None) -> Block:
        data, dtype, failed = rows(column, self._shape, self._choice.stored_as)
        return Block(start, len(column), self._choice.channels_first(data), dtype, ids, failed)

    def whole(self) -> Block:
        blocks = list(self.blocks(0, self.count, max(1, self.count)))
        data = blocks[0].data if len(blocks) == 1 else np.concatenate([block.data for block in blocks])
        failed = {block.start + place: why for block in blocks for place, why in block.failed.items()}
        return Block(0, self.count, data, blocks[0].dtype, None, failed)


def _names_rows(kind: pa.DataType) -> bool:
    """Whether values of this type can be names: whole numbers, text, and what has a form as text."""
    try:
        _as_names(pa.array([], _storage_type(kind)))
    except pa.ArrowException:
        return False
    return True


def _as_names(column: pa.Array) -> pa.Array:
    """Whole numbers as they are, all else as text: bytes of one length in hexadecimal, others as UTF-8."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_integer(column.type):
        return column
    if not _is_binary(column.type):
        return column.cast(pa.string())
    fixed = pa.types.is_fixed_size_binary(column.type)
    cells = (None if cell is None else cell.hex() if fixed else _text(cell) for cell in column.to_pylist())
    return pa.array(cells, pa.string())


def _text(cell: bytes) -> str:
    return cell.decode("utf-8", "backslashreplace")


class ParquetFile(Table):
    """A Parquet file, read by row groups."""

    def __init__(self, path: Path, shape: Shape, choice: Choice) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        super().__init__(self._file.schema_arrow, shape, choice)
        self.count = self._file.metadata.num_rows

    def _batches(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        metadata = self._file.metadata
        sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        ends = np.cumsum(sizes, dtype=np.int64)
        first, last = (int(np.searchsorted(ends, row, "right")) for row in (start, stop - 1))
        at = int(ends[first - 1]) if first else 0
        # Where groups hold plain bytes whole ones come at 9 GB/s, parts of them at 2 to 3.
        group = max(sizes)
        wanted = max(rows, LEAST_BYTES // (4 * math.prod(self._shape)))
        if group <= max(GROUPS * rows, wanted):
            wanted = max(1, rows // group) * group
        for batch in self._file.iter_batches(wanted, row_groups=list(range(first, last + 1)), columns=self.columns):
            yield at, batch
            at += len(batch)


class ArrowFile(Table):
    """An Arrow IPC file or stream, mapped."""

    def __init__(self, path: Path, shape: Shape, choice: Choice) -> None:
        self._path = path
        super().__init__(self._open().schema, shape, choice)
        self.count = sum(len(batch) for batch in self._all())

    def _batches(self, start: int, stop: int, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        at = count = 0
        gathered: list[pa.RecordBatch] = []  # of small batches enough for a block
        for batch in self._all():
            if not gathered and at + len(batch) <= start:
                at += len(batch)
                continue
            for name in self.columns:  # a wrong offset would have pyarrow read beyond its memory
                batch.column(name).validate(full=True)
            gathered.append(batch)
            count += len(batch)
            if count >= min(rows, stop - at):
                yield at, _joined(gathered)
                at, count, gathered = at + count, 0, []

    def _open(self) -> Any:
        source = pa.memory_map(str(self._path))
        try:
            return pa.ipc.open_file(source)
        except pa.ArrowInvalid:  # no file's magic number
            source.seek(max(0, source.size() - len(END_OF_STREAM)))
            if source.read() != END_OF_STREAM:
                raise FormatError("no Arrow file, and no stream that has an end: cut off?") from None
            source.seek(0)
            return pa.ipc.open_stream(source)

    def _all(self) -> Iterator[pa.RecordBatch]:
        """All batches, with the columns that are read."""
        reader = self._open()
        if isinstance(reader, pa.RecordBatchFileReader):
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            yield batch.select(self.columns)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.Table.from_batches(batches).combine_chunks().to_batches()[0]


def rows(column: pa.Array, shape: Shape, stored_as: str | None) -> tuple[npt.NDArray[Any], str, dict[int, str]]:
    """A column's rows as an array [n, *shape], in the same memory where that can be.

    Args:
        column: lists of numbers (flat, or nested as `shape` is), tensors, or bytes.
        shape: of one row.
        stored_as: the dtype of numbers held as bytes, or "bfloat16" of lists of their bits; None: float32.

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
    if fits is not None:
        failed |= dict.fromkeys(places[~fits].tolist(), f"holds null, or not {list(shape)} numbers")
        column = column.filter(pa.array(fits))  # without what is beside it, too
    values = read(column, shape, stored_as)
    assert values is not None
    dtype = "bfloat16" if stored_as == "bfloat16" and values.dtype == np.uint16 else values.dtype.name
    return values.reshape(-1, *shape), dtype, failed


def _holds_rows(kind: pa.DataType) -> bool:
    kind = _storage_type(kind)
    return _is_list(kind) or _is_binary(kind)


def _storage_type(kind: pa.DataType) -> pa.DataType:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


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


def _fitting_lists(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[np.bool_] | None:
    """Which rows are lists of as many numbers as they should be, told one by one; None: all are."""
    if _numbers(column, shape, stored_as) is not None:
        return None
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


def _fitting_bytes(column: pa.Array, shape: Shape, stored_as: str | None) -> npt.NDArray[np.bool_] | None:
    """Which rows have as many bytes as they should; None: all have."""
    wanted = math.prod(shape) * _stored(stored_as).itemsize
    if pa.types.is_fixed_size_binary(column.type) and column.type.byte_width != wanted:
        raise FeatureError(
            f"rows of {column.type.byte_width} bytes, expected {wanted}, {list(shape)} numbers of "
            f"{stored_as or 'float32'}: say of which type they are, with stored_as="
        )
    offsets = _offsets(column)
    fits = np.equal(offsets[1:] - offsets[:-1], wanted)
    return None if fits.all() else fits


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
    if not len(column):
        return np.empty(0, _stored(stored_as))
    offsets = _offsets(column)
    size = int(offsets[-1] - offsets[0])
    return np.frombuffer(column.buffers()[-1], np.uint8, size, int(offsets[0])).view(_stored(stored_as))


def _stored(stored_as: str | None) -> np.dtype[Any]:
    """The type that holds numbers in bytes: of bfloat16 their bits'."""
    return np.dtype(np.uint16 if stored_as == "bfloat16" else stored_as or np.float32)


def _another_shape(found: list[Any], shape: Shape) -> str:
    sizes = ", ".join(map(str, found))
    return f"rows of [{sizes}], expected {list(shape)}: are these the features of another split point or model?"
