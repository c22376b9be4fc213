"""`fastinv invert` on whole logs: what it prints, how it ends, and what it leaves when it is stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples

import fastinv
from fastinv.cli import main


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two files of five rows each."""
    folder = tmp_path / "log"
    folder.mkdir()
    np.save(folder / "a.npy", samples.features(5))
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(samples.features(5, seed=3))
    pq.write_table(pa.table({"v": column, "name": list("abcde")}), folder / "b.parquet")
    return folder


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_a_log_and_the_same_again(log: Path, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out") == 0
    assert f"{tmp_path / 'out'}: 2 files, 10 images, 10 this time in" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "out/b.parquet")
    images = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(-1, *samples.IMAGE)
    np.testing.assert_array_equal(images, fastinv.invert(samples.features(5, seed=3), finv, dtype="uint8"))
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out") == 0
    assert "2 files, 2 of them there before, 10 images, 0 this time" in capsys.readouterr().out


def test_one_file_with_options(log: Path, finv: Path, tmp_path: Path) -> None:
    options = ("--format", "npy", "--dtype", "float32", "--ids", "name", "--key", "v", "--rows-per-file", "2")
    assert run("invert", log / "b.parquet", "-m", finv, "-o", tmp_path / "out", *options, "--part", "2/3") == 0
    assert [path.name for path in sorted((tmp_path / "out").glob("*.npy"))] == ["b-000001.npy"]
    expected = fastinv.invert(samples.features(5, seed=3), finv)[2:4]
    np.testing.assert_array_equal(np.load(tmp_path / "out/b-000001.npy"), expected)
    assert np.load(tmp_path / "out/b-000001.rows.npz")["id"].tolist() == ["c", "d"]


def test_one_table_to_one_array(log: Path, finv: Path, tmp_path: Path) -> None:
    assert run("invert", log / "b.parquet", "-m", finv, "-o", tmp_path / "o.npy") == 0
    expected = fastinv.invert(samples.features(5, seed=3), finv)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)


def test_what_fails_is_told_of_and_ends_with_3(
    log: Path, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = samples.features(5)
    features[2] = np.nan
    np.save(log / "a.npy", features)
    (log / "c.npy").write_bytes(b"\x93NUMPY")
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out") == 3
    told = capsys.readouterr()
    assert f"{log / 'c.npy'}: cannot read features: cut off" in told.err
    assert told.out.splitlines()[-1].endswith("; 1 row failed: see .errors.jsonl; 1 file failed")
    assert json.loads((tmp_path / "out/a.errors.jsonl").read_text())["row"] == 2
    (log / "c.npy").unlink()
    np.save(log / "a.npy", samples.features(5))
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out") == 0


def test_dry_run_and_no_output(log: Path, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out", "--dry-run") == 0
    assert "2 files, 10 rows; nothing is written in a dry run" in capsys.readouterr().out
    assert run("invert", log, "-m", finv, "--format", "none") == 0
    assert "nothing written: 2 files, 10 images" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("a.npy", "-o", "o.npy", "--dry-run"),
        ("a.npy", "-o", "o.npy", "--part", "1/2"),
        ("a.npy", "-o", "o", "--format", "csv"),
        (".", "-o", "o", "--part", "3/2"),
        (".", "-o", "o", "--part", "half"),
        (".",),
    ],
)
def test_wrong_usage_ends_with_2(
    wrong: tuple[str, ...], log: Path, finv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(log)
    with pytest.raises(SystemExit) as ended:
        run("invert", *wrong, "-m", finv)
    assert ended.value.code == 2
    assert "usage: fastinv invert" in capsys.readouterr().err


def test_errors_speak_of_options(log: Path, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = pa.array([row.tobytes() for row in samples.features(5).astype(np.float16)], pa.binary(120))
    pq.write_table(pa.table({"v": column}), tmp_path / "half.parquet")
    half = ("invert", tmp_path / "half.parquet", "-m", finv, "-o", tmp_path / "o.npy")
    assert run(*half) == 1
    assert "numbers of float32: say of which type they are, with --stored-as" in capsys.readouterr().err
    assert run(*half, "--stored-as", "float16") == 0
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out") == 0
    assert run("invert", log, "-m", finv, "-o", tmp_path / "out", "--precision", "bfloat16") == 1
    assert "holds images of another job, with precision 'float32' instead of 'bfloat16'" in capsys.readouterr().err


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_it_goes_on(ended_by: signal.Signals, tmp_path: Path) -> None:
    samples.rmle(steps=3000).save(tmp_path / "slow.finv")  # some 20 ms an image
    np.save(tmp_path / "a.npy", samples.features(60))
    args = ("invert", tmp_path / "a.npy", "-m", tmp_path / "slow.finv", "-o", tmp_path / "out", "--rows-per-file", "1")
    args = (*args, "--format", "npy", "--threads", "1")
    code = "import sys; from fastinv.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-P", "-c", code, *map(str, args)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.stats.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(ended_by)
    _, told = process.communicate(timeout=60)
    done = list((tmp_path / "out").glob("*.stats.json"))
    assert 0 < len(done) < 60
    if ended_by == signal.SIGTERM:
        assert process.returncode == 130
        assert f"interrupted: {len(done)} of 60 shards are done; the same again does the others" in told
        assert not list((tmp_path / "out").glob(".fastinv-*"))
    kept = {path: path.stat().st_mtime_ns for path in done}
    assert run(*args) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == kept
    images = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))])
    expected = fastinv.invert(samples.features(60), tmp_path / "slow.finv", threads=1, dtype="uint8")
    np.testing.assert_array_equal(images, expected)
