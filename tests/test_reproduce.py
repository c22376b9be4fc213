"""The paper's experiments, in small: what is run, kept, gone on with and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import write_idx
from PIL import Image

import fastinv
from fastinv.cli import main
from fastinv.errors import DataError, FeatureError, FormatError, SplitError, TrainingError
from fastinv.experiment import recipe, results
from fastinv.experiment.scores import MOST_PSNR, Scores
from fastinv.experiment.target import Experiment
from fastinv.reproduce.paper import LAYERS, SPLITS, TABLES, cells
from fastinv.reproduce.run import Outcome, Reproduction, run
from fastinv.reproduce.settings import EFFORTS, Effort
from fastinv.split import normalise

QUICK = {"target_epochs": 1, "inverse_network_epochs": 1, "shadow_epochs": 1, "scored": 3}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """rMLE of a few steps, for what else it does."""
    monkeypatch.setattr(recipe, "STEPS", {"adam": ({"lr": 1e-2, "steps": 3}, {"lr": 1e-3, "steps": 5})})
    monkeypatch.setattr(recipe, "TV_WEIGHTS", (0.1,))


def reproduce(data: Path, out: Path, tables: list[str], splits: list[str] | None = None, **changes: Any) -> Outcome:
    return run(Reproduction(str(data), out, tables, splits, QUICK | changes, progress=False))


# ---- what the paper has --------------------------------------------------------------------------------------------


def test_tables() -> None:
    # 9 attacks at each split point of the tables, and the layers of Figures 11 and 12 that are none of them
    assert len(cells("lenet5")) == 9 * 2 + 8
    assert len(cells("cifar_net")) == 9 * 3
    for target in SPLITS:
        names = [cell.name for cell in cells(target)]
        assert len(set(names)) == len(names)
    assert {cell.split for cell in cells("lenet5", ["layers"])} == set(LAYERS["lenet5"])
    assert cells("cifar_net", ["layers"]) == []
    assert [cell.name for cell in cells("cifar_net", ["8"], ["ReLU22"])] == [
        "ReLU22-inverse_network-same",
        "ReLU22-fit_shadow-same-same",
    ]


PUBLISHED = """
rmle                            39.69 .9969  15.10 .5998  37.59 .9960  19.47 .6940  13.38 .1625
inverse_network-same            39.64 .9887  20.35 .7334  49.88 .9993  19.81 .6939  15.42 .3124
inverse_network-distribution    40.72 .9950  20.81 .8046  49.02 .9992  19.36 .6802  13.95 .2196
inverse_network-noise           14.76 .7188   7.72 .4310  48.59 .9996  12.79 .2930  12.37 .0440
shadow-same-same                17.60 .7423   9.61 .4981  21.16 .9104  12.74 .1752  11.09 .0419
shadow-distribution-same        21.53 .9121   9.27 .4652  21.45 .9145  11.51 .1723  11.98 .0102
shadow-same-different           12.59 .6430   8.05 .3790  17.55 .6344  12.46 .2714  10.68 .0247
shadow-distribution-different   17.86 .6952   8.03 .3226  13.06 .1553  11.30 .0467  11.47 .0793
fit_shadow-same-same            39.67 .9968  15.41 .6103  28.67 .9766  18.02 .6893  12.61 .1145
"""  # PSNR and SSIM at conv1, ReLU2, conv11, ReLU22, ReLU32


def test_published_figures() -> None:
    attacks = {attack.name: attack.published for table in TABLES.values() for attack in table.attacks}
    expected = {}
    for name, *figures in map(str.split, PUBLISHED.strip().splitlines()):
        pairs = zip(map(float, figures[::2]), map(float, figures[1::2]), strict=True)
        expected[name] = dict(zip(("conv1", "ReLU2", "conv11", "ReLU22", "ReLU32"), pairs, strict=True))
    assert attacks == expected


def test_efforts() -> None:
    assert set(EFFORTS) == set(SPLITS)
    for wrong in ({"target_epochs": -1}, {"scored": 0}, {"images": 0}, {"shadow_epochs": 1.5}, {"optimizer": "sgd"}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            Effort(**{"target_epochs": 1, "inverse_network_epochs": 1, "shadow_epochs": 1} | wrong)


# ---- how rMLE is set -----------------------------------------------------------------------------------------------


def edge_of(experiment: Experiment, split: fastinv.Split) -> Callable[[dict[str, Any]], fastinv.RMLE]:
    return lambda options: experiment.rmle(split, split.edge, options)


@pytest.mark.parametrize(("at", "optimizer"), [("conv1", "adam"), ("conv1", "lbfgs"), ("pool1", "lbfgs")])
def test_choose(digits: Path, at: str, optimizer: str) -> None:
    experiment = Experiment.on(digits, 0)
    split = experiment.untrained(at)
    images = experiment.attacker_images("distribution", 4)
    deep = at == "pool1"
    chosen, trials = recipe.choose(edge_of(experiment, split), images, split.features(images), optimizer, deep=deep)
    assert len(trials) == 11 + deep
    best = max(trials[:11], key=lambda trial: trial.psnr)
    if deep and trials[-1].psnr > best.psnr + recipe.NO_WORSE:
        best = trials[-1]
    assert chosen == best
    again = fastinv.invert(split.features(images), experiment.rmle(split, split.edge, chosen.options))
    assert Scores.of(images, again).means[0] == pytest.approx(best.psnr, abs=1e-3)


@pytest.mark.parametrize("gain", [0.05, 0.15])
def test_more_steps_have_to_be_worth_it(digits: Path, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.on(digits, 0)
    split = experiment.untrained("ReLU2")

    def invert(features: np.ndarray, inverter: fastinv.RMLE, threads: int | None) -> np.ndarray:
        better = 2.0 * (inverter.tv_weight == 1) + gain * (inverter.steps == 5000)
        return images + np.float32(10 ** (-(20 + better) / 20))

    images = np.full((2, 1, 28, 28), 0.5, np.float32)
    monkeypatch.setattr(fastinv, "invert", invert)
    best, _ = recipe.choose(edge_of(experiment, split), images, split.features(images))
    chosen = best.options
    assert (chosen["tv_weight"], chosen["tv_beta"]) == (1.0, 2.0)
    assert (chosen["steps"], chosen["lr"]) == ((5000, 1e-3) if gain > recipe.NO_WORSE else (500, 1e-2))


def test_recipes_that_give_nothing(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.on(digits, 0)
    split = experiment.untrained("conv1")
    images = experiment.attacker_images("distribution", 2)
    works = [0.1]
    monkeypatch.setattr(
        fastinv, "invert", lambda v, inverter, threads: images * (1 if inverter.tv_weight in works else np.nan)
    )
    best, trials = recipe.choose(edge_of(experiment, split), images, split.features(images))
    assert (best.options["tv_weight"], best.psnr) == (0.1, MOST_PSNR)
    assert all(np.isfinite(trial.psnr) for trial in trials)
    works.clear()
    with pytest.raises(FeatureError, match="gives NaN"):
        recipe.choose(edge_of(experiment, split), images, split.features(images))


def test_what_a_recipe_is_chosen_by(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the edge for who has it or may ask it, those of another shadow for who may not; his own images."""

    def choose(
        rmle: Callable[[dict[str, Any]], fastinv.RMLE], images: np.ndarray, features: np.ndarray, *_: Any, **__: Any
    ) -> tuple[recipe.Trial, list[recipe.Trial]]:
        options = {"tv_weight": 0.1, "tv_beta": 2.0, "steps": 1, "lr": 0.01}
        model = rmle(options)
        with torch.no_grad():
            z = normalise(torch.from_numpy(images), model.mean, model.std)
        edge = fastinv.Split(target(), "conv1", model.mean, model.std)
        equal = [
            name
            for name, v in (("edge", edge.features(images)), ("model", fastinv.compile(model.edge)(z.numpy())))
            if np.allclose(v, features, atol=1e-5)
        ]
        found.append((equal, images))
        return recipe.Trial(options, 10.0, 0.1), []

    def target() -> torch.nn.Module:
        return Experiment.on(digits, 0).target(0, file=tmp_path / "lenet5" / "target.pt", progress=False)

    found: list[tuple[list[str], np.ndarray]] = []
    monkeypatch.setattr("fastinv.experiment.run.choose", choose)
    reproduce(digits, tmp_path, ["3", "6", "8"], ["conv1"], images=7)
    assert [equal for equal, _ in found] == [["edge", "model"], [], [], [], [], ["edge"]]
    experiment = Experiment.on(digits, 0)
    for (_, images), knowledge in zip(found, ["distribution", *["same", "distribution"] * 2, "same"], strict=True):
        np.testing.assert_array_equal(images, experiment.attacker_images(knowledge, 7))


