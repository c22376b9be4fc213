"""The `.finv` file: what is written is read back; anything else in a file ends in a FormatError, cheaply."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import conv, inverse_network, rmle

import fastinv
from fastinv import RMLE, FormatError, InverseNetwork, Network, Step, finv
from fastinv.ops import OPS
from fastinv.ops.activation import KINDS, Activation
from fastinv.ops.add import Add


def read_bytes(data: bytes) -> fastinv.Inverter:
    return finv.decode(io.BytesIO(data), len(data))


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Tensor entries, document and tensor bytes of a file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header.pop("__metadata__")["fastinv"]), data[8 + length :]


def join(entries: dict[str, Any], document: Any, blob: bytes, sign: bool = True) -> bytes:
    """The inverse of `split`, with the right checksum wherever one can be made."""
    if sign:
        ends = {name: entry["data_offsets"] for name, entry in entries.items()}
        tensors = {name: np.frombuffer(blob[begin:end], np.float32) for name, (begin, end) in ends.items()}
        document["sha256"] = finv.checksum(document, tensors)
    header = json.dumps({"__metadata__": {"fastinv": json.dumps(document)}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + blob


def refused(data: bytes, message: str = ".", memory: int = 2**24) -> None:
    """Reading `data` raises FormatError with `message`, in little time and memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(FormatError, match=message) as caught:
            read_bytes(data)
        assert len(str(caught.value)) < 2000
        assert tracemalloc.get_traced_memory()[1] < memory + 60 * len(data)
        assert time.perf_counter() - started < 10
    finally:
        tracemalloc.stop()


# What is written is read


@pytest.mark.parametrize(
    "inverter", [inverse_network(), rmle(), rmle(init=inverse_network())], ids=["inverse_network", "rmle", "warm rmle"]
)
def test_round_trip(inverter: fastinv.Inverter, tmp_path: Path) -> None:
    inverter.save(tmp_path / "a.finv")
    again = fastinv.load(str(tmp_path / "a.finv"))
    assert again == inverter
    assert hash(again) == hash(inverter)
    assert type(again) is type(inverter)
    assert again.provenance == inverter.provenance
    assert again.recipe().keys() == inverter.recipe().keys()
    assert os.listdir(tmp_path) == ["a.finv"]
    inverter.save(tmp_path / "b.finv")
    assert (tmp_path / "a.finv").read_bytes() == (tmp_path / "b.finv").read_bytes()


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A case of some op, or convolutions with skip connections; any activation, any finite weights."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(sorted(KINDS)))
    low, high = sorted(draw(st.tuples(*[st.floats(0.125, 8, width=32)] * 2)))
    activation = Activation(kind, low, high)
    if draw(st.booleans()):
        cases = [case for op in OPS.values() for case in op.cases() if len(set(case.inputs)) == 1]
        case = draw(st.sampled_from(cases))
        weights = {name: rng.normal(size=shape) for name, shape in case.weights.items()}
        return Network(case.inputs[0], (Step(case.op, (0,) * len(case.inputs), weights, activation),))
    steps: list[Step] = []
    for index in range(draw(st.integers(0, 5))):
        if index and draw(st.booleans()):
            steps.append(Step(Add(), (index, draw(st.integers(0, index))), {}, activation, "sum"))
        else:
            steps.append(conv(rng, 3, 3, index))
    return Network((3, 4, 5), tuple(steps))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(network=networks(), note=JSON)
def test_round_trip_of_any_network(network: Network, note: Any) -> None:
    shape = network.input_shape
    if len(shape) == 3:
        inverter: fastinv.Inverter = RMLE(network, shape, provenance={"note": note})
    elif len(network.output_shape) == 3:
        inverter = InverseNetwork(network, provenance={"note": note})
    else:
        return
    again = read_bytes(finv.encode(inverter))
    assert again == inverter
    assert again.provenance["note"] == note


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    inverter = rmle()
    inverter.save(tmp_path / "a.finv")
    with safe_open(tmp_path / "a.finv", "numpy") as file:
        assert set(file.keys()) == {"0.weight", "0.bias", "init"}
        assert np.array_equal(file.get_tensor("init"), inverter.init)
        assert np.array_equal(file.get_tensor("0.weight"), inverter.edge.steps[0].weights["weight"])
        assert json.loads(file.metadata()["fastinv"])["kind"] == "rmle"


