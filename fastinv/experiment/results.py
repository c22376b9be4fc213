"""What came out, on disk: a folder for each target, in which an experiment is done when its JSON file is there.

settings.json     what decides the figures: a folder goes on with the same alone
target.pt         the target's weights, where fastinv trained it
target.json       their SHA-256, and the fraction of test images that it puts into their class
truth.npz         the first of the test images that are recovered, uint8 [n, C, H, W]
NAME.json         scores and how they came about, of the experiment NAME, written last
NAME.npz          psnr and ssim of each image [N], and the first images, as recovered: uint8 [n, C, H, W]
NAME.finv         the inverter
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv import strict_json
from fastinv.errors import FormatError
from fastinv.experiment.cells import Cell
from fastinv.experiment.scores import Pixels, Scores
from fastinv.places import make_folder, new_file
from fastinv.tensors import is_number

SETTINGS = "settings.json"
WEIGHTS, CHECKPOINT = "target.pt", "target.checkpoint"
TARGET, TRUTH = "target.json", "truth.npz"
DRAWN = 8  # images kept of each experiment, to look at

_AGAIN = "delete it, and it is made again"
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Result:
    """One experiment's outcome.

    Attributes:
        split, attack: what it was; the attack by its name.
        psnr, ssim: means over the images, in dB and up to 1, as of `Scores.means`.
        recognisable: the fraction of images as of `Scores.recognisable`.
        images: how many test images were recovered.
        chosen_on: of rMLE: on how many training images its recipe was chosen; 0 for inverse networks.
        recipe: of rMLE: what was chosen, with the mean PSNR and SSIM of these; empty for inverse networks.
        trials: of rMLE: all that was tried.
        seconds: what learning, choosing and recovering took.
        ran_on: the versions and the machine's part in it.
    """

    split: str
    attack: str
    psnr: float
    ssim: float
    recognisable: float
    images: int
    chosen_on: int
    recipe: dict[str, Any]
    trials: list[dict[str, Any]]
    seconds: dict[str, float]
    ran_on: dict[str, Any]

    @classmethod
    def of(cls, cell: Cell, scores: Scores, **more: Any) -> Result:
        """The means of scores."""
        return cls(cell.split, cell.attack.name, *scores.means, scores.recognisable, len(scores.psnr), **more)


KINDS: dict[str, type] = {  # of a result's fields, in JSON
    **dict.fromkeys(("split", "attack"), str),
    **dict.fromkeys(("psnr", "ssim", "recognisable"), float),
    **dict.fromkeys(("images", "chosen_on"), int),
    **dict.fromkeys(("recipe", "seconds", "ran_on"), dict),
    "trials": list,
}


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder the place of results of these settings.

    Raises:
        FormatError: it cannot be made, or holds something else.
    """
    file = folder / SETTINGS
    others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())  # hidden: begun to be written
    if not file.exists():  # asked after the others: another process may have just begun
        if others:
            raise FormatError(f"{folder}: holds files but no {SETTINGS}; choose another folder")
        make_folder(folder)
        _write(file, settings)
        return
    found = read_settings(folder)
    for name in sorted(settings | found):
        if found.get(name) != settings.get(name):
            if not _begun(folder):
                (folder / CHECKPOINT).unlink(missing_ok=True)
                _write(file, settings)
                return
            raise FormatError(
                f"{folder}: holds results with {name} {found.get(name)!r:.80} instead of {settings.get(name)!r:.80}: "
                "choose another folder, or go on with the same"
            )


def _begun(folder: Path) -> bool:
    """Whether anything was done, or begun, that has settings; but for the target's training."""
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    return not names <= {SETTINGS, CHECKPOINT, TRUTH}


