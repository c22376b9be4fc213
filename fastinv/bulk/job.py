"""A job: what decides the images of a log and their files, whatever machine runs it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from fastinv import strict_json, tensors
from fastinv.bulk.features import Choice
from fastinv.bulk.images import FORMATS
from fastinv.errors import FeatureError, FormatError
from fastinv.invert import DTYPES
from fastinv.inverters import Inverter


@dataclass(frozen=True)
class Job:
    """What to make of a log. The fields are arguments of `invert_log`.

    Raises:
        FormatError: an unknown format, or one that cannot be had here, or for these images.
        FeatureError: another argument is wrong.
    """

    inverter: Inverter
    choice: Choice
    format: str
    dtype: str
    precision: str
    scale: Any
    zero_point: Any
    rows_per_file: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str) or self.format not in FORMATS:
            raise FormatError(f"format {self.format!r:.40}, expected one of {', '.join(FORMATS)}")
        if self.dtype not in DTYPES:
            raise FeatureError(f"dtype {self.dtype!r:.40}, expected one of {', '.join(DTYPES)}")
        rows = self.rows_per_file
        if rows is not None and not (tensors.is_whole(rows) and rows >= 1):
            raise FeatureError(f"rows_per_file {rows!r:.40}, expected an integer of at least 1, or None")
        FORMATS[self.format].check(self.inverter.image_shape, self.dtype)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the record."""
        return hashlib.sha256(strict_json.dumps(self.record()).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """The job as JSON values: two of the same record give the same images, but for the backend."""
        return {
            "inverter": self.inverter.fingerprint,
            "format": self.format,
            "dtype": self.dtype,
            "precision": self.precision,
            "scale": None if self.scale is None else list(tensors.floats(self.scale)),
            "zero_point": None if self.zero_point is None else list(tensors.floats(self.zero_point)),
            "rows_per_file": None if self.rows_per_file is None else int(self.rows_per_file),
            **vars(self.choice),
        }
