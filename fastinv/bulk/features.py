"""Features in files, read in blocks of rows: arrays (`.npy`, `.npz`, `.safetensors`, `.pt`) and columns of tables.

No pickle is read. What a file does not say (which of its arrays, in which layout) a `Choice` does.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.errors import FeatureError, FormatError
from fastinv.ops.base import Shape

LAYOUTS = ("NCHW", "NHWC")
SAFETENSORS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "U8": "u1", "I8": "i1"}


@dataclass(frozen=True)
class Choice:
    """What to take from a file, and what it means.

    Attributes:
        key: which array of a file of several, or which column of a table; None where there is but one.
        ids: the array or column of the rows' names; None: "id" in a table that has one, else the rows' numbers.
        layout: "NCHW", or "NHWC" for features whose channels come last.
        stored_as: the dtype of numbers that a table holds as bytes, or as lists of bfloat16's bits; None: float32.
    """

    key: str | None = None
    ids: str | None = None
    layout: str = "NCHW"
    stored_as: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise FeatureError(f"layout {self.layout!r:.40}, expected one of {', '.join(LAYOUTS)}")
        if self.stored_as not in (None, *tensors.FLOATS, *tensors.QUANTISED):
            names = ", ".join(tensors.FLOATS + tensors.QUANTISED)
            raise FeatureError(f"stored_as {self.stored_as!r:.40}, expected one of {names}")
        for name, value in (("key", self.key), ("ids", self.ids)):
            if not isinstance(value, str | None):
                raise FeatureError(f"{name} {value!r:.40}, expected the name of an array or a column, or None")

    def stored_shape(self, shape: Shape) -> Shape:
        """The shape in the file of features of this shape."""
        return (*shape[1:], shape[0]) if self.layout == "NHWC" else shape

    def channels_first(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows of a file as [N, C, H, W], in the same memory."""
        if self.layout == "NCHW":
            return rows
        if rows.ndim != 4:
            raise FeatureError(f"features of shape {list(rows.shape)}, but layout NHWC is of four axes: leave it out")
        return rows.transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Block:
    """Rows of a file that follow each other.

    Attributes:
        start: the number of the first.
        count: how many there are.
        data: the features of those that could be read, in order; bfloat16 as its bits.
        dtype: its name.
        ids: the names of all, whole numbers or text, an array of numpy's or pyarrow's; None: their numbers are.
        failed: why the others could not be, by their place in the block.
    """

    start: int
    count: int
    data: npt.NDArray[Any]
    dtype: str
    ids: Any = None
    failed: Mapping[int, str] = field(default_factory=dict)

    @property
    def features(self) -> Any:
        """The data as `fastinv.invert` takes them."""
        return tensors.Bits(self.data) if self.dtype == "bfloat16" else self.data

    @property
    def places(self) -> npt.NDArray[np.intp]:
        """Where in the block the rows of `data` are."""
        return np.delete(np.arange(self.count), list(self.failed))

    def without(self, bad: npt.NDArray[np.bool_], why: str) -> Block:
        """The block with these rows of `data` failed, too."""
        failed = dict(self.failed) | dict.fromkeys(self.places[bad].tolist(), why)
        return replace(self, data=self.data[~bad], failed=failed)

    def between(self, low: int, high: int) -> Block:
        """Rows low to high of the block, as one of its own."""
        kept = (self.places >= low) & (self.places < high) if self.failed else slice(low, high)
        return Block(
            self.start + low,
            high - low,
            self.data[kept],
            self.dtype,
            None if self.ids is None else self.ids[low:high],
            {place - low: why for place, why in self.failed.items() if low <= place < high},
        )


class FeatureFile(Protocol):
    """An open file of features.

    Attributes:
        count: how many rows it has.
    """

    count: int

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[Block]:
        """Rows start to stop, at most so many at once; one empty block of none.

        Raises:
            FormatError: the file is damaged.
            FeatureError: its features are of another kind than the choice says.
        """

    def whole(self) -> Block:
        """All rows, mapped where they can be."""


