"""Files of features: the rows of each kind of file, in whatever blocks, are those that were written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from fastinv.bulk.columns import rows
from fastinv.bulk.features import Block, Choice, open_file, read
from fastinv.errors import FeatureError, FormatError

SHAPE = samples.FEATURES
X = samples.features(23)


def flat(x: npt.NDArray[Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), int(np.prod(x.shape[1:])))


def nested(x: npt.NDArray[Any]) -> pa.Array:
    kind: Any = pa.from_numpy_dtype(x.dtype)
    for _ in x.shape[1:]:
        kind = pa.list_(kind)
    return pa.array(x.tolist(), kind)


def variable(x: npt.NDArray[Any]) -> pa.Array:
    return flat(x).cast(pa.list_(pa.from_numpy_dtype(x.dtype)))


def in_bytes(x: npt.NDArray[Any]) -> pa.Array:
    return pa.array([row.tobytes() for row in x], pa.binary(x[0].nbytes) if len(x) else pa.binary())


def in_variable_bytes(x: npt.NDArray[Any]) -> pa.Array:
    return pa.array([row.tobytes() for row in x], pa.large_binary())


COLUMNS: dict[str, Callable[[npt.NDArray[Any]], pa.Array]] = {
    "flat": flat,
    "large list": lambda x: variable(x).cast(pa.large_list(pa.from_numpy_dtype(x.dtype))),
    "nested": nested,
    "variable": variable,
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray,
    "bytes": in_bytes,
    "variable bytes": in_variable_bytes,
}


def parquet(path: Path, column: pa.Array, **others: Any) -> Path:
    pq.write_table(pa.table({"v": column, **others}), path, row_group_size=5)
    return path


def arrow(path: Path, column: pa.Array) -> Path:
    table = pa.table({"v": column})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def stream(path: Path, column: pa.Array) -> Path:
    table = pa.table({"v": column})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def joined(blocks: list[Block]) -> npt.NDArray[Any]:
    """The rows of blocks, which have to follow each other."""
    for one, next_ in itertools.pairwise(blocks):
        assert next_.start == one.start + one.count
    assert all(len(block.data) + len(block.failed) == block.count for block in blocks)
    return np.concatenate([block.data for block in blocks])


def written(folder: Path) -> dict[str, Path]:
    """The same features in every kind of file."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", X)
    np.savez(folder / "a.npz", v=X)
    save_file({"v": X}, folder / "a.safetensors")
    torch.save(torch.from_numpy(X), folder / "a.pt")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("layer/v", data=X, chunks=(4, *SHAPE), compression="gzip")
    files = {suffix: folder / f"a.{suffix}" for suffix in ("npy", "npz", "safetensors", "pt", "h5")}
    for name, column in COLUMNS.items():
        files[f"parquet, {name}"] = parquet(folder / f"{name}.parquet", column(X))
    files["arrow"] = arrow(folder / "b.arrow", flat(X))
    files["stream"] = stream(folder / "c.feather", variable(X))
    return files


@pytest.mark.parametrize("start, stop", [(0, 23), (0, 0), (4, 16), (5, 6), (22, 23), (23, 23)])  # noqa: PT006
@pytest.mark.parametrize("size", [1, 4, 100])
def test_any_rows_in_any_blocks(start: int, stop: int, size: int, tmp_path: Path) -> None:
    for path in written(tmp_path).values():
        file = open_file(path, SHAPE, Choice())
        assert file.count == 23
        blocks = list(file.blocks(start, stop, size))
        assert all(block.count <= size and block.dtype == "float32" for block in blocks)
        assert sum(block.count for block in blocks) == stop - start
        if blocks:
            assert blocks[0].start == start
            np.testing.assert_array_equal(joined(blocks), X[start:stop], str(path))


def test_all_rows_at_once(tmp_path: Path) -> None:
    for path in written(tmp_path).values():
        np.testing.assert_array_equal(read(path, SHAPE, Choice()), X)
    np.save(tmp_path / "none.npy", X[:0])
    assert read(tmp_path / "none.npy", SHAPE, Choice()).shape == (0, *SHAPE)


def test_large_row_groups_are_read_in_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v": flat(X)}), tmp_path / "a.parquet", row_group_size=23)
    blocks = list(open_file(tmp_path / "a.parquet", SHAPE, Choice()).blocks(3, 23, 2))
    np.testing.assert_array_equal(joined(blocks), X[3:])
    assert len(blocks) >= 10


