"""What came out, on disk: a folder for each target, in which an experiment is done when its JSON file is there.

TARGET/settings.json     what decides the figures: a folder goes on with the same alone
TARGET/target.pt         the target's weights
TARGET/target.json       the fraction of test images that it puts into their class
TARGET/truth.npz         the first of the test images that are recovered, uint8 [n, C, H, W]
TARGET/NAME.json         scores and how they came about, of the experiment NAME, written last
TARGET/NAME.npz          psnr and ssim of each image [N], and the first images, as recovered: uint8 [n, C, H, W]
TARGET/NAME.finv         the inverter
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv import strict_json
from fastinv.errors import FormatError
from fastinv.experiment import Pixels, Scores
from fastinv.places import make_folder, new_file
from fastinv.reproduce.paper import RECOGNISABLE, Cell

SETTINGS = "settings.json"
TARGET, TRUTH = "target.json", "truth.npz"
MOST_PSNR = 100.0  # dB; an image without any error has infinite PSNR, which no mean can hold
DRAWN = 8  # images kept of each experiment, to look at

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Result:
    """One experiment's outcome.

    Attributes:
        split, attack: what it was; the attack by its name.
        psnr, ssim: means over the images (dB, of which an image counts `MOST_PSNR` at most, and up to 1).
        recognisable: the fraction of images whose SSIM is at least 0.3.
        images: how many test images were recovered.
        recipe: of rMLE: what was chosen; empty for inverse networks.
        trials: of rMLE: what was tried on training images.
        seconds: what learning, choosing and recovering took.
        ran_on: the versions and the machine's part in it.
    """

    split: str
    attack: str
    psnr: float
    ssim: float
    recognisable: float
    images: int
    recipe: dict[str, Any]
    trials: list[dict[str, Any]]
    seconds: dict[str, float]
    ran_on: dict[str, Any]

    @classmethod
    def of(cls, cell: Cell, scores: Scores, **more: Any) -> Result:
        """The means of scores."""
        return cls(
            cell.split,
            cell.attack.name,
            float(scores.psnr.clip(max=MOST_PSNR).mean()),
            float(scores.ssim.mean()),
            float((scores.ssim >= RECOGNISABLE).mean()),
            len(scores.psnr),
            **more,
        )


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder the place of results of these settings.

    Raises:
        FormatError: it cannot be made, or holds something else.
    """
    file = folder / SETTINGS
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise FormatError(f"{folder}: holds files but no {SETTINGS}; choose another folder")
        make_folder(folder)
        _write(file, settings)
        return
    found = read_json(file)
    for name in sorted(settings | found):
        if found.get(name) != settings.get(name):
            raise FormatError(
                f"{folder}: holds results with {name} {found.get(name)!r:.80} instead of {settings.get(name)!r:.80}: "
                "choose another folder, or go on with the same"
            )


def write_target(folder: Path, accuracy: float, truth: Pixels) -> None:
    """Keep how well the target classifies the test images, and the first images that are to be recovered.

    Raises:
        FormatError: it cannot be written.
    """
    _write_arrays(folder / TRUTH, images=_bytes(truth))
    _write(folder / TARGET, {"accuracy": accuracy})


def knows_target(folder: Path) -> bool:
    """Whether a folder holds what `write_target` keeps."""
    return (folder / TARGET).exists() and (folder / TRUTH).exists()


def read_truth(folder: Path) -> Bytes:
    """The images of `write_target`, uint8 [n, C, H, W].

    Raises:
        FormatError: they are missing or damaged.
    """
    (images,) = _read_arrays(folder / TRUTH, "images")
    return images


def read(folder: Path, cell: Cell) -> Result | None:
    """What a folder knows of an experiment; None where it is not done.

    Raises:
        FormatError: its file is damaged.
    """
    file = folder / f"{cell.name}.json"
    if not (file.exists() and file.with_suffix(".npz").exists()):
        return None
    try:
        return Result(**read_json(file))
    except TypeError:
        raise FormatError(f"{file}: no result of this version; delete it, and the experiment runs again") from None


def read_images(folder: Path, cell: Cell) -> tuple[Bytes, Scores]:
    """The first images that an experiment recovered, uint8 [n, C, H, W], n at most `DRAWN`, and their scores.

    Raises:
        FormatError: they are missing or damaged.
    """
    images, psnr, ssim = _read_arrays(folder / f"{cell.name}.npz", "images", "psnr", "ssim")
    return images, Scores(psnr[: len(images)], ssim[: len(images)])


def write(folder: Path, cell: Cell, result: Result, scores: Scores, recovered: Pixels) -> None:
    """Keep an experiment's outcome.

    Raises:
        FormatError: it cannot be written.
    """
    file = folder / f"{cell.name}.npz"
    _write_arrays(file, psnr=scores.psnr, ssim=scores.ssim, images=_bytes(recovered))
    _write(file.with_suffix(".json"), asdict(result))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FormatError: it cannot be read, or is none.
    """
    try:
        found = strict_json.loads(file.read_bytes(), str(file))
    except OSError as error:
        raise FormatError(f"{file}: cannot be read ({error.strerror})") from error
    if not isinstance(found, dict):
        raise FormatError(f"{file}: no JSON object")
    return found


def _write(file: Path, value: dict[str, Any]) -> None:
    with telling(file), new_file(file) as opened:
        opened.write(json.dumps(value, indent=1).encode())


def _write_arrays(file: Path, **arrays: npt.NDArray[Any]) -> None:
    with telling(file), new_file(file) as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]  # its stubs take a name for allow_pickle


def _read_arrays(file: Path, *names: str) -> list[npt.NDArray[Any]]:
    try:
        with np.load(file) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file}: cannot be read ({error!s:.80}); delete it, and it is made again") from None


def _bytes(images: Pixels) -> Bytes:
    """The first of them, to look at."""
    return np.rint(images[:DRAWN] * 255).astype(np.uint8)


@contextmanager
def telling(file: Path) -> Iterator[None]:
    """Raise what the system refuses as a FormatError that names the file."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{file}: cannot be written ({error.strerror}); choose another folder") from error
