"""JSON as `.finv` files hold it: one way to write a value, and a reader that refuses whatever is doubtful."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from fastinv.errors import FormatError

MAX_DEPTH = 32  # arrays and objects inside one another
MAX_DIGITS = 20  # of an integer

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # no backtracking: linear on any bytes
_NESTING = np.zeros(256, np.int8)
_NESTING[list(b"[{")] = 1
_NESTING[list(b"]}")] = -1


def dumps(value: Any) -> str:
    """`value` as JSON text, the same text for equal values: sorted keys, no spaces, no NaN.

    Raises:
        FormatError: the value has no JSON form.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"no JSON value: {error}") from None
    return text


def loads(text: bytes, where: str, depth: int = MAX_DEPTH) -> Any:
    """The value of UTF-8 JSON text, in time and memory proportional to its length.

    Args:
        text: the JSON text.
        where: what it is, for messages.
        depth: how deep arrays and objects may nest.

    Raises:
        FormatError: text that is not JSON, nests too deeply, repeats a key, holds NaN, an infinite number or
            an integer of more than 20 digits.
    """
    nesting = np.cumsum(_NESTING[np.frombuffer(_STRING.sub(b"", text), np.uint8)], dtype=np.int32)
    if nesting.max(initial=0) > depth:
        raise FormatError(f"{where}: JSON nested deeper than {depth} levels")
    try:
        return json.loads(
            text.decode(),
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
            object_pairs_hook=_object,
        )
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({error!s:.120})") from None


def read_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The JSON object in a file; `advice`: what to do where there is none in it.

    Raises:
        FormatError: it cannot be read, or as `loads`, or is no object.
    """
    try:
        found = loads(path.read_bytes(), str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: no JSON object{advice}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise FormatError(f"an integer of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FormatError(f"the number {digits:.40} is out of range")
    return value


def _constant(name: str) -> float:
    raise FormatError(f"the number {name}, expected finite numbers")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise FormatError("an object names the same key twice")
    return value
