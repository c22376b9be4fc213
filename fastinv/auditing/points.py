"""Where a model can be cut, and what crosses there."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastinv.errors import SplitError, UnsupportedOp
from fastinv.export import export
from fastinv.network import Network
from fastinv.schedule import place_of
from fastinv.split import Split, split_points


def exported(module: nn.Module, shape: tuple[int, ...]) -> Network:
    """A module that takes [N, *shape], exported; of one on a GPU a copy of it is.

    Raises:
        UnsupportedOp: it has an operation that cannot be.
    """
    here = module if place_of(module).type == "cpu" else copy.deepcopy(module).cpu()
    return export(here, torch.zeros(2, *shape))


@dataclass(frozen=True)
class Point:
    """A split point.

    Attributes:
        at: its name.
        feature_shape: of what crosses, for one image.
        flops: of the edge for one image, 2 a multiplication with addition; None where fastinv cannot export it.
        accuracy: the share of images whose class the model tells from what is sent; None where that is not known.
    """

    at: str
    feature_shape: tuple[int, ...]
    flops: int | None
    accuracy: float | None = None

    @classmethod
    def of(cls, split: Split, image_shape: tuple[int, ...]) -> Point:
        """Where a model is cut that takes images of this shape.

        Raises:
            FeatureError: it takes none of this shape.
        """
        shape = tuple(split.features(torch.zeros(1, *image_shape)).shape[1:])
        try:
            return cls(split.at, shape, exported(split.edge, image_shape).flops)
        except UnsupportedOp:
            return cls(split.at, shape, None)

    @property
    def kibibytes(self) -> float:
        """Of the features of one image, in float32."""
        return math.prod(self.feature_shape) * 4 / 1024


@dataclass(frozen=True)
class Cuts:
    """A model, and how it is cut.

    Attributes:
        model, mean, std, example: as of `Split`.
        names: where `split_points` finds that it can be cut.
    """

    model: nn.Module
    mean: Sequence[float] | float
    std: Sequence[float] | float
    example: torch.Tensor | None
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        mean: Sequence[float] | float,
        std: Sequence[float] | float,
        example: torch.Tensor | None,
        image_shape: tuple[int, ...],
    ) -> Cuts:
        """With an example of this shape where torch.fx cannot trace the model, and there is none.

        Raises:
            SplitError: the model cannot be traced.
        """
        try:
            names = split_points(model, example)
        except SplitError:
            if example is not None or not isinstance(model, nn.Module):
                raise
            example = torch.zeros(2, *image_shape)
            names = split_points(model, example)
        return cls(model, mean, std, example, tuple(names))

    def split(self, at: str, *, quiet: bool = False) -> Split:
        """The model, cut after a layer; quiet: without a warning where more than the layer's result crosses."""
        with warnings.catch_warnings():
            if quiet:
                warnings.filterwarnings("ignore", "Split: at .* not only its result crosses")
            return Split(self.model, at, self.mean, self.std, example=self.example)

    def point(self, at: str, image_shape: tuple[int, ...]) -> Point:
        """What is told of a cut."""
        return Point.of(self.split(at, quiet=True), image_shape)
