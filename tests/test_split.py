"""Models of any form are cut into edge and cloud, or the error says why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import make
from torch import nn

import fastinv
from fastinv.errors import FeatureError, SplitError
from fastinv.models import cifar_net, lenet5

TARGETS = {"lenet5": (lenet5, (1, 28, 28)), "cifar_net": (cifar_net, (3, 32, 32))}
LAYERS = [(name, layer) for name, (make_target, _) in TARGETS.items() for layer, _ in make_target().named_children()]


def check(model: nn.Module, at: str, shape: tuple[int, ...]) -> fastinv.Split:
    split = fastinv.Split(model, at=at)
    z = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(split.cloud(split.edge(z)), model.eval()(z))
    return split


@pytest.mark.parametrize(("name", "layer"), LAYERS[:-1])
def test_the_paper_s_targets_at_every_layer(name: str, layer: str) -> None:
    factory, shape = TARGETS[name]
    split = check(factory(), layer, shape)
    assert not any(n.startswith(layer) for n, _ in split.cloud.named_modules() if n == layer)


@pytest.mark.parametrize("at", ["conv1", "relu", "maxpool", "layer.0", "layer.0.1", "layer.1", "layer.1.1.relu", "fc"])
def test_a_resnet(at: str) -> None:
    model, shape = make("resnet18")
    if at == "relu":  # called once, before the pool
        assert check(model, at, shape).features(np.zeros((1, 3, 64, 64), np.float32)).shape == (1, 64, 32, 32)
    else:
        check(model, at, shape)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.fc = nn.Linear(4 * 36, 5)
        self.offset = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.conv(x) * 2 + self.offset)
        return self.fc(torch.flatten(self.act(F.max_pool2d(y, 1) + self.offset), 1))


def test_functional_code_and_the_last_call_of_a_shared_module() -> None:
    split = check(Functional().eval(), "act", (3, 8, 8))
    assert [n.target for n in split.cloud.graph.nodes if n.op == "call_module"] == ["fc"]
    check(Functional().eval(), "conv", (3, 8, 8))


def test_the_model_is_left_alone() -> None:
    model = lenet5()
    model.train()
    split = fastinv.Split(model, at="ReLU2")
    assert model.training
    assert not split.edge.training
    assert list(dict(model.named_children())) == list(dict(lenet5().named_children()))


def test_features_normalise_and_keep_the_kind() -> None:
    split = fastinv.Split(cifar_net(), at="conv11", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    x = np.random.default_rng(0).random((3, 3, 32, 32)).astype(np.float32)
    found = split.features(x)
    assert isinstance(found, np.ndarray)
    z = (x - np.array([0.4, 0.5, 0.6]).reshape(3, 1, 1)) / np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    with torch.no_grad():
        expected = split.edge(torch.from_numpy(z).float())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(split(torch.from_numpy(x)), torch.Tensor)
    assert split.features(x[:0]).shape == (0, 64, 32, 32)
    assert split.features(np.concatenate([x] * 100)).shape == (300, 64, 32, 32)


def test_edges_export() -> None:
    model, shape = make("resnet18")
    edge = fastinv.Split(model, at="layer.0").edge
    network = fastinv.export(edge, torch.randn(2, *shape))
    assert network.output_shape == (64, 16, 16)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (lenet5(), "relu2", "has no layer 'relu2'; did you mean .*ReLU2"),
        (lenet5(), "zzz", "it has conv1, ReLU1"),
        (make("resnet18")[0], "layer.0.0.bn1", "not only its result crosses: .* also needs"),
        (Branching(), "conv", "cannot trace Branching"),
        ("model", "conv1", "a str, expected"),
    ],
)
def test_impossible_cuts(model, at: str, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        fastinv.Split(model, at=at)


def test_wrong_images() -> None:
    split = fastinv.Split(lenet5(), at="conv1")
    with pytest.raises(FeatureError, match="expected float pixels"):
        split.features(np.zeros((3, 28, 28), np.float32))
    with pytest.raises(FeatureError, match="expected float pixels"):
        split.features(np.zeros((3, 1, 28, 28), np.uint8))
    with pytest.raises(SplitError, match="std"):
        fastinv.Split(lenet5(), at="conv1", std=(0.0,))
