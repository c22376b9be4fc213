"""The `.finv` file: one inverter as a safetensors file that holds no code.

    8 bytes   header length n, little-endian
    n bytes   JSON: {"__metadata__": {"fastinv": document}, tensor: {"dtype", "shape", "data_offsets"}, ...}
    the rest  little-endian float32, tensor after tensor without gaps

The document is JSON in a string: format version, fastinv version, kind, recipe, graph (`Network.graph`),
provenance and a SHA-256. Weight `name` of step k is the tensor "k.name"; an rMLE's start that is an array is the
tensor "init"; one that is an inverse network stands in the recipe with kind, recipe, graph and provenance of its
own, and its tensors begin with "init.". The checksum only catches accidents: a hostile file carries the right one, so
nothing is believed for its sake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

import fastinv
from fastinv import strict_json
from fastinv.errors import FormatError
from fastinv.inverters import INVERTERS, Inverter
from fastinv.network import Network
from fastinv.ops.base import MAX_RANK
from fastinv.places import new_file

FORMAT = 1
MAX_HEADER = 2**23  # bytes
MAX_DATA = 2**32  # bytes
PART = {"kind", "recipe", "graph", "provenance"}  # of every inverter
KEYS = {"format", "fastinv", "sha256"} | PART
LATER = {"schedule"}  # fields of a recipe that older files lack, and leave at their defaults
TENSOR = "tensor"  # stands in the recipe for a field kept as a tensor of its name

_WEIGHT = re.compile(r"(0|[1-9][0-9]{0,3})\.([a-z_]{1,40})")

Tensors = Mapping[str, npt.NDArray[np.float32]]


def write(inverter: Inverter, path: str | Path) -> None:
    """Write `inverter` to `path`, whole or not at all: a file already there survives a failed write.

    Raises:
        FormatError: the path cannot be written, or the graph is too large for the header.
    """
    data = encode(inverter)
    try:
        with new_file(path) as file:
            file.write(data)
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the name of a temporary file
        raise FormatError(f"{path!s:.300}: cannot write the file ({reason}); choose another path") from error


def encode(inverter: Inverter) -> bytes:
    """`inverter` as the bytes of a `.finv` file."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[np.float32]] = {}
    document = {"format": FORMAT, "fastinv": fastinv.__version__} | _part(inverter, "", tensors)
    document["sha256"] = checksum(document, tensors)
    data = save(tensors, {"fastinv": strict_json.dumps(document)})
    header = int.from_bytes(data[:8], "little")
    _expect(header <= MAX_HEADER, f"a header of {header} bytes, at most {MAX_HEADER} fit: shorten the provenance")
    _expect(len(data) - header - 8 <= MAX_DATA, f"more than {MAX_DATA} bytes of weights do not fit a .finv file")
    return data


