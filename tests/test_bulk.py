"""Whole logs: what becomes of their rows, whatever stops the work, and in which files it ends up."""

from __future__ import annotations

import fcntl
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from PIL import Image
from safetensors.numpy import save_file

import fastinv
from fastinv.bulk import record
from fastinv.bulk import run as pipeline
from fastinv.bulk.features import Choice
from fastinv.bulk.job import Job
from fastinv.bulk.progress import Progress
from fastinv.errors import FeatureError, FormatError

INVERTER = samples.inverse_network()
SIZES = {"a.npy": 20, "b/c.parquet": 15, "d.safetensors": 11}


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard of more than 8 rows goes in several blocks."""
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 8 * 4 * (60 + 90))
    monkeypatch.setattr(pipeline, "IMAGES_PER_CORE", 0)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of `SIZES`, one file of each kind; the rows of the table have names."""
    folder = tmp_path / "log"
    (folder / "b").mkdir(parents=True)
    np.save(folder / "a.npy", rows("a.npy"))
    names = [f"row {k}" for k in range(SIZES["b/c.parquet"])]
    write_table(folder / "b/c.parquet", rows("b/c.parquet"), id=names)
    save_file({"v": rows("d.safetensors")}, folder / "d.safetensors")
    (folder / ".hidden.npy").write_bytes(b"")
    (folder / "notes.json").write_text("{}")
    return folder


def rows(name: str) -> npt.NDArray[np.float32]:
    return samples.features(SIZES[name], seed=len(name))


def write_table(path: Path, features: npt.NDArray[Any], **columns: Any) -> None:
    pq.write_table(pa.table({**columns, "v": pa.FixedShapeTensorArray.from_numpy_ndarray(features)}), path)


def expected(name: str, dtype: str = "uint8") -> npt.NDArray[Any]:
    images: npt.NDArray[Any] = fastinv.invert(rows(name), INVERTER, dtype=dtype)
    return images


def images_in(path: Path) -> npt.NDArray[Any]:
    """The images of a Parquet file of results, without those that are null."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"fastinv"])
    data = b"".join(cell for cell in table["image"].to_pylist() if cell is not None)
    return np.frombuffer(data, about["dtype"]).reshape(-1, *about["shape"])


def tree(folder: Path) -> dict[str, bytes]:
    """All files in a folder but those that tell of times."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".stats.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- what becomes of rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_log_gives_the_images_that_invert_gives(log: Path, tmp_path: Path, dtype: str) -> None:
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", dtype=dtype)
    assert (report.shards, report.skipped, report.rows, report.recovered, report.images) == (3, 0, 46, 46, 46)
    assert report.complete
    for name in SIZES:
        found = images_in((tmp_path / "out" / name).with_suffix(".parquet"))
        np.testing.assert_array_equal(found, expected(name, dtype))
    table = pq.read_table(tmp_path / "out/b/c.parquet")
    assert table["id"].to_pylist() == [f"row {k}" for k in range(15)]
    assert table["status"].unique().to_pylist() == ["ok"]
    assert pq.read_table(tmp_path / "out/a.parquet")["id"].to_pylist() == list(range(20))
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"] == {
        "shards": 3,
        "done": 3,
        "recovered": 46,
        "failed": 0,
    }


def test_one_file_and_several_are_logs_too(log: Path, tmp_path: Path) -> None:
    assert fastinv.invert_log(log / "a.npy", INVERTER, tmp_path / "one").shards == 1
    np.testing.assert_array_equal(images_in(tmp_path / "one/a.parquet"), expected("a.npy"))
    several = [log / "b/c.parquet", str(log / "d.safetensors")]
    assert fastinv.invert_log(several, INVERTER, tmp_path / "two").shards == 2
    np.testing.assert_array_equal(images_in(tmp_path / "two/b/c.parquet"), expected("b/c.parquet"))


