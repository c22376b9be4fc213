"""Models of other people's kinds, written for the tests: random weights, random batch-norm statistics."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from attentions import TRANSFORMERS
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms that do something, and eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            size = part.num_features
            part.running_mean = torch.randn(size, generator=generator) * 0.3
            part.running_var = torch.rand(size, generator=generator) + 0.5
            part.weight.data = torch.rand(size, generator=generator) + 0.5
            part.bias.data = torch.randn(size, generator=generator) * 0.3
        elif isinstance(part, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            for parameter in part.parameters():
                parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    return model.eval()


class BasicBlock(nn.Module):
    """ResNet-18's block, with the in-place ReLU and the in-place sum of the common implementation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += identity
        return self.relu(y)


class ResNet18(nn.Module):
    """ResNet-18 with its usual names; `layers` of its four stages."""

    def __init__(self, layers: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)[: layers + 1]
        stages = (nn.Sequential(BasicBlock(a, b, 1 if a == b else 2), BasicBlock(b, b)) for a, b in pairwise(widths))
        self.layer = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer(x)), 1))


def vgg16_bn_prefix() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.shortcut = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def mobilenet_v2_prefix() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(inplace=True),
        InvertedResidual(32, 16, 1, 1),
        InvertedResidual(16, 24, 2, 6),
        InvertedResidual(24, 24, 1, 6),
    )


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's block: half of the channels go on as they are, then all are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        as_it_is, other = x.chunk(2, dim=1)
        n, c, h, w = x.shape
        y = torch.cat((as_it_is, self.branch(other)), dim=1)
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class MobileUnit(nn.Module):
    """MobileNetV3's block, with Hardswish and a hard gate."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.depthwise = nn.Conv2d(hidden, hidden, 5, 1, 2, groups=hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, 8, 1), nn.ReLU(), nn.Conv2d(8, hidden, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.hardswish(self.norm(self.depthwise(self.expand(x))), inplace=True)
        return x + self.project(y * self.gate(y))


class UNet(nn.Module):
    """Two levels joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.silu(self.down(x))
        b = F.gelu(self.deep(F.avg_pool2d(a, 2)))
        return self.out(torch.cat([a, self.up(b)], dim=1))


class SqueezeExcite(nn.Module):
    """A gate on channels: mul with broadcasting."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding="same", dilation=2)
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.stem(x), 0.1)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate


class PreActivation(nn.Module):
    """Batch norm before the convolution, and before a branch: it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.bn1(x).relu())
        return 0.5 * x - self.conv2(torch.tanh(self.bn2(y))) / 2 + 0.25


class TransformerOrder(nn.Module):
    """Channels-last code: permute, linear over the last axis, permute back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(self.mix(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class NormedBlock(nn.Module):
    """A residual block as those of diffusion models' and detectors' backbones: group norm, SiLU, convolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ChannelNorm(nn.LayerNorm):
    """ConvNeXt's layer norm of [N, C, H, W]: over the channels of each pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and layer norm, two linear layers and a scale of each channel in channels-last order."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.project = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext_prefix() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 4, 4), ChannelNorm(12), ConvNeXtBlock(12)),
        *(ChannelNorm(12), nn.Conv2d(12, 20, 2, 2), ConvNeXtBlock(20)),
    )


class Mixer(nn.Module):
    """MLP-Mixer's block on tokens [N, T, D]: layer norms, and linear layers across tokens and across channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 9), nn.GELU(), nn.Linear(9, tokens))
        self.along = nn.Sequential(nn.Linear(width, 30), nn.GELU(), nn.Linear(30, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norm2(x))


class MixerPrefix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 14, 4, 4)
        self.blocks = nn.Sequential(Mixer(12, 14), Mixer(12, 14))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2))


def mlp_decoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 48),
        nn.BatchNorm1d(48),
        nn.Hardtanh(-0.8, 0.8),
        nn.Unflatten(1, (3, 4, 4)),
        nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
    )


def pixel_shuffle_decoder() -> nn.Module:
    return nn.Sequential(
        nn.ZeroPad2d((1, 0, 2, 1)),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.PixelShuffle(2),
        nn.Dropout(0.5),
        nn.ConstantPad2d(1, 0.0),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveAvgPool2d((5, 3)),
    )


# name -> (model, input shape)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (ResNet18, (3, 64, 64)),
    "resnet18-prefix": (lambda: ResNet18(2), (3, 32, 32)),
    "vgg16-bn-prefix": (vgg16_bn_prefix, (3, 32, 32)),
    "mobilenet-v2-prefix": (mobilenet_v2_prefix, (3, 32, 32)),
    "shuffle-net-v2-units": (
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), *map(ShuffleUnit, (12, 12))),
        (3, 15, 12),
    ),
    "mobile-net-v3-unit": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), MobileUnit(8, 20)), (3, 11, 14)),
    "u-net": (UNet, (3, 12, 16)),
    "squeeze-excite": (SqueezeExcite, (3, 9, 11)),
    "pre-activation": (PreActivation, (3, 8, 10)),
    "channels-last": (TransformerOrder, (3, 6, 5)),
    "group-norm-blocks": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), NormedBlock(24, 6), nn.InstanceNorm2d(24), NormedBlock(24, 1)),
        (3, 13, 18),
    ),
    "convnext-prefix": (convnext_prefix, (3, 24, 32)),
    "mixer-prefix": (MixerPrefix, (3, 12, 16)),
    **TRANSFORMERS,
    "mlp-decoder": (mlp_decoder, (20,)),
    "pixel-shuffle-decoder": (pixel_shuffle_decoder, (8, 6, 7)),
}


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, in eval mode, and its input shape."""
    factory, shape = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(factory()), shape