def split_points(folder: Path) -> list[str]:
    """The split points that a folder has results of.

    Raises:
        FormatError: a result is damaged.
    """
    files = (file for file in sorted(folder.glob("*.json")) if file.name not in (SETTINGS, TARGET))
    return list(dict.fromkeys(str(strict_json.read_object(file).get("split")) for file in files))


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a folder's results are of.

    Raises:
        FormatError: they cannot be read.
    """
    return {"precision": "float32"} | strict_json.read_object(folder / SETTINGS)  # which earlier versions do not say


def sha256(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """The digest of what arrays hold."""
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def write_target(folder: Path, sha256: str, accuracy: float, truth: Pixels) -> None:
    """Keep which target it is, how well it classifies the test images, and the first images that are to be recovered.

    Raises:
        FormatError: the results that are there are of another target, or it cannot be written.
    """
    file = folder / TARGET
    if file.exists() and read_target(folder)["sha256"] != sha256:
        raise FormatError(f"{folder}: {WEIGHTS} is not the target that the results here are of; choose another folder")
    write_truth(folder, truth)
    _write(file, {"sha256": sha256, "accuracy": accuracy})


def write_truth(folder: Path, truth: Pixels) -> None:
    """Keep the first images that are to be recovered.

    Raises:
        FormatError: they cannot be written.
    """
    _write_arrays(folder / TRUTH, images=_bytes(truth))


def read_target(folder: Path) -> dict[str, Any]:
    """What `write_target` keeps: `sha256` and `accuracy`.

    Raises:
        FormatError: it is damaged.
    """
    file = folder / TARGET
    found = strict_json.read_object(file)
    if not (isinstance(found.get("sha256"), str) and isinstance(found.get("accuracy"), float)):
        raise FormatError(f"{file}: no target of this version; delete it, and it is made again")
    return found


def knows_target(folder: Path) -> bool:
    """Whether a folder holds what `write_target` keeps."""
    return (folder / TARGET).exists() and (folder / TRUTH).exists()


def read_truth(folder: Path) -> Bytes:
    """The images of `write_truth`, uint8 [n, C, H, W].

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
    found = strict_json.read_object(file)
    fits = found.keys() == KINDS.keys() and all(isinstance(found[name], kind) for name, kind in KINDS.items())
    recipe = found["recipe"] if fits else {}
    numbers = ("tv_weight", "tv_beta", "steps", "psnr") if cell.attack.kind != "inverse_network" else ()
    if not (
        fits
        and (found["split"], found["attack"]) == (cell.split, cell.attack.name)
        and all(is_number(recipe.get(name)) for name in numbers)
    ):
        raise FormatError(f"{file}: no result of this version; delete it, and the experiment runs again")
    return Result(**found)


def read_images(folder: Path, cell: Cell) -> tuple[Bytes, Scores]:
    """The first images that an experiment recovered, uint8 [n, C, H, W], n at most `DRAWN`, and their scores.

    Raises:
        FormatError: they are missing or damaged.
    """
    file = folder / f"{cell.name}.npz"
    images, psnr, ssim = _read_arrays(file, "images", "psnr", "ssim")
    if not (psnr.ndim == 1 and psnr.shape == ssim.shape and len(images) <= len(psnr)):
        raise FormatError(f"{file}: scores {list(psnr.shape)} and {list(ssim.shape)}; {_AGAIN}")
    return images, Scores(psnr[: len(images)], ssim[: len(images)])


def write(folder: Path, cell: Cell, result: Result, scores: Scores, recovered: Pixels) -> None:
    """Keep an experiment's outcome.

    Raises:
        FormatError: it cannot be written.
    """
    file = folder / f"{cell.name}.npz"
    _write_arrays(file, psnr=scores.psnr, ssim=scores.ssim, images=_bytes(recovered))
    _write(file.with_suffix(".json"), asdict(result))


def expect_ours(out: Path, targets: Iterable[str], reports: Iterable[str]) -> None:
    """Raise FormatError where reports would take the place of files that no run has written."""
    if not any((out / target / SETTINGS).exists() for target in targets):
        for name in reports:
            if (out / name).exists():
                raise FormatError(f"{out / name}: is there, but no results; choose another folder")


def _write(file: Path, value: dict[str, Any]) -> None:
    with telling(file), new_file(file) as opened:
        opened.write(json.dumps(value, indent=1, allow_nan=False).encode())


def _write_arrays(file: Path, **arrays: npt.NDArray[Any]) -> None:
    with telling(file), new_file(file) as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]  # its stubs take a name for allow_pickle


def _read_arrays(file: Path, *names: str) -> list[npt.NDArray[Any]]:
    try:
        with np.load(file) as arrays:
            found = [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{file}: cannot be read ({error!s:.80}); {_AGAIN}") from None
    if found[0].ndim != 4 or found[0].dtype != np.uint8:
        raise FormatError(f"{file}: images {list(found[0].shape)} {found[0].dtype}; {_AGAIN}")
    return found


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