def test_a_file_written_by_safetensors_loads(tmp_path: Path) -> None:
    from safetensors.numpy import load, save_file

    inverter = inverse_network()
    data = finv.encode(inverter)
    tensors = dict(reversed(load(data).items()))
    save_file(tensors, tmp_path / "a.finv", {"fastinv": json.dumps(split(data)[1])})
    assert fastinv.load(tmp_path / "a.finv") == inverter


# Writing is whole or not at all


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.finv"
    inverse_network().save(path)
    for name, error in (
        ("fsync", OSError("disk full")),
        ("replace", OSError("no")),
        ("fsync", KeyboardInterrupt()),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else FormatError):
                rmle().save(path)
        assert os.listdir(tmp_path) == ["a.finv"]
        assert fastinv.load(path) == inverse_network()


def test_a_written_file_has_ordinary_rights_and_follows_links(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    link = tmp_path / "link.finv"
    link.symlink_to(tmp_path / "real.finv")
    inverse_network().save(link)
    assert link.is_symlink()
    assert fastinv.load(tmp_path / "real.finv") == inverse_network()
    assert (tmp_path / "real.finv").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["missing/a.finv", "folder", "file/a.finv", "x" * 300, "nul\0"])
def test_paths_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="cannot write"):
        inverse_network().save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_header_too_large_is_refused_when_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finv, "MAX_HEADER", 1000)
    with pytest.raises(FormatError, match="header"):
        inverse_network().save(tmp_path / "a.finv")
    assert os.listdir(tmp_path) == []


# Paths


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.finv", "No such file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
        ("nul\0", "null byte"),
    ],
)
def test_paths_that_cannot_be_read(name: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match=message):
        fastinv.load(tmp_path / name)


@pytest.mark.parametrize("path", [None, 3.5, ["a"]])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(FormatError, match="cannot read"):
        fastinv.load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_the_right_to_read(tmp_path: Path) -> None:
    inverse_network().save(tmp_path / "a.finv")
    (tmp_path / "a.finv").chmod(0)
    with pytest.raises(FormatError, match="Permission denied"):
        fastinv.load(tmp_path / "a.finv")


def test_a_device_is_not_read() -> None:
    with pytest.raises(FormatError, match="not a regular file"):
        fastinv.load("/dev/zero")


# Damage


def test_truncation_at_any_length() -> None:
    data = finv.encode(inverse_network())
    header = int.from_bytes(data[:8], "little")
    lengths = {
        *range(40),
        *range(8 + header - 5, 8 + header + 5),
        *range(0, len(data), 61),
        *range(len(data) - 9, len(data)),
    }
    for length in sorted(lengths):
        with pytest.raises(FormatError):
            read_bytes(data[:length])
    with pytest.raises(FormatError, match="truncated or padded"):
        read_bytes(data + b"\0")


@settings(max_examples=400, deadline=None)
@given(place=st.integers(0, 2**31), bit=st.integers(0, 7), kind=st.booleans())
def test_a_flipped_bit_is_found_or_means_the_same(place: int, bit: int, kind: bool) -> None:
    inverter = inverse_network() if kind else rmle()
    data = bytearray(finv.encode(inverter))
    data[place % len(data)] ^= 1 << bit
    with contextlib.suppress(FormatError):
        assert read_bytes(bytes(data)) == inverter  # such as 1E-08 for 1e-08


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    for framed in (data, len(data).to_bytes(8, "little") + data):
        with pytest.raises(FormatError):
            read_bytes(framed)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, finv.MAX_HEADER + 1, 0, 1])
def test_header_lengths(length: int) -> None:
    refused(length.to_bytes(8, "little") + finv.encode(inverse_network())[8:])


def test_other_files_are_named_as_such(tmp_path: Path) -> None:
    import zipfile

    from safetensors.numpy import save

    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02.")
    with pytest.raises(FormatError, match=r"model\.pt: not a \.finv file"):
        fastinv.load(tmp_path / "model.pt")
    refused(save({"a": np.zeros(3, np.float32)}), r"not a \.finv file")
    refused(save({"a": np.zeros(3, np.float32)}, {"format": "np"}), r"not a \.finv file")


