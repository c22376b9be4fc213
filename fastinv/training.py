"""One training loop for targets, inverse networks and shadows: seeds, progress, checkpoints, divergence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastinv import pixels, tensors
from fastinv.backends.torch import torch_threads
from fastinv.checkpoints import Checkpoint, identity
from fastinv.errors import FastinvError, TrainingError
from fastinv.split import normalise
from fastinv.tensors import chunks, is_number, is_whole

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}

# FLOPs of a step below which one thread is used: the work of a few milliseconds is not worth OpenMP's barriers, which
# on a machine that does other work, too, cost several times as much.
SMALL_STEP = 300_000_000

# (indices of the batch) -> loss to descend
BatchLoss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        epochs: passes over the data.
        batch_size: samples in a step; the last, smaller batch of an epoch counts too.
        lr: peak step size; it falls along a half cosine to zero.
        optimizer: "adam" or "sgd" (momentum 0.9).
        seed: of the order of the samples, from 0 to 2³² − 1; a seed makes a run repeat exactly, with the same number
            of threads.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (is_whole(value) and value >= least) or (name == "seed" and value >= 2**32):
                most = " and below 2**32" if name == "seed" else ""
                raise TrainingError(f"{name} {value!r:.40}, expected an integer >= {least}{most}")
            object.__setattr__(self, name, int(value))  # a checkpoint cannot hold numpy's
        if not (is_number(self.lr) and 0 < self.lr < math.inf):
            raise TrainingError(f"lr {self.lr!r:.40}, expected a number above 0")
        object.__setattr__(self, "lr", float(self.lr))
        if not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS:
            raise TrainingError(f"optimizer {self.optimizer!r:.40}, expected one of {', '.join(OPTIMIZERS)}")


def fit(
    module: nn.Module,
    loss: BatchLoss,
    count: int,
    schedule: Schedule,
    *,
    progress: bool | str = False,
    checkpoint: str | Path | None = None,
    data: Sequence[torch.Tensor] = (),
) -> nn.Module:
    """Train `module` in place on batches of `count` samples and return it in eval mode.

    Small steps run on one thread, larger ones on as many as torch is set to.

    Args:
        loss: the loss of a batch, from the indices of its samples.
        progress: whether to show a progress bar; a string names it.
        checkpoint: a file written after every epoch; where it exists, training goes on from it. It has to be of the
            same schedule: the step size falls over all epochs, so that a run of more takes other steps from the first.
        data: what the samples are made of; a checkpoint of other data is refused.

    Raises:
        TrainingError: no samples, shapes that do not go together, a loss that is no number, NaN or Inf or has no
            gradient, a checkpoint of another run, or one that cannot be written.
    """
    if count == 0:
        raise TrainingError("no samples to train on; pass at least one image")
    module.train()
    optimizer = OPTIMIZERS[schedule.optimizer]([p for p in module.parameters() if p.requires_grad], lr=schedule.lr)
    batches = -(-count // schedule.batch_size)
    total = schedule.epochs * batches
    first = 0
    kept: Checkpoint | None = None
    if checkpoint is not None:
        kept = Checkpoint(checkpoint, identity(module, asdict(schedule), data))
        first = kept.resume(module, optimizer)
        if first < schedule.epochs:
            kept.expect_place()
    with _bar(total, first * batches, progress) as bar:
        for epoch in range(first, schedule.epochs):
            with seeded(schedule.seed * 1_000_003 + epoch):  # each epoch by itself, so that a resumed run repeats
                for batch, indices in enumerate(torch.split(torch.randperm(count), schedule.batch_size)):
                    rate = 0.5 * schedule.lr * (1 + math.cos(math.pi * (epoch * batches + batch) / total))
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    if batch == 0:  # in every epoch, so that a resumed run repeats
                        with torch_threads(1), FlopCounterMode(display=False) as counter:
                            value = _step(optimizer, loss, indices, epoch)
                        threads = 1 if counter.get_total_flops() < SMALL_STEP else None
                    else:
                        with torch_threads(threads):
                            value = _step(optimizer, loss, indices, epoch)
                    if bar is not None:
                        bar.update()
                        bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            if kept is not None:
                kept.save(epoch + 1, module, optimizer)
    return module.eval()


def _step(optimizer: torch.optim.Optimizer, loss: BatchLoss, indices: torch.Tensor, epoch: int) -> float:
    optimizer.zero_grad()
    with _told("a batch cannot be computed"):
        value = loss(indices)
    if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
        raise TrainingError(
            f"the loss is {value!r:.80}, expected a tensor of one number with a gradient, such as a mean of what the "
            "module gives"
        )
    found = float(value.detach())
    if not math.isfinite(found):
        raise TrainingError(f"training diverged: the loss became {found} in epoch {epoch + 1}; lower lr")
    with _told("a batch has no gradient"):
        value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return found


@contextmanager
def _told(what: str) -> Iterator[None]:
    """What torch makes of modules and data that do not fit, as a TrainingError."""
    try:
        yield
    except FastinvError:
        raise
    except RuntimeError as error:
        raise TrainingError(f"{what} ({error!s:.300}); do the modules and the data fit?") from error


def train_target(
    model: nn.Module,
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Train a classifier in place with cross-entropy (paper: Adam, lr 1e-3).

    Args:
        model: normalised images [N, C, H, W] to logits [N, K].
        images, labels: pixels [N, C, H, W] and class indices [N].
        mean, std: the model's normalisation.
        epochs, batch_size, lr, seed, progress, checkpoint: as of `fastinv.train_inverse_network`.

    Returns:
        The model, in eval mode.

    Raises:
        TrainingError: arguments that do not go together, divergence, or a checkpoint of another run or place.
        FeatureError: images that are no array or tensor, or a normalisation that does not fit them.
    """
    z = normalised(images, mean, std)
    classes = class_indices(labels, len(z))
    model = trainable("model", model)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(z[indices]), classes[indices])

    schedule = Schedule(epochs, batch_size, lr, "adam", seed)
    bar = "target" if progress else False
    return fit(model, loss, len(z), schedule, progress=bar, checkpoint=checkpoint, data=(z, classes))