def test_rmle_tells_objective_and_steps(log: Path, tmp_path: Path) -> None:
    recipe = samples.rmle()
    fastinv.invert_log(log / "a.npy", recipe, tmp_path / "out")
    images, report = fastinv.invert(rows("a.npy"), recipe, dtype="uint8", return_report=True)
    table = pq.read_table(tmp_path / "out/a.parquet")
    np.testing.assert_array_equal(images_in(tmp_path / "out/a.parquet"), images)
    np.testing.assert_array_equal(table["objective"].to_numpy(), report.objective)
    np.testing.assert_array_equal(table["steps"].to_numpy(), report.steps)
    np.testing.assert_array_equal(table["converged"].to_numpy(zero_copy_only=False), report.converged)
    stats = json.loads((tmp_path / "out/a.stats.json").read_text())
    assert stats["objective"] == pytest.approx(report.objective.sum())


def test_an_array_and_its_rows(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, samples.rmle(), tmp_path / "out", format="npy", dtype="float32")
    images, report = fastinv.invert(rows("b/c.parquet"), samples.rmle(), return_report=True)
    np.testing.assert_array_equal(np.load(tmp_path / "out/b/c.npy"), images)
    about = np.load(tmp_path / "out/b/c.rows.npz")
    assert about["id"].tolist() == [f"row {k}" for k in range(15)]
    assert about["status"].tolist() == ["ok"] * 15
    np.testing.assert_array_equal(about["objective"], report.objective)


def test_a_tar_of_pictures(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out", format="webdataset")
    with tarfile.open(tmp_path / "out/b/c.tar") as tar:
        contents = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert list(contents)[:2] == ["b/c-000000000.png", "b/c-000000000.json"]
    assert json.loads(contents["b/c-000000014.json"]) == {"row": 14, "id": "row 14"}
    pictures = [np.asarray(Image.open(io.BytesIO(contents[f"b/c-{k:09}.png"]))).transpose(2, 0, 1) for k in range(15)]
    np.testing.assert_array_equal(np.stack(pictures), expected("b/c.parquet"))


def test_none_writes_nothing(log: Path, tmp_path: Path) -> None:
    report = fastinv.invert_log(log, INVERTER, format="none")
    assert (report.shards, report.images, report.recovered) == (3, 46, 46)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("format", ["parquet", "npy", "webdataset"])
def test_an_empty_shard_gives_an_empty_file(format: str, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", samples.features(0))
    report = fastinv.invert_log(tmp_path / "e.npy", INVERTER, tmp_path / "out", format=format)
    assert (report.shards, report.rows, report.complete) == (1, 0, True)
    if format == "parquet":
        assert images_in(tmp_path / "out/e.parquet").shape == (0, *samples.IMAGE)
    elif format == "npy":
        assert np.load(tmp_path / "out/e.npy").shape == (0, *samples.IMAGE)


def test_cut_files_and_parts_make_up_the_log(log: Path, tmp_path: Path) -> None:
    shards = [
        fastinv.invert_log(log, INVERTER, tmp_path / "out", rows_per_file=7, part=(k, 3)).shards for k in (1, 2, 3)
    ]
    assert shards == [2, 3, 3]
    names = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert names == [f"a-{k:06}.parquet" for k in range(3)] + [f"d-{k:06}.parquet" for k in range(2)]
    for name in SIZES:
        stem = (tmp_path / "out" / name).with_suffix("")
        found = [images_in(path) for path in sorted(stem.parent.glob(f"{stem.name}-*.parquet"))]
        np.testing.assert_array_equal(np.concatenate(found), expected(name))
    assert pq.read_table(tmp_path / "out/a-000001.parquet")["id"].to_pylist() == list(range(7, 14))
    counts = json.loads((tmp_path / "out/manifest.json").read_text())["counts"]
    assert counts == {"shards": 8, "done": 8, "recovered": 46, "failed": 0}


# ---- what fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "npy", "webdataset"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_rows_of_nan_have_no_image_and_the_others_theirs(format: str, value: float, log: Path, tmp_path: Path) -> None:
    bad = rows("b/c.parquet")
    bad[[0, 14], 1, 2, 3] = value
    write_table(log / "b/c.parquet", bad, id=[f"row {k}" for k in range(15)])
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", format=format)
    assert (report.recovered, report.failed, report.complete) == (44, 2, False)
    errors = [json.loads(line) for line in (tmp_path / "out/b/c.errors.jsonl").read_text().splitlines()]
    assert errors == [{"row": k, "id": f"row {k}", "error": "features hold NaN or Inf"} for k in (0, 14)]
    kept = expected("b/c.parquet")[1:14]
    if format == "parquet":
        table = pq.read_table(tmp_path / "out/b/c.parquet")
        np.testing.assert_array_equal(images_in(tmp_path / "out/b/c.parquet"), kept)
        assert [cell is None for cell in table["image"].to_pylist()] == [True, *[False] * 13, True]
        assert table["status"].to_pylist() == [errors[0]["error"], *["ok"] * 13, errors[0]["error"]]
    elif format == "npy":
        found = np.load(tmp_path / "out/b/c.npy")
        np.testing.assert_array_equal(found[1:14], kept)
        assert not found[[0, 14]].any()
    else:
        with tarfile.open(tmp_path / "out/b/c.tar") as tar:
            assert len(tar.getnames()) == 2 * 13


def test_failed_rows_are_done_again_when_asked_for(log: Path, tmp_path: Path) -> None:
    bad = rows("a.npy")
    bad[3] = np.nan
    np.save(log / "a.npy", bad)
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert fastinv.invert_log(log, INVERTER, tmp_path / "out").skipped == 3
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", retry_failed=True)
    assert (report.skipped, report.images, report.failed) == (2, 19, 1)
    np.save(log / "a.npy", rows("a.npy"))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.skipped, report.failed, report.complete) == (2, 0, True)
    assert not (tmp_path / "out/a.errors.jsonl").exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-90],
    "empty": lambda data: b"",
    "other": lambda data: b"something else" * 40,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", SIZES)
