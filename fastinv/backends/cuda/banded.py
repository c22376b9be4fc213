"""A quadratic form as right factors of matrix products, as `kernels/cuda/banded.h` takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.fragments import scale_below, split_right
from fastinv.backends.cuda.native import Problem
from fastinv.backends.cuda.quadratic import QuadraticForm

COLUMNS, WINDOW = 8, 16  # that are made, and that they are made from: as many more to each side
MARGIN = (WINDOW - COLUMNS) // 2
MOST_FACTORS = 240  # of one channel: a kernel has their numbers in bytes
ROW_TAPS = 9  # of one channel: the kernel has no others
# Images for each multiprocessor, from which on several together are quicker than one by one. On an H200 528 images took
# 200 steps in 2.4 ms by sixteens and 1.7 one by one, 4,096 in 4.6 and 8.0; of three channels, by fours, 528 took 3.1
# and 3.6, 4,096 19 and 23.
CROWD, CROWD_OF_COLOURS = 8, 4
LARGEST = 14  # the weights' largest is next below this power of two


def banded_problem(form: QuadraticForm) -> Problem | None:
    """None where pixels reach too far, or rows of several channels differ by more than the first's and last's own."""
    _, _, down, across, channels, _ = form.weight.shape
    if across // 2 > MARGIN:
        return None
    first = None
    if channels == 1:
        if down > ROW_TAPS:
            return None
        around = (ROW_TAPS - down) // 2
        weight = np.pad(form.weight, [(0, 0), (0, 0), (around, around), *[(0, 0)] * 3])
        down = ROW_TAPS
        of_row, first = _row_taps(form, down)
        kinds, taps = of_row.T
        bands = weight[kinds, :, taps, :, 0, 0]
    else:
        same = _same_bands(form)
        if same is None:
            return None
        bands = np.moveaxis(same, (3, 4), (1, 2)).reshape(-1, *same.shape[1:3])
    if len(bands) > MOST_FACTORS:
        return None
    factors, kind = _factors(form, bands)
    scale, least = scale_below(factors, LARGEST), CROWD if channels == 1 else CROWD_OF_COLOURS
    arrays = {"weights": split_right(factors * np.float32(scale)).view(np.int32), "kind": kind}
    if first is not None:
        arrays["first"] = first
    numbers = {"taps": down, "kinds": factors.shape[0], "factors": factors.shape[1]}
    return Problem("BandedForm", "constant", arrays, {**numbers, "scale": scale, "unscale": 1 / scale}, least)


def _row_taps(form: QuadraticForm, taps: int) -> tuple[Any, npt.NDArray[np.int32]]:
    """(kind, tap) for every tap by which a row of a kind reaches rows of the image; and for every row the number of its
    tap 0 among these, or where that would be."""
    height, kinds = len(form.row_kind), form.weight.shape[0]
    rows = np.arange(height)[:, None] + np.arange(taps) - taps // 2
    reaches = np.zeros((kinds, taps), np.bool_)
    np.logical_or.at(reaches, form.row_kind, (rows >= 0) & (rows < height))
    start = np.concatenate([[0], reaches.sum(axis=1).cumsum()[:-1]]) - reaches.argmax(axis=1)
    return np.argwhere(reaches), start[form.row_kind].astype(np.int32)


def _same_bands(form: QuadraticForm) -> npt.NDArray[np.float32] | None:
    """Bands [taps + 2, column kinds, column taps, channels in, channels out] of all rows; the last two are what the
    first row and the last have more by the tap that is the row itself. None where rows differ elsewhere."""
    height, taps = len(form.row_kind), form.weight.shape[2]
    middle = form.weight[form.row_kind[height // 2]]
    bands = np.moveaxis(middle, 1, 0)
    more = [form.weight[form.row_kind[row]][:, taps // 2] - middle[:, taps // 2] for row in (0, height - 1)]
    for row in range(height):
        for tap in range(taps):
            own = tap == taps // 2 and row in (0, height - 1)
            if not 0 <= row + tap - taps // 2 < height or own:
                continue
            if np.abs(form.weight[form.row_kind[row]][:, tap] - middle[:, tap]).max() > 1e-6 * np.abs(middle).max():
                return None
    return np.concatenate([bands, np.stack(more)])


def _factors(form: QuadraticForm, bands: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], Any]:
    """[kinds, bands, WINDOW, COLUMNS] of [bands, column kinds, column taps], and the kind of each eight columns."""
    width, across = form.shape[1], bands.shape[2]
    columns = np.arange(0, width, COLUMNS)[:, None] + np.arange(-MARGIN, WINDOW - MARGIN)  # of every window
    inside = (columns >= 0) & (columns < width)
    made = slice(MARGIN, MARGIN + COLUMNS)
    of_column = np.where(inside, form.column_kind[columns.clip(0, width - 1)], 0)[:, made]
    alike, kind = np.unique(np.concatenate([of_column, inside], axis=1), axis=0, return_inverse=True)
    of_column, inside = alike[:, :COLUMNS], alike[:, COLUMNS:] > 0
    # From column k of the window to column n of those made there are so many taps.
    tap = np.arange(WINDOW)[:, None] - np.arange(COLUMNS) - MARGIN + across // 2
    there = (tap >= 0) & (tap < across) & inside[:, :, None] & inside[:, None, made]
    factors = bands[:, of_column[:, None], tap.clip(0, across - 1)] * there
    return factors.swapaxes(0, 1), kind.ravel().astype(np.int32)
