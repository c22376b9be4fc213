"""Where a model can be cut, and what crosses there."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastinv import tensors, tracing
from fastinv.errors import FeatureError, NetworkError, SplitError, UnsupportedOp
from fastinv.export import export
from fastinv.network import Network
from fastinv.schedule import place_of
from fastinv.split import Split, cuttable


def exported(module: nn.Module, shape: tuple[int, ...]) -> Network:
    """A module that takes [N, *shape], exported; of one on a GPU a copy of it is.

    Raises:
        UnsupportedOp, NetworkError: it has an operation that cannot be, or does other things that no network does.
    """
    here = module if place_of(module).type == "cpu" else copy.deepcopy(module).cpu()
    return export(here, torch.zeros(2, *shape))


PROBE = 3  # images that a model is asked about, to see which layers have features of each


@dataclass(frozen=True)
class Point:
    """A split point.

    Attributes:
        at: its name.
        feature_shape: of the layer's result, for one image.
        flops: of the edge for one image, 2 a multiplication with addition; None where fastinv cannot export it.
        crossing: what else crosses, in words; empty where nothing does.
        accuracy: the share of images whose class the model tells from what is sent; None where that is not known.
    """

    at: str
    feature_shape: tuple[int, ...]
    flops: int | None
    crossing: str = ""
    accuracy: float | None = None

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
        code: what it computes, as it was traced, and its structure.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    example: torch.Tensor | None
    names: tuple[str, ...]
    code: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        mean: Sequence[float] | float,
        std: Sequence[float] | float,
        example: torch.Tensor | None,
        image_shape: tuple[int, ...],
        *,
        named: bool = False,
    ) -> Cuts:
        """With an example of this shape where torch.fx cannot trace the model, and there is none.

        Args:
            named: whether split points are named anyway, so that none has to be found.

        Raises:
            SplitError: the model cannot be traced.
            FeatureError: it does not take such images.
        """
        model = cuttable(model)
        normalisation = tensors.normalisation(mean, std, image_shape[0], FeatureError)
        for inputs in [example] if example is not None else [None, torch.zeros(2, *image_shape)]:
            try:
                traced = tracing.trace(model, inputs)
            except SplitError as error:
                failure = error
                continue
            names = tracing.split_points(traced, model, torch.zeros(PROBE, *image_shape))
            return cls(model, *normalisation, inputs, tuple(names), f"{model}\n{traced.code}")
        if not named:
            raise failure
        return cls(model, *normalisation, example, (), str(model))

    def split(self, at: str) -> Split:
        """The model, cut after a layer. `Split.crossing` says what else crosses there; no warning does."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Split: at .* not only its result crosses")
            return Split(self.model, at, self.mean, self.std, example=self.example)

    def point(self, at: str, image_shape: tuple[int, ...]) -> Point:
        """What is told of a cut.

        Raises:
            FeatureError: the model does not take images of this shape.
        """
        split = self.split(at)
        shape = tuple(split.features(torch.zeros(1, *image_shape)).shape[1:])
        try:
            flops = exported(split.edge, image_shape).flops
        except (UnsupportedOp, NetworkError):
            flops = None
        return Point(at, shape, flops, split.crossing)