def test_a_damaged_file_is_told_of_and_the_others_are_done(damage: str, name: str, log: Path, tmp_path: Path) -> None:
    good = (log / name).read_bytes()
    (log / name).write_bytes(DAMAGE[damage](good))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert list(report.errors) == [str(log / name)]
    assert report.errors[str(log / name)].startswith(f"{log / name}: ")
    assert (report.recovered, report.complete) == (46 - SIZES[name], False)
    stem = (tmp_path / "out" / name).with_suffix("")
    assert json.loads(stem.with_suffix(".errors.jsonl").read_text())["error"] == report.errors[str(log / name)]
    assert not stem.with_suffix(".parquet").exists()
    (log / name).write_bytes(good)
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.skipped, report.recovered, report.complete) == (2, 46, True)


def test_a_shard_of_another_model_is_refused_alone(log: Path, tmp_path: Path) -> None:
    np.save(log / "a.npy", np.zeros((100, 2, 6, 6), np.float32))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert "features of shape [8, 2, 6, 6], expected [N, 2, 6, 5]" in report.errors[str(log / "a.npy")]
    assert report.recovered == 26


def test_where_nothing_fits_it_raises(log: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"a\.npy: features of shape"):
        fastinv.invert_log(log / "a.npy", _other(), tmp_path / "out")


def _other() -> fastinv.InverseNetwork:
    rng = np.random.default_rng(0)
    return fastinv.InverseNetwork(fastinv.Network((4, 6, 5), (samples.conv(rng, 4, 3),)))


def test_a_full_disk_ends_the_job_and_leaves_what_is_done(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastinv.bulk.images import Parquet

    fine = Parquet._write

    def full(self: Parquet, part: Any) -> None:
        if "c" in self._stem.name and part.start:
            raise OSError(28, "No space left on device")
        fine(self, part)

    monkeypatch.setattr(Parquet, "_write", full)
    with pytest.raises(FormatError, match=r"out/b/c: cannot write it \(No space left on device\); what was written"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == ["a.parquet", "manifest.json"]
    monkeypatch.undo()
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.skipped, report.complete) == (1, True)


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["parquet", "npy", "webdataset"])
@pytest.mark.parametrize("calls", [0, 1, 3, 4])
def test_after_an_interruption_the_rest_is_done_and_nothing_differs(
    format: str, calls: int, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "whole", format=format)
    real, count = pipeline.invert, 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += len(args[0]) > 0  # the first is of no features
        if count > calls:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "invert", interrupted)
        done = 0 if calls < 3 else 1
        with pytest.raises(KeyboardInterrupt, match=f"{done} of 3 shards are done"):
            fastinv.invert_log(log, INVERTER, tmp_path / "out", format=format)
    assert not list((tmp_path / "out").rglob(".fastinv-*"))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", format=format)
    assert (report.skipped, report.complete) == (done, True)
    found, whole = tree(tmp_path / "out"), tree(tmp_path / "whole")
    if format == "npy":  # archives hold times
        found, whole = ({name: data for name, data in files.items() if "npz" not in name} for files in (found, whole))
    assert found == whole


