"""normalize: y = weight · (x − μ) / √(σ² + eps) + bias, with μ and σ² of each image's own groups of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastinv.ops.base import Case, Op, Shape, expect, expect_inputs, expect_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Normalize(Op):
    """Group, layer, instance and RMS norm, with `weight` [C] and `bias` [C].

    Channels are the first axis of an image [C, H, W] and the last of any other value. A group is C / groups channels
    side by side: those of one pixel or row, or, where `spatial`, those of all pixels of the image.

    Attributes:
        groups: of channels.
        spatial: whether statistics are taken over rows and columns, too; images only.
        centered: False: μ is 0, and σ² the mean of squares (RMS norm).
        eps: added to the variance.
    """

    name: ClassVar[str] = "normalize"
    affine: ClassVar[bool] = False
    groups: int = 1
    spatial: bool = False
    centered: bool = True
    eps: float = 1e-5

    def validate(self) -> None:
        expect(self.groups >= 1, f"normalize: {self.groups} groups, expected >= 1")
        expect(self.eps >= 0, f"normalize: eps {self.eps}, expected >= 0")

    def shape(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        expect_inputs(self, inputs, 1)
        (shape,) = inputs
        expect(len(shape) >= 1, "normalize: a scalar input, expected rank 1 or more")
        expect(not self.spatial or len(shape) == 3, f"normalize: spatial, of shape {list(shape)}, expected [C, H, W]")
        channels = shape[channel_axis(shape)]
        expect(
            channels % self.groups == 0, f"normalize: {channels} channels, expected a multiple of {self.groups} groups"
        )
        expect_weights(self, weights, weight=(channels,), bias=(channels,))
        return shape

    def reference(self, inputs: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        axis = channel_axis(tuple(x.shape[1:])) + 1
        channels = x.shape[axis]
        grouped = x.reshape(*x.shape[:axis], self.groups, channels // self.groups, *x.shape[axis + 1 :])
        axes = (2, 3, 4) if self.spatial else (axis + 1,)
        if self.centered:
            grouped = grouped - grouped.mean(axes, keepdim=True)
        y = grouped / (grouped.square().mean(axes, keepdim=True) + self.eps).sqrt()
        spread = (channels, *[1] * (x.ndim - 1 - axis))
        return y.reshape(x.shape) * weights["weight"].reshape(spread) + weights["bias"].reshape(spread)

    def flops(self, inputs: Sequence[Shape], weights: Mapping[str, Shape]) -> int:
        return (7 if self.centered else 4) * math.prod(inputs[0])  # a sum, a sum of squared differences, and the result

    @staticmethod
    def cases() -> tuple[Case, ...]:
        def case(name: str, op: Normalize, x: Shape) -> Case:
            channels = x[channel_axis(x)]
            return Case(name, op, (x,), {"weight": (channels,), "bias": (channels,)})

        return (
            case("groups", Normalize(4, spatial=True), (20, 7, 6)),
            case("instance", Normalize(37, spatial=True, eps=1e-3), (37, 5, 9)),
            case("whole-image", Normalize(spatial=True), (3, 33, 17)),
            case("pixels", Normalize(), (24, 5, 7)),
            case("groups-of-pixels", Normalize(3), (51, 4, 3)),
            case("rows", Normalize(eps=1e-6), (5, 67)),
            case("flat", Normalize(2), (38,)),
            case("root-mean-square", Normalize(centered=False), (3, 19)),
        )


def channel_axis(shape: Shape) -> int:
    """Of a value, without the batch."""
    return 0 if len(shape) == 3 else len(shape) - 1
