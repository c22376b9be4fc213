"""What the kernels of layers in CUDA C++ have in common (`kernels/cuda/layers.h`): which there are, and how they are
given their weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.native import usable_on

if TYPE_CHECKING:
    import torch

Tile = npt.NDArray[np.float32]

OUTPUTS = 64  # of a product, at most
FINISHES = {"identity": 0, "relu": 1, "leaky_relu": 1, "sigmoid": 2, "tanh": 3, "hardtanh": 4, "clamp": 4}
SLOPES = {"identity": 1.0, "relu": 0.0}  # below 0; leaky_relu's is its own parameter
LINEAR = ("identity", "relu", "leaky_relu")  # activations between two layers of one launch
RESULTS = ("float32", "bfloat16", "float16", "uint8")  # the order of Result in tail_output.h
CAPABILITY = (9, 0)  # of a GPU with these tensor cores; later ones have others
FEW = 8  # by how many times multiprocessors are more than images, which then take longer one by one than tile by tile

# Where the phases of an axis read, from their cell on.
AROUND = [[-1, 0, 1]]  # one phase
AROUND_TWO = [[-1, 0], [0, 1]]  # two, as of an upsampling and three taps, or of four taps at a stride of 2
ONWARD_TWO = [[0], [0, 1]]  # two, as of three taps at a stride of 2


def runs_on(device: torch.device) -> bool:
    """Whether the kernels are built, and its tensor cores those that they are made for; what stands in for a GPU has
    them."""
    import torch

    return usable_on(device) and (device.type != "cuda" or torch.cuda.get_device_capability(device) == CAPABILITY)


def are_few(images: int, device: torch.device, few: int = FEW) -> bool:
    """Whether a block for each image would leave too much of the GPU idle: all but one multiprocessor of `few`."""
    from fastinv.kernels.triton.launch import processors

    return bool(images * few < processors(device))


def reads(geometry: Any, around: list[list[int]]) -> bool:
    """Whether the phases of both axes, as many as pixels of a cell, read there and nowhere else."""
    sides = len(around)
    found = [
        [sorted(axis.first + t * spacing for t in range(len(axis.taps))) for axis in axes]
        for axes, spacing in zip(geometry.axes, geometry.spacing, strict=True)
    ]
    cells = tuple(side // sides for side in geometry.outputs)
    same = geometry.inputs == cells and geometry.outputs == tuple(sides * side for side in cells)
    return bool(same and geometry.step == (sides, sides) and geometry.stride == (1, 1) and found == [around, around])


def finish_of(epilogue: Any) -> dict[str, float]:
    """The fields of an activation in `FINISHES`."""
    return {"finish": FINISHES[epilogue.kind], "a": slope_of(epilogue), "b": epilogue.b}


def slope_of(activation: Any) -> float:
    """That of `LINEAR` ones below 0, and of others their parameter a."""
    return float(SLOPES.get(activation.kind, activation.a))


def result_of(tensor: torch.Tensor) -> int:
    """What a field of `Result` says of its type."""
    return RESULTS.index(str(tensor.dtype).removeprefix("torch."))


def tap_tiles(geometry: Any, weight: Tile, around: list[list[int]]) -> Iterator[Tile]:
    """[OUTPUTS, 64] of every 64 inputs, for every shift and the phases that may read there: 0 where one does not.

    Args:
        weight: [1, outputs, inputs, kh, kw].
    """
    outputs, inputs = weight.shape[1:3]
    tiles: dict[tuple[int, int, int, int], Tile] = {}
    for y, x in geometry.phases():
        for t, tap_y in enumerate(y.taps):
            for s, tap_x in enumerate(x.taps):
                down, right = y.first + t * geometry.spacing[0], x.first + s * geometry.spacing[1]
                tiles[down, right, y.row, x.row] = weight[0, :, :, tap_y, tap_x]
    phases = [(shift, phase) for phase, shifts in enumerate(around) for shift in shifts]
    for (down, row), (right, column) in sorted(itertools.product(phases, phases), key=_by_shift):
        tile = np.zeros((OUTPUTS, inputs), np.float32)
        tile[:outputs] = tiles.get((down, right, row, column), 0)
        yield from np.split(tile, inputs // 64, axis=1)


def _by_shift(place: tuple[tuple[int, int], tuple[int, int]]) -> tuple[int, int, int, int]:
    (down, row), (right, column) = place
    return down, right, row, column


def for_tensor_cores(tiles: Iterator[Tile], dtype: torch.dtype, device: torch.device) -> Any:
    """Matrices of 64 columns, one below the other, as tensor cores read them: pieces of 16 bytes lie in the order of
    their number xor that of the row, modulo 8."""
    import torch

    rows = np.concatenate(list(tiles))
    pieces = rows.reshape(len(rows), 8, 8)
    order = np.arange(8)[None, :] ^ (np.arange(len(rows)) % 8)[:, None]
    return torch.from_numpy(np.take_along_axis(pieces, order[:, :, None], axis=1)).to(device, dtype)


def padded(bias: torch.Tensor, size: int) -> torch.Tensor:
    """With 0 for what there is not."""
    import torch

    return torch.nn.functional.pad(bias, (0, size - len(bias)))
