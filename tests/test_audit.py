"""Audits of a model of the user's, in small: where it is cut, what is attacked, kept, gone on with and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import IMAGES, LABELS, NORM
from PIL import Image
from torch import nn

import fastinv
from fastinv.auditing.run import ATTACKS
from fastinv.cli import main
from fastinv.errors import FeatureError, FormatError, NetworkError, SplitError, TrainingError
from fastinv.experiment import recipe, results
from fastinv.model_files import load_model
from fastinv.models import lenet5

OWN, TRUTH = IMAGES[:16], IMAGES[16:19]
QUICK: dict[str, Any] = {**NORM, "epochs": 1, "shadow_epochs": 1}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """rMLE of a few steps, for what else there is."""
    short = {"optimizer": "lbfgs", "steps": 2}
    monkeypatch.setattr(recipe, "STEPS", {"lbfgs": (short, {"steps": 3}), "adam": ({"lr": 0.01, "steps": 2}, {})})
    monkeypatch.setattr(recipe, "TV_WEIGHTS", (0.1,))


class Logarithm(nn.Module):
    """Has a layer that fastinv cannot export, after one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.exotic = Exponential()
        self.fc = nn.Linear(2 * 26 * 26, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] != 28:  # a branch that torch.fx cannot follow
            raise ValueError
        result: torch.Tensor = self.fc(self.exotic(self.conv(x)).flatten(1))
        return result


class Exponential(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)


# ---- what is found -------------------------------------------------------------------------------------------------


def test_all_attacks(tmp_path: Path) -> None:
    model = lenet5()
    said: list[str] = []
    report = fastinv.audit(
        model, OWN, TRUTH, tmp_path, at=["ReLU2", "conv1"], attacks=list(ATTACKS), labels=LABELS[:16],
        untrained=lenet5, tell=said.append, **QUICK,
    )  # fmt: skip
    assert (report.ran, report.failed) == (10, {})
    assert [point.at for point in report.points] == ["conv1", "ReLU2"]  # in the order of the model's forward
    assert set(report.results) == {(at, attack) for at in ("conv1", "ReLU2") for attack in ATTACKS}
    assert (report.points[0].feature_shape, report.points[0].kibibytes) == ((8, 24, 24), 18.0)
    assert report.points[0].flops == 2 * 25 * 8 * 24 * 24
    assert said[0] == "experiments: 10, done before: 0"
    assert len(said) == 11

    for (at, attack), result in report.results.items():
        file = tmp_path / "attacks" / f"{at}-{ATTACKS[attack].name}.finv"
        split = fastinv.Split(model, at, **NORM)
        again = fastinv.invert(split.features(TRUTH), file)
        assert result.psnr == pytest.approx(fastinv.psnr(TRUTH, again).mean())
        assert result.ssim == pytest.approx(fastinv.ssim(TRUTH, again).mean())
        provenance = fastinv.load(file).provenance
        assert (provenance["split"], provenance["attack"]) == (at, ATTACKS[attack].kind)

    text = report.path.read_text()
    for at in ("conv1", "ReLU2"):
        best = max((r for (name, _), r in report.results.items() if name == at), key=lambda r: r.ssim)
        (line,) = (line for line in text.partition("## All attacks")[0].splitlines() if line.startswith(f"| {at} "))
        assert f"{best.psnr:.2f} / {best.ssim:.3f}, {best.recognisable:.0%} |" in line
        with Image.open(tmp_path / f"{at}.png") as picture:
            assert picture.height > 6 * 84
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["edge_flops"] for record in records[:5]] == [report.points[0].flops] * 5
    assert {record["split"] for record in records} == {"conv1", "ReLU2"}


def test_what_is_recovered_without_features(tmp_path: Path) -> None:
    report = fastinv.audit(lenet5(), OWN, TRUTH, tmp_path, at=["conv1"], attacks=["inverse_network"], **QUICK)
    mean = np.broadcast_to(OWN.mean(0), TRUTH.shape)
    assert report.nothing == pytest.approx((fastinv.psnr(TRUTH, mean).mean(), fastinv.ssim(TRUTH, mean).mean()))
    assert f"gives {report.nothing[0]:.2f} / {report.nothing[1]:.3f}" in report.path.read_text()


def test_wherever_it_can_be_cut(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(2 * 26 * 26, 4))
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, attacks=["inverse_network"], **QUICK)
    assert [point.at for point in report.points] == fastinv.split_points(model) == ["0", "1"]


def test_tokens(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2).mT

    model = nn.Sequential(nn.Conv2d(1, 6, 4, 4), Tokens(), nn.Linear(6, 5), nn.Flatten(), nn.Linear(49 * 5, 4))
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, at="2", **QUICK)
    assert report.points[0].feature_shape == (49, 5)
    assert set(report.results) == {("2", "rmle"), ("2", "inverse_network")}


