"""Whole logs from disk to disk: `python bench/logs.py`.

Features of each decoder's images are written as logs of every kind, and recovered from there:

    memory      `invert` from an array to an array, nothing on a disk: what all else is compared with
    KIND        `invert_log`, features read from files of this kind, images dropped
    to FORMAT   `invert_log`, features from `.npy` files, images written in this format
    eager       what one writes without fastinv: PyTorch's decoder over the files, images written with numpy

All give 8-bit images. First those from every kind of file, and eager's, are checked against `invert`'s. They run in
turns, on files that are in the page cache; the figure is the median over turns of the ratio to `memory` in the same
turn.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

import fastinv
from fastinv import _core, benchmark
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import Subject

SHARDS = 8
EAGER_BATCH = 256
Features = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]


def _table(path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"v": column}), path, compression="none", use_dictionary=False, row_group_size=2**14)


def _bytes(x: Features) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(x[0].nbytes), len(x), [None, pa.py_buffer(x)])


def _lists(x: Features) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x[0].size)


def _arrow(path: Path, x: Features) -> None:
    table = pa.table({"v": _bytes(x)})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


KINDS: dict[str, tuple[str, Callable[[Path, Features], object]]] = {
    "npy": ("npy", np.save),
    "safetensors": ("safetensors", lambda path, x: save_file({"v": x}, path)),
    "arrow": ("arrow", _arrow),
    "parquet, bytes": ("parquet", lambda path, x: _table(path, _bytes(x))),
    "parquet, lists": ("parquet", lambda path, x: _table(path, _lists(x))),
}
FORMATS = ("parquet", "npy", "webdataset")


def eager(subject: Subject, folder: Path, out: Path) -> None:
    """A plain loop over the files."""
    out.mkdir()
    module = subject.eager
    for path in sorted(folder.iterdir()):
        features = np.load(path, mmap_mode="r")
        parts = []
        for start in range(0, len(features), EAGER_BATCH):
            x = torch.from_numpy(np.array(features[start : start + EAGER_BATCH]))
            parts.append((module(x).clamp(0, 1) * 255).round().to(torch.uint8))
        np.save(out / path.name, torch.cat(parts).numpy())


class Log:
    """One decoder's log: all ways to recover it, and a check of each."""

    def __init__(self, subject: Subject, size: int, threads: int, folder: Path) -> None:
        self.count = max(SHARDS, size // (4 * int(np.prod(subject.network.input_shape))))
        self._inverter = fastinv.InverseNetwork(subject.network)
        self._threads, self._folder, self._subject = threads, folder, subject
        self._x = np.random.default_rng(0).standard_normal((self.count, *subject.network.input_shape), np.float32)
        for kind, (suffix, write) in KINDS.items():
            (folder / kind).mkdir(parents=True)
            for number, part in enumerate(np.array_split(self._x, SHARDS)):
                write(folder / kind / f"{number}.{suffix}", part)
        self._images = np.empty((self.count, *subject.network.output_shape), np.uint8)
        self._memory()

    def ways(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name."""
        found: dict[str, Callable[[], object]] = {"memory": self._memory}
        found |= {kind: partial(self._recover, kind, "none") for kind in KINDS}
        found |= {f"to {format}": partial(self._recover, "npy", format) for format in FORMATS}
        return found | {"eager": lambda: eager(self._subject, self._folder / "npy", self.out)}

    @property
    def out(self) -> Path:
        return self._folder / "out"

    def check(self) -> None:
        """Raise where a log gives other images than `invert`."""
        for kind in KINDS:
            self.clear()
            self._recover(kind, "npy")
            found = np.concatenate([np.load(path) for path in sorted(self.out.glob("*.npy"))])
            np.testing.assert_array_equal(found, self._images, kind)
        self.clear()
        eager(self._subject, self._folder / "npy", self.out)
        found = np.concatenate([np.load(path) for path in sorted(self.out.glob("*.npy"))])
        np.testing.assert_allclose(found, self._images, atol=1)  # at a half either may be

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def _memory(self) -> None:
        fastinv.invert(self._x, self._inverter, out=self._images, dtype="uint8", threads=self._threads, backend="cpu")

    def _recover(self, kind: str, format: str) -> None:
        options = {"threads": self._threads, "backend": "cpu", "format": format}
        report = fastinv.invert_log(self._folder / kind, self._inverter, self.out, **options)
        assert report.recovered == self.count


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="decoders whose names hold this")
    parser.add_argument("--mib", type=int, default=256, help="MiB of features in each log")
    parser.add_argument("--threads", type=int, default=_core.available_threads(), help="of fastinv, and of PyTorch")
    parser.add_argument("--repeat", type=int, default=5, help="turns")
    parser.add_argument("--folder", type=Path, help="where the logs go; a temporary folder where left out")
    arguments = parser.parse_args()
    if min(arguments.mib, arguments.threads, arguments.repeat) < 1:
        parser.error("expected at least 1 MiB, 1 thread and 1 turn")
    for subject in benchmark.decoders():
        if arguments.case not in subject.name:
            continue
        with (
            tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
            torch_threads(arguments.threads),
            torch.no_grad(),
        ):
            log = Log(subject, arguments.mib * 2**20, arguments.threads, Path(folder))
            log.check()
            seconds: dict[str, list[float]] = {name: [] for name in log.ways()}
            for _ in range(arguments.repeat):
                for name, call in log.ways().items():
                    log.clear()
                    seconds[name].append(timed(call))
        memory = statistics.median(seconds["memory"])
        print(f"{subject.name}: {log.count:,} images, from memory {log.count / memory:,.0f} a second", flush=True)
        for name, times in seconds.items():
            ratio = statistics.median(base / own for base, own in zip(seconds["memory"], times, strict=True))
            print(f"  {name:16} {log.count / statistics.median(times):12,.0f} images/s  {ratio:6.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