def accuracy(
    model: nn.Module,
    images: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    progress: bool = False,
) -> float:
    """The fraction of images that `model` puts into their class; 0 of none.

    Args:
        model: normalised images [N, C, H, W] to logits [N, K]; it is copied, and asked in eval mode.
        images, labels: pixels [N, C, H, W] and class indices [N].
        mean, std: the model's normalisation.
        progress: whether to show a progress bar.

    Raises:
        TrainingError: no module, or one that does not take the images or gives no logits for the labels.
        FeatureError: images that are no array or tensor, or a normalisation that does not fit them.
    """
    z = normalised(images, mean, std)
    classes = class_indices(labels, len(z))
    if not isinstance(model, nn.Module):
        raise TrainingError(f"model: {type(model).__name__}, expected a torch.nn.Module")
    model = copy.deepcopy(model).eval()
    right, batch = 0, 500
    with torch.no_grad(), _bar(-(-len(z) // batch), 0, "accuracy" if progress else False) as bar:
        for start, stop in chunks(len(z), batch):
            with _told("the model cannot be asked"):
                logits = model(z[start:stop])
            _expect_logits(logits, classes[start:stop])
            right += int((logits.argmax(1) == classes[start:stop]).sum())
            if bar is not None:
                bar.update()
    return right / max(1, len(z))


def cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The mean of −log softmax(logits)[class]; logits [N, K], classes [N].

    Raises:
        TrainingError: logits of another shape, or classes they have no entry for.
    """
    _expect_logits(logits, classes)
    return nn.functional.cross_entropy(logits, classes)


def _expect_logits(logits: Any, classes: torch.Tensor) -> None:
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else f"of type {type(logits).__name__}"
    count, highest = len(classes), int(classes.max())
    if not isinstance(shape, list) or len(shape) != 2 or shape[0] != count or highest >= shape[1]:
        raise TrainingError(
            f"logits {shape} for {count} labels up to {highest}, expected [{count}, K] with K > {highest}"
        )


def trainable(what: str, given: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The module given, or made by what is given.

    Raises:
        TrainingError: it is none, or has nothing to train.
    """
    module = given() if callable(given) and not isinstance(given, nn.Module) else given
    if not isinstance(module, nn.Module) or not any(p.requires_grad for p in module.parameters()):
        raise TrainingError(f"{what}: {type(module).__name__}, expected a torch.nn.Module that can be trained")
    return module


def normalised(images: Any, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images, numpy or torch, of float pixels in [0, 1] or uint8, as z = (x − mean) / std, float32 [N, C, H, W].

    Raises:
        TrainingError: not a batch of images, NaN or Inf, or float pixels of 0 to 255.
        FeatureError: no array or tensor on the CPU, or a normalisation that does not fit.
    """
    data, dtype, _ = tensors.as_numpy(images, "images")
    if data.ndim != 4 or dtype not in pixels.KINDS:
        raise TrainingError(f"images: {list(data.shape)} {dtype}, expected float pixels, or uint8, [N, C, H, W]")
    x = pixels.checked(data, dtype, TrainingError)
    return normalise(torch.from_numpy(x if x.flags.writeable else x.copy()), mean, std)


def class_indices(labels: Any, count: int) -> torch.Tensor:
    """Labels, numpy, torch or a sequence, as int64 [count].

    Raises:
        TrainingError: another number of labels, or no whole numbers >= 0.
    """
    try:
        found = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, tensors on a GPU
        raise TrainingError(f"labels: {error!s:.120}; expected {count} whole numbers >= 0") from None
    whole = found.dtype.kind in "iu" and found.shape == (count,)
    classes = found.astype(np.int64) if whole else np.array([-1])  # of uint64 too large ones become negative
    if (classes < 0).any():
        raise TrainingError(
            f"labels of shape {list(found.shape)} and dtype {found.dtype}, expected {count} whole numbers >= 0"
        )
    return torch.from_numpy(classes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make torch's random numbers inside repeat, and leave those outside as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def _bar(total: int, done: int, progress: bool | str) -> Iterator[Any]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="batch", desc=progress if isinstance(progress, str) else "train") as bar:
        yield bar