def test_images_as_bytes_are_their_255ths(tmp_path: Path) -> None:
    data = (np.concatenate([OWN, TRUTH]) * 255).astype(np.uint8)
    model = lenet5()
    found = []
    for name, images in (("bytes", data), ("pixels", torch.from_numpy(data.astype(np.float32) / np.float32(255)))):
        report = fastinv.audit(model, images[:16], images[16:], tmp_path / name, at=["conv1"], **QUICK)
        found.append([(result.psnr, result.ssim) for result in report.results.values()])
    assert found[0] == found[1]


# ---- going on ------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again_and_more_comes_into_the_same_report(tmp_path: Path) -> None:
    model = lenet5()
    fastinv.audit(model, OWN, TRUTH, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "attacks").glob("conv1*")}
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)
    assert report.ran == 0
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, at=["pool1"], attacks=["inverse_network"], **QUICK)
    assert (report.ran, list(report.results)) == (1, [("conv1", "rmle"), ("pool1", "inverse_network")])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 2}, "epochs 1 instead of 2"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"mean": (0.4,)}, r"mean \[0.5\] instead of \[0.4\]"),
        ({"model": lenet5()}, "weights"),
        ({"images": OWN[1:]}, "images"),
        ({"truth": TRUTH[1:]}, "truth"),
        ({"optimizer": "adam"}, "optimizer 'lbfgs' instead of 'adam'"),
    ],
)
def test_results_of_something_else_are_left_alone(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    first = {"model": lenet5(), "images": OWN, "truth": TRUTH, "out": tmp_path, "at": ["conv1"], "attacks": ["rmle"]}
    fastinv.audit(**first, **QUICK)
    with pytest.raises(FormatError, match=words):
        fastinv.audit(**{**first, **QUICK, **change})


def test_a_start_that_did_nothing_decides_nothing(tmp_path: Path) -> None:
    model = Logarithm()
    for epochs in (1, 2):
        options = QUICK | {"epochs": epochs}
        report = fastinv.audit(model, OWN, TRUTH, tmp_path, at=["exotic"], attacks=["rmle"], **options)
        assert list(report.failed) == [("exotic", "rmle")]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(FormatError, match="is there, but no results"):
        fastinv.audit(lenet5(), OWN, TRUTH, tmp_path, at=["conv1"], **QUICK)
    assert (tmp_path / "report.md").read_text() == "mine"


# ---- what cannot be done -------------------------------------------------------------------------------------------


def test_an_attack_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    report = fastinv.audit(Logarithm(), OWN, TRUTH, tmp_path, **QUICK)
    assert list(report.results) == [("conv", "rmle"), ("conv", "inverse_network"), ("exotic", "inverse_network")]
    assert list(report.failed) == [("exotic", "rmle")]
    assert "aten.exp" in report.failed["exotic", "rmle"]
    assert [point.flops is None for point in report.points] == [False, True]
    text = report.path.read_text()
    assert f"| exotic | white-box: rMLE | {report.failed['exotic', 'rmle']} |" in text


def test_where_more_crosses_is_told_and_has_no_cloud(tmp_path: Path) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(784, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc((x + self.conv(x)).flatten(1))
            return result

    options: dict[str, Any] = {"attacks": ["inverse_network", "shadow"], "labels": LABELS[:16], "untrained": Skips}
    with pytest.warns(UserWarning, match="not only its result crosses"):
        report = fastinv.audit(Skips(), OWN, TRUTH, tmp_path, at=["conv"], **options, **QUICK)
    assert list(report.results) == [("conv", "inverse_network")]
    assert "Cut where they have joined" in report.failed["conv", "shadow"]


def test_refuses(tmp_path: Path) -> None:
    model = lenet5()

    def audit(images: Any = OWN, truth: Any = TRUTH, subject: Any = model, **options: Any) -> None:
        fastinv.audit(subject, images, truth, tmp_path, **QUICK | options)

    for error, words, arguments in (
        (TrainingError, r"attacks \['guess'\], expected some of rmle", {"attacks": ["guess"]}),
        (TrainingError, "attacks 'rmle'", {"attacks": "rmle"}),
        (TrainingError, r"attacks \[\]", {"attacks": []}),
        (TrainingError, "fit_shadow needs untrained=", {"attacks": ["fit_shadow"]}),
        (TrainingError, "shadow needs labels=", {"attacks": ["shadow"], "untrained": lenet5}),
        (TrainingError, "optimizer 'sgd', expected one of adam, lbfgs", {"optimizer": "sgd"}),
        (TrainingError, "epochs -1", {"epochs": -1}),
        (TrainingError, "images .* and truth .*, expected", {"truth": TRUTH[:, :, :20]}),
        (TrainingError, r"images \[0, 1, 28, 28\]", {"images": OWN[:0]}),
        (TrainingError, r"truth \[0, 1, 28, 28\]", {"truth": TRUTH[:0]}),
        (NetworkError, "kind 'unet'", {"kind": "unet"}),
        (FeatureError, "divide those of 0 to 255", {"truth": TRUTH * 255}),
        (FeatureError, "does not take images", {"images": OWN[..., :20], "truth": TRUTH[..., :20], "at": ["fc1"]}),
        (SplitError, "no layer 'conv9'", {"at": ["conv1", "conv9"]}),
        (SplitError, "no layer after which it can be cut", {"subject": nn.Sequential(nn.Flatten(), nn.Linear(784, 2))}),
        (SplitError, "expected a torch", {"subject": "model"}),
        (
            TrainingError,
            "the model's own weights",
            {"attacks": ["fit_shadow"], "at": ["conv1"], "untrained": lambda: model},
        ),
        (
            TrainingError,
            "another structure",
            {"attacks": ["fit_shadow"], "at": ["0"], "subject": nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
             "untrained": lambda: nn.Sequential(nn.ReLU(), nn.ReLU())},
        ),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            audit(**arguments)
    assert not list(tmp_path.iterdir())


# ---- models in files -----------------------------------------------------------------------------------------------

CODE = """
import helper
from torch import nn

class Namespace:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))

def build():
    return helper.lenet5()

def needs(argument):
    return nn.ReLU()

def nothing():
    return None
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("from fastinv.models import lenet5")
    file = tmp_path / "net.py"
    file.write_text(CODE)
    return file


def test_models_in_files(code: Path) -> None:
    model, untrained = load_model(f"{code}:build")
    assert untrained is None
    assert not model.training
    assert isinstance(load_model(f"{code}:Namespace.model")[0][0], nn.Conv2d)
    assert isinstance(load_model("fastinv.models:lenet5")[0].conv1, nn.Conv2d)


@pytest.mark.parametrize("name", ["net.pt", "nested.pt", "parallel.pt", "net.safetensors"])
def test_weights(code: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    state = lenet5().state_dict()
    file = tmp_path / name
    if name == "net.safetensors":
        save_file(state, file)
    elif name == "nested.pt":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        prefix = "module." if name == "parallel.pt" else ""
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, file)
    model, untrained = load_model(f"{code}:build", file)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert untrained is not None
    assert not torch.equal(untrained().state_dict()["fc1.weight"], state["fc1.weight"])


def test_models_that_are_none(code: Path, tmp_path: Path) -> None:
    for place, words in (
        ("net.py", "expected FILE.py:NAME"),
        (f"{tmp_path / 'missing.py'}:build", "cannot be imported"),
        ("no.such.package:build", "cannot be imported"),
        (f"{code}:built", "has no 'built'; it has helper, nn, Namespace, build"),
        (f"{code}:needs", "fails, called without arguments"),
        (f"{code}:nothing", "gives a NoneType, expected a torch.nn.Module"),
        (f"{code}:helper", "fails, called"),
    ):
        with pytest.raises(NetworkError, match=words):
            load_model(place)
    for name, content, words in (
        ("missing.pt", None, "cannot be read"),
        ("cut.pt", b"PK", "cannot be read"),
        ("cut.safetensors", b"PK", "cannot be read"),
        ("other.pt", {"conv9.weight": torch.zeros(1)}, "not the weights of this model"),
        ("list.pt", [torch.zeros(1)], "holds a list"),
    ):
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises((FormatError, TrainingError), match=words):
            load_model(f"{code}:build", file)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_command(digits: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lenet5().state_dict(), tmp_path / "net.pt")
    model = ["audit", "--model", f"{code}:build", "--weights", str(tmp_path / "net.pt"), "--data", str(digits)]
    model += ["--mean", "0.5", "--std", "0.5"]
    assert main([*model, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == fastinv.split_points(lenet5())
    assert lines[1].split() == ["conv1", "8×24×24", "18.0", "0.23"]
    out = tmp_path / "out"
    quick = ["-o", str(out), "--epochs", "1", "--shadow-epochs", "1", "--scored", "3", "--images", "9"]
    assert main([*model, *quick, "--splits", "conv1", "--attacks", "rmle", "shadow"]) == 0
    said = capsys.readouterr().out
    assert "experiments: 2, done before: 0" in said
    assert f"{out / 'report.md'}: 2 experiments, 2 of them run now" in said
    assert results.read_settings(out / "attacks")["epochs"] == 1
    assert main([*model, *quick, "--splits", "conv9"]) == 1
    assert "no layer 'conv9'" in capsys.readouterr().err


def test_command_of_a_model_with_failures(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("from test_audit import Logarithm as build")
    command = ["audit", "--model", f"{tmp_path / 'net.py'}:build", "--data", str(digits), "-o", str(tmp_path / "out")]
    assert main([*command, "--splits", "exotic", "--scored", "2", "--epochs", "1"]) == 3
    assert "1 experiment failed; the same command tries them again" in capsys.readouterr().out


# ---- on MNIST ------------------------------------------------------------------------------------------------------


def test_a_first_convolution_gives_everything_away(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    train, test = (part.sample(16) for part in fastinv.data.load(shared_data / "mnist"))
    report = fastinv.audit(lenet5(), train.images, test.images, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)
    assert report.results["conv1", "rmle"].psnr > 60
    assert report.results["conv1", "rmle"].recognisable == 1