@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8", "int8"])
def test_types(dtype: str, tmp_path: Path) -> None:
    x = (X * 20).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    save_file({"v": x}, tmp_path / "a.safetensors")
    paths = [tmp_path / "a.npy", tmp_path / "a.safetensors"]
    for name in ("flat", "variable", "tensor", "bytes", "variable bytes"):
        paths.append(parquet(tmp_path / f"{name}.parquet", COLUMNS[name](x)))
    for path in paths:
        file = open_file(path, SHAPE, Choice(stored_as=dtype if "bytes" in path.name else None))
        blocks = list(file.blocks(0, 23, 10))
        assert {block.dtype for block in blocks} == {dtype}
        np.testing.assert_array_equal(joined(blocks), x)


def test_bfloat16(tmp_path: Path) -> None:
    x = torch.from_numpy(X).bfloat16()
    bits = x.view(torch.uint16).numpy()
    save_torch_file({"pad": torch.zeros(1, dtype=torch.uint8), "v": x}, tmp_path / "a.safetensors")
    torch.save(x, tmp_path / "a.pt")
    files = {
        tmp_path / "a.safetensors": Choice("v"),
        tmp_path / "a.pt": Choice(),
        parquet(tmp_path / "bytes.parquet", in_bytes(bits)): Choice(stored_as="bfloat16"),
        parquet(tmp_path / "lists.parquet", flat(bits)): Choice(stored_as="bfloat16"),
    }
    for path, choice in files.items():
        blocks = list(open_file(path, SHAPE, choice).blocks(0, 23, 10))
        assert {block.dtype for block in blocks} == {"bfloat16"}
        np.testing.assert_array_equal(joined(blocks), bits)
        features = read(path, SHAPE, choice)
        np.testing.assert_array_equal(features.data.view(ml_dtypes.bfloat16).astype(np.float32), x.float().numpy())


def test_channels_last(tmp_path: Path) -> None:
    last = np.ascontiguousarray(X.transpose(0, 2, 3, 1))
    for path in (
        parquet(tmp_path / "flat.parquet", flat(last)),
        parquet(tmp_path / "nested.parquet", nested(last)),
        parquet(tmp_path / "tensor.parquet", pa.FixedShapeTensorArray.from_numpy_ndarray(last)),
        parquet(tmp_path / "bytes.parquet", in_bytes(last)),
    ):
        np.testing.assert_array_equal(read(path, SHAPE, Choice(layout="NHWC")), X)
    with pytest.raises(FeatureError, match=r"tensor\.parquet: rows of \[6, 5, 2\], expected \[2, 6, 5\]"):
        read(tmp_path / "tensor.parquet", SHAPE, Choice())
    with pytest.raises(FormatError, match=r"nested\.parquet: row 0: holds null, or not \[2, 6, 5\] numbers"):
        read(tmp_path / "nested.parquet", SHAPE, Choice())


def test_names_of_rows(tmp_path: Path) -> None:
    names = np.array([f"r{k}" for k in range(23)])
    np.savez(tmp_path / "a.npz", v=X, name=names)
    parquet(tmp_path / "a.parquet", flat(X), name=names.tolist(), id=list(range(100, 123)))
    save_file({"v": X, "name": np.arange(23)}, tmp_path / "a.safetensors")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["v"] = X
        file["name"] = names.tolist()
    for path, choice, expected in (
        (tmp_path / "a.npz", Choice(ids="name"), names.tolist()),
        (tmp_path / "a.hdf5", Choice(ids="name"), names.tolist()),
        (tmp_path / "a.parquet", Choice(ids="name"), names.tolist()),
        (tmp_path / "a.parquet", Choice(), list(range(100, 123))),
        (tmp_path / "a.safetensors", Choice("v", ids="name"), list(range(23))),
    ):
        blocks = list(open_file(path, SHAPE, choice).blocks(0, 23, 9))
        assert [name for block in blocks for name in block.ids.tolist()] == expected
        np.testing.assert_array_equal(joined(blocks), X)


