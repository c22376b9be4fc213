"""One training loop for targets, inverse networks and shadows: seeds, progress, checkpoints, divergence."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from fastinv import pixels, tensors
from fastinv.backends.torch import torch_threads
from fastinv.checkpoints import Checkpoint, identity
from fastinv.errors import FastinvError, TrainingError
from fastinv.schedule import Schedule, place_of
from fastinv.split import normalise
from fastinv.tensors import chunks

# FLOPs of a step below which one thread is used: the work of a few milliseconds is not worth OpenMP's barriers, which
# on a machine that does other work, too, cost several times as much.
SMALL_STEP = 300_000_000

# (indices of the batch) -> loss to descend
BatchLoss = Callable[[torch.Tensor], torch.Tensor]


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

    Small steps run on one thread, larger ones on as many as torch is set to. Convolutions compute channels last in
    modules that `takes_channels_last`.

    Args:
        loss: the loss of a batch, from the indices of its samples; modules are asked by `Schedule.forward`.
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
    batches = -(-count // schedule.batch_size)
    total = schedule.epochs * batches
    module.train()
    with _placed(module, schedule.device):
        optimizer = schedule.optimizer_of(p for p in module.parameters() if p.requires_grad)
        first = 0
        kept: Checkpoint | None = None
        if checkpoint is not None:
            kept = Checkpoint(checkpoint, identity(module, schedule.identity(), data))
            first = kept.resume(module, optimizer)
            if first < schedule.epochs:
                kept.expect_place()
        with _bar(total, first * batches, progress) as bar:
            for epoch in range(first, schedule.epochs):
                with seeded(schedule.seed * 1_000_003 + epoch):  # each by itself, so that a resumed run repeats
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


@contextmanager
def _placed(module: nn.Module, device: str | torch.device | None) -> Iterator[None]:
    """Have a module on a device, its convolutions laid out for it, and bring it back to where it was, as it was."""
    home, weights = place_of(module), _to_lay_out(module)
    try:
        if device is not None:
            module.to(device)
        _lay_out(weights, torch.channels_last)
        yield
    finally:
        _lay_out(weights, torch.contiguous_format)
        if device is not None:
            module.to(home)


def takes_channels_last(module: nn.Module) -> bool:
    """Whether a module's parts are PyTorch's own and fastinv's. What others do in a forward, such as a `view` of a
    convolution's result, may need the channels first."""
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            if any(node.op not in ("placeholder", "call_module", "output") for node in part.graph.nodes):
                return False
        elif not type(part).__module__.startswith(("torch.nn.modules.", "fastinv.")):
            return False
    return True


def _to_lay_out(module: nn.Module) -> list[nn.Parameter]:
    """The weights of 2-d convolutions, whose results follow them; none of a module that may not take these.

    Of the paper's targets and decoders a step takes 0.75 to 1 times as long channels last in float32 on a CPU, in
    bfloat16 0.65 to 0.8 times.
    """
    if not takes_channels_last(module) or any(map(is_lazy, module.parameters())):
        return []
    memory = Counter(parameter.untyped_storage().data_ptr() for parameter in module.parameters())

    def alone(weight: nn.Parameter) -> bool:
        """Whether nobody else, here or in another process, has its memory, which is to be another."""
        shared: bool = weight.is_shared()  # type: ignore[no-untyped-call]
        return memory[weight.untyped_storage().data_ptr()] == 1 and not shared

    convolutions = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))]
    weights = dict.fromkeys(cast(nn.Parameter, part.weight) for part in convolutions)
    return [weight for weight in weights if weight.is_contiguous() and alone(weight)]


def _lay_out(weights: list[nn.Parameter], memory_format: torch.memory_format) -> None:
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=memory_format)


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
    precision: str = "float32",
    device: str | torch.device | None = None,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Train a classifier in place with cross-entropy (paper: Adam, lr 1e-3).

    Args:
        model: normalised images [N, C, H, W] to logits [N, K].
        images, labels: pixels [N, C, H, W] and class indices [N].
        mean, std: the model's normalisation.
        epochs, batch_size, lr, seed, precision, device, progress, checkpoint: as of `fastinv.train_inverse_network`.

    Returns:
        The model, in eval mode.

    Raises:
        TrainingError: arguments that do not go together, divergence, or a checkpoint of another run or place.
        FeatureError: images that are no array or tensor, or a normalisation that does not fit them.
    """
    schedule = Schedule(epochs, batch_size, lr, "adam", seed, precision, device)
    z = normalised(images, mean, std)
    classes = class_indices(labels, len(z))
    model = trainable("model", model)

    def loss(indices: torch.Tensor) -> torch.Tensor:
        return cross_entropy(schedule.forward(model, z[indices]), classes[indices])

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
                logits = model(z[start:stop].to(place_of(model)))
            _expect_logits(logits, classes[start:stop])
            right += int((logits.argmax(1).cpu() == classes[start:stop]).sum())
            if bar is not None:
                bar.update()
    return right / max(1, len(z))


def cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The mean of −log softmax(logits)[class]; logits [N, K], classes [N].

    Raises:
        TrainingError: logits of another shape, or classes they have no entry for.
    """
    _expect_logits(logits, classes)
    return nn.functional.cross_entropy(logits, classes.to(logits.device))


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
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = range(torch.cuda.device_count()) if used else []
    with torch.random.fork_rng(devices=gpus):
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
