"""The plan of a lowered network for people, a row a launch: see `fastinv.Engine.describe`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from fastinv.backends.cuda.lowering import Lowering
from fastinv.backends.cuda.nodes import Node
from fastinv.network import Network


def plan_of(network: Network, lowering: Lowering) -> list[dict[str, Any]]:
    """In the order in which they run, but for what only brings features in and results out."""
    plan = []
    for indices, node in zip(lowering.steps, lowering.nodes, strict=True):
        index = indices[-1]
        step = network.steps[index]
        row: dict[str, Any] = {
            "step": index,
            "op": step.op.name,
            "kernel": _kernel_name(node),
            "output": network.shapes[index + 1],
        }
        row |= {"activation": step.activation.kind, "flops": sum(network.costs[i].flops for i in indices)}
        plan.append(row | {"bytes": _bytes(network, indices), "source": step.source})
    return plan


def _bytes(network: Network, indices: tuple[int, ...]) -> int:
    """Of one image, in float32, of steps that are one launch: what they hand on never reaches memory."""
    total = sum(network.costs[index].bytes for index in indices)
    between = [(network.shapes[i + 1], network.shapes[network.steps[j].inputs[0]]) for i, j in pairwise(indices)]
    return total - sum(4 * int(np.prod(shape)) for shapes in between for shape in shapes)


def _kernel_name(node: Node) -> str:
    kernel = getattr(node, "kernel", None)
    tile = getattr(kernel, "tile", None)
    name = type(kernel).__name__
    if tile is None:
        return name
    kind = ", lasting boxes" if tile.lasting else ", boxes" if tile.boxes else ""
    return f"{name} {tile.m}x{tile.n}x{tile.k}{kind}"