@pytest.mark.parametrize(
    ("column", "bad"),
    [
        (pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float32())), {1: "null"}),
        (pa.array([[1.0, 2.0], [5.0], [3.0, 4.0]], pa.list_(pa.float32())), {1: "holds null, or not"}),
        (pa.array([[1.0, 2.0], [5.0, None], [3.0, 4.0]], pa.list_(pa.float32(), 2)), {1: "holds null, or not"}),
        (pa.array([[1, 2], [None, 4], [3, 4]], pa.list_(pa.uint8(), 2)), {1: "holds null, or not"}),
        (pa.array([b"abcdefgh", b"abcdefg", b"abcdefgh"], pa.binary()), {1: "holds null, or not"}),
        (pa.array([b"abcdefgh", None, b"abcdefgh"], pa.binary(8)), {1: "null"}),
        (pa.array([None, None, None], pa.list_(pa.float32())), dict.fromkeys(range(3), "null")),
        (pa.array([[], [], []], pa.list_(pa.float32())), dict.fromkeys(range(3), "holds null, or not")),
        (pa.array([None, None, None], pa.binary()), dict.fromkeys(range(3), "null")),
    ],
)
def test_rows_that_do_not_fit_are_told_of(column: pa.Array, bad: dict[int, str]) -> None:
    data, _, failed = rows(column, (2,), None)
    assert failed.keys() == bad.keys()
    assert all(failed[place].startswith(why) for place, why in bad.items())
    good = [row for place, row in enumerate(column.to_pylist()) if place not in bad]
    assert data.shape == (len(good), 2)
    if good and isinstance(good[0], list):
        assert data.tolist() == good


def test_nested_rows_that_do_not_fit_are_told_of() -> None:
    fine = [[1.0, 2.0], [3.0, 4.0]]
    cells = [fine, [[1.0, 2.0], [3.0]], None, [[1.0, 2.0]], [[1.0, 2.0], None], fine]
    data, _, failed = rows(pa.array(cells, pa.list_(pa.list_(pa.float64()))), (2, 2), None)
    assert sorted(failed) == [1, 2, 3, 4]
    assert data.tolist() == [fine, fine]


@given(
    count=st.integers(0, 9),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    kind=st.sampled_from(sorted(COLUMNS)),
    nulls=st.sets(st.integers(0, 8)),
    start=st.integers(0, 9),
)
def test_any_slice_of_any_column(count: int, shape: tuple[int, ...], kind: str, nulls: set[int], start: int) -> None:
    x = np.arange(count * int(np.prod(shape)), dtype=np.float32).reshape(count, *shape)
    if kind == "tensor" and count == 0:
        return  # pyarrow makes none
    column = COLUMNS[kind](x)
    keep = [k not in nulls for k in range(count)]
    if not isinstance(column.type, pa.BaseExtensionType):  # `take` of those came later
        column = column.take(pa.array([k if kept else None for k, kept in enumerate(keep)], pa.int64()))
    else:
        keep = [True] * count
    part = column.slice(start)
    data, found, failed = rows(part, shape, None)
    expected = x[start:][keep[start:]]
    np.testing.assert_array_equal(data, expected)
    assert found == "float32"
    assert sorted(failed) == [k for k, kept in enumerate(keep[start:]) if not kept]