# Hostile JSON


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"3",
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"9" * 4000 + b"}",
        b"[" * 1_000_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'"' + b'\\"' * 1_000_000,
        b'"' * 1_000_001,
        b"\xff\xfe",
        b'{"a": "\x00"}',
        b"[" + b"[]," * 1_000_000 + b"[]]",
        b'{"__metadata__": {"fastinv": "\\ud800"}}',
        b'{"__metadata__": {"fastinv": "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["}}',
        b'{"__metadata__": {"fastinv": 3}}',
        b'{"__metadata__": {"fastinv": "{}"}}',
        b'{"__metadata__": []}',
    ],
    ids=lambda text: repr(text[:24]),
)
def test_hostile_headers(text: bytes) -> None:
    refused(len(text).to_bytes(8, "little") + text)


# Hostile content that carries the right checksum


def set_in(*path: Any, to: Any) -> Callable[[Any], None]:
    """Put `to` at a path inside a document."""

    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = to

    return edit


STEP = ("graph", "steps", 1)
HUGE = {"kind": "relu", "a": 0.0, "b": 0.0}


def activation_step(inputs: list[Any], **changes: Any) -> dict[str, Any]:
    plain = {
        "op": "activation",
        "attributes": HUGE,
        "inputs": inputs,
        "weights": {},
        "activation": HUGE,
        "source": "",
    }
    return plain | changes


