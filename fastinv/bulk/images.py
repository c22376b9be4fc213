"""Recovered images into files: Parquet, arrays of numpy's, or tars of PNGs as WebDataset reads them.

A file appears under its name when it is whole and on the disk, and not before.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv.backends.base import Report
from fastinv.errors import FormatError
from fastinv.ops.base import Shape
from fastinv.places import new_file

OK = "ok"  # the status of a row whose image there is; that of another says why not


@dataclass(frozen=True)
class Recovered:
    """What became of some rows that follow each other.

    Attributes:
        start: the number of the first row.
        count: how many there are.
        ids: their names, as of a `Block`.
        places: the place among them of each image.
        images: [len(places), C, H, W], float32 or uint8.
        report: on the images.
        failed: by place, why there is no image.
    """

    start: int
    count: int
    ids: Any
    places: npt.NDArray[np.intp]
    images: npt.NDArray[Any]
    report: Report
    failed: Mapping[int, str]

    def names(self) -> npt.NDArray[Any] | Any:
        """The rows' names, or their numbers."""
        return np.arange(self.start, self.start + self.count, dtype=np.int64) if self.ids is None else self.ids

    def status(self) -> list[str]:
        """Of each row "ok", or why it has no image."""
        return [self.failed.get(place, OK) for place in range(self.count)]

    def of_rmle(self) -> dict[str, npt.NDArray[Any]]:
        """What rMLE says of each row; nothing of an inverse network."""
        report = self.report
        if report.objective is None:
            return {}
        return {
            "objective": self.spread(report.objective, np.nan),
            "steps": self.spread(report.steps, 0),
            "converged": self.spread(report.converged, False),
        }

    def spread(self, values: npt.NDArray[Any], missing: Any) -> npt.NDArray[Any]:
        """One value for each image as one for each row."""
        if not self.failed:
            return values
        rows = np.full((self.count, *values.shape[1:]), missing, values.dtype)
        rows[self.places] = values
        return rows


def _as_numpy(names: Any) -> npt.NDArray[Any]:
    """Names of rows as numpy's; where some are missing, all as text, which is empty there."""
    if isinstance(names, np.ndarray):
        return names
    found: npt.NDArray[Any]
    if names.null_count or "int" not in str(names.type):
        found = np.array(["" if name is None else str(name) for name in listed(names)], str)
    else:
        found = names.to_numpy()
    return found


def listed(names: Any) -> list[Any]:
    """Names of rows, numpy's or pyarrow's, as Python's: integers, text, None."""
    found: list[Any] = names.tolist()
    return found


class Output:
    """The file or files of one shard's images.

    Args:
        folder: of all results.
        name: the shard's, a path below the folder; the format's endings are added.
        image_shape, dtype: of the images.
        count: how many rows there will be.
    """

    endings: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, name: str, image_shape: Shape, dtype: str, count: int) -> None:
        self._name, self._stem, self._shape, self._dtype = name, folder / name, image_shape, dtype
        self._stack = ExitStack()
        with self._guarded():
            places = (self._stem.with_name(self._stem.name + ending) for ending in self.endings)
            self._files = [self._stack.enter_context(new_file(place)) for place in places]
            self._begin(count)

    @classmethod
    def check(cls, image_shape: Shape, dtype: str) -> None:
        """Raise FormatError where images of this kind cannot be written here."""

    def write(self, part: Recovered) -> None:
        """Add what became of the next rows."""
        with self._guarded():
            self._write(part)

    def finish(self) -> None:
        """Let the files appear under their names."""
        with self._guarded():
            self._end()
            self._stack.close()

    def abandon(self) -> None:
        """Remove what there is."""
        with suppress(OSError, ValueError):
            self._close()
        self._stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After what goes wrong nothing is left; what the system refuses is an error that says what to do."""
        try:
            yield
        except BaseException as error:
            self.abandon()
            if isinstance(error, OSError):
                raise FormatError(
                    f"{self._stem}: cannot write it ({error.strerror or error}); what was written before stays: "
                    "run it again to go on"
                ) from error
            raise

    def _begin(self, count: int) -> None:
        """Write what comes first."""

    def _write(self, part: Recovered) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Write what comes last."""

    def _close(self) -> None:
        """Let go of what holds the files."""


