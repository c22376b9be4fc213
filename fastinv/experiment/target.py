"""The paper's targets: data, a trained target, exported attacks on it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastinv.attacks.rmle import PAPER_PRESETS
from fastinv.attacks.shadow import fit_shadow, train_shadow
from fastinv.checkpoints import load_tensors, save_tensors
from fastinv.data import PHOTOGRAPHS, Dataset, halves, knowledge, load, photographs
from fastinv.data_files import Indices
from fastinv.errors import DataError, TrainingError
from fastinv.experiment.scores import Pixels
from fastinv.export import export
from fastinv.inverters import RMLE, InverseNetwork
from fastinv.models import CIFAR_NORMALISATION, MNIST_NORMALISATION, cifar_net, lenet5, shadow_edge
from fastinv.ops.base import Shape
from fastinv.split import Split
from fastinv.training import accuracy, seeded, train_target


@dataclass(frozen=True)
class Model:
    """One of the paper's targets, its normalisation and the split point to take where none is named."""

    name: str
    make: Callable[[int], nn.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: str


MODELS: dict[Shape, Model] = {
    (1, 28, 28): Model("lenet5", lenet5, *MNIST_NORMALISATION, "ReLU2"),
    (3, 32, 32): Model("cifar_net", cifar_net, *CIFAR_NORMALISATION, "ReLU22"),
}


@dataclass(frozen=True)
class Experiment:
    """A data set, the target that fits its images, and the halves of the training set.

    Attributes:
        train, test: the whole sets.
        model: the target's structure.
        seed: of the halves, the training and everything else.
    """

    train: Dataset
    test: Dataset
    model: Model
    seed: int

    @classmethod
    def on(cls, source: str | Path, seed: int) -> Experiment:
        """Read the data in a folder, or cut "photographs" into crops.

        Raises:
            DataError: no data set, one without images to train on or to test with, or images of a shape that no target
                of the paper takes.
        """
        if str(source) == PHOTOGRAPHS:
            train, test = photographs(seed)
        else:
            train, test = load(source, size=(32, 32), seed=seed)
            if train.image_shape == (1, 32, 32):  # a folder of grey images
                train, test = load(source, size=(28, 28), seed=seed)
        if train.image_shape not in MODELS:
            known = " or ".join(str(list(shape)) for shape in MODELS)
            raise DataError(
                f"{source}: images {list(train.image_shape)}; the targets at hand take {known}. `fastinv audit` "
                "attacks a model of yours for others"
            )
        if len(train) < 2 or len(test) < 1:
            raise DataError(
                f"{source}: {len(train):,} images to train on and {len(test):,} to test with, expected at least one "
                "for either half of the training set, and one to test with"
            )
        return cls(train, test, MODELS[train.image_shape], seed)

    def untrained(self, at: str | None) -> Split:
        """An untrained target, cut at the split point, or at its usual one: tells what would fail after the training.

        Raises:
            SplitError: no layer of this name, or one where the target cannot be cut.
        """
        at = at or self.model.split
        with seeded(self.seed):
            fresh = self.model.make(len(self.train.classes))
        return Split(fresh, at, self.model.mean, self.model.std)

    def half(self, knowledge: str) -> Indices:
        """Indices of the training images that an attacker of this knowledge has; "same" are the target's own."""
        same, other = halves(len(self.train), self.seed)
        return same if knowledge == "same" else other

    def attacker_images(self, kind: str, count: int | None = None) -> Pixels:
        """The images of an attacker of this knowledge, as of `fastinv.knowledge`; None takes all."""
        return knowledge(self.train, kind, count, seed=self.seed, mean=self.model.mean, std=self.model.std)

    def untrained_edge(self, at: str, architecture: str, variant: int = 0) -> nn.Module:
        """What a shadow starts from: the edge's own structure, "same", or another, "different" (paper, Table 5).

        Its weights follow from the seed and the variant, and are not those that the target started from.
        """
        with seeded(self.seed + 1 + variant):
            if architecture == "different":
                return shadow_edge(at)
            return Split(self.model.make(len(self.train.classes)), at).edge

    def shadow(
        self,
        attack: str,
        split: Split,
        knowledge: str,
        architecture: str,
        count: int | None,
        variant: int = 0,
        **training: Any,
    ) -> nn.Module:
        """A shadow of the edge: learned through the cloud ("shadow"), or from queries ("fit_shadow").

        Args:
            knowledge, count: of the attacker's images.
            architecture, variant: as of `untrained_edge`.
            training: options of both attacks.
        """
        images = self.attacker_images(knowledge, count)
        start = self.untrained_edge(split.at, architecture, variant)
        if attack == "fit_shadow":
            return fit_shadow(split, images, start, **training)
        labels = self.train.labels[self.half(knowledge)[: len(images)]]
        return train_shadow(split.cloud, images, labels, start, mean=split.mean, std=split.std, **training)

    def target(
        self,
        epochs: int,
        *,
        images: int | None = None,
        file: Path | None = None,
        checkpoint: Path | None = None,
        progress: bool = True,
        **training: Any,
    ) -> nn.Module:
        """The target, trained on the half "same"; read from `file` where that exists, and written there otherwise.

        Args:
            epochs: passes over the half.
            images: how many of the half it trains on, at most; None takes all.
            file: its weights.
            checkpoint: a file to write after every epoch, and to go on from where it exists.
            progress: whether to show a progress bar.
            training: `precision` and `device` of the training.

        Raises:
            TrainingError: the file holds no weights of this target, or of another run.
        """
        chosen = self.half("same")[:images]
        with seeded(self.seed):
            module = self.model.make(len(self.train.classes))
        if file is not None and file.exists():
            return _load_target(module, file, self._identity())
        train_target(
            module,
            self.train.pixels(chosen),
            self.train.labels[chosen],
            mean=self.model.mean,
            std=self.model.std,
            epochs=epochs,
            seed=self.seed,
            checkpoint=checkpoint,
            progress=progress,
            **training,
        )
        if file is not None:
            save_tensors({"identity": self._identity(), "weights": module.state_dict()}, file)
        return module

    def accuracy(self, target: nn.Module, progress: bool = True) -> float:
        """The fraction of test images that the target puts into their class."""
        model = self.model
        return accuracy(target, self.test.pixels(), self.test.labels, mean=model.mean, std=model.std, progress=progress)

    def inverse_network(self, split: Split, module: nn.Module, **provenance: Any) -> InverseNetwork:
        """A trained inverse network, exported."""
        features = split.features(np.zeros((2, *self.test.image_shape), np.float32))
        network = export(module, torch.zeros(features.shape))
        return InverseNetwork(network, split.mean, split.std, provenance=self._provenance(split, provenance))

    def rmle(self, split: Split, edge: nn.Module, options: dict[str, Any], **provenance: Any) -> RMLE:
        """rMLE through the edge or a shadow of it: the paper's recipe for the split point, changed by `options`."""
        shape = self.test.image_shape
        chosen = PAPER_PRESETS.get(split.at, PAPER_PRESETS["conv1"]) | options
        network = export(edge, torch.zeros(2, *shape))
        chosen |= {"mean": split.mean, "std": split.std, "provenance": self._provenance(split, provenance)}
        return RMLE(network, shape, **chosen)

    def _provenance(self, split: Split, more: dict[str, Any]) -> dict[str, Any]:
        known = {"target": self.model.name, "split": split.at, "data": self.train.name, "seed": self.seed}
        return {**known, **more, "torch": torch.__version__}

    def held_out(self, count: int) -> Pixels:
        """Test images, chosen by the seed, pixels [min(count, all), C, H, W]."""
        return self.test.sample(count, self.seed).pixels()

    def _identity(self) -> dict[str, Any]:
        """What has to agree for a target's weights to be of this experiment."""
        return {"model": self.model.name, "data": self.train.name, "images": len(self.train), "seed": self.seed}


def _load_target(module: nn.Module, file: Path, identity: dict[str, Any]) -> nn.Module:
    """Read weights as `Experiment.target` saves them, or a bare state dict."""
    state = load_tensors(file)
    if isinstance(state, dict) and state.keys() == {"identity", "weights"}:
        if state["identity"] != identity:
            raise TrainingError(
                f"{file}: of the run {state['identity']}, expected {identity}; delete it or name another file"
            )
        state = state["weights"]
    try:
        module.load_state_dict(state)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise TrainingError(f"{file}: no weights of this target ({reason}); delete it or name another file") from None
    return module.eval()
