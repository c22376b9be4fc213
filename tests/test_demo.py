"""The demo and what it is made of, in small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastinv
from fastinv import benchmark, demo
from fastinv.data import PHOTOGRAPHS
from fastinv.errors import BackendError, DataError, FeatureError, FormatError, SplitError, TrainingError
from fastinv.experiment.scores import Scores
from fastinv.experiment.target import Experiment
from fastinv.models import cifar_net
from fastinv.picture import GAP, LINE, TILE, Row, picture

TINY = {
    "effort": demo.Effort(images=32, target_epochs=1, epochs=1),
    "split": "conv11",
    "held_out": 3,
    "batch": 2,
    "drawn": 2,
    "steps": 2,
    "progress": False,
}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.on(PHOTOGRAPHS, seed=1)


# ---- the demo ------------------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = demo.run(demo.Demo(out=tmp_path / "out", **TINY))
    assert outcome.error < 1e-4
    assert outcome.ratio > 0
    assert len(outcome.inverse_network.psnr) == 3
    assert len(outcome.rmle.psnr) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demo.png", "inverse_network.finv", "rmle.finv"}
    with Image.open(outcome.picture) as image:
        assert image.width == GAP + 2 * (TILE + GAP)
    text = capsys.readouterr().out
    for words in ("cifar_net", "PSNR", "SSIM", "times as fast", "relative difference", str(outcome.picture)):
        assert words in text
    provenance = fastinv.load(tmp_path / "out" / "inverse_network.finv").provenance
    assert (provenance["target"], provenance["split"], provenance["seed"]) == ("cifar_net", "conv11", 0)


def test_demo_fails_loudly_where_the_engine_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastinv.invert
    monkeypatch.setattr(fastinv, "invert", lambda *args, **options: right(*args, **options) + 1e-3)
    with pytest.raises(BackendError, match="differ from PyTorch's"):
        demo.run(demo.Demo(out=tmp_path, **TINY))


def test_demo_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        demo.run(demo.Demo(data=str(tmp_path / "missing"), out=tmp_path))
    with pytest.raises(SplitError, match="no layer 'conv9'"):
        demo.run(demo.Demo(out=tmp_path, **TINY | {"split": "conv9"}))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot make"):
        demo.run(demo.Demo(out=tmp_path / "file" / "out"))


# ---- experiments ---------------------------------------------------------------------------------------------------


def test_target_is_kept_in_a_file(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "target.pt"
    first = experiment.target(0, file=path, progress=False)
    again = experiment.target(5, file=path, progress=False)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    other = Experiment(experiment.train, experiment.test, experiment.model, seed=2)
    with pytest.raises(TrainingError, match="of the run"):
        other.target(0, file=path, progress=False)
    torch.save(cifar_net(len(experiment.train.classes)).state_dict(), path)  # a bare state dict will do
    experiment.target(0, file=path, progress=False)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(TrainingError, match="no weights of this target"):
        experiment.target(0, file=path, progress=False)


def test_halves_and_held_out_images(experiment: Experiment) -> None:
    same, other = experiment.half("same"), experiment.half("distribution")
    assert not set(same) & set(other)
    assert len(same) + len(other) == len(experiment.train)
    assert experiment.held_out(5).shape == (5, 3, 32, 32)
    np.testing.assert_array_equal(experiment.held_out(2), experiment.held_out(5)[:2])
    assert len(experiment.held_out(10**6)) == len(experiment.test)


def test_rmle_takes_the_papers_recipe(experiment: Experiment) -> None:
    target = experiment.target(0, progress=False)
    split = fastinv.Split(target, "ReLU22", experiment.model.mean, experiment.model.std)
    recipe = experiment.rmle(split, split.edge, {"tv_weight": 0.5}, attack="rmle")
    assert (recipe.steps, recipe.lr, recipe.tv_weight, recipe.clamp) == (5000, 1e-3, 0.5, None)
    assert recipe.std == experiment.model.std


def test_folders_of_grey_and_of_coloured_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for mode, shape, name in (("L", (40, 30), "lenet5"), ("RGB", (40, 30, 3), "cifar_net")):
        for label in ("a", "b"):
            (tmp_path / mode / label).mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 256, shape, np.uint8)
                Image.fromarray(pixels).save(tmp_path / mode / label / f"{index}.png")
        assert Experiment.on(tmp_path / mode, 0).model.name == name


def test_scores() -> None:
    truth = np.zeros((2, 1, 8, 8), np.float32)
    scores = Scores.of(truth, truth + 0.1)
    assert scores.captions()[0].startswith("20.0 dB / 0.")
    assert str(scores).startswith("PSNR 20.00 dB, SSIM 0.")


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_shows_every_pixel(channels: int) -> None:
    images = np.random.default_rng(0).random((3, channels, 5, 7), np.float32)
    drawn = np.asarray(picture([Row("a", images), Row("b", 1 - images, ["x", "y", "z"])]))
    factor = -(-TILE // 7)
    height, width = 5 * factor, 7 * factor
    assert drawn.shape == (GAP + LINE + height + GAP + 2 * LINE + height + GAP, GAP + 3 * (width + GAP), 3)
    for index, image in enumerate(images):
        left = GAP + index * (width + GAP) + factor // 2
        top = GAP + LINE + factor // 2
        found = drawn[top : top + height : factor, left : left + width : factor][:5, :7]
        expected = np.rint(255 * np.broadcast_to(image, (3, 5, 7))).transpose(1, 2, 0)
        np.testing.assert_array_equal(found, expected)


def test_picture_refuses() -> None:
    grey, colour = np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 3, 4, 4), np.float32)
    for rows in (
        [],
        [Row("a", grey), Row("b", colour)],
        [Row("a", grey[0])],
        [Row("a", np.zeros((1, 2, 4, 4), np.float32))],
    ):
        with pytest.raises(FeatureError, match="expected one shape"):
            picture(rows)


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def test_subjects_cover_decoders_and_splits() -> None:
    names = [*benchmark.DECODERS, *benchmark.RESIDUAL_DECODERS, "ResNet-18 style"]
    assert [subject.name for subject in benchmark.decoders()] == names
    solvers = list(benchmark.solvers(steps=1))
    assert [subject.name for subject in solvers] == [
        f"rMLE {at}, 1 steps" for at in ("conv1", "ReLU2", "conv11", "ReLU22", "ReLU32", "layer1", "blocks")
    ]
    timing = benchmark.measure(solvers[0], batch=2, repeat=1)
    assert timing.error < benchmark.SOLVER_TOLERANCE
    assert timing.ratio == timing.eager_seconds / timing.seconds


def test_a_wrong_result_is_not_timed() -> None:
    subject = next(iter(benchmark.ops()))
    wrong = benchmark.Subject(subject.name, subject.network, subject.eager, torch.nn.Sequential(subject.exact, _Half()))
    with pytest.raises(BackendError, match="differs from PyTorch"):
        benchmark.measure(wrong, batch=2, repeat=1)


class _Half(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_large_batches_are_cut() -> None:
    *_, large = benchmark.decoders()
    assert large.batch(1) == 1
    assert large.batch(10**6) * 64 * 224 * 224 <= benchmark.MAX_ELEMENTS


def test_contenders_name_every_instruction_set() -> None:
    found = benchmark.contenders()
    assert ("torch", "") in found
    assert ("cpu", "portable") in found


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    seconds = benchmark.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], repeat=3)
    assert len(seconds) == 2
    assert all(0 < time < 1e-3 for time in seconds)
    rounds = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    assert rounds == ["a", "b"] * 4  # a warm-up and three rounds
