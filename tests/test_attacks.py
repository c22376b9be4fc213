"""The three attacks on small data: they repeat, resume, refuse nonsense, and do what the algorithms say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastinv
from fastinv.attacks.inverse_network import Features
from fastinv.attacks.rmle import PAPER_PRESETS, rmle, total_variation
from fastinv.errors import FeatureError, NetworkError, TrainingError
from fastinv.models import lenet5
from fastinv.training import Schedule, accuracy, fit, train_target

NORM = {"mean": (0.5,), "std": (0.5,)}
IMAGES = np.random.default_rng(0).random((24, 1, 28, 28)).astype(np.float32)
LABELS = np.arange(24) % 10


def states(*modules: nn.Module) -> list[list[np.ndarray]]:
    return [[v.numpy() for v in module.state_dict().values()] for module in modules]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(*states(a, b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lenet5().eval()


@pytest.fixture(scope="module")
def split(target: nn.Module) -> fastinv.Split:
    return fastinv.Split(target, at="ReLU2", **NORM)


# ---- rMLE ----------------------------------------------------------------------------------------


def test_total_variation_by_hand() -> None:
    z = torch.tensor([[[[0.0, 3.0], [4.0, 4.0]]]], dtype=torch.float64)
    # (dy, dx) are (4, 3), (1, 0), (0, 0), (0, 0)
    assert float(total_variation(z, 2.0)) == 25 + 1
    assert float(total_variation(z, 1.0)) == pytest.approx(5 + 1 + 2 * 1e-6)
    assert float(total_variation(z, 4.0)) == 625 + 1


def test_rmle_against_a_loop_by_hand() -> None:
    edge = nn.Conv2d(1, 2, 3).double().eval()
    features = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    start = torch.randn(1, 8, 8, dtype=torch.float64)
    found, report = rmle(edge, features, (1, 8, 8), steps=3, lr=0.1, tv_weight=0.5, start=start, clamp=(0, 0.9))
    z, m, v = start[None].clone(), 0.0, 0.0
    for step in (1, 2, 3):
        z.requires_grad_(True)
        dy, dx = z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]
        f = (edge(z) - features).square().sum() + 0.5 * (dy.square().sum() + dx.square().sum())
        (g,) = torch.autograd.grad(f, z)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        z = z.detach() - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        z = z.clamp(0, 0.9)
    torch.testing.assert_close(found, z)
    assert list(report.steps) == [3]


def test_rmle_images_are_independent(split: fastinv.Split) -> None:
    features = torch.from_numpy(split.features(IMAGES[:4]))
    options = {"steps": 60, "tolerance": 3e-3, "keep": "best", **NORM}
    together, report = rmle(split.edge, features, (1, 28, 28), **options)
    assert len(set(report.steps)) > 1  # images stop at their own time
    for i in range(4):
        alone, one = rmle(split.edge, features[i : i + 1], (1, 28, 28), **options)
        assert one.steps[0] == report.steps[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_rmle_recovers_through_an_invertible_edge() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    z, report = rmle(nn.Identity(), x, (1, 6, 6), steps=400, lr=1e-2, tv_weight=0.0)
    assert float((z - x).abs().max()) < 1e-3
    assert report.objective[0] < 1e-6


def test_rmle_refuses_unknown_options() -> None:
    with pytest.raises(NetworkError, match="optimizer 'newton'"):
        rmle(nn.Identity(), torch.zeros(1, 1, 3, 3), (1, 3, 3), optimizer="newton")


def test_presets_make_recipes(split: fastinv.Split) -> None:
    edge = fastinv.export(split.edge, torch.zeros(2, 1, 28, 28))
    recipe = fastinv.RMLE(edge, (1, 28, 28), **NORM, **PAPER_PRESETS["ReLU2"])
    assert (recipe.steps, recipe.lr, recipe.clamp) == (5000, 1e-3, None)


# ---- training ------------------------------------------------------------------------------------


def test_training_repeats_and_leaves_the_global_generator_alone(split: fastinv.Split) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = (
        fastinv.train_inverse_network(split, IMAGES, epochs=2, batch_size=7, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert_equal(first, second)
    with pytest.raises(AssertionError):
        assert_equal(first, other)
    assert not first.training


class Stop(Exception):
    pass


def stopping(split: fastinv.Split, after: int):
    """A decoder whose forward fails after so many batches: a run that was cut off."""

    class Decoder(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > after:
                raise Stop
            return super().forward(x)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Decoder(nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 784), nn.Unflatten(1, (1, 28, 28)))


def test_a_resumed_run_equals_an_uninterrupted_one(split: fastinv.Split, tmp_path) -> None:
    options = {"epochs": 4, "batch_size": 8}
    whole = fastinv.train_inverse_network(split, IMAGES, decoder=stopping(split, 99), **options)
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fastinv.train_inverse_network(split, IMAGES, decoder=stopping(split, 8), checkpoint=checkpoint, **options)
    assert checkpoint.exists()
    resumed = fastinv.train_inverse_network(
        split, IMAGES, decoder=stopping(split, 99), checkpoint=checkpoint, **options
    )
    assert resumed.calls == 6  # two of four epochs
    assert_equal(whole, resumed)


def test_checkpoints_of_other_runs_are_refused(split: fastinv.Split, tmp_path) -> None:
    checkpoint = tmp_path / "run.pt"
    fastinv.train_inverse_network(split, IMAGES, epochs=1, checkpoint=checkpoint)
    for images, options in ((IMAGES, {"epochs": 2}), (IMAGES[::-1].copy(), {"epochs": 1})):
        with pytest.raises(TrainingError, match="another run"):
            fastinv.train_inverse_network(split, images, checkpoint=checkpoint, **options)
    checkpoint.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="cannot be read"):
        fastinv.train_inverse_network(split, IMAGES, epochs=1, checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # no temporary left


def test_divergence_is_an_error(split: fastinv.Split) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        fastinv.train_inverse_network(split, IMAGES, optimizer="sgd", lr=1e9, epochs=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "epochs -1"),
        ({"epochs": 1.5}, "epochs 1.5"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"optimizer": "rmsprop"}, "optimizer 'rmsprop'"),
        ({"seed": 1.0}, "seed 1.0"),
    ],
)
def test_wrong_schedules(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Schedule(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **changes})


def test_no_samples() -> None:
    with pytest.raises(TrainingError, match="no samples"):
        fit(nn.Linear(1, 1), lambda i: torch.zeros(()), 0, Schedule(1, 1, 0.1))


# ---- inverse networks ----------------------------------------------------------------------------


def test_queries_or_pairs_and_never_the_model(split: fastinv.Split) -> None:
    asked = []

    def query(images: np.ndarray) -> np.ndarray:
        assert isinstance(images, np.ndarray)
        assert images.dtype == np.float32
        asked.append(len(images))
        return split.features(images)

    by_query = fastinv.train_inverse_network(query, IMAGES, epochs=1, **NORM)
    assert sum(asked) >= len(IMAGES)
    by_pairs = fastinv.train_inverse_network(pairs=(IMAGES, split.features(IMAGES)), epochs=1, **NORM)
    assert_equal(by_query, by_pairs)
    assert_equal(by_query, fastinv.train_inverse_network(split, IMAGES, epochs=1))  # mean and std from the Split


def test_features_beyond_the_cache_are_queried_again(split: fastinv.Split, monkeypatch) -> None:
    kept = fastinv.train_inverse_network(split, IMAGES, epochs=1)
    monkeypatch.setattr("fastinv.attacks.inverse_network.CACHE_BYTES", 0)
    assert_equal(kept, fastinv.train_inverse_network(split, IMAGES, epochs=1))
    assert Features.queried(split, torch.from_numpy(IMAGES)).shape == (16, 8, 8)


def test_an_inverse_network_learns() -> None:
    """Through an invertible edge a linear decoder finds the inverse."""
    images = np.random.default_rng(1).random((256, 1, 6, 6)).astype(np.float32)
    decoder = nn.Conv2d(1, 1, 1)
    module = fastinv.train_inverse_network(
        lambda x: 3 * x - 1, images, decoder=decoder, epochs=30, lr=0.1, mean=(0.5,), std=(0.25,)
    )
    # z = (x − 0.5) / 0.25 from v = 3x − 1: z = v · 4/3 − 2/3
    assert module.weight.item() == pytest.approx(4 / 3, abs=1e-2)
    assert module.bias.item() == pytest.approx(-2 / 3, abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TrainingError, "pass a query and images, or pairs"),
        ((lambda x: x, IMAGES), {"pairs": (IMAGES, IMAGES)}, TrainingError, "not both"),
        ((lambda x: x[:1], IMAGES), {}, TrainingError, r"for 24 images, expected floats \[24"),
        ((lambda x: x.astype(np.int64), IMAGES), {}, TrainingError, "dtype int64"),
        ((lambda x: x * np.nan, IMAGES), {}, FeatureError, "NaN"),
        ((lambda x: list(x), IMAGES), {}, FeatureError, "a list, expected"),
        ((lambda x: x, IMAGES[0]), {}, TrainingError, "expected float pixels"),
        ((lambda x: x, IMAGES[:0]), {}, TrainingError, "at least one"),
        ((lambda x: x, IMAGES * np.nan), {}, TrainingError, "NaN or Inf"),
        ((lambda x: x, IMAGES), {"decoder": nn.Conv2d(1, 2, 1)}, TrainingError, "the decoder gives"),
        ((lambda x: x, IMAGES), {"decoder": nn.ReLU()}, TrainingError, "that can be trained"),
        ((), {"pairs": (IMAGES, IMAGES[:3])}, TrainingError, "for 24 images"),
    ],
)
def test_wrong_queries(arguments, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        fastinv.train_inverse_network(*arguments, epochs=1, **options)


# ---- shadows and targets -------------------------------------------------------------------------


def test_a_shadow_lowers_the_loss_through_a_frozen_cloud(split: fastinv.Split) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        cloud = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    before = states(cloud)
    labels = LABELS % 2
    images = (IMAGES + labels[:, None, None, None]).astype(np.float32) / 2  # one class is bright
    seen: list[float] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(logits, labels)
        seen.append(float(value.detach()))
        return value

    def architecture() -> nn.Module:
        return nn.Sequential(*list(lenet5())[:5])

    shadow = fastinv.train_shadow(
        cloud, images, labels, architecture, loss=loss, epochs=60, batch_size=24, lr=3e-3, **NORM
    )
    assert seen[-1] < 0.5 * seen[0]
    for x, y in zip(before[0], states(cloud)[0], strict=True):
        np.testing.assert_array_equal(x, y)
    assert all(p.requires_grad for p in cloud.parameters())
    # and then rMLE on it
    edge = fastinv.export(shadow, torch.zeros(2, 1, 28, 28))
    recipe = fastinv.RMLE(edge, (1, 28, 28), **NORM, steps=5)
    assert fastinv.invert(split.features(IMAGES[:3]), recipe).shape == (3, 1, 28, 28)


def test_a_shadow_fits_queried_features(split: fastinv.Split) -> None:
    images = np.random.default_rng(2).random((64, 1, 28, 28)).astype(np.float32)
    one = fastinv.Split(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), at="0", **NORM)
    shadow = fastinv.fit_shadow(one, images, nn.Conv2d(1, 2, 3), epochs=60, batch_size=16, lr=3e-2)
    z = torch.from_numpy((images - 0.5) / 0.5)
    error = (shadow(z) - one.edge(z)).norm() / one.edge(z).norm()
    assert float(error.detach()) < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS[:3]}, "expected 24 whole numbers"),
        ({"labels": LABELS.astype(float)}, "whole numbers"),
        ({"labels": LABELS - 1}, "whole numbers"),
        ({"loss": "hinge"}, "loss 'hinge'"),
        ({"architecture": nn.ReLU()}, "that can be trained"),
    ],
)
def test_wrong_shadows(split: fastinv.Split, options: dict, message: str) -> None:
    arguments = {"images": IMAGES, "labels": LABELS, "architecture": nn.Conv2d(1, 16, 3), **options}
    with pytest.raises(TrainingError, match=message):
        fastinv.train_shadow(split.cloud, epochs=1, **arguments)


def test_a_shadow_of_another_shape_is_refused(split: fastinv.Split) -> None:
    with pytest.raises(TrainingError, match="the shadow gives features"):
        fastinv.fit_shadow(split, IMAGES, nn.Conv2d(1, 16, 3), epochs=1)


def test_a_target_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    images = (rng.random((200, 1, 28, 28)) * 0.5 + 0.5 * labels[:, None, None, None]).astype(np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lenet5(2)
    train_target(model, images, labels, epochs=3, **NORM)
    assert accuracy(model, images, labels, **NORM) > 0.98