# ---- running -------------------------------------------------------------------------------------------------------


def test_all_tables(digits: Path, tmp_path: Path, few_steps: None, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = reproduce(digits, tmp_path / "out", ["3", "4", "6", "8", "layers"])
    assert (outcome.ran, outcome.before, outcome.failed) == (26, 0, 0)
    folder = tmp_path / "out" / "lenet5"
    assert not list(folder.glob("*.checkpoint"))
    for cell in cells("lenet5"):
        result = results.read(folder, cell)
        assert result is not None
        inverter = fastinv.load(folder / f"{cell.name}.finv")
        assert inverter.kind == ("inverse_network" if cell.attack.kind == "inverse_network" else "rmle")
        assert inverter.provenance["split"] == cell.split
        images, scores = results.read_images(folder, cell)
        assert images.shape == (3, 1, 28, 28)
        assert result.images == 3
        assert result.psnr == pytest.approx(scores.psnr.mean())
        assert result.ssim == pytest.approx(scores.ssim.mean())
        assert bool(result.recipe) == bool(result.trials) == (inverter.kind == "rmle")

    text = outcome.report.read_text()
    for table in TABLES.values():
        assert f"### {table.title}\n" in text
    found = results.read(folder, cells("lenet5", ["3"])[0])
    assert found is not None
    assert f"{found.psnr:.2f} / {found.ssim:.3f}, {found.recognisable:.0%} (39.69 / 0.997)" in text
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(records) == 26
    assert {record["target"] for record in records} == {"lenet5"}
    assert records[0]["paper_psnr"] == 39.69
    for name in ("conv1", "ReLU2", "layers"):
        with Image.open(tmp_path / "out" / f"lenet5-{name}.png") as picture:
            assert picture.width > 3 * 84
        assert f"(lenet5-{name}.png)" in text
    assert "(paper: 39.69, 0.997)" in capsys.readouterr().out


def test_recovered_images_are_those_of_the_inverter(digits: Path, tmp_path: Path, few_steps: None) -> None:
    reproduce(digits, tmp_path, ["4"], ["ReLU2"])
    experiment = Experiment.on(digits, 0)
    target = experiment.target(0, file=tmp_path / "lenet5" / "target.pt", progress=False)
    split = fastinv.Split(target, "ReLU2", experiment.model.mean, experiment.model.std)
    truth = experiment.held_out(3)
    for cell in cells("lenet5", ["4"], ["ReLU2"]):
        again = fastinv.invert(split.features(truth), tmp_path / "lenet5" / f"{cell.name}.finv")
        images, scores = results.read_images(tmp_path / "lenet5", cell)
        np.testing.assert_array_equal(images, np.rint(again * 255))
        np.testing.assert_array_equal(scores.psnr, fastinv.psnr(truth, again))
    np.testing.assert_array_equal(results.read_truth(tmp_path / "lenet5"), np.rint(truth * 255))


def test_what_is_done_is_not_done_again(digits: Path, tmp_path: Path, few_steps: None) -> None:
    reproduce(digits, tmp_path, ["3", "4"], ["conv1"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lenet5").iterdir()}
    outcome = reproduce(digits, tmp_path, ["3", "4"], ["conv1"])
    assert (outcome.ran, outcome.before) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "lenet5").iterdir()} == before
    (cell,) = (cell for cell in cells("lenet5", ["4"], ["conv1"]) if cell.attack.knowledge == "noise")
    first = results.read(tmp_path / "lenet5", cell)
    (tmp_path / "lenet5" / f"{cell.name}.json").unlink()
    outcome = reproduce(digits, tmp_path, ["4", "8"], ["conv1"])
    assert (outcome.ran, outcome.before) == (2, 2)
    again = results.read(tmp_path / "lenet5", cell)
    assert first is not None
    assert again is not None
    assert (again.psnr, again.ssim) == (first.psnr, first.ssim)


def test_an_experiment_that_fails_does_not_stop_the_others(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastinv.train_inverse_network

    def train(query: Any, images: np.ndarray, **options: Any) -> torch.nn.Module:
        if images.min() < 0:  # noise
            raise TrainingError("training diverged")
        return right(query, images, **options)

    monkeypatch.setattr(fastinv, "train_inverse_network", train)
    out = ["--data", str(digits), "-o", str(tmp_path), "--tables", "4", "--splits", "conv1", "--target-epochs", "0"]
    out += ["--inverse-network-epochs", "1", "--scored", "3"]
    assert main(["reproduce", *out]) == 3
    said = capsys.readouterr().out
    assert "failed: training diverged" in said
    assert "1 experiment failed" in said
    assert len(list((tmp_path / "lenet5").glob("*.json"))) == 2 + 2  # settings, the target
    monkeypatch.undo()
    assert main(["reproduce", *out]) == 0
    assert "3 experiments, 1 of them run now" in capsys.readouterr().out


def test_both_targets_in_one_report(digits: Path, tmp_path: Path) -> None:
    reproduce(digits, tmp_path, ["4"], ["conv1"], target_epochs=0, inverse_network_epochs=0)
    photographs = Path("photographs")
    outcome = reproduce(photographs, tmp_path, ["4"], ["ReLU32"], target_epochs=0, images=8)
    text = outcome.report.read_text()
    assert "## lenet5" in text
    assert "## cifar_net" in text
    assert len(json.loads((tmp_path / "results.json").read_text())) == 6


def test_an_image_without_any_error_counts_100_db(tmp_path: Path) -> None:
    (cell,) = cells("lenet5", ["3"], ["conv1"])
    images = np.zeros((2, 1, 28, 28), np.float32)
    scores = Scores.of(images, images + np.array([0, 0.1], np.float32).reshape(2, 1, 1, 1))
    trial = recipe.Trial({"tv_weight": 0.1, "tv_beta": 2.0, "steps": 1, "lr": 0.01}, 10.0, 0.1).record()
    more: dict[str, Any] = {"chosen_on": 2, "recipe": trial, "trials": [trial], "seconds": {}, "ran_on": {}}
    results.write(tmp_path, cell, results.Result.of(cell, scores, **more), scores, images)
    result = results.read(tmp_path, cell)
    assert result is not None
    assert result.psnr == pytest.approx((100 + 20) / 2)


# ---- wrong input ---------------------------------------------------------------------------------------------------


def test_refuses(digits: Path, tmp_path: Path) -> None:
    quick = {"target_epochs": 0, "inverse_network_epochs": 0}
    with pytest.raises(DataError, match="not a folder"):
        reproduce(tmp_path / "missing", tmp_path, ["4"])
    with pytest.raises(DataError, match="tables 5: not the paper's; expected some of 3, 4, 6, 8, layers"):
        reproduce(digits, tmp_path, ["3", "5"])
    with pytest.raises(SplitError, match="nothing for lenet5 at pool9; they have conv1, ReLU2"):
        reproduce(digits, tmp_path, ["4"], ["conv1", "pool9"])
    with pytest.raises(SplitError, match="nothing for cifar_net"):
        reproduce(Path("photographs"), tmp_path, ["layers"])
    reproduce(digits, tmp_path, ["4"], ["conv1"], **quick)
    with pytest.raises(FormatError, match=r"inverse_network_epochs 0 instead of 1: choose another folder"):
        reproduce(digits, tmp_path, ["4"], ["conv1"])
    with pytest.raises(FormatError, match="optimizer 'adam' instead of 'lbfgs'"):
        reproduce(digits, tmp_path, ["4"], ["conv1"], **quick, optimizer="lbfgs")
    (tmp_path / "other" / "lenet5").mkdir(parents=True)
    (tmp_path / "other" / "lenet5" / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds files but no settings\.json"):
        reproduce(digits, tmp_path / "other", ["4"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot make"):
        reproduce(digits, tmp_path / "file", ["4"], ["conv1"])


@pytest.mark.parametrize(("train", "test"), [(0, 10), (1, 10), (40, 0)])
def test_data_sets_without_images(tmp_path: Path, train: int, test: int) -> None:
    write_idx(tmp_path, train, test)
    with pytest.raises(DataError, match=f"{train} images to train on and {test} to test with, expected at least one"):
        reproduce(tmp_path, tmp_path / "out", ["4"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("conv1-inverse_network-same.json", b"{", "not valid JSON"),
        ("conv1-inverse_network-same.json", b"[]", "no JSON object"),
        ("conv1-inverse_network-same.json", b"{}", "no result of this version"),
        ("conv1-inverse_network-same.npz", b"PK", "cannot be read"),
        ("truth.npz", b"PK", "cannot be read"),
        ("settings.json", b"\xff", "not valid JSON"),
        ("target.pt", b"", "cannot be read"),
        ("target.json", b"{}", "no target of this version"),
        ("target.json", b'{"sha256": "x", "accuracy": "all"}', "no target of this version"),
    ],
)
def test_damaged_files(digits: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    quick = {"target_epochs": 0, "inverse_network_epochs": 0}
    reproduce(digits, tmp_path, ["4"], ["conv1"], **quick)
    path = tmp_path / "lenet5" / name
    path.write_bytes(content)
    tables = ["4", "8"] if name == "target.pt" else ["4"]
    with pytest.raises((FormatError, TrainingError), match=words):
        reproduce(digits, tmp_path, tables, ["conv1"], **quick)
    if name.endswith(".npz"):
        path.unlink()
        reproduce(digits, tmp_path, ["4"], ["conv1"], **quick)
        assert path.exists()


def test_a_result_of_another_experiment_is_refused(digits: Path, tmp_path: Path) -> None:
    quick = {"target_epochs": 0, "inverse_network_epochs": 0}
    reproduce(digits, tmp_path, ["4"], ["conv1"], **quick)
    same, other = (tmp_path / "lenet5" / f"conv1-inverse_network-{name}.json" for name in ("same", "noise"))
    other.write_bytes(same.read_bytes())
    with pytest.raises(FormatError, match=r"conv1-inverse_network-noise\.json: no result of this version"):
        reproduce(digits, tmp_path, ["4"], ["conv1"], **quick)


def test_images_of_a_result_that_are_none(digits: Path, tmp_path: Path) -> None:
    (cell,) = cells("lenet5", ["3"], ["conv1"])
    scores, images = np.zeros(2), np.zeros((2, 1, 4, 4), np.uint8)
    for arrays, words in (
        ({"images": images[0], "psnr": scores, "ssim": scores}, r"images \[1, 4, 4\]"),
        ({"images": images / 2, "psnr": scores, "ssim": scores}, "float64"),
        ({"images": images, "psnr": scores, "ssim": scores[:1]}, r"scores \[2\] and \[1\]"),
        ({"images": images, "psnr": scores}, "cannot be read"),
    ):
        np.savez(tmp_path / f"{cell.name}.npz", **arrays)
        with pytest.raises(FormatError, match=words):
            results.read_images(tmp_path, cell)


def test_another_target_is_refused(digits: Path, tmp_path: Path) -> None:
    for name, epochs in (("a", 0), ("b", 1)):
        reproduce(digits, tmp_path / name, ["4"], ["conv1"], target_epochs=epochs, inverse_network_epochs=0)
    (tmp_path / "b" / "lenet5" / "target.pt").replace(tmp_path / "a" / "lenet5" / "target.pt")
    with pytest.raises(FormatError, match="not the target that the results here are of"):
        reproduce(digits, tmp_path / "a", ["4"], target_epochs=0, inverse_network_epochs=0)


def test_files_of_others_are_left_alone(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(FormatError, match="is there, but no results"):
        reproduce(digits, tmp_path, ["4"], ["conv1"])
    assert (tmp_path / "report.md").read_text() == "mine"


def test_a_start_that_did_nothing_decides_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "target", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reproduce(digits, tmp_path, ["4"], ["conv1"], target_epochs=5)
    (tmp_path / "lenet5" / ".fastinv-begun.tmp").write_bytes(b"")
    assert reproduce(digits, tmp_path, ["4"], ["conv1"], target_epochs=0).ran == 3


def test_a_full_disk_ends_the_run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any) -> None:
        raise FormatError("no space left")

    monkeypatch.setattr(results, "write", write)
    with pytest.raises(FormatError, match="no space left"):
        reproduce(digits, tmp_path, ["4"], ["conv1"], target_epochs=0)
    assert len(list((tmp_path / "lenet5").glob("*.checkpoint"))) == 1  # of the first, which is not learned again


def test_images_at_most(digits: Path, tmp_path: Path) -> None:
    """More images than an attacker can have are all of them; noise is no more than others."""
    outcome = reproduce(digits, tmp_path, ["4"], ["conv1"], target_epochs=0, images=1000)
    assert (outcome.ran, outcome.failed) == (3, 0)


def test_by_lbfgs(digits: Path, tmp_path: Path) -> None:
    outcome = reproduce(digits, tmp_path, ["3"], ["conv1"], target_epochs=0, optimizer="lbfgs")
    assert "By L-BFGS, where the paper has Adam" in outcome.report.read_text()
    assert fastinv.load(tmp_path / "lenet5" / "conv1-rmle.finv").optimizer == "lbfgs"  # type: ignore[attr-defined]


# ---- on MNIST ------------------------------------------------------------------------------------------------------


def test_rmle_is_as_good_as_the_papers(shared_data: Path, tmp_path: Path) -> None:
    reproduce(shared_data / "mnist", tmp_path, ["3"], ["conv1"], scored=32)
    (cell,) = cells("lenet5", ["3"], ["conv1"])
    result = results.read(tmp_path / "lenet5", cell)
    assert result is not None
    psnr, ssim = cell.attack.published["conv1"]
    assert result.psnr > psnr
    assert result.ssim > ssim - 0.002