DOCUMENTS: dict[str, Callable[[Any], None]] = {
    "format-2": set_in("format", to=2),
    "format-true": set_in("format", to=True),
    "format-float": set_in("format", to=1.0),
    "kind": set_in("kind", to="pickle"),
    "kind-of-another": set_in("kind", to="rmle"),
    "kind-list": set_in("kind", to=["rmle"]),
    "recipe-list": set_in("recipe", to=[]),
    "recipe-missing": set_in("recipe", to={"mean": [0.5]}),
    "recipe-unknown": set_in("recipe", "network", to=1),
    "mean-ints": set_in("recipe", "mean", to=[0, 0, 0]),
    "mean-length": set_in("recipe", "mean", to=[0.5, 0.5]),
    "mean-long": set_in("recipe", "mean", to=[0.5] * 100_000),
    "mean-string": set_in("recipe", "mean", to="0.5"),
    "mean-bools": set_in("recipe", "mean", to=[True]),
    "mean-tensor": set_in("recipe", "mean", to="tensor"),
    "mean-huge": set_in("recipe", "mean", to=[1e300]),
    "std-zero": set_in("recipe", "std", to=[0.0]),
    "std-negative": set_in("recipe", "std", to=[-1.0]),
    "std-vanishing": set_in("recipe", "std", to=[1e-300]),
    "provenance-list": set_in("provenance", to=[]),
    "provenance-large": set_in("provenance", "note", to="x" * 2_000_000),
    "provenance-deep": set_in("provenance", "note", to=json.loads("[" * 20 + "]" * 20)),
    "graph-null": set_in("graph", to=None),
    "graph-keys": set_in("graph", "more", to=1),
    "steps-dict": set_in("graph", "steps", to={}),
    "steps-null": set_in("graph", "steps", to=[None]),
    "steps-many": set_in("graph", "steps", to=[activation_step([i]) for i in range(5000)]),
    "input-shape-string": set_in("graph", "input_shape", to="268"),
    "input-shape-huge": set_in("graph", "input_shape", to=[2, 2**40, 2**40]),
    "input-shape-long": set_in("graph", "input_shape", to=[1] * 100_000),
    "input-shape-negative": set_in("graph", "input_shape", to=[2, -6, -5]),
    "input-shape-zero": set_in("graph", "input_shape", to=[2, 0, 5]),
    "input-shape-floats": set_in("graph", "input_shape", to=[2.0, 6.0, 5.0]),
    "input-shape-bools": set_in("graph", "input_shape", to=[2, 6, True]),
    "input-shape-other": set_in("graph", "input_shape", to=[7, 6, 5]),
    "input-shape-flat": set_in("graph", "input_shape", to=[60]),
    "op-unknown": set_in(*STEP, "op", to="eval"),
    "op-list": set_in(*STEP, "op", to=["conv2d"]),
    "op-other": set_in(*STEP, "op", to="linear"),
    "inputs-forward": set_in(*STEP, "inputs", to=[2]),
    "inputs-far": set_in(*STEP, "inputs", to=[10**18]),
    "inputs-negative": set_in(*STEP, "inputs", to=[-1]),
    "inputs-string": set_in(*STEP, "inputs", to=["1"]),
    "inputs-bool": set_in(*STEP, "inputs", to=[True]),
    "inputs-float": set_in(*STEP, "inputs", to=[1.0]),
    "inputs-none": set_in(*STEP, "inputs", to=[]),
    "inputs-many": set_in(*STEP, "inputs", to=[1] * 100_000),
    "inputs-objects": set_in(*STEP, "inputs", to=[{}]),
    "attribute-missing": set_in(*STEP, "attributes", to={}),
    "attribute-unknown": set_in(*STEP, "attributes", "__class__", to="x"),
    "stride-zero": set_in(*STEP, "attributes", "stride", to=[0, 1]),
    "stride-negative": set_in(*STEP, "attributes", "stride", to=[-1, 1]),
    "stride-huge": set_in(*STEP, "attributes", "stride", to=[10**19, 1]),
    "stride-string": set_in(*STEP, "attributes", "stride", to=["1", "1"]),
    "stride-bools": set_in(*STEP, "attributes", "stride", to=[True, True]),
    "stride-floats": set_in(*STEP, "attributes", "stride", to=[1.0, 1.0]),
    "stride-number": set_in(*STEP, "attributes", "stride", to=1),
    "stride-null": set_in(*STEP, "attributes", "stride", to=None),
    "stride-long": set_in(*STEP, "attributes", "stride", to=[1] * 100_000),
    "padding-negative": set_in(*STEP, "attributes", "padding", to=[-1, 0, 0, 0]),
    "padding-huge": set_in(*STEP, "attributes", "padding", to=[65536] * 4),
    "dilation-zero": set_in(*STEP, "attributes", "dilation", to=[0, 0]),
    "groups-zero": set_in(*STEP, "attributes", "groups", to=0),
    "groups-seven": set_in(*STEP, "attributes", "groups", to=7),
    "weights-none": set_in(*STEP, "weights", to={}),
    "weights-unknown": set_in(*STEP, "weights", "gamma", to=[3]),
    "weights-shape": set_in(*STEP, "weights", "bias", to=[3, 1]),
    "weights-shape-huge": set_in(*STEP, "weights", "weight", to=[2**40] * 4),
    "weights-shape-bool": set_in(*STEP, "weights", "bias", to=[3.0]),
    "activation-unknown": set_in(*STEP, "activation", "kind", to="exec"),
    "activation-list": set_in(*STEP, "activation", "kind", to=["relu"]),
    "activation-huge": set_in(*STEP, "activation", "a", to=1e300),
    "activation-string": set_in(*STEP, "activation", "a", to="1"),
    "activation-null": set_in(*STEP, "activation", to=None),
    "source-number": set_in(*STEP, "source", to=3),
    "unknown-key": set_in("__reduce__", to="os.system"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_hostile_documents_with_the_right_checksum(name: str) -> None:
    entries, document, blob = split(finv.encode(inverse_network()))
    DOCUMENTS[name](document)
    refused(join(entries, document, blob))


RECIPES: dict[str, Any] = {
    "steps": [-1, 10**8, 1.0, True, "7", None],
    "lr": [-1.0, 1e300, 1, "0.1", None, [0.1]],
    "tv_weight": [-0.1, "x", True],
    "tv_beta": [0.5, 11.0, None],
    "optimizer": ["lion", 3, None, ["adam"]],
    "keep": ["first", None],
    "clamp": [[1.0, 0.0], [0.0], [0.0, 1.0, 2.0], [0, 1], "01", [True, True]],
    "init": ["Tensor", "0.5", None, [0.5], 1, True, 0.5],  # with 0.5, the tensor belongs to nothing
    "betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0, 0], None],
    "eps": [-1e-8, 2.0, None],
    "momentum": [-0.5, 1.5, False],
    "schedule": ["linear", None, 1],
    "tolerance": [-1.0, None],
    "patience": [0, 1.0, 10**9],
    "input_shape": [[3, 6], [3, 6, 6], [3.0, 6.0, 5.0], [], None, "365"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes_with_the_right_checksum(name: str) -> None:
    assert set(RECIPES) | {"mean", "std"} == set(rmle().recipe())
    entries, document, blob = split(finv.encode(rmle()))
    for value in RECIPES[name]:
        hostile = copy.deepcopy(document)
        hostile["recipe"][name] = value
        refused(join(entries, hostile, blob))


def test_a_file_from_before_there_were_schedules_reads_as_constant() -> None:
    entries, document, blob = split(finv.encode(rmle(schedule="constant")))
    del document["recipe"]["schedule"]
    assert read_bytes(join(entries, document, blob)) == rmle(schedule="constant")


NESTED: dict[str, Callable[[Any], None]] = {
    "kind": set_in("kind", to="rmle"),
    "kind-list": set_in("kind", to=["inverse_network"]),
    "key-missing": lambda part: part.pop("graph"),
    "key-unknown": set_in("start", to=1),
    "recipe-null": set_in("recipe", to=None),
    "recipe-field": set_in("recipe", "steps", to=3),
    "provenance": set_in("provenance", to=[1]),
    "graph": set_in("graph", to={}),
    "std": set_in("recipe", "std", to=[0.0]),
    "shape": set_in("graph", "input_shape", to=[2, 5, 6]),
}


@pytest.mark.parametrize("name", NESTED)
def test_hostile_starts_with_the_right_checksum(name: str) -> None:
    entries, document, blob = split(finv.encode(rmle(init=inverse_network())))
    NESTED[name](document["recipe"]["init"])
    refused(join(entries, document, blob))


def test_a_start_needs_its_own_tensors() -> None:
    entries, document, blob = split(finv.encode(rmle(init=inverse_network())))
    assert {name for name in entries if name.startswith("init.")} == {
        f"init.{k}.{w}" for k in "01" for w in ("weight", "bias")
    }
    for name, new in (("init.0.bias", "init.2.bias"), ("init.0.bias", "init.init.bias"), ("init.0.bias", "2.bias")):
        refused(join({new if key == name else key: value for key, value in entries.items()}, document, blob))
    document["recipe"]["init"] = 0.5
    refused(join(entries, document, blob))


ENTRIES: dict[str, Callable[[Any], None]] = {
    "dtype": set_in("0.bias", "dtype", to="F64"),
    "dtype-list": set_in("0.bias", "dtype", to=["F32"]),
    "shape-string": set_in("0.bias", "shape", to="3"),
    "shape-float": set_in("0.bias", "shape", to=[3.0]),
    "shape-bool": set_in("0.bias", "shape", to=[True]),
    "shape-negative": set_in("0.bias", "shape", to=[-3]),
    "shape-two-negatives": set_in("0.bias", "shape", to=[-1, -3]),
    "shape-huge": set_in("0.bias", "shape", to=[2**62, 2**62]),
    "shape-zero": set_in("0.bias", "shape", to=[0]),
    "shape-long": set_in("0.bias", "shape", to=[1] * 100_000 + [3]),
    "shape-more": set_in("0.bias", "shape", to=[4]),
    "offsets-none": set_in("0.bias", "data_offsets", to=None),
    "offsets-one": set_in("0.bias", "data_offsets", to=[0]),
    "offsets-three": set_in("0.bias", "data_offsets", to=[0, 12, 24]),
    "offsets-floats": set_in("0.bias", "data_offsets", to=[0.0, 12.0]),
    "offsets-negative": set_in("0.bias", "data_offsets", to=[-12, 0]),
    "offsets-far": set_in("0.bias", "data_offsets", to=[2**62, 2**62 + 12]),
    "offsets-backward": set_in("0.bias", "data_offsets", to=[12, 0]),
    "entry-null": set_in("0.bias", to=None),
    "entry-empty": set_in("0.bias", to={}),
    "entry-more": set_in("0.bias", "code", to="x"),
    "name": lambda e: e.update({"weights": e.pop("0.bias")}),
    "name-traversal": lambda e: e.update({"0.../../x": e.pop("0.bias")}),
    "name-other-digits": lambda e: e.update({"٠.bias": e.pop("0.bias")}),
    "name-leading-zero": lambda e: e.update({"00.bias": e.pop("0.bias")}),
    "step-far": lambda e: e.update({"9999.bias": e.pop("0.bias")}),
    "missing": lambda e: e.pop("0.bias"),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_hostile_tensor_entries(name: str) -> None:
    entries, document, blob = split(finv.encode(inverse_network()))
    ENTRIES[name](entries)
    refused(join(entries, document, blob, sign=False))


def test_tensors_must_tile_the_data() -> None:
    entries, document, blob = split(finv.encode(inverse_network()))
    first, second = entries["0.bias"], entries["1.bias"]
    overlapping = {**entries, "1.bias": {**second, "data_offsets": first["data_offsets"]}}
    refused(join(overlapping, document, blob), "begins at byte")
    extra = {**entries, "7.bias": {**first, "data_offsets": [len(blob), len(blob) + 12]}}
    refused(join(extra, document, blob + bytes(12)), "belong to no step")
    refused(join(entries, document, blob + bytes(4)), "truncated or padded")
    shifted = {
        name: {**entry, "data_offsets": [offset + 4 for offset in entry["data_offsets"]]}
        for name, entry in entries.items()
    }
    refused(join(shifted, document, bytes(4) + blob), "begins at byte")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(value: float) -> None:
    for inverter in (inverse_network(), rmle()):
        entries, document, blob = split(finv.encode(inverter))
        for begin, _ in (entry["data_offsets"] for entry in entries.values()):
            hostile = bytearray(blob)
            hostile[begin : begin + 4] = np.float32(value).tobytes()
            refused(join(entries, document, bytes(hostile)), "NaN or Inf")


def test_many_steps_within_the_limit_load_fast() -> None:
    steps = tuple(Step(Activation("relu"), (index,)) for index in range(4096))
    data = finv.encode(InverseNetwork(Network((1, 2, 2), steps)))
    started = time.perf_counter()
    assert len(read_bytes(data).network.steps) == 4096  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 10


def test_a_million_steps_are_refused_by_the_header_alone() -> None:
    steps = ",".join([json.dumps(activation_step([0]))] * 1_000_000)
    text = b'{"__metadata__": {"fastinv": "' + steps.replace('"', '\\"').encode() + b'"}}'
    refused(len(text).to_bytes(8, "little") + text, "header length")


def test_a_graph_that_doubles_its_values_is_refused() -> None:
    entries, document, blob = split(finv.encode(inverse_network()))
    upsample = {"op": "concat", "attributes": {}, "weights": {}, "activation": HUGE, "source": ""}
    document["graph"]["steps"] += [{**upsample, "inputs": [k, k]} for k in range(2, 60)]
    refused(join(entries, document, blob))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_replaced_by_any_other_with_the_right_checksum(data: st.DataObject) -> None:
    """Any leaf or branch of the document is swapped for any JSON: it loads, or FormatError says why not."""
    op = data.draw(st.sampled_from(sorted(OPS)))
    cases = [case for case in OPS[op].cases() if len(set(case.inputs)) == 1 and len(case.inputs[0]) == 3]
    if not cases:
        return
    case = data.draw(st.sampled_from(cases))
    weights = {name: np.ones(shape, np.float32) for name, shape in case.weights.items()}
    edge = Network(case.inputs[0], (Step(case.op, (0,) * len(case.inputs), weights),))
    entries, document, blob = split(finv.encode(RMLE(edge, edge.input_shape)))
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        paths.append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, (*path, key))

    walk(document, ())
    numbers = st.sampled_from([0, -1, 1, 2, 3, 7, 255, 65536, 65537, 2**28, 2**31, 2**62, 0.0, -0.5, 1.5, 1e38, 1e300])
    value = data.draw(numbers | st.lists(numbers, max_size=6) | st.sampled_from(sorted(OPS)) | JSON)
    set_in(*data.draw(st.sampled_from(paths[1:])), to=value)(document)
    with contextlib.suppress(FormatError):
        assert isinstance(read_bytes(join(entries, document, blob)), fastinv.Inverter)
