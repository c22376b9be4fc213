"""Audits of a model of the user's, in small: where it is cut, what is attacked, kept, gone on with and reported."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import IMAGES, LABELS, NORM
from PIL import Image
from torch import nn

import fastinv
from fastinv.auditing.attacks import ATTACKS
from fastinv.cli import main
from fastinv.errors import BackendError, FeatureError, FormatError, NetworkError, SplitError, TrainingError
from fastinv.experiment import recipe, results
from fastinv.models import lenet5
from fastinv.training import train_target

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
        self.exotic = OfOneMore()
        self.fc = nn.Linear(2 * 26 * 26, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] != 28:  # a branch that torch.fx cannot follow
            raise ValueError
        result: torch.Tensor = self.fc(self.exotic(self.conv(x)).flatten(1))
        return result


class OfOneMore(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().log1p()


# ---- what is found -------------------------------------------------------------------------------------------------


def test_all_attacks(tmp_path: Path) -> None:
    model = lenet5()
    said: list[str] = []
    report = fastinv.audit(
        model, OWN, TRUTH, tmp_path, at=["ReLU2", "conv1"], attacks=list(ATTACKS), labels=LABELS[:16],
        untrained=lenet5, tell=said.append, **QUICK,
    )  # fmt: skip
    assert (report.ran, report.failed) == (12, {})
    assert [point.at for point in report.points] == ["conv1", "ReLU2"]  # in the order of the model's forward
    assert set(report.results) == {(at, attack) for at in ("conv1", "ReLU2") for attack in ATTACKS}
    assert (report.points[0].feature_shape, report.points[0].kibibytes) == ((8, 24, 24), 18.0)
    assert report.points[0].flops == 2 * 25 * 8 * 24 * 24
    assert said[0] == "experiments: 12, done before: 0"
    assert len(said) == 13

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
        with Image.open(tmp_path / "pictures" / f"{at}.png") as picture:
            assert picture.height > 6 * 84
    assert (tmp_path / "overview.png").exists()
    records = json.loads((tmp_path / "results.json").read_text())
    assert {record["attack"] for record in records} == set(ATTACKS)
    assert [record["edge_flops"] for record in records[:6]] == [report.points[0].flops] * 6
    assert {record["split"] for record in records} == {"conv1", "ReLU2"}


def test_what_is_refined_starts_from_the_inverse_network(tmp_path: Path) -> None:
    report = fastinv.audit(lenet5(), OWN, TRUTH, tmp_path, at=["pool1"], attacks=["refined"], **QUICK)
    assert list(report.results) == [("pool1", "inverse_network"), ("pool1", "refined")]
    start, refined = (
        fastinv.load(tmp_path / "attacks" / f"pool1-{ATTACKS[attack].name}.finv")
        for attack in ("inverse_network", "refined")
    )
    assert isinstance(refined, fastinv.RMLE)
    assert isinstance(refined.init, fastinv.InverseNetwork)
    assert refined.init.fingerprint == start.fingerprint


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
    assert set(report.results) == {("2", "rmle"), ("2", "inverse_network"), ("2", "refined")}


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
    assert fastinv.audit(model, OWN, TRUTH, tmp_path, at=["flatten"], attacks=["inverse_network"], **QUICK).ran == 1
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)  # the others stay
    assert list(report.results) == [("conv1", "rmle"), ("pool1", "inverse_network"), ("flatten", "inverse_network")]


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


def test_structure_and_labels_count_too(tmp_path: Path) -> None:
    """Another activation has the same weights."""
    relu, tanh = (
        nn.Sequential(nn.Conv2d(1, 2, 3), a, nn.Flatten(), nn.Linear(1352, 4)) for a in (nn.ReLU(), nn.Tanh())
    )
    tanh.load_state_dict(relu.state_dict())
    options = {"at": ["1"], "attacks": ["inverse_network"], **QUICK}
    fastinv.audit(relu, OWN, TRUTH, tmp_path / "a", **options)
    with pytest.raises(FormatError, match="with code"):
        fastinv.audit(tanh, OWN, TRUTH, tmp_path / "a", **options)

    options = {"at": ["conv1"], "attacks": ["shadow"], "untrained": lenet5, **QUICK}
    model = lenet5()
    fastinv.audit(model, OWN, TRUTH, tmp_path / "b", labels=LABELS[:16], **options)
    with pytest.raises(FormatError, match="of other labels"):
        fastinv.audit(model, OWN, TRUTH, tmp_path / "b", labels=LABELS[1:17], **options)


def test_results_without_their_inverters_are_results(tmp_path: Path) -> None:
    model = lenet5()
    fastinv.audit(model, OWN, TRUTH, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)
    for file in (tmp_path / "attacks").glob("*.finv"):
        file.unlink()
    with pytest.raises(FormatError, match="epochs 1 instead of 2"):
        fastinv.audit(model, OWN, TRUTH, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK | {"epochs": 2})


def test_pictures_show_what_there_is(tmp_path: Path) -> None:
    model = lenet5()
    options = {"at": ["conv1"], **QUICK}
    fastinv.audit(model, OWN, TRUTH, tmp_path, **options)
    picture = tmp_path / "pictures" / "conv1.png"
    before = picture.stat().st_mtime_ns
    fastinv.audit(model, OWN, TRUTH, tmp_path, **options)
    assert picture.stat().st_mtime_ns == before  # nothing new is to be seen
    with Image.open(picture) as image:
        height = image.height
    (tmp_path / "attacks" / "conv1-refined.json").unlink()
    fastinv.audit(model, OWN, TRUTH, tmp_path, attacks=["rmle"], **options)
    with Image.open(picture) as image:
        assert image.height < height


def test_pictures_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "overview.png").write_bytes(b"mine")
    with pytest.raises(FormatError, match=r"overview\.png: is there, but no results"):
        fastinv.audit(lenet5(), OWN, TRUTH, tmp_path, at=["conv1"], **QUICK)


def test_layers_of_any_names(tmp_path: Path) -> None:
    names = ["overview", "a|b/c", "ю" * 90]
    parts = {name: nn.Conv2d(1, 1, 3) for name in names}
    model = nn.Sequential(OrderedDict(**parts, flatten=nn.Flatten(), fc=nn.Linear(22 * 22, 4)))
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, attacks=["inverse_network"], **QUICK)
    assert [point.at for point in report.points] == names
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    (line,) = (line for line in report.path.read_text().splitlines() if line.startswith("| a\\|b/c | 1 × "))
    assert line.replace("\\|", "").count("|") == 8


# ---- what cannot be done -------------------------------------------------------------------------------------------


def test_an_attack_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    report = fastinv.audit(Logarithm(), OWN, TRUTH, tmp_path, **QUICK)
    attacks = ["rmle", "inverse_network", "refined"]
    assert list(report.results) == [*(("conv", attack) for attack in attacks), ("exotic", "inverse_network")]
    assert list(report.failed) == [("exotic", "rmle"), ("exotic", "refined")]
    assert "aten.log1p" in report.failed["exotic", "rmle"]
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
    report = fastinv.audit(Skips(), OWN, TRUTH, tmp_path, at=["conv"], **options, **QUICK)
    assert list(report.results) == [("conv", "inverse_network")]
    assert report.points[0].crossing == "the images"
    text = report.path.read_text()
    assert "| conv (+) |" in text
    assert "(+) After conv, the images crosses, too" in text
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
        (TrainingError, "optimizer 'sgd', expected one of ", {"optimizer": "sgd"}),
        (TrainingError, "epochs -1", {"epochs": -1}),
        (TrainingError, "images .* and truth .*, expected", {"truth": TRUTH[:, :, :20]}),
        (FeatureError, r"images \[0, 1, 28, 28\]", {"images": OWN[:0]}),
        (FeatureError, r"truth \[0, 1, 28, 28\]", {"truth": TRUTH[:0]}),
        (FeatureError, "images .* complex64, expected", {"images": OWN + 0j}),
        (TrainingError, "attacks None", {"attacks": None}),
        (TrainingError, r"attacks \[\['rmle'\]\]", {"attacks": [["rmle"]]}),
        (TrainingError, "optimizer", {"optimizer": ["adam"]}),
        (TrainingError, "epochs 1.5", {"epochs": 1.5}),
        (NetworkError, "width", {"width": "64"}),
        (BackendError, "threads 0", {"threads": 0}),
        (SplitError, r"at \[\], expected names", {"at": []}),
        (SplitError, "at 5, expected names", {"at": 5}),
        (SplitError, "weight has no values yet", {"subject": lenet5().to("meta")}),
        (SplitError, "weight has no values yet", {"subject": nn.Sequential(nn.LazyConv2d(2, 3))}),
        (TrainingError, "fit_shadow needs untrained=", {"attacks": ["fit_shadow"], "untrained": lenet5()}),
        (TrainingError, "untrained.. fails .Zero", {"attacks": ["fit_shadow"], "untrained": lambda: 1 / 0}),
        (FeatureError, "protect: gives .* expected a tensor of the same shape", {"protect": lambda v: v[:, :1]}),
        (FeatureError, "protect: gives .* without NaN", {"protect": lambda v: v / 0}),
        (FeatureError, "protect: fails .*KeyError", {"protect": lambda v: {}["x"]}),
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


def test_where_no_features_of_each_image_are(tmp_path: Path) -> None:
    """What gives a tuple, or has the tokens first, is left out where no split point is named."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(1, 6, 7, 7), nn.LSTM(6, 5, batch_first=True)
            self.first, self.fc = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            states, _ = self.lstm(self.conv(x).flatten(2).mT)
            result: torch.Tensor = self.fc(self.first(states.transpose(0, 1)).sum(0))
            return result

    assert fastinv.split_points(Recurrent()) == ["conv", "lstm", "first"]
    assert fastinv.split_points(Recurrent(), images=torch.zeros(3, 1, 28, 28)) == ["conv"]
    report = fastinv.audit(Recurrent(), OWN, TRUTH, tmp_path, attacks=["inverse_network"], **QUICK)
    assert [point.at for point in report.points] == ["conv"]


