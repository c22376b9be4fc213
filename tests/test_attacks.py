"""Attacks on small data: inverse networks, shadows and targets learn, from images and features of many kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digits import IMAGES, LABELS, NORM, assert_equal, cut, states
from torch import nn

import fastinv
from fastinv.attacks.inverse_network import Features
from fastinv.errors import FeatureError, TrainingError
from fastinv.models import lenet5
from fastinv.training import accuracy, class_indices, normalised, train_target


@pytest.fixture(scope="module")
def split() -> fastinv.Split:
    return cut()


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


def test_a_query_is_asked_in_the_kind_of_the_images(split: fastinv.Split) -> None:
    module = split.edge  # takes and gives tensors, with gradients

    def query(images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        return module((images - 0.5) / 0.5)

    tensors = torch.from_numpy(IMAGES).double()
    by_tensors = fastinv.train_inverse_network(query, tensors, epochs=1, **NORM)
    assert_equal(by_tensors, fastinv.train_inverse_network(split, IMAGES, epochs=1))
    with pytest.warns(UserWarning, match="queried again"):
        again = fastinv.train_inverse_network(query, tensors, epochs=1, cache_bytes=0, **NORM)
    assert_equal(by_tensors, again)


def test_features_beyond_the_cache_are_queried_again_with_a_warning(split: fastinv.Split) -> None:
    asked: list[int] = []

    def query(images: np.ndarray) -> np.ndarray:
        asked.append(len(images))
        return split.features(images)

    options = {"epochs": 3, **NORM}
    size = 24 * 1024 * 4
    kept = fastinv.train_inverse_network(query, IMAGES, cache_bytes=size, **options)
    assert sum(asked) == 24
    asked.clear()
    with pytest.warns(UserWarning, match="24 images take .* GiB, more than cache_bytes: .* 72 queries in all"):
        again = fastinv.train_inverse_network(query, IMAGES, cache_bytes=size - 1, **options)
    assert sum(asked) >= 72
    assert_equal(kept, again)
    with pytest.warns(UserWarning, match="cache_bytes"):
        fastinv.fit_shadow(query, IMAGES, nn.Sequential(*list(lenet5())[:5]), epochs=1, cache_bytes=0, **NORM)
    for wrong in (-1, "2 GiB", None):
        with pytest.raises(TrainingError, match="cache_bytes"):
            fastinv.train_inverse_network(query, IMAGES, cache_bytes=wrong)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_logged_features_stay_as_they_are(split: fastinv.Split, tmp_path, dtype) -> None:
    np.save(tmp_path / "features.npy", split.features(IMAGES).astype(dtype))
    log = np.load(tmp_path / "features.npy", mmap_mode="r")
    source = Features.logged(log, 24)
    assert np.shares_memory(source._kept.data, log)
    assert torch.equal(source[torch.tensor([3, 1])], torch.from_numpy(log[[3, 1]].astype(np.float32)))
    found = fastinv.train_inverse_network(pairs=(IMAGES, log), epochs=1)
    assert_equal(found, fastinv.train_inverse_network(pairs=(IMAGES, log.astype(np.float32)), epochs=1))


def test_pairs_the_other_way_round_are_warned_of() -> None:
    rng = np.random.default_rng(0)
    images, features = (rng.random((4, channels, 8, 8), np.float32) for channels in (3, 16))
    fastinv.train_inverse_network(pairs=(images, features), epochs=1)
    with pytest.warns(UserWarning, match="seem to be the other way round"):
        fastinv.train_inverse_network(pairs=(features, images), epochs=1)


def test_logged_tensors_stay_as_they_are(split: fastinv.Split) -> None:
    log = torch.from_numpy(split.features(IMAGES)).bfloat16()
    source = Features.logged(log, 24)
    assert np.shares_memory(source._kept.data, log.view(torch.uint16).numpy())
    assert torch.equal(source[torch.arange(24)], log.float())


def test_quantised_features_train_as_what_they_stand_for(split: fastinv.Split) -> None:
    features = split.features(IMAGES)
    scale, zero = np.float32(features.max() / 200), 3
    log = np.rint(features / scale + zero).astype(np.uint8)
    expected = fastinv.train_inverse_network(pairs=(IMAGES, (log - np.float32(zero)) * scale), epochs=1)
    quantised = {"scale": scale, "zero_point": zero, "epochs": 1}
    assert_equal(expected, fastinv.train_inverse_network(pairs=(IMAGES, log), **quantised))
    assert_equal(expected, fastinv.train_inverse_network(lambda _: log, IMAGES, **quantised))
    with pytest.raises(FeatureError, match="pass scale="):
        fastinv.train_inverse_network(pairs=(IMAGES, log))
    with pytest.raises(FeatureError, match="leave them out"):
        fastinv.train_inverse_network(pairs=(IMAGES, features), scale=0.1)


def test_a_query_that_gives_features_of_several_shapes_is_refused(split: fastinv.Split) -> None:
    images = np.concatenate([IMAGES] * 12)  # more than are asked about at once

    def query(images: np.ndarray) -> np.ndarray:
        return split.features(images)[:, : 16 if len(images) == 256 else 1]

    with pytest.raises(TrainingError, match=r"\[16, 8, 8\], and \[1, 8, 8\] from image 256 on"):
        fastinv.train_inverse_network(query, images)


def test_logged_features_that_hold_nan_are_refused_before_training(split: fastinv.Split) -> None:
    log = split.features(IMAGES)
    log[17, 3] = np.nan
    with pytest.raises(FeatureError, match="first in image 17"):
        fastinv.train_inverse_network(pairs=(IMAGES, log), decoder=lambda: pytest.fail("it trains"))


def test_features_whose_channels_come_last_teach_as_much(split: fastinv.Split) -> None:
    features = split.features(IMAGES)
    first, last = (
        fastinv.train_inverse_network(pairs=(IMAGES, log), epochs=1)
        for log in (features, features.transpose(0, 2, 3, 1))
    )
    with torch.no_grad():
        expected, found = first(torch.from_numpy(features)), last(torch.from_numpy(features.transpose(0, 2, 3, 1)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


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
        ((lambda x: x, IMAGES[0]), {}, TrainingError, "expected float pixels, or uint8"),
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
        ({"labels": [[1, 2], [3]]}, "labels: .* whole numbers"),
        ({"labels": (LABELS - 1).astype(np.uint64)}, "whole numbers"),
        ({"seed": "x"}, "seed 'x'"),
        ({"loss": "hinge"}, "loss 'hinge'"),
        ({"labels": LABELS + 1}, "labels up to 10"),
        ({"architecture": nn.ReLU()}, "that can be trained"),
        ({"architecture": nn.Conv2d(1, 16, 5)}, "a batch cannot be computed"),
        ({"cloud": len}, "cloud: a builtin_function_or_method"),
    ],
)
def test_wrong_shadows(split: fastinv.Split, options: dict, message: str) -> None:
    edge = nn.Sequential(*list(lenet5())[:5])
    arguments = {"cloud": split.cloud, "images": IMAGES, "labels": LABELS, "architecture": edge, **options}
    with pytest.raises(TrainingError, match=message):
        fastinv.train_shadow(epochs=1, **arguments)


@pytest.mark.parametrize("kind", ["<", ">"])
def test_training_data_of_any_byte_order_and_layout(kind: str) -> None:
    expected = normalised(IMAGES, **NORM)
    for images in (IMAGES.astype(f"{kind}f4"), IMAGES.astype(f"{kind}f8"), IMAGES[:, :, :, ::-1].copy()[:, :, :, ::-1]):
        assert torch.equal(normalised(images, **NORM), expected)
    for dtype in ("i4", "u8"):
        assert torch.equal(class_indices(LABELS.astype(kind + dtype), 24), torch.arange(24) % 10)


def test_images_of_bytes_and_halves_train_as_their_pixels(split: fastinv.Split) -> None:
    whole = np.rint(255 * IMAGES).astype(np.uint8)
    half = IMAGES.astype(np.float16)
    for given, stands_for in ((whole, whole / np.float32(255)), (half, half.astype(np.float32))):
        for images in (given, torch.from_numpy(given)):
            found = fastinv.train_inverse_network(split, images, epochs=1)
            assert_equal(found, fastinv.train_inverse_network(split, stands_for, epochs=1))


def test_float_pixels_of_0_to_255_are_refused(split: fastinv.Split) -> None:
    digits = np.where(IMAGES > 0.9, np.float32(250), np.float32(0))  # mostly black
    edge = nn.Sequential(*list(lenet5())[:5])
    for train in (
        lambda: fastinv.train_inverse_network(split, digits),
        lambda: fastinv.train_inverse_network(pairs=(digits, split.features(IMAGES))),
        lambda: fastinv.train_shadow(split.cloud, digits, LABELS, edge),
        lambda: fastinv.fit_shadow(split, digits, edge),
        lambda: train_target(lenet5(), digits, LABELS),
    ):
        with pytest.raises(TrainingError, match="divide those of 0 to 255 by 255"):
            train()
    noise = np.random.default_rng(0).standard_normal(IMAGES.shape, np.float32)
    assert normalised(noise, **NORM).shape == IMAGES.shape


def test_shadows_repeat_and_resume_for_the_same_cloud_only(split: fastinv.Split, tmp_path) -> None:
    checkpoint = tmp_path / "run.pt"
    clouds = [nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 24 * 24, 10)) for _ in range(2)]
    options = {"architecture": lambda: nn.Conv2d(1, 2, 5), "epochs": 2, **NORM}
    first = fastinv.train_shadow(clouds[0], IMAGES, LABELS, checkpoint=checkpoint, **options)
    assert_equal(first, fastinv.train_shadow(clouds[0], IMAGES, LABELS, **options))
    assert_equal(first, fastinv.train_shadow(clouds[0], IMAGES, LABELS, checkpoint=checkpoint, **options))
    with pytest.raises(TrainingError, match="another run"):
        fastinv.train_shadow(clouds[1], IMAGES, LABELS, checkpoint=checkpoint, **options)


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
    with pytest.raises(TrainingError, match="labels up to 2"):
        train_target(model, images, labels + 1, epochs=1, **NORM)


@pytest.mark.parametrize("use", [train_target, accuracy])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model: NoneType, expected"),
        (nn.Conv2d(3, 2, 1), "expected input.*; do the modules and the data fit"),
        (nn.Conv2d(1, 2, 1), r"logits \[24, 2, 28, 28\] for 24 labels"),
    ],
)
def test_wrong_classifiers(use, model, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        use(model, IMAGES, LABELS)


def test_accuracy_is_that_of_eval_mode() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.99), nn.Linear(784, 10)).train()
    found = {accuracy(model, IMAGES, LABELS, **NORM) for _ in range(5)}
    assert len(found) == 1
    assert model.training
