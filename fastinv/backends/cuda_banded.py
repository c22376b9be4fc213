"""A quadratic form of one channel as right factors of matrix products, as `kernels/cuda/banded.h` takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda_native import Problem
from fastinv.backends.cuda_quadratic import QuadraticForm

COLUMNS, WINDOW = 8, 16  # that are made, and that they are made from: as many to each side
MOST_ROWS = 240  # of taps: a kernel has their numbers in bytes
CROWD = 4  # images for each multiprocessor, from which on sixteen together are quicker than one by one
LARGEST = 2.0**14  # of the weights: float16 ends at 65,504, and what is below 2^-24 of it is lost


def banded_problem(form: QuadraticForm) -> Problem | None:
    """None where an image has several channels, or a row's pixels reach too far."""
    kinds_y, _, down, across, channels, _ = form.weight.shape
    width = form.shape[1]
    margin = (WINDOW - COLUMNS) // 2
    if channels > 1 or across // 2 > margin:
        return None
    of_row, first = _row_taps(form.row_kind, kinds_y, down)
    if len(of_row) > MOST_ROWS:
        return None
    columns = np.arange(0, width, COLUMNS)[:, None] + np.arange(-margin, WINDOW - margin)  # of every window
    inside = (columns >= 0) & (columns < width)
    made = slice(margin, margin + COLUMNS)
    of_column = np.where(inside, form.column_kind[columns.clip(0, width - 1)], 0)[:, made]
    alike, kind = np.unique(np.concatenate([of_column, inside], axis=1), axis=0, return_inverse=True)
    of_column, inside = alike[:, :COLUMNS], alike[:, COLUMNS:] > 0
    # From column k of the window to column n of those made there are so many taps.
    tap = np.arange(WINDOW)[:, None] - np.arange(COLUMNS) - margin + across // 2
    there = (tap >= 0) & (tap < across) & inside[:, :, None] & inside[:, None, made]
    rows, taps = of_row.T[:, :, None, None, None]
    factors = form.weight[rows, of_column[:, None], taps, tap.clip(0, across - 1), 0, 0] * there
    scale = 2.0 ** np.floor(np.log2(LARGEST / max(np.abs(factors).max(), 2.0**-100)))
    arrays = {"weights": _fragments(factors * np.float32(scale)), "first": first, "kind": kind.ravel().astype(np.int32)}
    numbers = {"taps": down, "rows": len(of_row), "kinds": len(alike), "scale": scale, "unscale": 1 / scale}
    return Problem("BandedForm", "constant", arrays, numbers, CROWD)


def _row_taps(row_kind: npt.NDArray[np.int32], kinds: int, taps: int) -> tuple[Any, npt.NDArray[np.int32]]:
    """(kind, tap) for every tap by which a row of a kind reaches rows of the image; and for every row the number of its
    tap 0 among these, or where that would be."""
    rows = np.arange(len(row_kind))[:, None] + np.arange(taps) - taps // 2
    reaches = np.zeros((kinds, taps), np.bool_)
    np.logical_or.at(reaches, row_kind, (rows >= 0) & (rows < len(row_kind)))
    least = reaches.argmax(axis=1)
    start = np.concatenate([[0], reaches.sum(axis=1).cumsum()[:-1]]) - least
    return np.argwhere(reaches), start[row_kind].astype(np.int32)


def _fragments(factors: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """[..., WINDOW, COLUMNS] in two halves, as lanes have them: [..., lane, two words of the high, two of the low]."""
    high = factors.astype(np.float16)
    halves = np.stack([high, (factors - high).astype(np.float16)], axis=-3)
    pairs = halves.reshape(*halves.shape[:-2], 2, 4, 2, COLUMNS)  # upper and lower half, lane % 4, two rows
    lanes = np.moveaxis(pairs, (-1, -3, -5, -4, -2), (-5, -4, -3, -2, -1))
    return np.ascontiguousarray(lanes).view(np.int32).reshape(*factors.shape[:-2], 32, 4)
