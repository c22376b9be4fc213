"""The paper's networks: targets with their layer names, decoders, shadow structures; and decoders made to measure."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from fastinv.errors import NetworkError
from fastinv.ops.base import Shape
from fastinv.pixels import channels_last_hint, to_channels_first
from fastinv.tensors import is_shape, is_whole

MNIST_NORMALISATION = ((0.5,), (0.5,))
CIFAR_NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Tokens at the front that are no places: none, a class token, one for distillation, too, or four registers (Darcet et
# al. 2023). Fewer places than that many are taken for another sequence.
EXTRA, LEAST_PLACES = (0, 1, 2, 5), 16
MOST_MISSING = 8  # rows or columns of an image that convolutions without padding may have left out
MOST_FLAT = 4096  # features of unknown places that a linear layer takes: its weights stay below 2**25


def lenet5(classes: int = 10) -> nn.Sequential:
    """The paper's MNIST target, [1, 28, 28] to logits; split points conv1 and ReLU2 in its tables."""
    _expect_classes("lenet5", classes)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 5),
            ReLU1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 16, 5),
            ReLU2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(256, 120),
            fc1act=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            fc2act=nn.ReLU(),
            fc3=nn.Linear(84, classes),
        )
    )


def cifar_net(classes: int = 10) -> nn.Sequential:
    """The paper's CIFAR-10 target, [3, 32, 32] to logits; split points conv11, ReLU22 and ReLU32 in its tables."""
    _expect_classes("cifar_net", classes)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for block, width in ((1, 64), (2, 128), (3, 128)):
        for index in (1, 2):
            layers[f"conv{block}{index}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"ReLU{block}{index}"] = nn.ReLU()
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(2048, 512)
    layers["sigmoid"] = nn.Sigmoid()
    layers["fc2"] = nn.Linear(512, classes)
    return nn.Sequential(layers)


def _expect_classes(model: str, classes: int) -> None:
    if not (is_whole(classes) and classes >= 1):
        raise NetworkError(f"{model}: classes {classes!r:.40}, expected a whole number from 1 on")


# ---- shadow structures, where the target's is not known (paper, Table 5) -------------------------------------------

SHADOW_SPLITS = ("conv1", "ReLU2", "conv11", "ReLU22", "ReLU32")


def shadow_edge(split: str) -> nn.Sequential:
    """The other structure that the paper's query-free attack tries for the edge cut at `split` (Table 5).

    It takes the same images and gives features of the same shape as the target's edge.
    """
    if split not in SHADOW_SPLITS:
        raise NetworkError(f"shadow_edge: split {split!r:.40}, expected one of {', '.join(SHADOW_SPLITS)}")
    if split == "conv1":  # two 3×3 instead of one 5×5
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    if split == "ReLU2":
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU()),
        )
    if split == "conv11":
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1))
    # One 5×5 for every pair of 3×3, with the pools between.
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 128, 5, padding=2), nn.ReLU()]
    if split == "ReLU32":
        layers += [nn.MaxPool2d(2), nn.Conv2d(128, 128, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers)


# ---- decoders ------------------------------------------------------------------------------------------------------


def make_decoder(
    feature_shape: Sequence[int],
    image_shape: Sequence[int],
    kind: str = "paper",
    *,
    width: int = 64,
    depth: int = 4,
    final: str = "none",
) -> nn.Sequential:
    """A decoder g: features -> normalised images, Xavier initialised (paper, Algorithm 2).

    Args:
        feature_shape: [C, H, W], or [H, W, C] where the sizes tell that the channels come last, or [D]. Or tokens
            [T, D]: read as places of the image, row by row, where their number allows that, but for `EXTRA` ones at
            the front, such as a class token, which are left out; else as [T·D].
        image_shape: [C, H, W].
        kind: "paper": the paper's own decoder where it has one for these shapes, and otherwise one of its style,
            made to measure; "residual": residual blocks and nearest upsampling.
        width: channels of a residual decoder, and the fewest of a made-to-measure one.
        depth: residual blocks.
        final: "none", or "sigmoid" for networks that give pixels themselves.

    Raises:
        NetworkError: shapes or options that no decoder is for.
    """
    if not (is_shape(feature_shape, 1, 2, 3) and is_shape(image_shape, 3)):
        raise NetworkError(
            f"make_decoder: features {feature_shape!r:.60} and images {image_shape!r:.60}, "
            "expected [C, H, W], [T, D] or [D], and [C, H, W]; reshape features of other axes to one of these"
        )
    features, image = (tuple(int(n) for n in shape) for shape in (feature_shape, image_shape))
    if channels_last_hint(image):
        warnings.warn(
            f"make_decoder: from features {list(features)} to images {list(image)}: the images look channels last, "
            f"from which next to nothing is learned; expected [C, H, W]: {to_channels_first('images')}",
            UserWarning,
            stacklevel=2,
        )
    if not (is_whole(width) and width >= 1 and is_whole(depth) and depth >= 0):
        raise NetworkError(f"make_decoder: width {width!r:.40}, depth {depth!r:.40}; expected width >= 1, depth >= 0")
    if final not in ("none", "sigmoid"):
        raise NetworkError(f"make_decoder: final {final!r:.40}, expected 'none' or 'sigmoid'")
    first: list[nn.Module] = []
    if _look_channels_last(features, image):
        first, features = [ChannelsFirst()], (features[2], *features[:2])
    if kind == "paper":
        layers = first + (_paper_decoder(features, image) or _measured_decoder(features, image, width))
    elif kind == "residual":
        layers = first + _residual_decoder(features, image, width, depth)
    else:
        raise NetworkError(f"make_decoder: kind {kind!r:.40}, expected 'paper' or 'residual'")
    if final == "sigmoid":
        layers.append(nn.Sigmoid())
    decoder = nn.Sequential(*layers)
    initialise(decoder)
    return decoder


def _look_channels_last(features: Shape, image: Shape) -> bool:
    """Whether the first two axes have the image's ratio of height to width, and the last two are far from it."""
    if len(features) != 3:
        return False
    first, last = (abs(math.log(h * image[2] / (w * image[1]))) for h, w in (features[:2], features[1:]))
    return first <= math.log(1.1) and last >= math.log(1.2)


def initialise(module: nn.Module) -> None:
    """Xavier weights, zero biases (paper, Section 4.2)."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _double(inputs: int, outputs: int, odd: tuple[int, int] = (0, 0)) -> nn.ConvTranspose2d:
    """Doubles an image; along an axis that is odd, to one place less."""
    return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=(1 - odd[0], 1 - odd[1]))


def _paper_decoder(features: Shape, image: Shape) -> list[nn.Module] | None:
    """The five decoders of the paper; None for other shapes."""
    to_rgb = nn.ConvTranspose2d(64, 3, 3, padding=1)
    decoders: dict[tuple[Shape, Shape], list[nn.Module]] = {
        ((8, 24, 24), (1, 28, 28)): [nn.Conv2d(8, 1, 5, padding=4)],
        ((16, 8, 8), (1, 28, 28)): [
            nn.ConvTranspose2d(16, 8, 5),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 5, stride=2, output_padding=1),
        ],
        ((64, 32, 32), (3, 32, 32)): [to_rgb],
        ((128, 16, 16), (3, 32, 32)): [_double(128, 64), nn.ReLU(), to_rgb],
        ((128, 8, 8), (3, 32, 32)): [_double(128, 128), nn.ReLU(), _double(128, 64), nn.ReLU(), to_rgb],
    }
    return decoders.get((features, image))


def _head(features: Shape, image: Shape, width: int) -> tuple[list[nn.Module], int, Shape]:
    """Layers that bring flat features or tokens to a small image, the channels after them, and its size.

    So they do with few features of places of which it cannot be told where in the image they are.
    """
    if len(features) == 3 and (math.prod(features) > MOST_FLAT or _has_places(features[1:], image[1:])):
        return [], features[0], features[1:]
    if len(features) == 2 and (grid := _grid(features[0], image)):
        return [grid], features[1], grid.size
    size = tuple(max(1, math.ceil(n / 8)) for n in image[1:])
    channels = 2 * width
    layers: list[nn.Module] = [] if len(features) == 1 else [nn.Flatten()]
    layers += [
        nn.Linear(math.prod(features), channels * math.prod(size)),
        nn.ReLU(),
        nn.Unflatten(1, (channels, *size)),
    ]
    return layers, channels, size


class ChannelsFirst(nn.Module):
    """[N, H, W, C], as Swin's blocks give, as an image [N, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class TokenGrid(nn.Module):
    """Tokens [N, T, D] of places, row by row, as an image [N, D, H, W]; the first `extra` are none."""

    def __init__(self, extra: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.extra, self.size = extra, size
        self.places = nn.Unflatten(2, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.places(x[:, self.extra :].mT)
        return image

    def extra_repr(self) -> str:
        return f"extra={self.extra}, size={self.size}"


def _grid(tokens: int, image: Shape) -> TokenGrid | None:
    """Tokens as the places of a grid with the image's ratio of height to width; None where no such grid has as many."""
    common = math.gcd(*image[1:])
    height, width = (n // common for n in image[1:])
    for extra in EXTRA:
        places = tokens - extra
        scale = math.isqrt(max(0, places) // (height * width))
        if scale * scale * height * width == places >= LEAST_PLACES:
            return TokenGrid(extra, (scale * height, scale * width))
    return None


def _has_places(size: Shape, target: Shape) -> bool:
    """Whether it can be told from the sizes where in the image features are."""
    return _is_near([size, *_doublings(size, target)][-1], target)


def _sizes(size: Shape, target: Shape) -> list[Shape]:
    """The sizes that doublings go through on their way to the target.

    Where it can be had by doublings some of which leave one place out, as strided convolutions of odd sizes need it,
    they are these; otherwise plain ones that stay within it.
    """
    back = [target]
    while back[-1][0] > size[0] or back[-1][1] > size[1]:
        back.append((-(-back[-1][0] // 2), -(-back[-1][1] // 2)))
    if back[-1] == size:
        return back[-2::-1]
    return _doublings(size, target)


def _doublings(size: Shape, target: Shape) -> list[Shape]:
    """The sizes that plain doublings go through within the target."""
    sizes = [size]
    while 2 * sizes[-1][0] <= target[0] and 2 * sizes[-1][1] <= target[1]:
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
    return sizes[1:]


def _is_near(size: Shape, target: Shape) -> bool:
    """Whether a size lacks nothing of another, or a few places, such as convolutions without padding leave out."""
    return all(0 <= t - s <= MOST_MISSING for s, t in zip(size, target, strict=True))


def _last(channels: int, size: Shape, image: Shape) -> list[nn.Module]:
    """What brings an image to the size and the channels of another: a 3×3, or a larger one for what is missing."""
    rows, columns = image[1] - size[0], image[2] - size[1]
    if _is_near(size, image[1:]) and (rows or columns):
        return [nn.ConvTranspose2d(channels, image[0], (rows + 3, columns + 3), padding=1)]
    resize = [] if size == image[1:] else [nn.Upsample(size=image[1:], mode="bilinear")]
    return [*resize, nn.Conv2d(channels, image[0], 3, padding=1)]


def _measured_decoder(features: Shape, image: Shape, width: int) -> list[nn.Module]:
    """As the paper's: stride-2 transposed convolutions, then one to the image's channels and size."""
    layers, channels, size = _head(features, image, width)
    for after in _sizes(size, image[1:]):
        fewer = max(width, channels // 2)
        layers += [_double(channels, fewer, (2 * size[0] - after[0], 2 * size[1] - after[1])), nn.ReLU()]
        channels, size = fewer, after
    return [*layers, *_last(channels, size, image)]


class ResidualBlock(nn.Module):
    """y = ReLU(x + conv(ReLU(conv x))), two 3×3 convolutions, each with batch norm where asked for."""

    def __init__(self, channels: int, *, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(self.conv1(x)).relu()
        result: torch.Tensor = (x + self.norm2(self.conv2(y))).relu()
        return result


def _residual_decoder(features: Shape, image: Shape, width: int, depth: int) -> list[nn.Module]:
    layers, channels, size = _head(features, image, width)
    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    layers += [ResidualBlock(width) for _ in range(depth)]
    for after in _sizes(size, image[1:]):
        twice = after == (2 * size[0], 2 * size[1])
        layers += [nn.Upsample(scale_factor=2) if twice else nn.Upsample(size=after)]
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        size = after
    return [*layers, *_last(width, size, image)]


def resnet_decoder() -> nn.Sequential:
    """A decoder in the style of ResNet-18, [64, 56, 56] features to pixels [3, 224, 224], for benchmarks."""
    decoder = nn.Sequential(
        *(ResidualBlock(64, norm=True), ResidualBlock(64, norm=True)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 3, 3, padding=1), nn.Sigmoid()),
    )
    initialise(decoder)
    return decoder


def resnet_edge() -> nn.Sequential:
    """ResNet-18 from conv1 to layer1, images [3, H, W] to features [64, H/4, W/4], for benchmarks."""
    edge = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(3, 2, 1),
            layer1=nn.Sequential(ResidualBlock(64, norm=True), ResidualBlock(64, norm=True)),
        )
    )
    initialise(edge)
    return edge


class _Tokens(nn.Module):
    """Patches of [3, 32, 32] images as tokens [64, width], with their positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.patches(x).flatten(2).mT + self.positions
        return tokens


def transformer_edge() -> nn.Sequential:
    """Two blocks of a vision transformer (ViT-Ti: width 192, three heads) on 4×4 patches of images [3, 32, 32], to
    tokens [64, 192], for benchmarks."""
    width, heads = 192, 3
    blocks = (
        nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True)
        for _ in range(2)
    )
    return nn.Sequential(OrderedDict(tokens=_Tokens(width), blocks=nn.Sequential(*blocks)))
