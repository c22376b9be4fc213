"""Models of any form are cut into edge and cloud, or the error says why not."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import make
from torch import nn

import fastinv
from fastinv.errors import FeatureError, SplitError
from fastinv.models import cifar_net, lenet5, resnet_edge, transformer_edge

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


class Sized(nn.Module):
    """Uses the batch size, a constant and an in-place activation across the cut, and branches on a shape."""

    def __init__(self, checks: bool) -> None:
        super().__init__()
        self.checks = checks
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4 * 36, 5)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checks and x.shape[1] != 3:
            raise ValueError("three channels, please")
        count, size, gain = x.size(0), x.shape, self.scale * 2
        y = self.norm(self.conv(x)) * gain
        self.act(y)  # changes y
        return self.fc(y.view(count, -1)) + self.fc(y.reshape(size[0], 144))


@pytest.mark.parametrize("at", ["conv", "norm"])
def test_batch_sizes_constants_and_writes_in_place_cross_a_cut(at: str) -> None:
    split = check(Sized(checks=False).eval(), at, (3, 8, 8))
    z = torch.randn(5, 3, 8, 8)
    features = split.edge(z)
    before = features.clone()
    split.cloud(features)
    assert torch.equal(features, before)


@pytest.mark.parametrize("at", ["conv", "norm"])
def test_with_an_example_shapes_may_be_branched_on(at: str) -> None:
    model = Sized(checks=True).eval()
    with pytest.raises(SplitError, match="Pass example="):
        fastinv.Split(model, at=at)
    split = fastinv.Split(model, at=at, example=torch.zeros(2, 3, 8, 8))
    for count in (1, 2, 7):
        z = torch.randn(count, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(split.cloud(split.edge(z)), model(z))
    assert split.features(torch.rand(3, 3, 8, 8)).shape == (3, 4, 6, 6)


@pytest.mark.parametrize("at", ["conv1", "layer.0", "layer.1.1.relu"])
def test_a_resnet_through_torch_export(at: str) -> None:
    model, shape = make("resnet18")
    split = fastinv.Split(model, at=at, example=torch.zeros(2, *shape))
    z = torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(split.edge(z), fastinv.Split(model, at=at).edge(z))
        torch.testing.assert_close(split.cloud(split.edge(z)), model(z))
    with pytest.warns(UserWarning, match=r"the cloud also needs what \w+ in 'maxpool' gives"):
        fastinv.Split(model, at="layer.0.0.bn1", example=torch.zeros(2, *shape))


@pytest.mark.parametrize("example", [False, True])
def test_split_points(example: bool) -> None:
    def points(model: nn.Module, *shape: int) -> list[str]:
        found = fastinv.split_points(model, torch.zeros(2, *shape) if example else None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = torch.rand(2, *shape)
            model = model.eval()
            for at in found[
                :: 4 if example else 1
            ]:  # each can be cut, with nothing else that crosses; slower by export
                split = fastinv.Split(model, at, example=torch.zeros(2, *shape) if example else None)
                torch.testing.assert_close(split.cloud(split.edge(x)), model(x))
        return found

    assert points(lenet5(), 1, 28, 28) == [
        name for name, _ in lenet5().named_children() if name not in ("flatten", "fc3")
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 10))
    resnet = nn.Sequential(OrderedDict(edge=resnet_edge(), head=head))
    inside = [f"edge.{name}" for name in ("conv1", "bn1", "relu", "maxpool", "layer1.0")]
    assert points(resnet, 3, 32, 32) == [*inside, "edge", "head.0"]
    # As torch.export has it, attention computes sizes from the number of images, which do not cross.
    transformer = nn.Sequential(transformer_edge(), nn.Flatten(), nn.Linear(64 * 192, 10))
    assert points(transformer, 3, 32, 32) == ["0.tokens.patches", "0.tokens", "0.blocks.0", "0"]


def test_a_model_that_cannot_be_cut_has_no_split_points() -> None:
    assert fastinv.split_points(nn.Sequential(nn.Flatten(), nn.Linear(16, 4))) == []
    with pytest.raises(SplitError, match="expected a torch"):
        fastinv.split_points("model")


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
    np.testing.assert_array_equal(split.features(x.astype(">f4")), found)


def test_bytes_are_255ths_and_halves_are_taken_as_they_are() -> None:
    split = fastinv.Split(cifar_net(), at="conv11", mean=(0.4, 0.5, 0.6), std=0.2)
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(split.features(x), split.features(x / 255))
    np.testing.assert_array_equal(split.features(x.numpy()), split.features(x.numpy() / np.float32(255)))
    for dtype in (torch.float16, torch.bfloat16):
        half = (x / 255).to(dtype)
        assert torch.equal(split.features(half), split.features(half.float()))


@pytest.mark.parametrize("mean", [0.0, (0.4, 0.5, 0.6)])
def test_images_whose_channels_come_last_are_told(mean) -> None:
    split = fastinv.Split(cifar_net(), at="conv11", mean=mean)
    with pytest.raises(FeatureError, match=r"channels seem to come last: pass images\.transpose\(0, 3, 1, 2\)"):
        split.features(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(FeatureError, match=r"does not take images \[1, 32, 32\] [^;]*$"):
        fastinv.Split(cifar_net(), at="conv11").features(np.zeros((2, 1, 32, 32), np.float32))


def test_features_of_many_images_are_asked_for_by_few_large_or_many_small_ones() -> None:
    for shape, count, sizes in (((1, 28, 28), 300, [256, 44]), ((3, 320, 320), 30, [13, 13, 4])):
        split = fastinv.Split(nn.Sequential(nn.Conv2d(shape[0], 2, 3, stride=9), nn.Flatten()), at="0")
        asked: list[int] = []
        split.edge.register_forward_pre_hook(lambda module, args, asked=asked: asked.append(len(args[0])))
        x = np.random.default_rng(0).random((count, *shape), dtype=np.float32)
        found = split.features(x)
        assert asked == sizes
        with torch.no_grad():
            expected = split.edge(torch.from_numpy(x))
        np.testing.assert_allclose(found, expected, atol=1e-6)


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


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.spare = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.spare(x)
        return self.conv(x)


class TwoInputs(Unused):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.conv(x) + y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv1(x), x


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (lenet5(), "relu2", "has no layer 'relu2'; did you mean .*ReLU2"),
        (lenet5(), "zzz", "it has conv1, ReLU1"),
        (nn.DataParallel(lenet5()), "module.conv1", "pass model.module"),
        (lenet5().half(), "conv1", r"conv1.weight is torch.float16, expected float32; call model.float\(\) first"),
        (lenet5().double(), "conv1", "conv1.weight is torch.float64"),
        (Branching(), "conv", "cannot trace Branching"),
        ("model", "conv1", "a str, expected"),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), 0, "has no layer 0"),
        (nn.Bilinear(2, 2, 2), "weight", "has no layer 'weight'; it has none"),
        (Unused(), "spare", "never called"),
        (TwoInputs(), "conv", "several inputs"),
    ],
)
def test_impossible_cuts(model, at: str, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        fastinv.Split(model, at=at)


class UNet(nn.Module):
    """Two levels, of which the upper one goes past the lower one."""

    def __init__(self) -> None:
        super().__init__()
        self.e1 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.e2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upper = self.e1(x)
        return self.out(torch.cat([self.up(self.e2(upper)), upper * 2], 1))


@pytest.mark.parametrize(
    ("example", "origin"), [(None, "what 'e1.1' gives"), (torch.zeros(2, 3, 8, 8), "what relu in 'e1.1' gives")]
)
def test_where_more_crosses_there_is_an_edge_but_no_cloud(example, origin: str) -> None:
    model = UNet().eval()
    with pytest.warns(UserWarning, match=f"at 'e2.2' not only its result crosses: the cloud also needs {origin}. The"):
        split = fastinv.Split(model, at="e2.2", example=example)
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(split.features(x), model.e2(model.e1(x)))
    with pytest.raises(SplitError, match=f"{origin}. Cut where they have joined.*write one that gives all"):
        _ = split.cloud
    check(model, "e1", (3, 8, 8))


def test_what_crosses_by_no_module_is_named_by_its_function() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sigmoid(x)
            return self.conv(y) + y + x

    with pytest.warns(UserWarning, match="needs the images, what sigmoid in the model's forward gives"):
        fastinv.Split(Skip(), at="conv")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(SplitError, match=r"expected the torch.nn.Module it was made of. Or write the edge"):
        fastinv.Split(scripted, at="0")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of its own making
def test_a_compiled_model_is_cut_as_the_one_it_was_made_of() -> None:
    model = lenet5().eval()
    split = fastinv.Split(torch.compile(model), at="ReLU2")
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(split.features(x), fastinv.Split(model, at="ReLU2").features(x))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (lenet5(), torch.zeros(1, 1, 28, 28), r"expected a tensor \[N >= 2"),
        (lenet5(), np.zeros((2, 1, 28, 28)), "a ndarray, expected"),
        (lenet5(), torch.zeros(2, 3, 28, 28), "torch.export cannot trace Sequential"),
        (Pair(), torch.zeros(2, 3, 8, 8), "several results"),
    ],
)
def test_wrong_examples(model, example, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        fastinv.Split(model, at="conv1", example=example)


def test_wrong_images() -> None:
    split = fastinv.Split(lenet5(), at="conv1")
    with pytest.raises(FeatureError, match="expected float pixels"):
        split.features(np.zeros((3, 28, 28), np.float32))
    with pytest.raises(FeatureError, match="dtype int64, expected float pixels"):
        split.features(np.zeros((3, 1, 28, 28), np.int64))
    with pytest.raises(FeatureError, match="divide those of 0 to 255 by 255"):
        split.features(np.full((3, 1, 28, 28), 200, np.float32))
    with pytest.raises(FeatureError, match="NaN or Inf"):
        split.features(np.full((3, 1, 28, 28), np.nan, np.float32))
    with pytest.raises(FeatureError, match="does not take images"):
        split.features(np.zeros((3, 3, 28, 28), np.float32))
    rgb = fastinv.Split(lenet5(), at="conv1", mean=(0.1, 0.2, 0.3))
    with pytest.raises(FeatureError, match=r"mean \(0\.1, 0\.2, 0\.3\), expected 1 finite number"):
        rgb.features(np.zeros((3, 1, 28, 28), np.float32))
    with pytest.raises(FeatureError, match=r"gives a tuple for 2 images"):
        fastinv.Split(nn.Sequential(nn.Flatten(2), nn.LSTM(64, 3)), at="1").features(np.zeros((2, 3, 8, 8), np.float32))


@pytest.mark.parametrize(
    "change", [{"std": (0.0,)}, {"mean": ()}, {"mean": (np.nan,)}, {"std": "0.5"}, {"mean": True}, {"mean": [[0.5]]}]
)
def test_wrong_normalisations(change: dict) -> None:
    with pytest.raises(SplitError, match=r"std|mean"):
        fastinv.Split(lenet5(), at="conv1", **change)
    assert fastinv.Split(lenet5(), at="conv1", mean=0.5, std=0.25).std == (0.25,)