@pytest.mark.parametrize(
    ("make", "choice", "words"),
    [
        (
            lambda p: parquet(p, in_bytes(X.astype(np.float16))),
            Choice(),
            "rows of 120 bytes, expected 240",
        ),
        (lambda p: parquet(p, in_bytes(X)), Choice(stored_as="int8"), "rows of 240 bytes, expected 60"),
        (lambda p: parquet(p, flat(X[:, :1])), Choice(), r"rows of \[30\], expected \[2, 6, 5\]: are these"),
        (lambda p: parquet(p, pa.array(["a", "b"])), Choice(), "holds no column of lists, tensors or bytes, but v"),
        (lambda p: parquet(p, pa.array(["a", "b"])), Choice("v"), "column 'v' is of string, expected lists"),
        (lambda p: parquet(p, flat(X)), Choice("w"), "has no column 'w'; it holds v"),
        (lambda p: parquet(p, flat(X)), Choice(ids="w"), "has no column 'w' of the rows' names"),
        (lambda p: parquet(p, flat(X), w=flat(X)), Choice(), "holds 2 columns .* pass key= to choose one"),
        (lambda p: parquet(p, variable(X).take(pa.array([0, None]))), Choice(), "row 1: null; recover it as a log"),
    ],
)
def test_columns_that_do_not_fit(make: Callable[[Path], Path], choice: Choice, words: str, tmp_path: Path) -> None:
    with pytest.raises((FeatureError, FormatError), match=rf"a\.parquet: .*{words}"):
        read(make(tmp_path / "a.parquet"), SHAPE, choice)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", v=X, name=np.arange(3))
    with pytest.raises(FormatError, match=r"holds names of shape \[3\], expected one for each of 23 rows"):
        open_file(tmp_path / "a.npz", SHAPE, Choice("v", ids="name"))
    with pytest.raises(FormatError, match="has no array 'x' of the rows' names; it holds v, name"):
        open_file(tmp_path / "a.npz", SHAPE, Choice("v", ids="x"))
    np.save(tmp_path / "number.npy", np.float32(1))
    with pytest.raises(FormatError, match=r"holds features of shape \[\], expected"):
        open_file(tmp_path / "number.npy", SHAPE, Choice())
    save_file({"v": np.zeros((3, 2), np.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="holds I64, expected float32"):
        open_file(tmp_path / "a.safetensors", SHAPE, Choice())


def test_columns_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = parquet(tmp_path / "a.parquet", flat(X))
    monkeypatch.delitem(sys.modules, "fastinv.bulk.columns")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FormatError, match=r"pip install 'fastinv\[parquet\]'"):
        open_file(path, SHAPE, Choice())


def test_a_bad_row_beside_a_block_takes_none_with_it(tmp_path: Path) -> None:
    cells = X.tolist()
    cells[15][1] = cells[15][1][:3]
    pq.write_table(pa.table({"v": pa.array(cells, nested(X).type)}), tmp_path / "a.parquet", row_group_size=23)
    blocks = list(open_file(tmp_path / "a.parquet", SHAPE, Choice()).blocks(0, 23, 8))
    assert [(block.start, sorted(block.failed)) for block in blocks] == [(0, []), (8, [7]), (16, [])]
    np.testing.assert_array_equal(joined(blocks), np.delete(X, 15, axis=0))


def test_bytes_of_another_length_fail_whatever_the_others_have(tmp_path: Path) -> None:
    cells = [row.tobytes() for row in X]
    for k in range(8, 14):
        cells[k] *= 2
    cells[20] = b""
    path = parquet(tmp_path / "a.parquet", pa.array(cells, pa.binary()))
    blocks = list(open_file(path, SHAPE, Choice()).blocks(0, 23, 4))
    failed = [block.start + place for block in blocks for place in block.failed]
    assert failed == [*range(8, 14), 20]
    np.testing.assert_array_equal(joined(blocks), np.delete(X, failed, axis=0))


def test_wrong_offsets_of_an_arrow_file(tmp_path: Path) -> None:
    path = arrow(tmp_path / "a.arrow", variable(X))
    data = bytearray(path.read_bytes())
    offsets = (np.arange(8, dtype=np.int32) * 60).tobytes()  # of a batch of seven rows
    at = data.index(offsets) + 4 * 7
    data[at : at + 4] = np.int32(2**30).tobytes()
    path.write_bytes(data)
    file = open_file(path, SHAPE, Choice())
    with pytest.raises(pa.ArrowInvalid):
        list(file.blocks(0, 23, 100))


def test_a_stream_cut_between_batches(tmp_path: Path) -> None:
    path = stream(tmp_path / "a.arrow", flat(X))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError, match="no stream that has an end: cut off"):
        open_file(path, SHAPE, Choice())


def test_a_block_is_cut_with_its_names_and_failures() -> None:
    block = Block(10, 6, np.arange(4.0), "float64", np.arange(6), {0: "a", 3: "b"})
    part = block.between(2, 5)
    assert (part.start, part.count, part.data.tolist(), part.ids.tolist(), part.failed) == (
        12,
        3,
        [1.0, 2.0],
        [2, 3, 4],
        {1: "b"},
    )
    assert part.places.tolist() == [0, 2]


def test_shapes_that_would_never_end(tmp_path: Path) -> None:
    header = b'{"v":{"dtype":"F32","shape":[1000000000000,0,6,5],"data_offsets":[0,0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match=r"holds features of shape \[1000000000000, 0, 6, 5\]"):
        open_file(tmp_path / "a.safetensors", SHAPE, Choice())


def test_small_batches_are_read_together(tmp_path: Path) -> None:
    table = pa.table({"v": pa.FixedShapeTensorArray.from_numpy_ndarray(X), "id": list(range(23))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        blocks = list(open_file(tmp_path / name, SHAPE, Choice()).blocks(3, 22, 8))
        assert len(blocks) <= 5
        np.testing.assert_array_equal(joined(blocks), X[3:22])
        assert [row for block in blocks for row in block.ids.to_pylist()] == list(range(3, 22))