class Parquet(Output):
    """A row for each row of features: `id`, `image` (its pixels' bytes [C, H, W]; null where it failed), of rMLE
    `objective`, `steps` and `converged`, and `status`: "ok", or why it failed."""

    endings = (".parquet",)
    _writer: Any = None

    @classmethod
    def check(cls, image_shape: Shape, dtype: str) -> None:
        if find_spec("pyarrow") is None:
            raise FormatError(
                "Parquet needs pyarrow: install it with pip install 'fastinv[parquet]', or choose the format npy"
            )

    def _write(self, part: Recovered) -> None:
        import pyarrow as pa

        status = pa.array(part.status(), pa.string())
        columns = {"id": part.names(), "image": self._image_column(part), **part.of_rmle(), "status": status}
        table = pa.table(columns)
        if self._writer is None:
            self._writer = self._open(table.schema)
        self._writer.write_table(table.replace_schema_metadata(self._writer.schema.metadata))

    def _image_column(self, part: Recovered) -> Any:
        import pyarrow as pa

        images = np.ascontiguousarray(part.spread(part.images, 0))
        width = int(np.prod(self._shape)) * images.itemsize
        missing = None
        if part.failed:
            present = np.zeros(part.count, np.bool_)
            present[part.places] = True
            missing = pa.py_buffer(np.packbits(present, bitorder="little"))
        data = pa.py_buffer(images.view(np.uint8).reshape(-1))
        return pa.Array.from_buffers(pa.binary(width), part.count, [missing, data])

    def _open(self, schema: Any) -> Any:
        import pyarrow.parquet as pq

        note = json.dumps({"shape": list(self._shape), "dtype": self._dtype})
        others = [name for name in schema.names if name != "image"]
        return pq.ParquetWriter(
            self._files[0],
            schema.with_metadata({"fastinv": note}),
            compression={name: "none" if name == "image" else "zstd" for name in schema.names},  # noise to it
            use_dictionary=["status"],
            write_statistics=others,
        )

    def _end(self) -> None:
        self._writer.close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Npy(Output):
    """The images as one array [N, C, H, W], zeros where a row failed; and beside it, in `.rows.npz`, `id`, `status`
    and of rMLE `objective`, `steps` and `converged`."""

    endings = (".npy", ".rows.npz")

    def _begin(self, count: int) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(self._dtype)), "fortran_order": False}
        np.lib.format.write_array_header_2_0(self._files[0], header | {"shape": (count, *self._shape)})
        self._rows: dict[str, list[npt.NDArray[Any]]] = {}

    def _write(self, part: Recovered) -> None:
        self._files[0].write(np.ascontiguousarray(part.spread(part.images, 0)).data)
        columns = {"id": _as_numpy(part.names()), "status": np.array(part.status(), str), **part.of_rmle()}
        for name, values in columns.items():
            self._rows.setdefault(name, []).append(values)

    def _end(self) -> None:
        parts = self._rows["id"]
        if len({array.dtype.kind for array in parts}) > 1:  # some have text for what is missing
            self._rows["id"] = [array.astype(str) for array in parts]
        rows: dict[str, Any] = {name: np.concatenate(arrays) for name, arrays in self._rows.items()}
        np.savez(self._files[1], **rows)


class WebDataset(Output):
    """A tar of `KEY.png` and `KEY.json` (row, id, of rMLE objective, steps, converged) for each image; rows that failed
    are not in it."""

    endings = (".tar",)

    @classmethod
    def check(cls, image_shape: Shape, dtype: str) -> None:
        check_png(image_shape)
        if dtype != "uint8":
            raise FormatError(f"PNG files take dtype uint8, not {dtype}: choose another format, or leave the dtype out")

    def _begin(self, count: int) -> None:
        self._tar = tarfile.open(fileobj=self._files[0], mode="w")  # noqa: SIM115  (until the end)
        self._members: list[tarfile.TarInfo] = self._tar.members  # type: ignore[attr-defined]  # grows with every one
        folder, _, name = self._name.rpartition("/")
        self._key = f"{folder}/{name.replace('.', '%2E')}".lstrip("/")  # WebDataset's keys end at a name's first dot

    def _write(self, part: Recovered) -> None:
        names, of_rmle = listed(part.names()), part.of_rmle()
        for place, image in zip(part.places.tolist(), part.images, strict=True):
            row = part.start + place
            about = {"row": row, "id": names[place]} | {name: values[place].item() for name, values in of_rmle.items()}
            if not np.isfinite(about.get("objective", 0.0)):
                about["objective"] = None  # JSON has no NaN
            data = io.BytesIO()
            write_png(data, image)
            self._add(f"{self._key}-{row:09}.png", data.getvalue())
            self._add(f"{self._key}-{row:09}.json", json.dumps(about).encode())

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self._tar.addfile(entry, io.BytesIO(data))
        self._members.clear()

    def _end(self) -> None:
        self._tar.close()


class Nothing(Output):
    """No file, and nothing that would write one: for benchmarks."""

    endings = ()


FORMATS: Mapping[str, type[Output]] = {"parquet": Parquet, "npy": Npy, "webdataset": WebDataset, "none": Nothing}


def check_png(shape: Shape) -> None:
    """Raise FormatError where images [C, H, W] do not fit a PNG file."""
    if shape[0] not in (1, 3):
        raise FormatError(f"images of {shape[0]} channels, but PNG files take 1 or 3: choose another format")


def write_png(file: str | os.PathLike[str] | BinaryIO, image: npt.NDArray[np.uint8]) -> None:
    """One image, uint8 [1, H, W] or [3, H, W], as a PNG file."""
    from PIL import Image

    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, format="PNG")