def _part(inverter: Inverter, prefix: str, tensors: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """An inverter as JSON values; what does not fit there goes to `tensors`, by names that begin with the prefix."""
    recipe = inverter.recipe()
    for name, value in recipe.items():
        if isinstance(value, np.ndarray):
            tensors[prefix + name] = value
            recipe[name] = TENSOR
        elif isinstance(value, Inverter):
            recipe[name] = _part(value, f"{prefix}{name}.", tensors)
    network: Network = getattr(inverter, inverter.network_field)
    for index, step in enumerate(network.steps):
        tensors |= {f"{prefix}{index}.{name}": value for name, value in step.weights.items()}
    graph, provenance = network.graph(), dict(inverter.provenance)
    return {"kind": inverter.kind, "recipe": recipe, "graph": graph, "provenance": provenance}


def checksum(document: Mapping[str, Any], tensors: Tensors) -> str:
    """SHA-256 over the document without its checksum and over the tensors in the order of their names."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    digest = hashlib.sha256(strict_json.dumps(content).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return digest.hexdigest()


def read(path: str | Path) -> Inverter:
    """The inverter in the file at `path`, in time and memory proportional to the file's size.

    Raises:
        FormatError: the file is missing, unreadable, damaged or hostile; the message names what is wrong.
    """
    try:
        # A pipe or device would block or never end, so ask before opening.
        mode = os.stat(os.fspath(path)).st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise FormatError(f"{found}, not a regular file; expected a .finv file")
        with open(path, "rb") as file:
            return decode(file, os.fstat(file.fileno()).st_size)
    except FormatError as error:
        raise FormatError(f"{path!s:.300}: {error}") from None
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the name again
        raise FormatError(f"{path!s:.300}: cannot read the file ({reason})") from None


def decode(file: BinaryIO, size: int) -> Inverter:
    """The inverter in `file`, whose length is `size` bytes, from its start.

    Raises:
        FormatError: anything in the bytes that `encode` would not have written.
    """
    header, start = _header(file, size)
    document = _document(header.pop("__metadata__", None))
    ranges = _ranges(header, size - start)
    data = _exactly(file, size - start)
    tensors = {
        name: np.frombuffer(data, "<f4", math.prod(shape), begin).reshape(shape)
        for name, (begin, shape) in ranges.items()
    }
    _expect(checksum(document, tensors) == document["sha256"], "the checksum does not match: the file is damaged")
    return _inverter(document, tensors)


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    _expect(size >= 8, f"{size} bytes, too short for a .finv file")
    length = int.from_bytes(_exactly(file, 8), "little")
    _expect(length <= MAX_HEADER, f"not a .finv file (header length {length}, expected at most {MAX_HEADER})")
    _expect(8 + length <= size, f"truncated: a header of {length} bytes in a file of {size}")
    _expect(size - 8 - length <= MAX_DATA, f"{size - 8 - length} bytes of weights, expected at most {MAX_DATA}")
    header = strict_json.loads(_exactly(file, length), "header")
    _expect(isinstance(header, dict), "header: not a JSON object")
    return header, 8 + length


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    _expect(
        len(data) == length,
        f"{len(data)} bytes where {length} were expected: the file changed while it was read",
    )
    return data


def _document(metadata: Any) -> dict[str, Any]:
    _expect(
        isinstance(metadata, dict) and set(metadata) == {"fastinv"} and isinstance(metadata["fastinv"], str),
        "a safetensors file, but not a .finv file (it lacks the fastinv metadata)",
    )
    document: dict[str, Any] = strict_json.loads(metadata["fastinv"].encode(errors="surrogatepass"), "document")
    _expect(isinstance(document, dict), "document: not a JSON object")
    version = document.get("format")
    _expect(
        type(version) is int and version == FORMAT,
        f"format {version!r:.40}, but this fastinv reads format {FORMAT}: upgrade fastinv or export again",
    )
    _expect(set(document) == KEYS, f"document: keys {sorted(document)!r:.300}, expected {sorted(KEYS)}")
    for key, kind in (
        ("fastinv", str),
        ("kind", str),
        ("recipe", dict),
        ("provenance", dict),
        ("sha256", str),
    ):
        _expect(isinstance(document[key], kind), f"document: {key} is not a {kind.__name__}")
    return document


def _ranges(header: Mapping[str, Any], size: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Begin and shape of every tensor, checked to tile the `size` bytes of data exactly."""
    found: list[tuple[int, int, str, tuple[int, ...]]] = []
    for name, entry in header.items():
        where = f"tensor {name!r:.60}"
        _expect(
            isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
            f"{where}: expected dtype, shape and data_offsets",
        )
        _expect(entry["dtype"] == "F32", f"{where}: dtype {entry['dtype']!r:.40}, expected F32")
        shape, offsets = entry["shape"], entry["data_offsets"]
        _expect(_integers(shape, 1) and len(shape) <= MAX_RANK, f"{where}: shape {shape!r:.80}")
        _expect(_integers(offsets, 0) and len(offsets) == 2, f"{where}: data_offsets {offsets!r:.80}")
        begin, end = offsets
        _expect(
            begin <= end <= size and end - begin == 4 * math.prod(shape),
            f"{where}: data_offsets {offsets} do not hold shape {shape} in {size} bytes of data (truncated?)",
        )
        found.append((begin, end, name, tuple(shape)))
    position = 0
    for begin, end, name, _ in sorted(found):
        _expect(begin == position, f"tensor {name!r:.60}: begins at byte {begin}, expected {position}")
        position = end
    _expect(position == size, f"{size} bytes of data, but the tensors fill {position}: truncated or padded")
    return {name: (begin, shape) for begin, _, name, shape in found}


def _integers(values: Any, low: int) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= low for v in values)


