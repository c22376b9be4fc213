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
        ids: their names, an array of numpy's or pyarrow's; None: their numbers are.
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

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """The rows' numbers."""
        return np.arange(self.start, self.start + self.count, dtype=np.int64)

    def names(self) -> npt.NDArray[Any]:
        """The rows' names, as numpy's."""
        if self.ids is None:
            return self.numbers
        array = self.ids if isinstance(self.ids, np.ndarray) else self.ids.to_numpy(zero_copy_only=False)
        return array.astype(str) if array.dtype == object else array

    def spread(self, values: npt.NDArray[Any], missing: Any) -> npt.NDArray[Any]:
        """One value for each image as one for each row."""
        if not self.failed:
            return values
        rows = np.full((self.count, *values.shape[1:]), missing, values.dtype)
        rows[self.places] = values
        return rows


class Output:
    """The file or files of one shard's images, `stem` with the format's endings."""

    endings: ClassVar[tuple[str, ...]]

    def __init__(self, stem: Path, image_shape: Shape, dtype: str, count: int) -> None:
        self._stem, self._shape, self._dtype = stem, image_shape, dtype
        self._stack = ExitStack()
        with self._guarded():
            self._files = [
                self._stack.enter_context(new_file(stem.with_name(stem.name + ending))) for ending in self.endings
            ]

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

    def abandon(self) -> None:
        """Remove what there is."""
        with suppress(Exception):  # of a file that may not have been begun
            self._end()
        self._stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def _write(self, part: Recovered) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        """Write what comes last."""


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

        table = {"id": part.numbers if part.ids is None else part.ids, "image": self._image_column(part)}
        report = part.report
        if report.objective is not None:
            table["objective"] = part.spread(report.objective, np.nan)
            table["steps"] = part.spread(report.steps, 0)
            table["converged"] = part.spread(report.converged, False)
        table["status"] = [part.failed.get(place, OK) for place in range(part.count)]
        batch = pa.RecordBatch.from_pydict(table)
        if self._writer is None:
            self._writer = self._open(batch.schema)
        self._writer.write_batch(batch.cast(self._writer.schema))

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
        if self._writer is None:
            empty = np.empty((0, *self._shape), self._dtype)
            nothing = Report(None, np.empty(0, np.int64), np.empty(0, np.bool_), "", "")
            self._write(Recovered(0, 0, None, np.empty(0, np.intp), empty, nothing, {}))
        self._writer.close()


class Npy(Output):
    """The images as one array [N, C, H, W], zeros where a row failed; and beside it, in `.rows.npz`, `id`, `status`
    and of rMLE `objective`, `steps` and `converged`."""

    endings = (".npy", ".rows.npz")

    def __init__(self, stem: Path, image_shape: Shape, dtype: str, count: int) -> None:
        super().__init__(stem, image_shape, dtype, count)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
        np.lib.format.write_array_header_2_0(self._files[0], header | {"shape": (count, *image_shape)})
        self._rows: dict[str, list[npt.NDArray[Any]]] = {"id": [], "status": []}

    def _write(self, part: Recovered) -> None:
        self._files[0].write(np.ascontiguousarray(part.spread(part.images, 0)).data)
        rows = {"id": part.names(), "status": np.array([part.failed.get(k, OK) for k in range(part.count)])}
        if part.report.objective is not None:
            rows["objective"] = part.spread(part.report.objective, np.nan)
            rows["steps"] = part.spread(part.report.steps, 0)
            rows["converged"] = part.spread(part.report.converged, False)
        for name, values in rows.items():
            self._rows.setdefault(name, []).append(values)

    def _end(self) -> None:
        rows: dict[str, Any] = {name: np.concatenate(parts) for name, parts in self._rows.items() if parts}
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

    def __init__(self, stem: Path, image_shape: Shape, dtype: str, count: int) -> None:
        super().__init__(stem, image_shape, dtype, count)
        self._tar = tarfile.open(fileobj=self._files[0], mode="w")  # noqa: SIM115  (until the end)
        self._key = stem.name.replace(".", "-")  # WebDataset's keys end at the first dot

    def _write(self, part: Recovered) -> None:
        names, report = part.names(), part.report
        for k, image in enumerate(part.images):
            place = int(part.places[k])
            about = {"row": part.start + place, "id": names[place].item()}
            if report.objective is not None:
                objective = float(report.objective[k])
                about["objective"] = objective if np.isfinite(objective) else None
                about |= {"steps": int(report.steps[k]), "converged": bool(report.converged[k])}
            key = f"{self._key}-{part.start + place:09}"
            self._add(f"{key}.png", _png(image))
            self._add(f"{key}.json", json.dumps(about).encode())

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        self._tar.addfile(entry, io.BytesIO(data))

    def _end(self) -> None:
        self._tar.close()


class Nothing(Output):
    """No file: for benchmarks."""

    endings = ()

    def _write(self, part: Recovered) -> None:
        pass


FORMATS: Mapping[str, type[Output]] = {"parquet": Parquet, "npy": Npy, "webdataset": WebDataset, "none": Nothing}


def check_png(shape: Shape) -> None:
    """Raise FormatError where images [C, H, W] do not fit a PNG file."""
    if shape[0] not in (1, 3):
        raise FormatError(f"images of {shape[0]} channels, but PNG files take 1 or 3: choose another format")


def write_png(file: str | os.PathLike[str] | BinaryIO, image: npt.NDArray[np.uint8]) -> None:
    """One image, uint8 [1, H, W] or [3, H, W], as a PNG file."""
    from PIL import Image

    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, format="PNG")


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    write_png(data, image)
    return data.getvalue()
