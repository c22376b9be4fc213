"""Graph rewrites of parts: what computes several parts of a value computes each where it is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from fastinv.network import Network, Step, sources
from fastinv.ops.activation import IDENTITY
from fastinv.ops.conv2d import Conv2d


def picked_early(network: Network) -> Network:
    """Convolutions of which every reader picks some channels: each reader's own computes those, and no others."""
    steps = list(network.steps)
    for index, step in enumerate(network.steps[:-1]):
        readers = network.consumers[index + 1]
        picks = [picked_channels(network.steps[reader]) for reader in readers]
        if not isinstance(step.op, Conv2d) or step.op.groups != 1 or not readers:
            continue
        if any(pick is None for pick in picks) or sum(map(len, picks)) > len(step.weights["bias"]):  # type: ignore[arg-type]
            continue
        if step.activation != IDENTITY and any(network.steps[reader].activation != IDENTITY for reader in readers):
            continue
        for reader, pick in zip(readers, picks, strict=True):
            picker = network.steps[reader]
            steps[reader] = dataclasses.replace(
                step,
                weights={key: weight[pick] for key, weight in step.weights.items()},
                activation=step.activation if picker.activation == IDENTITY else picker.activation,
                source=sources(step, picker),
            )
    return Network(network.input_shape, tuple(steps)) if steps != list(network.steps) else network


def picked_channels(step: Step) -> npt.NDArray[np.intp] | None:
    """The channels that a step copies, if that is all it does: a 1×1 convolution of zeros and ones."""
    if step.op != Conv2d() or step.weights["weight"].shape[2:] != (1, 1) or step.weights["bias"].any():
        return None
    return picked(step.weights["weight"][:, :, 0, 0])


def picked(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.intp] | None:
    """Which element each row of a matrix copies, if that is all that rows do: a 1 each, and zeros."""
    alone = ((matrix == 1).sum(1) == 1) & ((matrix != 0).sum(1) == 1)
    return matrix.argmax(1) if alone.all() else None