def test_what_is_done_is_not_done_again_unless_it_changed(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.skipped, report.images, report.recovered) == (3, 0, 46)
    np.save(log / "a.npy", rows("a.npy")[:5])  # another size
    (tmp_path / "out/b/c.parquet").unlink()  # its images are gone
    np.save(log / "e.npy", rows("a.npy"))  # the log has grown
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.shards, report.skipped, report.images, report.recovered) == (4, 1, 40, 51)
    os.utime(log / "e.npy", (1, 1))
    assert fastinv.invert_log(log, INVERTER, tmp_path / "out").skipped == 3


@pytest.mark.parametrize(
    "other", [{"dtype": "float32"}, {"rows_per_file": 7}, {"key": "v"}, {"inverter": samples.inverse_network(1)}]
)
def test_another_job_is_refused(other: dict[str, Any], log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    before = tree(tmp_path / "out")
    (name,) = other
    with pytest.raises(FormatError, match=f"images of another job, with {name} .* choose a new folder"):
        fastinv.invert_log(log, other.pop("inverter", INVERTER), tmp_path / "out", **other)
    assert tree(tmp_path / "out") == before


def test_a_folder_of_other_files_is_refused(log: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match=r"holds files but no manifest\.json; choose a new one"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.txt": b"years of work"}


def test_a_retry_that_fails_is_not_done(log: Path, tmp_path: Path) -> None:
    bad = rows("a.npy")
    bad[3] = np.nan
    np.save(log / "a.npy", bad)
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    seen = (log / "a.npy").stat()
    (log / "a.npy").write_bytes(b"?" * seen.st_size)
    os.utime(log / "a.npy", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", retry_failed=True, dry_run=True)
    assert (report.rows, report.recovered, report.failed) == (26, 26, 0)
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", retry_failed=True)
    assert (report.skipped, report.recovered, list(report.errors)) == (2, 26, [str(log / "a.npy")])
    assert json.loads((tmp_path / "out/manifest.json").read_text())["counts"]["done"] == 2


def test_images_of_another_job_are_no_proof(log: Path, tmp_path: Path) -> None:
    def overtaken(state: Progress) -> None:
        if not state.done and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            fastinv.invert_log(
                log, other, tmp_path / "out", dry_run=True
            )  # nothing is done yet: it may have the folder
            record.claim(tmp_path / "out", pipeline_job(other))

    other = samples.inverse_network(1)
    with pytest.raises(FormatError, match="images of another job"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out", progress=overtaken)
    report = fastinv.invert_log(log, other, tmp_path / "out")
    assert (report.skipped, report.complete) == (0, True)
    images = fastinv.invert(rows("a.npy"), other, dtype="uint8")
    np.testing.assert_array_equal(images_in(tmp_path / "out/a.parquet"), images)


def pipeline_job(inverter: fastinv.InverseNetwork) -> dict[str, Any]:
    return Job(inverter, Choice(), "parquet", "uint8", "float32", None, None, None).record()


@pytest.mark.parametrize("files", [{}, {"/x": 1}, {"\0": 1}, {".parquet": "1"}, None])
def test_records_of_other_files_are_no_proof(files: Any, log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    path = tmp_path / "out/a.stats.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))
    assert fastinv.invert_log(log, INVERTER, tmp_path / "out").skipped == 2


def test_damaged_records_are_no_proof(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    (tmp_path / "out/a.stats.json").write_text('{"size": 1}')
    (tmp_path / "out/d.stats.json").write_text("[")
    assert fastinv.invert_log(log, INVERTER, tmp_path / "out").skipped == 1
    (tmp_path / "out/manifest.json").write_text("{}")
    with pytest.raises(FormatError, match="describes no job"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")


def test_what_killed_processes_left_is_swept_but_not_what_others_write(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    left, written, new = (tmp_path / "out/b" / f".fastinv-{k}.tmp" for k in range(3))
    for path in (left, written, new):
        path.write_bytes(b"part")
    for path in (left, written):
        os.utime(path, (1, 1))
    with open(written, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fastinv.invert_log(log, INVERTER, tmp_path / "out")
        assert [path.exists() for path in (left, written, new)] == [False, True, True]


def test_a_file_that_changes_meanwhile_fails(log: Path, tmp_path: Path) -> None:
    def change(state: Progress) -> None:
        if state.done == 0:  # within the first file: the second is still to be read
            write_table(log / "b/c.parquet", rows("b/c.parquet")[:9])

    for format in ("parquet", "npy", "webdataset"):
        report = fastinv.invert_log(log, INVERTER, tmp_path / format, format=format, rows_per_file=9, progress=change)
        assert "changed since the log was looked at" in report.errors[str(log / "b/c.parquet")]
        assert report.recovered == 31
        assert not list((tmp_path / format / "b").glob("c-*[!l]"))
        write_table(log / "b/c.parquet", rows("b/c.parquet"))


def test_a_file_of_one_block_that_changes_meanwhile_fails(log: Path, tmp_path: Path) -> None:
    report = fastinv.invert_log(log / "a.npy", INVERTER, tmp_path / "out", progress=lambda _: None)
    assert report.complete
    np.save(log / "a.npy", rows("a.npy")[:3])
    later = lambda state: None if state.done else os.utime(log / "a.npy", (1, 1))  # noqa: E731
    with pytest.raises(FormatError, match="changed since the log was looked at"):
        fastinv.invert_log(log / "a.npy", INVERTER, tmp_path / "out", progress=later)


def test_what_is_left_of_files_that_changed_goes(log: Path, tmp_path: Path) -> None:
    good = (log / "a.npy").read_bytes()
    (log / "a.npy").write_bytes(b"")
    fastinv.invert_log(log, INVERTER, tmp_path / "out", rows_per_file=7)
    assert (tmp_path / "out/a-000000.errors.jsonl").exists()
    (log / "a.npy").write_bytes(good)
    fastinv.invert_log(log, INVERTER, tmp_path / "out", rows_per_file=7)
    assert sorted(path.name for path in (tmp_path / "out").glob("a*.parquet")) == [
        f"a-{k:06}.parquet" for k in range(3)
    ]
    assert not (tmp_path / "out/a-000000.errors.jsonl").exists()
    np.save(log / "a.npy", rows("a.npy")[:5])
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", rows_per_file=7)
    assert sorted(path.name for path in (tmp_path / "out").glob("a*")) == ["a-000000.parquet", "a-000000.stats.json"]
    assert (report.recovered, report.complete) == (31, True)


def test_a_damaged_file_is_not_done_whatever_it_was_before(log: Path, tmp_path: Path) -> None:
    fastinv.invert_log(log, INVERTER, tmp_path / "out")
    (log / "a.npy").write_bytes(b"")
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.skipped, report.recovered, list(report.errors)) == (2, 26, [str(log / "a.npy")])
    assert not (tmp_path / "out/a.stats.json").exists()


def test_another_file_of_the_same_name_size_and_time_is_done(log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "a.npy", rows("a.npy")[::-1])
    for folder in (log, other):
        os.utime(folder / "a.npy", (0, 0))
        assert fastinv.invert_log(folder / "a.npy", INVERTER, tmp_path / "out").skipped == 0
    np.testing.assert_array_equal(images_in(tmp_path / "out/a.parquet"), expected("a.npy")[::-1])


def test_a_mistaken_start_does_not_keep_the_folder(log: Path, tmp_path: Path) -> None:
    save_file({"v": rows("a.npy"), "w": rows("a.npy")}, tmp_path / "two.safetensors")
    with pytest.raises(FormatError, match="pass key= to choose one"):
        fastinv.invert_log(tmp_path / "two.safetensors", INVERTER, tmp_path / "out")
    assert fastinv.invert_log(tmp_path / "two.safetensors", INVERTER, tmp_path / "out", key="v").complete
    with pytest.raises(FormatError, match="another job, with key 'v' instead of 'w'"):
        fastinv.invert_log(tmp_path / "two.safetensors", INVERTER, tmp_path / "out", key="w", dry_run=True)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (pa.array([2**60, 2**60 + 1, None]), [2**60, 2**60 + 1, None]),
        (pa.array(["a", None, "c"]), ["a", None, "c"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([True, None, False]), ["true", None, "false"]),
        (pa.array([0, 1, 2], pa.timestamp("s")), [f"1970-01-01 00:00:0{k}.000" for k in range(3)]),
        (pa.array([b"a", b"b", b"\xff"]), ["a", "b", "\\xff"]),
        (pa.array([b"\0\1", b"\2\3", b"\xff\xfe"], pa.binary(2)), ["0001", "0203", "fffe"]),
        (pa.array([2**63, 2**63 + 1, 5], pa.uint64()), [2**63, 2**63 + 1, 5]),
    ],
)
def test_names_stay_what_they_are(names: pa.Array, told: list[Any], tmp_path: Path) -> None:
    x = samples.features(3)
    x[1] = np.nan
    write_table(tmp_path / "a.parquet", x, id=names)
    for format in ("parquet", "npy", "webdataset"):
        fastinv.invert_log(tmp_path / "a.parquet", INVERTER, tmp_path / format, format=format, key="v")
        error = json.loads((tmp_path / format / "a.errors.jsonl").read_text())
        assert (error["row"], error["id"]) == (1, told[1])
    assert pq.read_table(tmp_path / "parquet/a.parquet")["id"].to_pylist() == told
    kept = np.load(tmp_path / "npy/a.rows.npz")["id"].tolist()
    assert kept == (["" if name is None else str(name) for name in told] if None in told else told)
    with tarfile.open(tmp_path / "webdataset/a.tar") as tar:
        assert json.loads(tar.extractfile("a-000000002.json").read())["id"] == told[2]  # type: ignore[union-attr]


@pytest.mark.parametrize("names", [pa.array([[1], [2], [3]]), pa.array([{"a": 1}] * 3)])
def test_names_that_are_none_are_refused(names: pa.Array, tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", samples.features(3), name=names)
    with pytest.raises(FormatError, match=r"column 'name' of names is of .*, expected whole numbers or text"):
        fastinv.invert_log(tmp_path / "a.parquet", INVERTER, tmp_path / "out", key="v", ids="name")


def test_a_column_id_that_names_nothing_is_left_alone(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", samples.features(3), id=pa.array([[1], [2], [3]]))
    fastinv.invert_log(tmp_path / "a.parquet", INVERTER, tmp_path / "out", key="v")
    assert pq.read_table(tmp_path / "out/a.parquet")["id"].to_pylist() == [0, 1, 2]


def test_empty_shards_have_the_columns_of_others(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name, count in (("a", 3), ("b", 0)):
        column = pa.array([row.reshape(-1) for row in samples.features(count)], pa.list_(pa.float32()))
        table = pa.table({"id": pa.array(list("xyz")[:count], pa.string()), "v": column})
        pq.write_table(table, tmp_path / f"log/{name}.parquet")
    fastinv.invert_log(tmp_path / "log", samples.rmle(), tmp_path / "out")
    schemas = [pq.read_schema(tmp_path / f"out/{name}.parquet") for name in "ab"]
    assert schemas[0] == schemas[1]
    fastinv.invert_log(tmp_path / "log", samples.rmle(), tmp_path / "npy", format="npy")
    about = np.load(tmp_path / "npy/b.rows.npz")
    assert {name: about[name].shape for name in about} == dict.fromkeys(
        ("id", "status", "objective", "steps", "converged"), (0,)
    )


# ---- what is asked for ---------------------------------------------------------------------------------------------


def test_a_dry_run_counts_and_writes_nothing(log: Path, tmp_path: Path) -> None:
    (log / "d.safetensors").write_bytes(b"")
    np.save(log / "e.npy", np.zeros((3, 4), np.float32))
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out", dry_run=True)
    assert (report.shards, report.rows, report.images) == (4, 35, 0)
    assert list(report.errors) == [str(log / "d.safetensors"), str(log / "e.npy")]
    assert not (tmp_path / "out").exists()


def test_progress_is_told(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states: list[Progress] = []
    fastinv.invert_log(log, INVERTER, tmp_path / "out", progress=states.append)
    assert (states[-1].shards, states[-1].done, states[-1].images, states[-1].failed) == (3, 3, 46, 0)
    parts = [state.part for state in states]
    assert parts == sorted(parts)
    assert parts[-1] == pytest.approx(1)
    assert len(states) >= 6  # blocks and shards
    fastinv.invert_log(log, INVERTER, tmp_path / "again", progress=True)
    assert capsys.readouterr().err.startswith("100%: 3 of 3 shards, 46 images")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "csv"}, "format 'csv', expected one of parquet, npy, webdataset, none"),
        ({"dtype": "int8"}, "dtype 'int8', expected one of"),
        ({"rows_per_file": 0}, "rows_per_file 0, expected an integer of at least 1"),
        ({"part": (0, 2)}, r"part \(0, 2\), expected"),
        ({"part": (3, 2)}, r"part \(3, 2\), expected"),
        ({"layout": "CHW"}, "layout 'CHW', expected one of NCHW, NHWC"),
        ({"stored_as": "int4"}, "stored_as 'int4', expected one of"),
        ({"out": None}, "needs a folder"),
        ({"format": "webdataset", "dtype": "float32"}, "PNG files take dtype uint8"),
        ({"log": "nowhere"}, "nowhere: No such file"),
        ({"log": []}, "no files of features"),
        ({"log": 3}, "log 3, expected a path, or several"),
        ({"format": ["npy"]}, r"format \['npy'\], expected one of"),
        ({"backend": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str, log: Path, tmp_path: Path) -> None:
    given = {"log": log, "out": tmp_path / "out"} | options
    with pytest.raises(fastinv.FastinvError, match=words):
        fastinv.invert_log(given.pop("log"), INVERTER, given.pop("out"), **given)


def test_places_that_do_not_go(log: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lies in the log's own folder"):
        fastinv.invert_log(log, INVERTER, log / "out")
    np.save(log / "d.npy", rows("a.npy"))
    with pytest.raises(FormatError, match="would have results of one name"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"no files of features; expected some with a suffix of \.npy"):
        fastinv.invert_log(tmp_path / "empty", INVERTER, tmp_path / "out")


def test_all_files_of_a_folder_are_found(log: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (log / "a.npy").rename(tmp_path / "elsewhere/A.NPY")
    (log / "link").symlink_to(tmp_path / "elsewhere")
    (log / "b/loop").symlink_to(log)
    report = fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert (report.shards, report.recovered) == (3, 46)
    assert (tmp_path / "out/link/A.parquet").exists()


def test_folders_files_twice_and_iterators(log: Path, tmp_path: Path) -> None:
    both = (path for path in (log / "b", log / "a.npy", log / "a.npy", str(log / "b")))
    report = fastinv.invert_log(both, INVERTER, tmp_path / "out")
    assert (report.shards, report.recovered) == (2, 35)
    assert (tmp_path / "out/b/c.parquet").exists()


def test_folders_named_as_results(log: Path, tmp_path: Path) -> None:
    (log / "a.parquet").mkdir()
    np.save(log / "a.parquet/x.npy", rows("a.npy"))
    with pytest.raises(FormatError, match="its folder may have the name of another file's results"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")


def test_names_that_are_too_long(log: Path, tmp_path: Path) -> None:
    (log / "a.npy").rename(log / f"{'ä' * 120}.npy")
    with pytest.raises(FormatError, match="results' names would be too long"):
        fastinv.invert_log(log, INVERTER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_are_looked_at_before_anything_is_written(log: Path, tmp_path: Path) -> None:
    for options in ({"batch_size": 0}, {"threads": 0}, {"precision": "float12"}, {"scale": -1}, {"ids": Path("a")}):
        with pytest.raises(fastinv.FastinvError):
            fastinv.invert_log(log, INVERTER, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*"))
    options = {"rows_per_file": np.int64(50), "dtype": np.uint8, "part": [1, 1]}
    assert fastinv.invert_log(log, INVERTER, tmp_path / "out", **options).complete