class ArrayFile:
    """A file of arrays, whose first axis is the rows'."""

    def __init__(self, array: Any, ids: npt.NDArray[Any] | None, choice: Choice, bfloat16: bool = False) -> None:
        if len(array.shape) == 0 or (len(array) and math.prod(array.shape[1:]) == 0):
            raise FormatError(f"holds features of shape {list(array.shape)}, expected [N, ...]")
        self.count = len(array)
        self._array = array
        self._ids = None if ids is None else _names(ids, self.count)
        self._choice = choice
        self._bfloat16 = bfloat16  # whose bits the array holds

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[Block]:
        for first in range(start, max(stop, start + 1), rows):
            last = min(first + rows, stop)
            if isinstance(self._array, np.memmap):
                _ask_for(self._array[first:last])
            yield self._block(first, last)

    def whole(self) -> Block:
        return self._block(0, self.count)

    def _block(self, start: int, stop: int) -> Block:
        taken = self._array[start:stop]
        data, dtype, _ = tensors.as_numpy(tensors.Bits(taken) if self._bfloat16 else taken, "features")
        ids = None if self._ids is None else self._ids[start:stop]
        return Block(start, stop - start, self._choice.channels_first(data), dtype, ids)


def _names(ids: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Names of rows as whole numbers or text of this machine's byte order."""
    if ids.shape != (count,):
        raise FormatError(f"holds names of shape {list(ids.shape)}, expected one for each of {count} rows")
    if ids.dtype.kind == "S":
        return np.char.decode(ids, "utf-8")
    if ids.dtype.kind == "O":  # of h5py's text
        ids = ids.astype(str)
    if ids.dtype.kind not in "iuU":
        raise FormatError(f"holds names of dtype {ids.dtype}, expected whole numbers or text")
    if ids.dtype.kind == "U":
        np.char.encode(ids, "utf-8")  # raises where it is no text
    return ids.astype(ids.dtype.newbyteorder("="))


def _ask_for(rows: npt.NDArray[Any]) -> None:
    """Have the system read these rows of a mapped file while others are worked on.

    Read by this process instead, into memory of its own, they cost conv11's engine 60% of its pace on two cores: there
    features pass at 8 GB/s.
    """
    if not rows.flags.c_contiguous or rows.nbytes == 0:
        return
    base: Any = getattr(rows, "_mmap")  # noqa: B009  (of a memmap, which numpy's types do not tell of a slice)
    offset = rows.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_WILLNEED, start, offset + rows.nbytes - start)


def expect_file(path: Path) -> None:
    """Raise FormatError where there is no file to read: of a pipe or device the end may never come."""
    if not path.exists():
        raise FormatError(f"{path}: No such file")
    if not path.is_file():
        raise FormatError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")


