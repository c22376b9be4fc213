"""The demo: train a target and an attack on it, export, invert with the compiled engine, compare, draw."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import fastinv
from fastinv.backends.torch import torch_threads
from fastinv.benchmark import TOLERANCE, interleaved
from fastinv.data import PHOTOGRAPHS
from fastinv.errors import BackendError
from fastinv.experiment.scores import Scores
from fastinv.experiment.target import Experiment
from fastinv.picture import Row, picture
from fastinv.places import make_folder
from fastinv.split import Split

REPEAT = 7  # samples of each contender
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Effort:
    """How long the demo trains: images of the target and of the attacker, epochs of the target and of the attack."""

    images: int
    target_epochs: int
    epochs: int


EFFORTS = {"lenet5": Effort(20_000, 2, 4), "cifar_net": Effort(2_500, 2, 8)}  # by target: about a minute each


@dataclass(frozen=True)
class Demo:
    """What the demo does.

    Args:
        data: a data set's folder, or "photographs".
        split: the split point; None takes the target's usual one.
        seed: of everything.
        out: the folder for the picture and the `.finv` files.
        effort: how long to train; None takes what suits the target.
        held_out: test images to recover.
        batch: images at once, for the timing.
        drawn: how many rMLE recovers, too, and the picture shows.
        steps: of rMLE.
        progress: whether to show progress bars.
    """

    data: str = PHOTOGRAPHS
    split: str | None = None
    seed: int = 0
    out: Path = Path("fastinv-demo")
    effort: Effort | None = None
    held_out: int = 1000
    batch: int = 256
    drawn: int = 8
    steps: int = 300
    progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """What the demo found.

    Attributes:
        inverse_network, rmle: scores of both attacks.
        error: relative difference of the compiled engine's images from PyTorch's.
        ratio: the engine's speed, as a multiple of PyTorch eager's.
        picture: the PNG file.
    """

    inverse_network: Scores
    rmle: Scores
    error: float
    ratio: float
    picture: Path


def run(demo: Demo) -> Outcome:
    """Do it all, and print what is found.

    Raises:
        BackendError: the compiled engine's images differ from PyTorch's.
        DataError, SplitError, TrainingError, FormatError: the data, the split point or the folder do not fit.
    """
    begin = time.perf_counter()
    make_folder(demo.out)
    experiment = Experiment.on(demo.data, demo.seed)
    train, test = experiment.train, experiment.test
    print(f"data       {demo.data}: {len(train):,} training and {len(test):,} test images {list(test.image_shape)}")
    model = experiment.model
    effort = demo.effort or EFFORTS[model.name]
    at = experiment.untrained(demo.split).at
    target = experiment.target(effort.target_epochs, images=effort.images, progress=demo.progress)
    print(
        f"target     {model.name}: {experiment.accuracy(target, demo.progress):.1%} of the test images classified right"
    )
    split = Split(target, at, model.mean, model.std)

    decoder = _train(demo, experiment, split, effort)
    inverter = experiment.inverse_network(split, decoder, attack="inverse_network", knowledge="distribution")
    path = demo.out / "inverse_network.finv"
    inverter.save(path)
    print(f"attack     inverse network for features {list(inverter.feature_shape)} at {split.at}: {path}")

    truth = experiment.held_out(demo.held_out)
    features = split.features(truth)
    images = fastinv.invert(features, path)
    error = _expect_same(images, decoder, features, inverter)
    scores = Scores.of(truth, images)
    print(f"recovered  {len(truth):,} test images: {scores}")
    ratio = _race(demo, inverter, decoder, features)

    few, drawn = slice(0, demo.drawn), truth[: demo.drawn]
    solved = _solve(demo, experiment, split, features[few])
    rmle_scores = Scores.of(drawn, solved)
    print(f"rMLE       {len(drawn)} test images, {demo.steps} steps of L-BFGS: {rmle_scores}")
    rows = [
        Row("truth", drawn),
        Row(f"inverse network at {split.at}", images[few], Scores.of(drawn, images[few]).captions()),
        Row(f"rMLE at {split.at}", solved, rmle_scores.captions()),
    ]
    drawing = demo.out / "demo.png"
    picture(rows).save(drawing)
    print(f"picture    {drawing}")
    print(f"time       {time.perf_counter() - begin:.0f} s in all")
    return Outcome(scores, rmle_scores, error, ratio, drawing)


def _train(demo: Demo, experiment: Experiment, split: Split, effort: Effort) -> torch.nn.Module:
    """An inverse network, trained on images like the target's, but not its own: the other half of the training set."""
    pixels = experiment.train.pixels(experiment.half("distribution")[: effort.images])
    return fastinv.train_inverse_network(
        split, pixels, epochs=effort.epochs, batch_size=32, seed=demo.seed, progress=demo.progress
    )


def _expect_same(images: Pixels, decoder: torch.nn.Module, features: Pixels, inverter: fastinv.InverseNetwork) -> float:
    """The relative difference of the engine's pixels from those of PyTorch in float64."""
    exact = copy.deepcopy(decoder).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (inverter.mean, inverter.std))
    with torch.no_grad():
        z = torch.cat([exact(part.double()) for part in torch.from_numpy(features).tensor_split(8)])
    expected = (z * std + mean).clamp(0, 1).numpy()
    error = float(np.linalg.norm(images - expected) / np.linalg.norm(expected))
    largest = float(np.abs(images - expected).max())
    print(f"check      against PyTorch in float64: relative difference {error:.1e}, largest {largest:.1e}")
    if not error <= TOLERANCE:
        raise BackendError(
            f"the compiled engine's images differ from PyTorch's by {error:.2g} (relative), expected at most "
            f"{TOLERANCE:g}: a bug; please report it"
        )
    return error


def _race(demo: Demo, inverter: fastinv.InverseNetwork, decoder: torch.nn.Module, features: Pixels) -> float:
    """How many times as fast as PyTorch eager the compiled inverse network is, with as many threads."""
    threads = len(os.sched_getaffinity(0))
    engine = fastinv.compile(inverter, threads=threads)
    assert isinstance(engine, fastinv.Engine)
    x = torch.from_numpy(np.resize(features, (demo.batch, *features.shape[1:])))
    with torch.no_grad(), torch_threads(threads):
        compiled, eager = interleaved([lambda: engine(x), lambda: decoder(x)], REPEAT)
    print(
        f"speed      {demo.batch / compiled:,.0f} images/s ({engine.backend}, {engine.isa}); PyTorch eager "
        f"{demo.batch / eager:,.0f}: {eager / compiled:.2f} times as fast, {threads} threads, batches of {demo.batch}"
    )
    return eager / compiled


def _solve(demo: Demo, experiment: Experiment, split: Split, features: Pixels) -> Pixels:
    """The images that rMLE recovers, with the compiled solver."""
    # On crops of photographs at ReLU22 300 steps end at 23.7 dB; 500 of Adam at a step size of 1e-2 at 16.1.
    options = {"steps": demo.steps, "optimizer": "lbfgs", "clamp": (0.0, 1.0)}
    solver = experiment.rmle(split, split.edge, options, attack="rmle")
    path = demo.out / "rmle.finv"
    solver.save(path)
    workers = len(os.sched_getaffinity(0))
    images: Pixels = fastinv.invert(features, path, batch_size=workers, progress=demo.progress)
    return images
