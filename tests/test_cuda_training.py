"""Training on a GPU; where there is none, on a CPU that is named."""

from __future__ import annotations

import pytest
import torch
from digits import IMAGES, LABELS, NORM, cut
from interpreter import DEVICE
from torch import nn

import fastinv
from fastinv.models import lenet5
from fastinv.training import accuracy, train_target


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_inverse_network(precision: str) -> None:
    query = cut()
    options = {"epochs": 40, "precision": precision}
    here, there = (fastinv.train_inverse_network(query, IMAGES, device=d, **options) for d in (None, DEVICE))
    features = torch.as_tensor(query.features(IMAGES))
    with torch.no_grad():
        errors = [float(nn.functional.mse_loss(m(features) / 2 + 0.5, torch.as_tensor(IMAGES))) for m in (here, there)]
    assert errors[1] < 1.1 * errors[0] + 1e-3
    assert {p.device.type for p in there.parameters()} == {"cpu"}


def test_a_module_that_is_there_stays_there() -> None:
    decoder = fastinv.make_decoder((16, 8, 8), (1, 28, 28)).to(DEVICE)
    trained = fastinv.train_inverse_network(cut(), IMAGES, decoder=decoder, epochs=1)
    assert {p.device.type for p in trained.parameters()} == {DEVICE}


def test_shadows_and_targets(tmp_path) -> None:
    split = cut()
    options = {"epochs": 2, "device": DEVICE, **NORM}
    shadow = fastinv.train_shadow(split.cloud, IMAGES, LABELS, lenet5()[:5], checkpoint=tmp_path / "run.pt", **options)
    assert {p.device.type for p in shadow.parameters()} == {"cpu"}
    fastinv.train_shadow(split.cloud, IMAGES, LABELS, lenet5()[:5], checkpoint=tmp_path / "run.pt", **options)
    fastinv.fit_shadow(split, IMAGES, lenet5()[:5], epochs=1, device=DEVICE)
    model = train_target(lenet5().to(DEVICE), IMAGES, LABELS, epochs=60, **NORM)
    assert accuracy(model, IMAGES, LABELS, **NORM) > 0.9


def test_a_split_of_a_model_that_is_there() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = lenet5().eval()
    here = fastinv.Split(model, "ReLU2", **NORM).features(IMAGES)
    there = fastinv.Split(model.to(DEVICE), "ReLU2", **NORM).features(IMAGES)
    assert abs(here - there).max() < 1e-2  # tf32


def test_an_audit_of_a_model_that_is_there(tmp_path) -> None:
    attacks = ["rmle", "inverse_network", "shadow", "fit_shadow"]
    options = {"labels": LABELS[:16], "untrained": lenet5, "epochs": 1, "shadow_epochs": 1, **NORM}
    for name, example in (("fx", None), ("export", torch.zeros(2, 1, 28, 28))):
        report = fastinv.audit(
            *(lenet5().to(DEVICE), IMAGES[:16], IMAGES[16:18], tmp_path / name),
            at=["pool1"],
            attacks=attacks if name == "fx" else attacks[:1],
            example=example,
            **options,
        )
        assert not report.failed
