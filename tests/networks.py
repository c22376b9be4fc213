"""Networks for tests, made from the ops' own cases."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.base import Case
from fastinv.ops.linear import Linear
from fastinv.ops.reshape import Reshape


def network_of(case: Case, activation: Activation = IDENTITY, seed: int = 0) -> Network:
    """The case's op on random weights of unit gain.

    The network's input is the case's first input; a dense layer of the flat input makes each further one.
    """
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        fan_in = max(1, math.prod(shape[1:]))
        return rng.standard_normal(shape) / math.sqrt(fan_in)

    steps: list[Step] = []
    inputs = [0]
    size = math.prod(case.inputs[0])
    for shape in case.inputs[1:]:
        steps.append(Step(Reshape((size,)), (0,)))
        count = math.prod(shape)
        weights = {"weight": draw((count, size)), "bias": rng.standard_normal(count)}
        steps.append(Step(Linear(), (len(steps),), weights))
        steps.append(Step(Reshape(shape), (len(steps),)))
        inputs.append(len(steps))
    weights = {key: draw(shape) for key, shape in case.weights.items()}
    steps.append(Step(case.op, tuple(inputs), weights, activation))
    return Network(case.inputs[0], tuple(dataclasses.replace(s, source=f"s{k}") for k, s in enumerate(steps)))