def _inverter(document: Mapping[str, Any], tensors: Tensors) -> Inverter:
    kind = document["kind"]
    _expect(isinstance(kind, str) and kind in INVERTERS, f"kind {kind!r:.40}, expected one of {', '.join(INVERTERS)}")
    cls = INVERTERS[kind]
    rest = dict(tensors)
    recipe = _recipe(cls, document["recipe"], rest)
    weights = {_weight(name): value for name, value in rest.items()}
    try:
        network = Network.from_graph(document["graph"], weights)
        used = {(index, name) for index, step in enumerate(network.steps) for name in step.weights}
        _expect(used == set(weights), f"{len(set(weights) - used)} tensors belong to no step")
        return cls(**{cls.network_field: network}, **recipe, provenance=document["provenance"])
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise FormatError(str(error)) from None


def _weight(name: str) -> tuple[int, str]:
    match = _WEIGHT.fullmatch(name)
    _expect(match is not None, f"tensor {name!r:.60}: expected a name such as 0.weight")
    assert match is not None
    return int(match[1]), match[2]


def _recipe(cls: type[Inverter], raw: Mapping[str, Any], tensors: dict[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """The recipe's fields in their exact types; takes those kept as tensors out of `tensors`."""
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)} - {cls.network_field, "provenance"}
    found = set(raw) | LATER
    _expect(set(raw) <= names and names <= found, f"recipe: fields {sorted(raw)!r:.300}, expected {sorted(names)}")
    recipe = dict(raw)
    for name, value in raw.items():
        if value == TENSOR and _is_array(hints[name]):
            _expect(name in tensors, f"recipe: the tensor {name!r} is missing")
            recipe[name] = tensors.pop(name)
        elif isinstance(value, dict) and (nested := _inverter_class(hints[name])) is not None:
            recipe[name] = _nested(nested, name, value, tensors)
        else:
            _expect(_has_type(value, hints[name]), f"recipe: {name} is {value!r:.80}, of a wrong type")
    return recipe


def _nested(
    cls: type[Inverter], name: str, part: Mapping[str, Any], tensors: dict[str, npt.NDArray[np.float32]]
) -> Inverter:
    """An inverter in a recipe, of this class; takes its tensors out of `tensors`."""
    _expect(set(part) == PART, f"recipe: {name}: keys {sorted(part)!r:.300}, expected {sorted(PART)}")
    _expect(part["kind"] == cls.kind, f"recipe: {name}: kind {part['kind']!r:.40}, expected {cls.kind}")
    for key in ("recipe", "provenance"):
        _expect(isinstance(part[key], dict), f"recipe: {name}: {key} is not a dict")
    prefix = f"{name}."
    own = [tensor for tensor in tensors if tensor.startswith(prefix)]
    return _inverter(part, {tensor.removeprefix(prefix): tensors.pop(tensor) for tensor in own})


def _inverter_class(hint: Any) -> type[Inverter] | None:
    options = (option for option in typing.get_args(hint) if isinstance(option, type))
    return next((option for option in options if issubclass(option, Inverter)), None)


def _is_array(hint: Any) -> bool:
    return any(typing.get_origin(h) is np.ndarray for h in typing.get_args(hint))


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is as `hint` says; lists stand for tuples, whose lengths the inverter checks."""
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_has_type(v, typing.get_args(hint)[0]) for v in value)
    return value is None if hint is types.NoneType else type(value) is hint


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(message)
