"""Feature files in, image files out. A file is replaced whole or left as it was; no pickle is read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import FormatError
from fastinv.ops.base import Shape
from fastinv.places import beside, try_beside

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt")


def read_features(path: Path, key: str | None = None) -> Any:
    """The features in a file: a numpy array, or a torch tensor for bfloat16 and from a `.pt` file.

    Args:
        path: `.npy` (mapped, not read), `.npz`, `.safetensors`, or `.pt` with a tensor or a dict of tensors.
        key: which array of a file of several; not needed where there is only one.

    Raises:
        FormatError: a missing or damaged file, another suffix, a pickle of more than tensors, no such key.
    """
    expect_file(path)
    readers = dict(zip(SUFFIXES, (_npy, _npz, _safetensors, _pt), strict=True))
    if path.suffix not in readers:
        raise FormatError(f"{path}: suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    try:
        return readers[path.suffix](path, key)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except Exception as error:  # what the four libraries raise on a damaged file has no common base
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(f"{path}: cannot read features ({type(error).__name__}: {reason})") from None


def expect_file(path: Path) -> None:
    """Raise FormatError where there is no file to read: of a pipe or device the end may never come."""
    if not path.exists():
        raise FormatError(f"{path}: No such file")
    if not path.is_file():
        raise FormatError(f"{path}: {'a folder' if path.is_dir() else 'a pipe or device'}, expected a file")


def _npy(path: Path, key: str | None) -> npt.NDArray[Any]:
    if key is not None:
        raise FormatError(f"key {key!r}, but a .npy file holds one array: leave the key out")
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:  # it speaks of pickles where the file is cut or no .npy file
        raise FormatError(
            "cannot read features: cut off, no .npy file, or one of Python objects; expected an array of numbers"
        ) from error
    return array


def _npz(path: Path, key: str | None) -> npt.NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        if not isinstance(arrays, Mapping):
            raise FormatError("not a .npz archive")
        array: npt.NDArray[Any] = arrays[_choose(list(arrays), key)]
        return array


def _safetensors(path: Path, key: str | None) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        name = _choose(list(tensors.keys()), key)
        dtype = tensors.get_slice(name).get_dtype()
        if dtype.startswith("F8"):
            raise FormatError(f"holds {dtype}, expected float32, float16, bfloat16, float64, uint8 or int8")
        if dtype != "BF16":
            return tensors.get_tensor(name)
    with safe_open(path, framework="pt") as tensors:  # numpy has no bfloat16
        return tensors.get_tensor(name)


def _pt(path: Path, key: str | None) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it refuses it warns, too
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it has no common base; of more than tensors it says how to run what is in the file
        raise FormatError(
            "cannot read features: cut off, no .pt file, or one of more than tensors; expected torch.save(tensor)"
        ) from error
    if isinstance(content, dict):
        content = content[_choose([name for name, value in content.items() if torch.is_tensor(value)], key)]
    elif key is not None:
        raise FormatError(f"key {key!r}, but the file holds one tensor: leave the key out")
    if not torch.is_tensor(content):
        raise FormatError(f"holds a {type(content).__name__}, expected a tensor or a dict of tensors")
    return content


def _choose(names: list[str], key: str | None) -> str:
    listed = ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")
    if key is None and len(names) == 1:
        return names[0]
    if not names:
        raise FormatError("holds no arrays")
    if key is None:
        raise FormatError(f"holds {len(names)} arrays ({listed}): pass --key to choose one")
    if key not in names:
        raise FormatError(f"has no array {key!r}; it holds {listed}")
    return key


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


def check_png(shape: Shape) -> None:
    """Raise FormatError where images [C, H, W] do not fit a PNG file."""
    if shape[0] not in (1, 3):
        raise FormatError(f"images of {shape[0]} channels, but PNG files take 1 or 3: write a .npy file")


def write_png(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """One image, uint8 [1, H, W] or [3, H, W], as a PNG file."""
    from PIL import Image

    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(path, format="PNG")
