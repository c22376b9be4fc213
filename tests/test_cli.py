"""The command line, on tiny data: what each command does, and what it says of wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import samples
import torch
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

import fastinv
from fastinv.cli import main
from fastinv.cli.arguments import integer, numbers, positive, table

COMMANDS = ("demo", "train", "invert", "reproduce", "info", "bench")


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """Features of five images."""
    path = tmp_path / "features.npy"
    np.save(path, samples.features(5))
    return path


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def fails(capsys: pytest.CaptureFixture[str], words: str, *args: object) -> None:
    """The command ends with exit code 1 and one line on stderr that holds the words."""
    capsys.readouterr()
    assert run(*args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"fastinv {args[0]}: ")
    assert words in lines[-1]


# ---- usage ---------------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fastinv {fastinv.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    assert f"usage: fastinv {command}" in capsys.readouterr().out


def test_help_of_train_names_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train", "--help")
    found = " ".join(capsys.readouterr().out.split())
    assert "The targets are the paper's two: lenet5" in found
    assert "A model of your own is attacked by `fastinv audit`" in found


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["recover"],
        ["reproduce"],
        ["info"],
        ["invert", "x.npy"],
        ["train"],
        ["demo", "--seed", "-1"],
        ["bench", "--batch", "0"],
    ],
)
def test_wrong_usage_ends_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*args)
    assert ended.value.code == 2
    assert "usage: fastinv" in capsys.readouterr().err


def test_interrupted_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastinv.cli.info.describe", interrupt)
    assert run("info", "x.finv") == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("64", 64), ("60_000", 60_000), ("10k", 10_000), ("2M", 2_000_000)]
)
def test_integers(text: str, value: int) -> None:
    assert integer(text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1kk", "k", "1_", "ten"])
def test_wrong_integers(text: str) -> None:
    with pytest.raises(Exception, match="expected a whole number"):
        integer(text)


def test_positive_and_numbers() -> None:
    assert positive("1") == 1
    assert numbers("0.5") == 0.5
    assert numbers("1,2.5") == [1.0, 2.5]
    with pytest.raises(Exception, match="at least 1"):
        positive("0")
    with pytest.raises(Exception, match="expected a number"):
        numbers("a,b")


def test_table_aligns() -> None:
    assert table(["", "n"], [["a", "1"], ["bcd", "200"]]).splitlines() == ["       n", "a      1", "bcd  200"]


# ---- info ----------------------------------------------------------------------------------------------------------


def test_info_says_what_the_file_holds(finv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", finv) == 0
    text = capsys.readouterr().out
    network = samples.inverse_network().network
    for words in (
        "inverse_network",
        "[2, 6, 5]",
        "[3, 6, 5]",
        "2 conv2d",
        f"{network.parameters:,}",
        f"{network.flops:,}",
    ):
        assert words in text
    assert 'target "a"' in text


def test_info_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inverter = samples.rmle()
    inverter.save(tmp_path / "a.finv")
    assert run("info", tmp_path / "a.finv", "--json", "--backend", "torch") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "rmle"
    assert found["recipe"]["init"] == f"array {list(samples.IMAGE)}"
    assert found["recipe"]["steps"] == inverter.steps
    assert found["fingerprint"] == inverter.fingerprint
    assert found["backend"] == "torch"
    assert [entry["op"] for entry in found["plan"]] == ["conv2d"]


def test_info_refuses(tmp_path: Path, finv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, "missing.finv", "info", tmp_path / "missing.finv")
    fails(capsys, "backend 'gpu'", "info", finv, "--backend", "gpu")
    fails(capsys, "no precision tf32 here", "info", finv, "--backend", "cpu", "--precision", "tf32")
    fails(capsys, "backend 'cpu' has no tiles to measure, expected cuda", "info", finv, "--backend", "cpu", "--tune")
    fails(capsys, "--measure: backend 'torch' does not time its steps", "info", finv, "--backend", "torch", "--measure")
    fails(capsys, "nope.finv: cannot read the file (No such file or directory)", "info", "nope.finv")
    finv.write_bytes(finv.read_bytes()[:-10])
    fails(capsys, "inverse.finv", "info", finv)


# ---- invert --------------------------------------------------------------------------------------------------------


def expected(dtype: str = "float32") -> np.ndarray:
    return fastinv.invert(samples.features(5), samples.inverse_network(), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_invert_to_npy(
    finv: Path, features: Path, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "images.npy"
    out.write_bytes(b"what was there before")
    assert run("invert", features, "-m", finv, "-o", out, "--dtype", dtype, "--batch-size", 2) == 0
    np.testing.assert_array_equal(np.load(out), expected(dtype))
    assert "5 images [3, 6, 5]" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"inverse.finv", "features.npy", "images.npy"}


def test_invert_to_pngs(finv: Path, features: Path, tmp_path: Path) -> None:
    assert run("invert", features, "-m", finv, "-o", tmp_path / "images") == 0
    paths = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in paths] == [f"{index:06}.png" for index in range(5)]
    found = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(found, expected("uint8"))


def test_invert_reads_every_format(finv: Path, tmp_path: Path) -> None:
    batch = samples.features(5)
    tensor = torch.from_numpy(batch)
    np.savez(tmp_path / "a.npz", v=batch)
    save_file({"v": batch, "w": batch[:1]}, tmp_path / "a.safetensors")
    torch.save(tensor, tmp_path / "a.pt")
    torch.save({"v": tensor, "w": tensor[:1], "epoch": 3}, tmp_path / "b.pt")
    for name, key in (("a.npz", ()), ("a.safetensors", ("--key", "v")), ("a.pt", ()), ("b.pt", ("--key", "v"))):
        assert run("invert", tmp_path / name, "-m", finv, "-o", tmp_path / "o.npy", *key) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected())


def test_invert_reads_bfloat16(finv: Path, tmp_path: Path) -> None:
    batch = torch.from_numpy(samples.features(5)).bfloat16()
    save_torch_file({"v": batch}, tmp_path / "a.safetensors")
    assert run("invert", tmp_path / "a.safetensors", "-m", finv, "-o", tmp_path / "o.npy") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), fastinv.invert(batch.float().numpy(), finv))


def test_invert_quantised_and_no_features(finv: Path, tmp_path: Path) -> None:
    quantised = np.arange(2 * 60, dtype=np.uint8).reshape(2, *samples.FEATURES)
    np.save(tmp_path / "q.npy", quantised)
    options = ("--scale", "0.01,0.02", "--zero-point", "60")
    assert run("invert", tmp_path / "q.npy", "-m", finv, "-o", tmp_path / "o.npy", *options) == 0
    images = fastinv.invert(quantised, finv, scale=[0.01, 0.02], zero_point=60)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), images)
    np.save(tmp_path / "none.npy", samples.features(0))
    assert run("invert", tmp_path / "none.npy", "-m", finv, "-o", tmp_path / "o.npy") == 0
    assert np.load(tmp_path / "o.npy").shape == (0, *samples.IMAGE)


@pytest.mark.parametrize("save", [np.save, lambda path, x: torch.save(torch.from_numpy(x), path)])
def test_invert_takes_channels_last(save: Any, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"last.{'npy' if save is np.save else 'pt'}"
    save(path, np.ascontiguousarray(samples.features(5).transpose(0, 2, 3, 1)))
    args = ("invert", path, "-m", finv, "-o", tmp_path / "o.npy")
    fails(capsys, "the channels come last; pass --layout NHWC", *args)
    assert run(*args, "--layout", "NHWC") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected())
    np.save(tmp_path / "flat.npy", np.zeros((5, 60), np.float32))
    fails(
        capsys,
        "features of shape [5, 60], but --layout NHWC is of four axes",
        *("invert", tmp_path / "flat.npy", "-m", finv, "-o", tmp_path / "o.npy", "--layout", "NHWC"),
    )


def test_invert_says_what_to_do_in_words_of_the_shell(
    finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = samples.features(2)
    for array, options, words in (
        (np.zeros(batch.shape, np.uint8), (), "pass --scale"),
        (batch, ("--scale", "0.1"), "--scale and --zero-point are for uint8 and int8 features"),
        (batch[0], (), "without the batch axis; save features[None]"),
        (batch.reshape(2, -1), (), "save features.reshape(-1, 2, 6, 5)"),
    ):
        np.save(tmp_path / "f.npy", array)
        fails(capsys, words, "invert", tmp_path / "f.npy", "-m", finv, "-o", tmp_path / "o.npy", *options)


def test_bars_are_shown_on_terminals_only(
    finv: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("invert", features, "-m", finv, "-o")
    assert run(*args, tmp_path / "one") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*args, tmp_path / "two") == 0
    found = capsys.readouterr().err
    assert "invert:" in found
    assert "write:" in found


def test_invert_with_rmle_from_the_environment(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples.rmle().save(tmp_path / "rmle.finv")
    monkeypatch.setenv("FASTINV_INVERTER", str(tmp_path / "rmle.finv"))
    assert run("invert", features, "-o", tmp_path / "o.npy", "--threads", 1, "--backend", "cpu") == 0
    assert "mean objective" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["o.npy", "images"])
def test_interrupted_invert_keeps_what_is_done(
    out: str,
    finv: Path,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "o.npy", np.arange(3))
    original, calls = fastinv.Engine.run, []

    def interrupted_at_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(fastinv.Engine, "run", interrupted_at_the_third)
    assert run("invert", features, "-m", finv, "-o", tmp_path / out, "--batch-size", 2, "--dtype", "uint8") == 130
    partial = tmp_path / f"{out.removesuffix('.npy')}.partial.npy"
    assert f"interrupted: the first 4 of 5 images are in {partial}" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(partial), expected("uint8")[:4])
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), np.arange(3))  # what was there stays
    assert not (tmp_path / "images").exists()
    assert run("invert", features, "-m", finv, "-o", tmp_path / "new.npy") == 0

    partial.unlink()
    (tmp_path / f"{partial.stem}2.npy").touch()
    partial.touch()
    calls.clear()
    assert run("invert", features, "-m", finv, "-o", tmp_path / out, "--batch-size", 2) == 130
    assert len(np.load(tmp_path / f"{partial.stem}3.npy")) == 4  # what was kept before is not lost
    partial.unlink()
    calls[:] = [(), ()]
    assert run("invert", features, "-m", finv, "-o", tmp_path / out) == 130
    assert "interrupted before the first of 5 images" in capsys.readouterr().err
    assert not partial.exists()


def test_termination_keeps_what_is_done(
    finv: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = fastinv.Engine.run, []

    def terminated_at_the_third(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(fastinv.Engine, "run", terminated_at_the_third)
    assert run("invert", features, "-m", finv, "-o", tmp_path / "o.npy", "--batch-size", 2) == 130
    assert len(np.load(tmp_path / "o.partial.npy")) == 4
    assert not list(tmp_path.glob(".*"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_info_and_invert_load_no_torch(finv: Path, features: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from fastinv.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch was loaded' if 'torch' in sys.modules else 0))"
    )
    for args in (["info", finv], ["invert", features, "-m", finv, "-o", tmp_path / "o.npy"]):
        # -P: the folder it runs in may hold the sources, without the compiled core
        command = [sys.executable, "-P", "-c", script, *map(str, args), "--backend", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_invert_refuses_files(finv: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batch = samples.features(5)
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", v=batch, w=batch)
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "damaged.npy").write_bytes(features.read_bytes()[:-40])
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 30)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    np.save(tmp_path / "wrong.npy", batch[:, :, :3])
    for name, words in (
        ("missing.npy", "No such file"),
        ("object.npy", "cannot read features"),
        ("two.npz", "pass --key"),
        ("a.bin", "suffix '.bin'"),
        ("damaged.npy", "cannot read features"),
        ("damaged.safetensors", "cannot read features"),
        ("module.pt", "cannot read features"),
        ("list.pt", "holds a list"),
        ("wrong.npy", "expected [N, 2, 6, 5]"),
    ):
        fails(capsys, words, "invert", tmp_path / name, "-m", finv, "-o", tmp_path / "o.npy")
    fails(
        capsys, "has no array 'x'", "invert", tmp_path / "two.npz", "-m", finv, "-o", tmp_path / "o.npy", "--key", "x"
    )
    fails(capsys, "leave the key out", "invert", features, "-m", finv, "-o", tmp_path / "o.npy", "--key", "x")
    assert not (tmp_path / "o.npy").exists()
    assert not list(tmp_path.glob(".*"))


def test_invert_keeps_what_it_reads(
    finv: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = features.read_bytes()
    (tmp_path / "link.npy").symlink_to(features)
    for out in (features, tmp_path / "link.npy"):
        fails(capsys, "the file of the features, too", "invert", features, "-m", finv, "-o", out)
    assert features.read_bytes() == kept


def test_invert_writes_where_a_link_points(finv: Path, features: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.npy"
    np.save(tmp_path / "o.npy", np.zeros(1))
    link.symlink_to(tmp_path / "o.npy")
    assert run("invert", features, "-m", finv, "-o", link) == 0
    assert link.is_symlink()
    assert len(np.load(tmp_path / "o.npy")) == len(np.load(features))


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_without_a_terminal(closed: str, finv: Path, features: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.{closed} = None; from fastinv.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "o.npy"
    command = [sys.executable, "-P", "-c", code, "invert", str(features), "-m", str(finv), "-o", str(out)]
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0
    assert out.exists()


def test_what_a_terminal_has_no_letters_for(finv: Path) -> None:
    code = "import sys; from fastinv.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, "info", str(finv), "--measure"]
    found = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert b"?s an image" in found.stdout


def test_invert_refuses_what_has_no_end(finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    fails(capsys, "a pipe or device", "invert", tmp_path / "pipe.npy", "-m", finv, "-o", tmp_path / "o.npy")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_invert_refuses_float8(suffix: str, finv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = torch.from_numpy(samples.features(2)).to(torch.float8_e5m2)
    path = tmp_path / f"a.{suffix}"
    torch.save(values, path) if suffix == "pt" else save_torch_file({"v": values}, path)
    fails(capsys, "expected float32", "invert", path, "-m", finv, "-o", tmp_path / "o.npy")


def test_too_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train", "-o", "o.finv", "--data", "x"], ["bench"], ["invert", "f.npy", "-o", "o.npy"]):
        with pytest.raises(SystemExit):
            run(*command, "--threads", 100_000)
        assert "a whole number from 1 to 1024" in capsys.readouterr().err


def test_invert_refuses_places_and_inverters(
    finv: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FASTINV_INVERTER", raising=False)
    fails(capsys, "pass -m", "invert", features, "-o", tmp_path / "o.npy")
    fails(capsys, "missing.finv", "invert", features, "-m", tmp_path / "missing.finv", "-o", tmp_path / "o.npy")
    fails(capsys, "suffix '.txt'", "invert", features, "-m", finv, "-o", tmp_path / "o.txt")
    fails(capsys, "cannot write", "invert", features, "-m", finv, "-o", tmp_path / "no" / "o.npy")
    fails(capsys, "not empty", "invert", features, "-m", finv, "-o", tmp_path)
    fails(capsys, "is a file", "invert", features, "-m", finv, "-o", _file(tmp_path / "taken"))
    (tmp_path / "folder.npy").mkdir()
    fails(capsys, "is a folder", "invert", features, "-m", finv, "-o", tmp_path / "folder.npy")
    two = samples.inverse_network(mean=(0.0,), std=(1.0,))
    network = fastinv.Network(samples.FEATURES, (samples.conv(np.random.default_rng(0), 2, 2),))
    fastinv.InverseNetwork(network, two.mean, two.std).save(tmp_path / "two.finv")
    fails(capsys, "2 channels", "invert", features, "-m", tmp_path / "two.finv", "-o", tmp_path / "images")


def _file(path: Path) -> Path:
    path.write_text("x")
    return path


# ---- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "options", "kind"),
    [
        ("inverse_network", ["--knowledge", "noise", "--images", 20], "inverse_network"),
        ("rmle", ["--rmle-lr", 0.02], "rmle"),
        ("shadow", ["--architecture", "different"], "rmle"),
        ("fit_shadow", ["--knowledge", "same", "--precision", "bfloat16"], "rmle"),
    ],
)
def test_train(
    attack: str, options: list[object], kind: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.finv"
    common = ["--data", digits, "--attack", attack, "--target-epochs", 1, "--seed", 3, "--score", 4, "-o", out]
    common += [] if attack == "inverse_network" else ["--rmle-steps", 2]
    common += [] if attack == "rmle" else ["--epochs", 1]
    assert run("train", *common, *options) == 0
    inverter = fastinv.load(out)
    assert (inverter.kind, inverter.feature_shape, inverter.image_shape) == (kind, (16, 8, 8), (1, 28, 28))
    known = {"target": "lenet5", "split": "ReLU2", "attack": attack, "seed": 3}
    known |= {"precision": "bfloat16"} if "bfloat16" in options else {}
    assert known.items() <= dict(inverter.provenance).items()
    if isinstance(inverter, fastinv.RMLE):
        assert (inverter.steps, inverter.lr) == (2, 0.02 if attack == "rmle" else 1e-3)
    assert "4 test images recovered: PSNR" in capsys.readouterr().out


def test_train_rmle_from_an_inverse_network(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--data", digits, "--target-epochs", 1, "--score", 0, "--target", tmp_path / "target.pt"]
    first, second = tmp_path / "network.finv", tmp_path / "rmle.finv"
    assert run(*common, "--epochs", 1, "-o", first) == 0
    refine = [*common, "--attack", "rmle", "--rmle-steps", 2]
    assert run(*refine, "--rmle-init", first, "-o", second) == 0
    inverter = fastinv.load(second)
    assert isinstance(inverter, fastinv.RMLE)
    assert inverter.init == fastinv.load(first)
    capsys.readouterr()
    assert run("info", second) == 0
    assert 'init "inverse_network' in capsys.readouterr().out
    assert run(*refine, "--rmle-init", "0.25", "-o", second) == 0
    assert fastinv.load(second).recipe()["init"] == 0.25
    fails(capsys, "holds an rmle, expected an inverse network", *refine, "--rmle-init", second, "-o", first)
    fails(capsys, "nowhere", *refine, "--rmle-init", tmp_path / "nowhere.finv", "-o", first)


def test_train_repeats_keeps_its_target_and_resumes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--data", digits, "--target-epochs", 1, "--epochs", 1, "--score", 0, "--split", "conv1"]
    assert run(*common, "-o", tmp_path / "a.finv", "--target", tmp_path / "target.pt") == 0
    assert (tmp_path / "target.pt").exists()
    assert run(*common, "-o", tmp_path / "b.finv", "--target", tmp_path / "target.pt") == 0
    assert run(*common, "-o", tmp_path / "c.finv", "--checkpoint", tmp_path / "state") == 0
    assert run(*common, "-o", tmp_path / "d.finv", "--checkpoint", tmp_path / "state") == 0
    assert len({fastinv.load(tmp_path / f"{name}.finv").fingerprint for name in "abcd"}) == 1
    assert not list(tmp_path.glob(".*"))  # where the place was tried
    fails(capsys, "another run", *common, "-o", tmp_path / "e.finv", "--checkpoint", tmp_path / "state", "--lr", "0.1")
    fails(capsys, "of the run", *common, "-o", tmp_path / "e.finv", "--target", tmp_path / "target.pt", "--seed", "5")


def test_train_refuses_before_it_trains(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target.pt"
    common = ["train", "--data", digits, "--target", target, "--target-epochs", 1, "-o", tmp_path / "o.finv"]
    fails(capsys, "no layer 'conv9'", *common, "--split", "conv9")
    fails(capsys, "shadow_edge", *common, "--attack", "shadow", "--split", "fc1", *_different())
    fails(capsys, "images asked for", *common, "--images", "1k")
    fails(capsys, "lr 0.0", *common, "--lr", "0")
    fails(capsys, "tv_beta 0.5", *common, "--attack", "rmle", "--rmle-tv-beta", "0.5")
    fails(capsys, "optimizer 'exact'", *common, "--attack", "rmle", "--rmle-optimizer", "exact", "--split", "ReLU2")
    for attack, option, value in (
        ("inverse_network", "--rmle-steps", 3),
        ("inverse_network", "--architecture", "same"),
        ("rmle", "--kind", "residual"),
        ("rmle", "--images", 9),
        ("shadow", "--width", 3),
    ):
        fails(capsys, f"{option} is of --attack", *common, "--attack", attack, option, value)
    new = tmp_path / "new"
    fails(capsys, "the file of the target, too", *common[:3], "--target", new, "-o", tmp_path / "." / ".." / new)
    assert not target.exists()
    assert not new.exists()
    kept = _file(target).read_bytes()
    fails(capsys, "the file of the target, too", *common[:-1], target)
    assert target.read_bytes() == kept


def test_train_refuses(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--target-epochs", 0, "--score", 0, "-o", tmp_path / "o.finv"]
    fails(capsys, "not a folder", "train", "--data", tmp_path / "missing", *out)
    fails(capsys, "no data set known", "train", "--data", tmp_path, *out)
    fails(capsys, "images asked for", "train", "--data", digits, "--images", "1k", *out)
    fails(capsys, "noise has no labels", "train", "--data", digits, "--attack", "shadow", "--knowledge", "noise", *out)
    fails(capsys, "no folder", "train", "--data", digits, "-o", tmp_path / "no" / "o.finv")
    fails(capsys, "no folder", "train", "--data", digits, "--target", tmp_path / "no" / "t.pt", *out)
    fails(capsys, "is a folder", "train", "--data", digits, "-o", tmp_path)
    fails(capsys, "cannot make", "train", "--data", digits, "--checkpoint", _file(tmp_path / "file") / "x", *out)
    fails(capsys, "cannot be read", "train", "--data", digits, "--target", _file(tmp_path / "target.pt"), *out)
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    for words in ("no weights of this target", " ...); delete it or name another file"):  # cut between words
        fails(capsys, words, "train", "--data", digits, "--target", tmp_path / "other.pt", *out)


def _different() -> list[str]:
    return ["--architecture", "different"]


def test_train_on_other_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No target of the paper takes what IDX files of 5×5 images hold."""
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 5]) + bytes(50)
        )
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(2))
    fails(capsys, "images [1, 5, 5]", "train", "--data", tmp_path, "-o", tmp_path / "o.finv")


# ---- bench ---------------------------------------------------------------------------------------------------------


def test_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fastinv import benchmark

    everything = list(benchmark.decoders())[:2]
    monkeypatch.setattr(benchmark, "decoders", lambda: everything)
    monkeypatch.setattr(benchmark, "ops", lambda: iter(()))
    monkeypatch.setattr(benchmark, "solvers", lambda: iter(()))
    options = ("--batch", 2, "--threads", 1, "--repeat", 1, "--ops", "--rmle")
    assert run("bench", *options, "--json", tmp_path / "t.json") == 0
    text = capsys.readouterr().out
    assert "MNIST conv1" in text
    assert "ratio" in text
    timings = json.loads((tmp_path / "t.json").read_text())["timings"]
    assert [timing["name"] for timing in timings] == ["MNIST conv1", "MNIST ReLU2"]
    assert all(timing["error"] < benchmark.TOLERANCE and timing["ratio"] > 0 for timing in timings)


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, "backend 'gpu'", "bench", "--backend", "gpu")
    fails(capsys, "no folder", "bench", "--json", tmp_path / "no" / "t.json")
