"""Readers of every layout users have, damaged files, and the attacker's knowledge."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastinv
from fastinv.data import MAX_SIDE, Dataset, halves, load, photographs, read_idx
from fastinv.errors import DataError

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder: Path, compress: bool) -> tuple[np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = RNG.integers(0, 10, 12, dtype=np.uint8)
    for stem, array in (
        ("train-images-idx3-ubyte", images),
        ("train-labels-idx1-ubyte", labels),
        ("t10k-images-idx3-ubyte", images[:5]),
        ("t10k-labels-idx1-ubyte", labels[:5]),
    ):
        if compress:
            (folder / f"{stem}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / stem).write_bytes(idx(array))
    return images, labels


@pytest.mark.parametrize("compress", [False, True])
def test_idx(tmp_path: Path, compress: bool) -> None:
    images, labels = write_mnist(tmp_path, compress)
    train, test = load(tmp_path)
    np.testing.assert_array_equal(train.images[:, 0], images)
    np.testing.assert_array_equal(test.labels, labels[:5])
    assert (len(test), train.image_shape, train.classes[3]) == (5, (1, 28, 28), "3")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_idx_is_an_error_or_another_array(tmp_path_factory, data) -> None:
    good = bytearray(idx(np.zeros((2, 3, 4), np.uint8)))
    path = tmp_path_factory.mktemp("idx") / "images"
    if data.draw(st.booleans()):
        del good[data.draw(st.integers(0, len(good) - 1)) :]
    else:
        good[data.draw(st.integers(0, 15))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(good)
    try:
        found = read_idx(path)
    except DataError as error:
        message = str(error)
    else:
        message = str(path)
        assert found.size == len(good) - 4 - 4 * good[3]
    assert str(path) in message


def test_damaged_gzip(tmp_path: Path) -> None:
    write_mnist(tmp_path, True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged gzip"):
        load(tmp_path)


def test_cifar_binary(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    records = np.concatenate([labels[:, None], images.reshape(6, -1)], axis=1)
    (tmp_path / "data_batch_1.bin").write_bytes(records[:3].tobytes())
    (tmp_path / "data_batch_2.bin").write_bytes(records[3:].tobytes())
    with pytest.raises(DataError, match=r"test_batch\.bin is missing"):
        load(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(records[:2].tobytes())
    train, test = load(tmp_path)
    np.testing.assert_array_equal(train.images, images)
    assert train.classes[0] == "airplane"
    assert list(test.labels) == [0, 1]
    (tmp_path / "test_batch.bin").write_bytes(records[:2].tobytes()[:-1])
    with pytest.raises(DataError, match="truncated or damaged"):
        load(tmp_path)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_hugging_face_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = RNG.integers(0, 256, (4, 8, 9, 3), dtype=np.uint8)
    cells = [{"bytes": png(image), "path": None} for image in images]
    for part in ("train-00000-of-00001", "test-00000-of-00001"):
        parquet.write_table(pyarrow.table({"img": cells, "label": [0, 1, 2, 3]}), tmp_path / f"{part}.parquet")
    train, _ = load(tmp_path)
    np.testing.assert_array_equal(train.images, images.transpose(0, 3, 1, 2))
    parquet.write_table(pyarrow.table({"img": cells, "text": list("abcd")}), tmp_path / "test-x.parquet")
    with pytest.raises(DataError, match="expected img"):
        load(tmp_path)
    (tmp_path / "test-x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        load(tmp_path)


def write_folder(folder: Path, count: int = 5) -> None:
    for name in ("dog", "cat"):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            (folder / name / f"{k}.png").write_bytes(png(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)))


def test_folder_of_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    train, test = load(tmp_path / "one")
    assert (len(train), len(test), train.classes) == (8, 2, ("cat", "dog"))
    again, _ = load(tmp_path / "one")
    np.testing.assert_array_equal(train.images, again.images)
    write_folder(tmp_path / "two/train")
    write_folder(tmp_path / "two/test", 1)
    assert [len(part) for part in load(tmp_path / "two")] == [10, 2]
    (tmp_path / "one/cat/odd.png").write_bytes(png(np.zeros((9, 8), np.uint8)))
    with pytest.raises(DataError, match="one shape"):
        load(tmp_path / "one")
    (tmp_path / "one/cat/odd.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"odd\.png: not a readable image"):
        load(tmp_path / "one")


def test_hugging_face_class_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": png(np.zeros((8, 8), np.uint8)), "path": None}] * 2
    note = {"info": {"features": {"label": {"names": ["no", "yes", "maybe"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": cells, "label": [0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    parquet.write_table(table, tmp_path / "test.parquet")
    assert load(tmp_path)[0].classes == ("0", "1")
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(note)}), tmp_path / "train.parquet")
    train, test = load(tmp_path)
    assert train.classes == test.classes == ("no", "yes", "maybe")
    assert train.image_shape == (1, 8, 8)
    parquet.write_table(pyarrow.table({"image": cells, "label": [0, -1]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match="integers >= 0"):
        load(tmp_path)
    cells[1] = {"bytes": b"JPEG?", "path": None}
    parquet.write_table(pyarrow.table({"image": cells, "label": [0, 1]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"test\.parquet, image 1: not a readable image"):
        load(tmp_path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'fastinv\[parquet\]'"):
        load(tmp_path)


def test_idx_files_that_do_not_go_together(tmp_path: Path) -> None:
    write_mnist(tmp_path, False)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match=r"shape \[5, 28, 28\], but labels \[4\]"):
        load(tmp_path)
    labels.unlink()
    with pytest.raises(DataError, match=r"the test files .* are missing"):
        load(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((1, 20, 20), np.uint8)))
    labels.write_bytes(idx(np.zeros(1, np.uint8)))
    with pytest.raises(DataError, match=r"training images \[1, 28, 28\], but test images \[1, 20, 20\]"):
        load(tmp_path)


def test_a_cifar_label_beyond_the_classes_names_its_file(tmp_path: Path) -> None:
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (tmp_path / name).write_bytes(bytes([3] * 3073))
    (tmp_path / "test_batch.bin").write_bytes(bytes([10] * 3073))
    with pytest.raises(DataError, match=r"test_batch\.bin: a label 10"):
        load(tmp_path)


def test_classes_of_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    with pytest.raises(DataError, match="a folder train, but not both"):
        load(tmp_path)
    write_folder(tmp_path / "test", 2)
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "test/cat").rename(tmp_path / "test/emu")
    with pytest.raises(DataError, match="test has classes that train lacks: emu"):
        load(tmp_path)
    for picture in (tmp_path / "test/emu").iterdir():
        picture.unlink()
    (tmp_path / "test/emu").rmdir()
    train, test = load(tmp_path)
    assert train.classes == test.classes == ("cat", "dog")
    assert list(test.labels) == [1, 1]


def test_pictures_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "cat/deep.png").write_bytes(png(np.full((8, 8), 40_000, np.uint16)))
    with pytest.raises(DataError, match=r"deep\.png: .* expected 8 bits"):
        load(tmp_path)


def test_folder_resized(tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    assert load(tmp_path / "one", size=(5, 6))[0].image_shape == (3, 5, 6)
    for wrong in ((0, 6), (5, 6, 3), (5.5, 6), 5, "56"):
        with pytest.raises(DataError, match="size"):
            load(tmp_path / "one", size=wrong)  # type: ignore[arg-type]


def test_pictures_of_several_shapes_are_told_what_to_do_with(tmp_path: Path) -> None:
    for name, shape in (("cat", (8, 8, 3)), ("dog", (9, 8, 3))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"\[\(3, 8, 8\), \(3, 9, 8\)\], expected images of one shape: pass size="):
        load(tmp_path)
    assert load(tmp_path, size=(8, 8))[0].image_shape == (3, 8, 8)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "cat/grey.png")
    for size in (None, (8, 8)):
        with pytest.raises(DataError, match=r"one shape: make all of them grey, or all of them colour$"):
            load(tmp_path, size=size)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_nothing_there(tmp_path: Path, make) -> None:
    make(tmp_path / "data")
    with pytest.raises(DataError, match="expected"):
        load(tmp_path / "data")


@pytest.mark.parametrize("source", [None, 3, ["data"]])
def test_no_path(source) -> None:
    with pytest.raises(DataError, match=r"load: a \w+, expected the path of a folder"):
        load(source)


@pytest.mark.parametrize("count", [-1, 2.5, "10", True])
def test_wrong_halves(count) -> None:
    with pytest.raises(DataError, match=r"halves: .* expected a whole number"):
        halves(count)


def test_photographs_need_no_download_and_share_no_pixels() -> None:
    train, test = photographs(seed=1, train=20, test=10)
    assert train.images.shape == (140, 3, 32, 32)
    assert list(np.bincount(test.labels)) == [10] * 7
    again, _ = photographs(seed=1, train=20, test=10)
    np.testing.assert_array_equal(train.images, again.images)
    assert train.images.std() > 20


def test_wrong_photographs() -> None:
    with pytest.raises(DataError, match="of side 400"):
        photographs(side=400)
    with pytest.raises(DataError, match="0 and 150 crops"):
        photographs(train=0)
    for wrong in ({"side": "x"}, {"side": 8.0}, {"train": 1.5}):
        with pytest.raises(DataError, match="crops"):
            photographs(**wrong)
    with pytest.raises(DataError, match="seed -1"):
        photographs(-1)
    assert photographs(train=1, test=1, side=MAX_SIDE)[1].image_shape == (3, MAX_SIDE, MAX_SIDE)


def dataset(count: int = 11) -> Dataset:
    images = RNG.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    return Dataset(images, np.zeros(count, np.int64), ("only",), "test")


def test_knowledge() -> None:
    data = dataset()
    a, b = halves(len(data), seed=3)
    assert sorted([*a, *b]) == list(range(11))
    np.testing.assert_array_equal(fastinv.knowledge(data, "same", seed=3), data.pixels(a))
    np.testing.assert_array_equal(fastinv.knowledge(data, "distribution", 4, seed=3), data.pixels(b[:4]))
    noise = fastinv.knowledge(data, "noise", 4000, mean=(0.5,), std=(0.25,))
    z = (noise - 0.5) / 0.25
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    assert len(fastinv.knowledge(data, "noise")) == len(a)
    np.testing.assert_array_equal(fastinv.knowledge(data, "same", seed=np.int64(3)), data.pixels(a))


@pytest.mark.parametrize(("kind", "n"), [("all", None), ("same", 6), ("same", -1), ("distribution", 1.5)])
def test_wrong_knowledge(kind: str, n) -> None:
    with pytest.raises(DataError, match="knowledge"):
        fastinv.knowledge(dataset(), kind, n)
    with pytest.raises(DataError, match=r"mean .* expected 1 finite number"):
        fastinv.knowledge(dataset(), "noise", mean=(0.1, 0.2, 0.3))
    with pytest.raises(DataError, match=r"seed 1\.5"):
        fastinv.knowledge(dataset(), "same", seed=1.5)  # type: ignore[arg-type]


def test_datasets_check_themselves() -> None:
    with pytest.raises(DataError, match="expected uint8"):
        Dataset(np.zeros((2, 1, 4, 4), np.float32), np.zeros(2, np.int64), ("a",), "test")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="beyond its 1 classes"):
        Dataset(np.zeros((2, 1, 4, 4), np.uint8), np.ones(2, np.int64), ("a",), "test")


def test_real_mnist(shared_data: Path) -> None:
    train, test = load(shared_data / "mnist")
    assert (len(train), len(test), train.image_shape) == (60000, 10000, (1, 28, 28))
    assert round(float(train.images.mean()), 3) == 33.318


def test_real_cifar10(shared_data: Path) -> None:
    pytest.importorskip("pyarrow")
    train, test = load(shared_data / "cifar10")
    assert (len(train), len(test), train.image_shape) == (50000, 10000, (3, 32, 32))
    assert list(np.bincount(test.labels)) == [1000] * 10