def test_a_named_layer_of_a_model_that_cannot_be_traced_wholly(tmp_path: Path) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            return x if x.sum() > 0 else -x  # a branch on values

    model = nn.Sequential(OrderedDict(body=Body(), flatten=nn.Flatten(), fc=nn.Linear(1352, 4)))
    with pytest.raises(SplitError, match="cannot trace"):
        fastinv.audit(model, OWN, TRUTH, tmp_path, **QUICK)
    report = fastinv.audit(model, OWN, TRUTH, tmp_path, at=["body"], attacks=["rmle", "inverse_network"], **QUICK)
    assert list(report.results) == [("body", "inverse_network")]
    assert report.points[0].flops is None
    assert list(report.failed) == [("body", "rmle")]


# ---- protection ----------------------------------------------------------------------------------------------------


def test_protection(tmp_path: Path) -> None:
    """Attackers see what is sent, and the report says what the model makes of it."""
    torch.manual_seed(0)
    model = train_target(lenet5(), IMAGES, LABELS, epochs=60, **NORM)
    options = {"at": ["conv1"], "truth_labels": LABELS, **QUICK | {"epochs": 20}}
    open_, noisy, zeros = (
        fastinv.audit(model, IMAGES, IMAGES, tmp_path / str(index), protect=protect, **options)
        for index, protect in enumerate((None, lambda v: v + torch.randn_like(v), torch.zeros_like))
    )
    for attack in ("rmle", "inverse_network"):
        found = [report.results["conv1", attack].psnr for report in (open_, noisy, zeros)]
        assert found[0] > found[1], attack
        assert found[2] <= zeros.nothing[0] + 1e-6, (
            attack
        )  # what does not depend on the image is no better than the mean
    right = [report.points[0].accuracy for report in (open_, noisy, zeros)]
    assert right[0] > 0.9
    assert right[2] < 0.5
    text = noisy.path.read_text()
    assert "Features are protected before they are sent, by" in text
    assert f"| {right[1]:.1%} |" in text


