"""Small networks and inverters with random weights, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv import RMLE, InverseNetwork, Network, Step
from fastinv.ops.activation import Activation
from fastinv.ops.conv2d import Conv2d

FEATURES = (2, 6, 5)
IMAGE = (3, 6, 5)


def conv(rng: np.random.Generator, inputs: int, outputs: int, source: int = 0, **activation: Any) -> Step:
    """A 3×3 convolution that keeps the size and reads value `source`."""
    weights = {
        "weight": rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32) / np.float32(3 * inputs**0.5),
        "bias": rng.normal(size=outputs).astype(np.float32),
    }
    return Step(Conv2d(padding=(1, 1, 1, 1)), (source,), weights, Activation(**activation), f"layer{source}")


def inverse_network(seed: int = 0, **changes: Any) -> InverseNetwork:
    """From `FEATURES` to `IMAGE` in two convolutions."""
    rng = np.random.default_rng(seed)
    network = Network(FEATURES, (conv(rng, 2, 3, 0, kind="leaky_relu", a=0.1), conv(rng, 3, 3, 1)))
    note = {"target": "a", "nested": {"x": [1, 2.5, None, True, "é"]}}
    return InverseNetwork(network, **({"mean": (0.4, 0.5, 0.6), "std": (0.2,), "provenance": note} | changes))


def rmle(seed: int = 1, **changes: Any) -> RMLE:
    """Through an edge of one convolution from `IMAGE` to `FEATURES`, from a random start."""
    rng = np.random.default_rng(seed)
    edge = Network(IMAGE, (conv(rng, 3, 2, kind="leaky_relu", a=0.1),))
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2,), "steps": 7, "init": rng.random(IMAGE), "clamp": None}
    return RMLE(edge, IMAGE, **(options | changes))


def features(count: int, seed: int = 2) -> npt.NDArray[np.float32]:
    """[count, *FEATURES], normal."""
    return np.random.default_rng(seed).normal(size=(count, *FEATURES)).astype(np.float32)
