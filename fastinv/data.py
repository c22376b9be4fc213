"""Data sets as files, and the attacker's knowledge of them.

`load` takes what users have: IDX files (MNIST), CIFAR-10's binary batches, Hugging Face Parquet, folders of images by
class. Images are kept as uint8; `pixels` gives float32 in [0, 1].
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastinv.data_files import Bytes, Indices, read_cifar, read_idx, read_image, read_parquet
from fastinv.errors import DataError
from fastinv.tensors import is_shape, is_whole, normalisation

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
KNOWLEDGE = ("same", "distribution", "noise")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], indices into `classes`.
        classes: the names of the classes.
        name: where it comes from.
    """

    images: Bytes
    labels: Indices
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"{self.name}: images {list(self.images.shape)} {self.images.dtype} and labels "
                f"{list(self.labels.shape)}, expected uint8 [N, C, H, W] and [N]"
            )
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise DataError(f"{self.name}: labels beyond its {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return self.images.shape[1:]

    def pixels(self, indices: Any = slice(None)) -> npt.NDArray[np.float32]:
        """Images as float32 in [0, 1], [n, C, H, W]."""
        scaled: npt.NDArray[np.float32] = self.images[indices].astype(np.float32) / np.float32(255)
        return scaled

    def subset(self, indices: Any) -> Dataset:
        """The chosen images."""
        return Dataset(self.images[indices], self.labels[indices], self.classes, self.name)

    def sample(self, count: int | None, seed: int = 0) -> Dataset:
        """As many images, chosen by the seed; all of them, in an order by the seed, where there are no more."""
        return self.subset(_generator(seed, 2).permutation(len(self))[:count])


def load(source: str | Path, *, size: tuple[int, int] | None = None, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The training and the test set in a folder.

    Args:
        source: a folder with MNIST's IDX files (gzip or not), CIFAR-10's binary batches (`data_batch_1.bin` ...),
            Hugging Face Parquet files (`train*.parquet`, `test*.parquet`), or images by class: `train/CLASS/*.png` and
            `test/CLASS/*.png`, or `CLASS/*.png`, of which a fifth, chosen by `seed`, is the test set.
        size: (H, W) to which images in folders by class are resized; None expects them to be of one size.

    Raises:
        DataError: nothing known is there, or a file is damaged; the message names it.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"load: a {type(source).__name__}, expected the path of a folder")
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder; expected one with {_KNOWN}")
    if size is not None and not is_shape(size, 2):
        raise DataError(f"load: size {size!r:.40}, expected (height, width) in pixels")
    train, test = _read_parts(folder, size, seed)
    if train.image_shape != test.image_shape:
        raise DataError(
            f"{folder}: training images {list(train.image_shape)}, but test images {list(test.image_shape)}; "
            "expected one shape"
        )
    return train, test


def _read_parts(folder: Path, size: tuple[int, int] | None, seed: int) -> tuple[Dataset, Dataset]:
    if found := _idx_files(folder):
        return _load_idx(found)
    if list(folder.glob("data_batch_*.bin")):
        return _load_cifar_binary(folder)
    if list(folder.glob("train*.parquet")):
        return _load_parquet(folder)
    if any(child.is_dir() for child in folder.iterdir()):
        return _load_image_folder(folder, size, seed)
    raise DataError(f"{folder}: no data set known; expected {_KNOWN}")


_KNOWN = "IDX files, data_batch_*.bin, train*.parquet and test*.parquet, or one folder of images for each class"


def _generator(seed: int, *stream: int) -> np.random.Generator:
    if not is_whole(seed) or seed < 0:
        raise DataError(f"seed {seed!r:.40}, expected an integer >= 0")
    return np.random.default_rng((int(seed), *stream))


def halves(count: int, seed: int = 0) -> tuple[Indices, Indices]:
    """The indices of A, which the target trains on, and of B: a seeded permutation of the training set, halved.

    Raises:
        DataError: the count of images, or the seed, is no whole number >= 0.
    """
    if not (is_whole(count) and count >= 0):
        raise DataError(f"halves: {count!r:.40} images, expected a whole number >= 0")
    order = _generator(seed).permutation(count)
    return order[: count // 2], order[count // 2 :]


def knowledge(
    dataset: Dataset,
    kind: str,
    n: int | None = None,
    *,
    seed: int = 0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> npt.NDArray[np.float32]:
    """The images that an attacker queries with (paper, Section 4.2), as pixels [n, C, H, W].

    Args:
        dataset: the target's whole training set, of which it trained on the half A of `halves(len(dataset), seed)`.
        kind: "same": A; "distribution": the other half, B; "noise": N(0, 1) in normalised units, that is
            pixels mean + std · N(0, 1), which may leave [0, 1], as many as A.
        n: how many; None takes all.
        seed: of the halves and of the noise.
        mean, std: the target's normalisation, for the noise.

    Raises:
        DataError: no data set, an unknown kind, more images asked for than there are, a seed below 0, or a
            normalisation that is none.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"knowledge: a {type(dataset).__name__}, expected a Dataset, such as fastinv.data.load gives")
    if kind not in KNOWLEDGE:
        raise DataError(f"knowledge: kind {kind!r:.40}, expected one of {', '.join(KNOWLEDGE)}")
    same, other = halves(len(dataset), seed)
    available = len(other) if kind == "distribution" else len(same)
    count = available if n is None else n
    if not (is_whole(count) and count >= 0 and (kind == "noise" or count <= available)):
        raise DataError(f"knowledge: {n!r:.40} images asked for, of {available} of kind {kind!r}")
    if kind == "noise":
        return noise(count, dataset.image_shape, seed=seed, mean=mean, std=std)
    normalisation(mean, std, dataset.image_shape[0], DataError)  # refused whatever the images
    return dataset.pixels((same if kind == "same" else other)[:count])


def noise(
    count: int,
    shape: Sequence[int],
    *,
    seed: int = 0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> npt.NDArray[np.float32]:
    """Images [C, H, W] of Gaussian noise, mean + std · N(0, 1), as pixels [count, C, H, W]; they may leave [0, 1].

    Raises:
        DataError: a seed below 0, or a normalisation that is none.
    """
    numbers = normalisation(mean, std, shape[0], DataError)
    shift, scale = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in numbers)
    z = _generator(seed, 1).standard_normal((count, *shape), dtype=np.float32)
    drawn: npt.NDArray[np.float32] = z * scale + shift
    return drawn


# ---- MNIST, CIFAR-10, Hugging Face ---------------------------------------------------------------------------------

_IDX_STEMS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def _idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The IDX files of both parts; empty where there are none."""
    found: dict[str, tuple[Path, Path]] = {}
    for part, stems in _IDX_STEMS.items():
        paths = [next((p for s in ("", ".gz") if (p := folder / (stem + s)).exists()), None) for stem in stems]
        if paths[0] is not None and paths[1] is not None:
            found[part] = (paths[0], paths[1])
    if len(found) == 1:
        missing = ({*_IDX_STEMS} - {*found}).pop()
        raise DataError(f"{folder}: the {missing} files {', '.join(_IDX_STEMS[missing])} (or .gz) are missing")
    return found


def _load_idx(files: dict[str, tuple[Path, Path]]) -> tuple[Dataset, Dataset]:
    parts = []
    for part, (image_path, label_path) in files.items():
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"{image_path}: shape {list(images.shape)}, but labels {list(labels.shape)}")
        classes = tuple(str(digit) for digit in range(max(10, int(labels.max(initial=0)) + 1)))
        parts.append(Dataset(images[:, None], labels.astype(np.int64), classes, f"{image_path.parent.name} {part}"))
    return parts[0], parts[1]


def _load_cifar_binary(folder: Path) -> tuple[Dataset, Dataset]:
    test = folder / "test_batch.bin"
    if not test.exists():
        raise DataError(f"{folder}: test_batch.bin is missing")
    parts = []
    for part, paths in (("train", sorted(folder.glob("data_batch_*.bin"))), ("test", [test])):
        images, labels = zip(*map(read_cifar, paths), strict=True)
        parts.append(Dataset(np.concatenate(images), np.concatenate(labels), CIFAR10_CLASSES, f"{folder.name} {part}"))
    return parts[0], parts[1]


def _load_parquet(folder: Path) -> tuple[Dataset, Dataset]:
    """Hugging Face's layout: a column of {bytes, path} and a column of class indices."""
    parts = []
    names: tuple[str, ...] = ()
    for part in ("train", "test"):
        paths = sorted(folder.glob(f"{part}*.parquet"))
        if not paths:
            raise DataError(f"{folder}: {part}*.parquet is missing")
        images: list[Bytes] = []
        labels: list[int] = []
        for path in paths:
            table = read_parquet(path)
            images += table.images
            labels += table.labels
            names = names or table.classes
        parts.append((_stack(images, f"{folder} {part}"), np.asarray(labels, np.int64), f"{folder.name} {part}"))
    if not names:
        count = 1 + max(int(labels.max()) for _, labels, _ in parts)
        cifar = count <= 10 and parts[0][0].shape[1:] == (3, 32, 32)
        names = CIFAR10_CLASSES if cifar else tuple(map(str, range(count)))
    train, test = (Dataset(images, labels, names, name) for images, labels, name in parts)
    return train, test


def _stack(images: list[Bytes], where: str, advice: str = "") -> Bytes:
    """Images of one shape as one array; `advice`: what to do where they are of several."""
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        found = f"images of shapes {shapes[:4]}" if shapes else "no images"
        if len({shape[0] for shape in shapes}) > 1:
            advice = ": make all of them grey, or all of them colour"
        raise DataError(f"{where}: {found}, expected images of one shape{advice}")
    return np.stack(images)


# ---- folders of images ---------------------------------------------------------------------------------------------


def _load_image_folder(folder: Path, size: tuple[int, int] | None, seed: int) -> tuple[Dataset, Dataset]:
    parts = [part for part in ("train", "test") if (folder / part).is_dir()]
    if len(parts) == 1:
        raise DataError(f"{folder}: a folder {parts[0]}, but not both train and test")
    if parts:
        train = _image_classes(folder / "train", size)
        test = _image_classes(folder / "test", size)
        if not set(test.classes) <= set(train.classes):
            extra = ", ".join(sorted({*test.classes} - {*train.classes}))
            raise DataError(f"{folder}: test has classes that train lacks: {extra:.200}")
        indices = np.array([train.classes.index(name) for name in test.classes])
        return train, Dataset(test.images, indices[test.labels], train.classes, test.name)
    whole = _image_classes(folder, size)
    order = _generator(seed).permutation(len(whole))
    held_out = max(1, len(whole) // 5)
    if len(whole) < 2:
        raise DataError(f"{folder}: {len(whole)} images, too few to hold any out; expected 2 or more")
    return whole.subset(order[held_out:]), whole.subset(order[:held_out])


def _image_classes(folder: Path, size: tuple[int, int] | None) -> Dataset:
    names = tuple(sorted(child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != "."))
    images: list[Bytes] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(read_image(path, size))
                labels.append(label)
    advice = ": pass size=, to which they are resized" if size is None else ""
    return Dataset(_stack(images, str(folder), advice), np.asarray(labels, np.int64), names, folder.name)


# ---- photographs ---------------------------------------------------------------------------------------------------

PHOTOGRAPHS = "photographs"  # stands where a folder could
SUBJECTS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)
MAX_SIDE = 57  # pixels: the width of the narrowest test region


def photographs(seed: int = 0, *, train: int = 1000, test: int = 150, side: int = 32) -> tuple[Dataset, Dataset]:
    """A training and a test set that need no download: crops of the photographs that scikit-image ships.

    Each photograph, at half its size, is a class. Training crops come from its left three quarters, test crops from
    the rest, so that no pixel is in both.

    Args:
        seed: of where the crops lie.
        train, test: crops of each photograph.
        side: of a crop, in pixels; at most `MAX_SIDE`.

    Raises:
        DataError: numbers of crops that are no integers >= 1, a side that does not fit, or a seed below 0.
    """
    if not all(is_whole(n) and n >= 1 for n in (train, test, side)) or side > MAX_SIDE:
        raise DataError(
            f"photographs: {train!r:.40} and {test!r:.40} crops of side {side!r:.40}, expected whole numbers, at least "
            f"one crop of each and a side from 1 to {MAX_SIDE}"
        )
    import skimage.data

    rng = _generator(seed)
    parts: tuple[list[Bytes], list[Bytes]] = ([], [])
    for name in SUBJECTS:
        photograph = np.asarray(getattr(skimage.data, name)(), np.uint8).transpose(2, 0, 1)
        smaller = _halved(photograph)
        border = smaller.shape[2] * 3 // 4
        for crops, region, count in zip(
            parts, (smaller[..., :border], smaller[..., border:]), (train, test), strict=True
        ):
            rows = rng.integers(region.shape[1] - side + 1, size=count)
            columns = rng.integers(region.shape[2] - side + 1, size=count)
            crops += [region[:, y : y + side, x : x + side] for y, x in zip(rows, columns, strict=True)]
    labels = [np.repeat(np.arange(len(SUBJECTS)), count) for count in (train, test)]
    first, second = (
        Dataset(np.stack(crops), label, SUBJECTS, f"{PHOTOGRAPHS} {part}")
        for crops, label, part in zip(parts, labels, ("train", "test"), strict=True)
    )
    return first, second


def _halved(image: Bytes) -> Bytes:
    """[C, H, W] at half the size, each pixel the rounded mean of four."""
    c, h, w = image.shape
    blocks = image[:, : h // 2 * 2, : w // 2 * 2].reshape(c, h // 2, 2, w // 2, 2)
    halved: Bytes = np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8)
    return halved