def test_another_protection_is_another_audit(tmp_path: Path) -> None:
    def noise(scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda v: v + scale * torch.randn_like(v)

    options = {"at": ["conv1"], "attacks": ["inverse_network"], **QUICK}
    model = lenet5()
    first = fastinv.audit(model, OWN, TRUTH, tmp_path / "a", protect=noise(0.1), **options)
    assert fastinv.audit(model, OWN, TRUTH, tmp_path / "a", protect=noise(0.1), **options).ran == 0
    again = fastinv.audit(model, OWN, TRUTH, tmp_path / "b", protect=noise(0.1), **options)
    assert again.results["conv1", "inverse_network"].psnr == first.results["conv1", "inverse_network"].psnr
    for other in (None, noise(0.2)):
        with pytest.raises(FormatError, match="protect"):
            fastinv.audit(model, OWN, TRUTH, tmp_path / "a", protect=other, **options)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_command(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(lenet5().state_dict(), tmp_path / "net.pt")
    model = ["audit", "--model", "fastinv.models:lenet5", "--weights", str(tmp_path / "net.pt"), "--data", str(digits)]
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
    assert main([*model, *quick, "--splits", "conv1", "--attacks", "rmle"]) == 0
    assert "2 experiments, 0 of them run now" in capsys.readouterr().out
    assert main([*model, *quick, "--splits", "conv9"]) == 1
    assert "no layer 'conv9'" in capsys.readouterr().err


def test_command_of_a_model_with_failures(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("from test_audit import Logarithm as build")
    command = ["audit", "--model", f"{tmp_path / 'net.py'}:build", "--data", str(digits), "-o", str(tmp_path / "out")]
    command += ["--splits", "exotic", "--scored", "2", "--epochs", "1"]
    assert main([*command, "--attacks", "rmle"]) == 3
    assert "1 experiment failed; the same" in capsys.readouterr().out
    assert main(command) == 3  # the same model, though its weights are drawn anew
    assert "2 experiments failed; the same command tries them again" in capsys.readouterr().out


def test_wrong_commands(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["audit", "--model", "fastinv.models:lenet5", "-o", str(tmp_path / "out"), "--data"]
    for more, words in (
        ([str(digits), "--attacks", "shadow"], "pass --weights of the trained model"),
        ([str(digits), "--protect", "math:pi"], "a float, expected a function"),
        (["photographs", "--size", "16", "16"], "--size is for images in folders by class"),
        (["photographs"], "does not take images [3, 32, 32]"),
    ):
        assert main([*command, *more]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_protected_by_code(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "defence.py").write_text("def blank(v): return 0 * v")
    command = ["audit", "--model", "fastinv.models:lenet5", "-o", str(tmp_path / "out"), "--data", str(digits)]
    command += ["--protect", f"{tmp_path / 'defence.py'}:blank", "--splits", "conv1", "--scored", "2", "--epochs", "1"]
    assert main(command) == 0
    assert "by blank" in (tmp_path / "out" / "report.md").read_text()


# ---- on MNIST ------------------------------------------------------------------------------------------------------


def test_a_first_convolution_gives_everything_away(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    train, test = (part.sample(16) for part in fastinv.data.load(shared_data / "mnist"))
    report = fastinv.audit(lenet5(), train.images, test.images, tmp_path, at=["conv1"], attacks=["rmle"], **QUICK)
    assert report.results["conv1", "rmle"].psnr > 60
    assert report.results["conv1", "rmle"].recognisable == 1
