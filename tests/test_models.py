"""The paper's networks have its layers and shapes; other decoders fit whatever they are asked to fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastinv
from fastinv.errors import NetworkError
from fastinv.models import (
    SHADOW_SPLITS,
    ResidualBlock,
    cifar_net,
    initialise,
    lenet5,
    make_decoder,
    resnet_decoder,
    shadow_edge,
)

FEATURES = {  # the paper's split points: features, images
    "conv1": ((8, 24, 24), (1, 28, 28)),
    "ReLU2": ((16, 8, 8), (1, 28, 28)),
    "conv11": ((64, 32, 32), (3, 32, 32)),
    "ReLU22": ((128, 16, 16), (3, 32, 32)),
    "ReLU32": ((128, 8, 8), (3, 32, 32)),
}


DOUBLE = "deconv 3 64→64 s2 p1"


def layers(model: nn.Module) -> list[str]:
    def one(m: nn.Module) -> str:
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = "conv" if isinstance(m, nn.Conv2d) else "deconv"
            return f"{kind} {m.kernel_size[0]} {m.in_channels}→{m.out_channels} s{m.stride[0]} p{m.padding[0]}"
        return type(m).__name__

    return [one(m) for m in model]


def test_targets_have_the_paper_s_layers() -> None:
    assert list(dict(lenet5().named_children())) == [
        *("conv1", "ReLU1", "pool1", "conv2", "ReLU2", "pool2", "flatten", "fc1", "fc1act", "fc2", "fc2act", "fc3")
    ]
    names = list(dict(cifar_net().named_children()))
    assert names[:10] == [
        *("conv11", "ReLU11", "conv12", "ReLU12", "pool1", "conv21", "ReLU21", "conv22", "ReLU22", "pool2")
    ]
    assert names[10:] == [*("conv31", "ReLU31", "conv32", "ReLU32", "pool3", "flatten", "fc1", "sigmoid", "fc2")]
    assert sum(p.numel() for p in lenet5().fc1.parameters()) == 256 * 120 + 120
    assert lenet5()(torch.zeros(2, 1, 28, 28)).shape == cifar_net()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("target", [lenet5, cifar_net])
@pytest.mark.parametrize("classes", ["a", -1, 0, 2.0, True, None])
def test_targets_refuse_numbers_of_classes_that_are_none(target, classes) -> None:
    with pytest.raises(NetworkError, match=f"{target.__name__}: classes {classes!r}, expected a whole"):
        target(classes)


@pytest.mark.parametrize("split", FEATURES)
def test_edges_decoders_and_shadows_have_matching_shapes(split: str) -> None:
    features, image = FEATURES[split]
    target = lenet5() if image[0] == 1 else cifar_net()
    z = torch.zeros(2, *image)
    assert fastinv.Split(target, at=split).edge(z).shape == (2, *features)
    assert shadow_edge(split)(z).shape == (2, *features)
    assert make_decoder(features, image)(torch.zeros(2, *features)).shape == (2, *image)


def test_the_paper_s_decoders() -> None:
    assert layers(make_decoder(*FEATURES["conv1"])) == ["conv 5 8→1 s1 p4"]
    assert layers(make_decoder(*FEATURES["ReLU2"])) == ["deconv 5 16→8 s1 p0", "ReLU", "deconv 5 8→1 s2 p0"]
    assert layers(make_decoder(*FEATURES["conv11"])) == ["deconv 3 64→3 s1 p1"]
    last = ["ReLU", "deconv 3 64→3 s1 p1"]
    assert layers(make_decoder(*FEATURES["ReLU22"])) == ["deconv 3 128→64 s2 p1", *last]
    first = ["deconv 3 128→128 s2 p1", "ReLU", "deconv 3 128→64 s2 p1"]
    assert layers(make_decoder(*FEATURES["ReLU32"])) == [*first, *last]


def test_shadows_have_the_paper_s_structures() -> None:
    kernels = {split: [int(n.split()[1]) for n in layers(shadow_edge(split)) if " " in n] for split in SHADOW_SPLITS}
    assert kernels == {"conv1": [3, 3], "ReLU2": [3] * 4, "conv11": [3, 3], "ReLU22": [5, 5], "ReLU32": [5, 5, 5]}
    with pytest.raises(NetworkError, match="split 'fc1'"):
        shadow_edge("fc1")


def test_residual_decoder_for_benchmarks() -> None:
    decoder = make_decoder((128, 16, 16), (3, 64, 64), "residual", final="sigmoid")
    assert sum(isinstance(m, ResidualBlock) for m in decoder) == 4
    assert sum(isinstance(m, nn.Upsample) for m in decoder) == 2
    assert isinstance(decoder[-1], nn.Sigmoid)
    assert resnet_decoder()(torch.zeros(2, 64, 7, 7)).shape == (2, 3, 28, 28)


@pytest.mark.filterwarnings("ignore:make_decoder")  # some of these shapes look channels last
@settings(max_examples=25, deadline=None)
@given(
    features=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    image=st.tuples(st.integers(1, 4), st.integers(1, 50), st.integers(1, 50)),
    kind=st.sampled_from(["paper", "residual"]),
)
def test_decoders_fit_any_shapes(features: tuple[int, ...], image: tuple[int, ...], kind: str) -> None:
    decoder = make_decoder(features, image, kind, width=4, depth=1).eval()
    x = torch.randn(2, *features)
    with torch.no_grad():
        assert decoder(x).shape == (2, *image)


def test_images_whose_channels_come_last_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"the images look channels last.*images\.transpose\(0, 3, 1, 2\)"):
        make_decoder((16, 8, 8), (28, 28, 1), width=4)


@pytest.mark.parametrize("kind", ["paper", "residual"])
@pytest.mark.parametrize(
    ("features", "image"),
    [((8, 8, 16), (1, 28, 28)), ((1, 1, 64), (3, 32, 32)), ((24, 52, 16), (3, 28, 56)), ((16, 16, 48), (3, 32, 32))],
)
def test_features_whose_channels_come_last_are_put_first(features, image, kind: str) -> None:
    torch.manual_seed(0)
    last = make_decoder(features, image, kind, width=4, depth=1).eval()
    torch.manual_seed(0)
    first = make_decoder((features[2], *features[:2]), image, kind, width=4, depth=1).eval()
    x = torch.randn(2, *features)
    with torch.no_grad():
        torch.testing.assert_close(last(x), first(x.permute(0, 3, 1, 2)))
    network = fastinv.export(last, x)
    torch.testing.assert_close(fastinv.compile(network, backend="cpu")(x), last(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("features", "image"),
    [
        *FEATURES.values(),
        ((8, 8, 8), (1, 28, 28)),
        ((12, 24, 52), (3, 28, 56)),
        ((9, 8, 8), (3, 32, 32)),
        ((64,), (3, 9, 9)),
    ],
)
def test_channels_that_come_first_are_not(features, image) -> None:
    make_decoder(features, image, width=4)  # warnings are errors here


@pytest.mark.parametrize(
    ("tokens", "image", "extra", "size"),
    [
        (64, (3, 32, 32), 0, (8, 8)),
        (197, (3, 224, 224), 1, (14, 14)),  # ViT-B/16
        (201, (3, 224, 224), 5, (14, 14)),  # with four registers
        (72, (3, 32, 64), 0, (6, 12)),
        (33, (1, 64, 32), 1, (8, 4)),
        (66, (3, 32, 32), 2, (8, 8)),  # with a token for distillation
    ],
)
def test_tokens_are_places_of_the_image(tokens: int, image: tuple[int, ...], extra: int, size: tuple[int, int]) -> None:
    decoder = make_decoder((tokens, 5), image, width=4)
    grid = decoder[0](torch.arange(tokens * 5.0).reshape(1, tokens, 5))
    assert grid.shape == (1, 5, *size)
    assert grid[0, :, 1, 2].tolist() == [5.0 * (extra + size[1] + 2) + n for n in range(5)]


@pytest.mark.parametrize(
    ("tokens", "image"), [(24, (3, 32, 32)), (1, (3, 32, 64)), (70, (3, 30, 40)), (10, (1, 28, 28)), (28, (1, 28, 28))]
)
def test_tokens_that_are_no_places_are_taken_as_they_are(tokens: int, image: tuple[int, ...]) -> None:
    decoder = make_decoder((tokens, 5), image, width=4)
    assert isinstance(decoder[0], nn.Flatten)
    assert decoder[1].in_features == tokens * 5


@pytest.mark.parametrize(
    ("features", "image", "expected"),
    [
        ((128, 8, 8), (3, 64, 64), ["deconv 3 128→64 s2 p1", DOUBLE, DOUBLE, "conv 3 64→3 s1 p1"]),
        # pool1 of the paper's MNIST target: 28 = 2·12 + 4, which a convolution without padding left out
        ((8, 12, 12), (1, 28, 28), ["deconv 3 8→64 s2 p1", "deconv 7 64→1 s1 p1"]),
        # strided convolutions of odd sizes
        ((64, 29, 29), (3, 113, 113), [DOUBLE, DOUBLE, "conv 3 64→3 s1 p1"]),
        # pool2: of a few features whose places cannot be told
        ((16, 4, 4), (1, 28, 28), ["Linear", "deconv 3 128→64 s2 p1", DOUBLE, DOUBLE, "conv 3 64→1 s1 p1"]),
    ],
)
def test_measured_decoders(features: tuple[int, ...], image: tuple[int, ...], expected: list[str]) -> None:
    decoder = make_decoder(features, image)
    assert [name for name in layers(decoder) if name not in ("ReLU", "Flatten", "Unflatten")] == expected
    assert decoder(torch.zeros(1, *features)).shape == (1, *image)


def test_measured_decoders_export() -> None:
    for features in ((37,), (20, 7, 9), (49, 6), (13, 6), (11, 6), (64, 13, 18), (300, 8, 10), (300, 4, 5)):
        decoder = make_decoder(features, (3, 30, 40), width=8).eval()
        assert fastinv.export(decoder, torch.randn(2, *features)).output_shape == (3, 30, 40)


def test_initialisation_is_xavier_with_zero_biases() -> None:
    layer = nn.Linear(300, 200)
    initialise(layer)
    assert not layer.bias.any()
    assert abs(float(layer.weight.detach().var()) * (300 + 200) / 2 - 1) < 0.05


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((8, 24, 24, 1), (1, 28, 28)), {}, "reshape features of other axes"),
        (((8,), (28, 28)), {}, "expected"),
        ((("8",), (1, 28, 28)), {}, "expected"),
        (((8.5, 4, 4), (1, 28, 28)), {}, "expected"),
        (((0, 4, 4), (1, 28, 28)), {}, "expected"),
        (((8,), (1, 28, 28)), {"kind": "unet"}, "kind 'unet'"),
        (((8,), (1, 28, 28)), {"final": "tanh"}, "final 'tanh'"),
        (((8,), (1, 28, 28)), {"width": 0}, "width 0"),
        (((8,), (1, 28, 28)), {"width": "64"}, "width '64'"),
        (((8,), (1, 28, 28)), {"depth": 1.5}, r"depth 1\.5"),
        ((8, (1, 28, 28)), {}, "features 8 and images"),
        (((8,), None), {}, "images None, expected"),
    ],
)
def test_wrong_decoders(arguments, options, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        make_decoder(*arguments, **options)