def open_file(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    """The features in a file.

    Args:
        path: with one of `SUFFIXES`.
        shape: of one feature tensor; rows of a table, which may be flat, are given it.
        choice: what to take.

    Raises:
        FormatError: a missing or damaged file, another suffix, a pickle of more than tensors, no such array.
    """
    expect_file(path)
    suffix = path.suffix.lower()
    if suffix not in _OPENERS:
        raise FormatError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    with told_of(path):
        return _OPENERS[suffix](path, shape, choice)


def read(path: Path, shape: Shape, choice: Choice) -> Any:
    """All features in a file, as `fastinv.invert` takes them; those of a `.npy` file are mapped, not read.

    Raises:
        FormatError: as of `open_file`, or rows that cannot be read.
    """
    file = open_file(path, shape, choice)
    with told_of(path):
        block = file.whole()
    for place, why in block.failed.items():
        raise FormatError(f"{path}: row {place:,}: {why}; recover it as a log, which goes on without")
    return block.features


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Errors of reading a file name it: what the libraries raise on a damaged one has no common base."""
    try:
        yield
    except (FormatError, FeatureError) as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path}: cannot read features ({type(error).__name__}: {reason})") from None


# ---- files of arrays -----------------------------------------------------------------------------------------------


def _npy(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    for name in (choice.key, choice.ids):
        if name is not None:
            raise FormatError(f"key {name!r}, but a .npy file holds one array: leave the key out")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # it speaks of pickles where the file is cut or no .npy file
        raise FormatError(
            "cannot read features: cut off, no .npy file, or one of Python objects; expected an array of numbers"
        ) from error
    if not isinstance(array, np.ndarray):
        raise FormatError("cannot read features: a .npz archive; name it so")
    return ArrayFile(array, None, choice)


def _npz(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    if not zipfile.is_zipfile(path):
        raise FormatError("cannot read features: no .npz archive, or cut off")
    with np.load(path, allow_pickle=False) as arrays:
        ids = _ids_among(list(arrays), choice)
        array = arrays[choose(list(arrays), choice.key, but=ids)]
        return ArrayFile(array, None if ids is None else arrays[ids], choice)


def _safetensors(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    from safetensors import safe_open

    arrays: Any = safe_open(path, framework="numpy")  # checks the header
    names = list(arrays.keys())
    ids = _ids_among(names, choice)
    name = choose(names, choice.key, but=ids)
    # Mapped: the library's own slices are copies, which took half as long as an engine with two cores (1.6 GB/s).
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
    kind = SAFETENSORS.get(entry["dtype"])
    if kind is None:
        raise FormatError(f"holds {entry['dtype']}, expected float32, float16, bfloat16, float64, uint8 or int8")
    array: npt.NDArray[Any]
    if math.prod(entry["shape"]):
        array = np.memmap(path, kind, "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
    else:  # cannot be mapped
        array = np.broadcast_to(np.zeros((), kind), entry["shape"])
    return ArrayFile(array, None if ids is None else arrays.get_tensor(ids), choice, entry["dtype"] == "BF16")


def _pt(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it refuses it warns, too
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it has no common base; of more than tensors it says how to run what is in the file
        raise FormatError(
            "cannot read features: cut off, no .pt file, or one of more than tensors; expected torch.save(tensor)"
        ) from error
    ids = None
    if isinstance(content, dict):
        names = [name for name, value in content.items() if torch.is_tensor(value)]
        named = _ids_among(names, choice)
        ids = None if named is None else content[named].numpy()
        content = content[choose(names, choice.key, but=named)]
    elif choice.key is not None or choice.ids is not None:
        raise FormatError(f"key {choice.key or choice.ids!r}, but the file holds one tensor: leave the key out")
    if not torch.is_tensor(content):
        raise FormatError(f"holds a {type(content).__name__}, expected a tensor or a dict of tensors")
    return ArrayFile(content, ids, choice)


def _hdf5(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    try:
        import h5py
    except ImportError:
        raise FormatError("HDF5 needs h5py; install it with pip install 'fastinv[hdf5]'") from None
    names: list[str] = []
    file = h5py.File(path, "r")
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and item.shape else None)
    ids = _ids_among(names, choice)
    rows = file[choose(names, choice.key and choice.key.lstrip("/"), but=ids)]
    if ids is None:
        return ArrayFile(rows, None, choice)
    text = h5py.check_string_dtype(file[ids].dtype) is not None
    return ArrayFile(rows, (file[ids].asstr() if text else file[ids])[...], choice)


def _ids_among(names: list[str], choice: Choice) -> str | None:
    if choice.ids is not None and choice.ids not in names:
        raise FormatError(f"has no array {choice.ids!r} of the rows' names; it holds {_listed(names)}")
    return choice.ids


def choose(names: list[str], key: str | None, *, but: str | None = None, what: str = "array") -> str:
    """The name of the array or column of features: `key`, or the only one there is beside that of the rows' names.

    Raises:
        FormatError: there are others, or there is none.
    """
    if key is not None:
        if key not in names:
            raise FormatError(f"has no {what} {key!r}; it holds {_listed(names) or 'none'}")
        return key
    others = [name for name in names if name != but]
    if len(others) == 1:
        return others[0]
    if not others:
        raise FormatError(f"holds no {what}s")
    raise FormatError(f"holds {len(others)} {what}s ({_listed(others)}): pass key= to choose one")


def _listed(names: list[str]) -> str:
    return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")


def _parquet(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    from fastinv.bulk.columns import ParquetFile

    return ParquetFile(path, shape, choice)


def _arrow(path: Path, shape: Shape, choice: Choice) -> FeatureFile:
    from fastinv.bulk.columns import ArrowFile

    return ArrowFile(path, shape, choice)


_OPENERS: dict[str, Callable[[Path, Shape, Choice], FeatureFile]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _pt,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
SUFFIXES = tuple(_OPENERS)
