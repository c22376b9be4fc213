"""`invert`: features to pixels on every backend; its cache, defaults, threads and forks."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import InterruptAt
from samples import FEATURES, IMAGE, features, inverse_network, rmle

import fastinv
from fastinv import BackendError, FeatureError, FormatError, Network, NetworkError, Report

module = importlib.import_module("fastinv.invert")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No default inverter, no compiled ones."""
    for name in ("FASTINV_INVERTER", "FASTINV_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_machines", module.Cache(8))
    monkeypatch.setattr(module, "_files", module.Cache(8))
    yield
    fastinv.use(None)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `invert` has compiled since the test began."""
    made: list[Any] = []

    def compile(*args: Any) -> Any:
        made.append(args)
        return fastinv.compile(*args)

    monkeypatch.setattr(module, "compile", compile)
    return made


def expected_images(x: np.ndarray, **changes: Any) -> np.ndarray:
    """What `inverse_network()` gives, from its parts."""
    inverter = inverse_network(**changes)
    z = fastinv.compile(inverter.network, "torch")(x)
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (inverter.mean, inverter.std))
    return np.asarray(np.clip(z * std + mean, 0, 1))


def test_an_inverse_network_gives_pixels(backend: str) -> None:
    x = features(9)
    images = fastinv.invert(x, inverse_network(), backend=backend)
    assert type(images) is np.ndarray
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, expected_images(x), atol=1e-5)
    assert images.min() >= 0
    assert images.max() <= 1
    one = fastinv.invert(x, inverse_network(mean=0.5, std=0.25), backend=backend)
    np.testing.assert_allclose(one, expected_images(x, mean=0.5, std=0.25), atol=1e-5)


def test_rmle_gives_what_its_solver_gives(backend: str) -> None:
    x = features(5)
    images, report = fastinv.invert(x, rmle(), backend=backend, return_report=True)
    again, solved = fastinv.compile(rmle(), backend).solve(x)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(report.objective, solved.objective)
    assert report.steps.tolist() == [7] * 5


@pytest.mark.parametrize("inverter", [inverse_network(), rmle()], ids=["inverse_network", "rmle"])
def test_the_report_covers_every_image(backend: str, inverter: fastinv.Inverter) -> None:
    for count in (0, 1, 7):
        images, report = fastinv.invert(features(count), inverter, backend=backend, return_report=True, batch_size=3)
        assert images.shape == (count, *IMAGE)
        assert isinstance(report, Report)
        assert (report.backend, bool(report.isa)) == (backend, True)
        assert report.steps.shape == report.converged.shape == (count,)
        assert (report.steps.dtype, report.converged.dtype) == (np.int64, np.bool_)
        if inverter.kind == "rmle":
            assert report.objective is not None
            assert report.objective.shape == (count,)
            assert report.objective.dtype == np.float64
        else:
            assert report.objective is None
            assert report.steps.tolist() == [1] * count
            assert report.converged.all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_in_torch_out(backend: str, dtype: str) -> None:
    x = torch.from_numpy(features(4)).to(getattr(torch, dtype)).requires_grad_()
    images = fastinv.invert(x, inverse_network(), backend=backend)
    assert type(images) is torch.Tensor
    assert images.dtype == torch.float32
    assert not images.requires_grad
    np.testing.assert_allclose(images.numpy(), expected_images(x.detach().float().numpy()), atol=1e-5)
    assert fastinv.invert(x, inverse_network(), dtype="uint8").dtype == torch.uint8


def test_quantised_features(backend: str) -> None:
    q = np.random.default_rng(0).integers(0, 256, (3, *FEATURES)).astype(np.uint8)
    images = fastinv.invert(q, inverse_network(), backend=backend, scale=[0.01, 0.02], zero_point=128)
    x = (q.astype(np.float32) - 128) * np.float32([0.01, 0.02]).reshape(2, 1, 1)
    np.testing.assert_allclose(images, expected_images(x), atol=1e-5)


@pytest.mark.parametrize("inverter", [inverse_network(), rmle(steps=100, lr=0.1)], ids=["inverse_network", "rmle"])
def test_uint8_rounds(backend: str, inverter: fastinv.Inverter) -> None:
    x = features(6) * np.float32(8)
    images = fastinv.invert(x, inverter, backend=backend)
    quantised = fastinv.invert(x, inverter, backend=backend, dtype="uint8", batch_size=4)
    assert quantised.dtype == np.uint8
    off = np.abs(quantised - 255.0 * images)
    assert off.max() <= 0.5 + 1e-4
    assert {0, 255} <= set(quantised.ravel().tolist())


def test_out_that_overlaps_itself_is_refused() -> None:
    x = features(3)
    inverter = inverse_network()
    one = np.zeros((1, *inverter.image_shape), np.float32)
    for strides in ((0, *one.strides[1:]), (4, 4, 4, 4)):
        out = np.lib.stride_tricks.as_strided(one, (3, *one.shape[1:]), strides)
        with pytest.raises(FeatureError, match="several images in the same memory"):
            fastinv.invert(x, inverter, out=out)
    backwards = np.zeros((3, *inverter.image_shape), np.float32)[::-1, :, ::-1]
    np.testing.assert_array_equal(fastinv.invert(x, inverter, out=backwards), fastinv.invert(x, inverter))


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"a masked array.*filled"):
        fastinv.invert(np.ma.masked_array(features(3)), inverse_network())


def test_numpy_s_whole_numbers() -> None:
    x = features(3)
    expected = fastinv.invert(x, inverse_network(), threads=1, batch_size=2)
    found = fastinv.invert(x, inverse_network(), threads=np.int64(1), batch_size=np.int16(2))
    np.testing.assert_array_equal(found, expected)


def test_out_is_written_in_place(backend: str) -> None:
    x = features(6)
    expected = fastinv.invert(x, inverse_network(), backend=backend)
    for make in (
        lambda: np.full((6, *IMAGE), 7, np.float32),
        lambda: np.full((6, *IMAGE[1:], 3), 7, np.float32).transpose(0, 3, 1, 2),
        lambda: np.full((12, *IMAGE), 7, np.float32)[::2],
        lambda: torch.full((6, *IMAGE), 7.0),
    ):
        out: Any = make()
        assert fastinv.invert(x, inverse_network(), backend=backend, out=out, batch_size=4) is out
        np.testing.assert_allclose(np.asarray(out), expected, atol=1e-6)
    pixels = np.full((6, *IMAGE), 7, np.uint8)
    fastinv.invert(torch.from_numpy(x), inverse_network(), backend=backend, out=pixels, dtype="uint8")
    assert np.abs(pixels - 255.0 * expected).max() <= 0.51


def readonly() -> np.ndarray:
    out = np.zeros((2, *IMAGE), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.dtype(np.uint8), torch.uint8, np.float32, torch.float32])
def test_dtypes_may_be_given_as_numpy_s_and_torch_s(dtype: Any) -> None:
    name = "uint8" if "uint8" in str(dtype) else "float32"
    found, expected = (fastinv.invert(features(2), inverse_network(), dtype=d) for d in (dtype, name))
    assert found.dtype == expected.dtype == name
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_a_short_type_that_only_the_slow_backend_has_is_warned_of(precision: str, recwarn: Any) -> None:
    if fastinv.compile(rmle(), "auto").backend != "cpu":
        pytest.skip("a GPU has both")
    recipe = rmle(optimizer="lbfgs", clamp=None)  # which the cpu backend never has in bfloat16
    assert fastinv.compile(recipe, "auto", precision).backend == "torch"
    fastinv.compile(recipe, "torch", precision)
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (precision == "bfloat16")
    assert all("'bfloat16' runs on the slow torch backend" in text for text in told)
    assert all("'float32' on the cpu backend is faster" in text for text in told)


@pytest.mark.parametrize(
    ("out", "dtype", "message"),
    [
        (
            np.zeros((3, *IMAGE), np.float32),
            "float32",
            r"out of shape \[3, 3, 6, 5\] .* expected \[2, 3, 6, 5\]",
        ),
        (np.zeros((2, *IMAGE)), "float32", "dtype float64, expected .* float32"),
        (np.zeros((2, *IMAGE), np.float32), "uint8", "dtype float32, expected .* uint8"),
        (readonly(), "float32", "out is read-only"),
        ([0.0], "float32", "out: a list"),
        (torch.zeros(2, *IMAGE, device="meta"), "float32", "out on device 'meta'"),
        (torch.zeros(2, *IMAGE).bfloat16(), "float32", "dtype bfloat16"),
        (torch.zeros(2, *IMAGE, dtype=torch.complex64).conj().imag, "float32", "the negative of its memory"),
    ],
)
def test_wrong_out(out: Any, dtype: str, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        fastinv.invert(features(2), inverse_network(), out=out, dtype=dtype)


def test_out_may_not_be_the_features() -> None:
    memory = np.zeros(2 * 90, np.float32)
    x, out = memory[: 2 * 60].reshape(2, *FEATURES), memory.reshape(2, *IMAGE)
    with pytest.raises(FeatureError, match="shares memory"):
        fastinv.invert(x, inverse_network(), out=out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:77"}, BackendError, "backend 'cuda:77': "),
        ({"device": torch.device("meta")}, BackendError, "expected None, 'cpu', 'cuda' or as in 'cuda:1'"),
        ({"device": "cuda", "backend": "cpu"}, BackendError, "does not go with backend 'cpu'"),
        ({"device": "cpu", "backend": "cuda"}, BackendError, "does not go with backend 'cuda'"),
        ({"dtype": "float64"}, FeatureError, "dtype 'float64', expected one of float32, uint8"),
        ({"dtype": None}, FeatureError, "dtype None"),
        ({"dtype": np.float16}, FeatureError, "dtype .*float16"),
        ({"dtype": torch.int8}, FeatureError, "dtype torch.int8"),
        ({"batch_size": 0}, FeatureError, "batch_size 0, expected an integer of at least 1"),
        ({"batch_size": 2.0}, FeatureError, r"batch_size 2\.0"),
        ({"batch_size": True}, FeatureError, "batch_size True"),
        ({"backend": "tpu"}, BackendError, "'tpu' is unknown"),
        ({"precision": "float8"}, BackendError, "precision 'float8'"),
        ({"threads": -1}, BackendError, "threads -1"),
        ({"scale": 1.0}, FeatureError, "leave them out"),
        ({"inverter": 3}, NetworkError, "inverter: a int, expected"),
        (
            {"inverter": inverse_network().network},
            NetworkError,
            "inverter: a Network, expected an InverseNetwork",
        ),
        ({"inverter": None}, NetworkError, r"no inverter: pass one .*fastinv\.use.*FASTINV_INVERTER"),
        ({"inverter": "none.finv"}, FormatError, r"none\.finv: cannot read"),
        ({"features": features(2)[0]}, FeatureError, "without the batch axis"),
        ({"features": features(2) * np.nan}, FeatureError, "NaN or Inf .* image 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastinv.invert(**({"features": features(2), "inverter": inverse_network()} | options))


def test_the_cpu_by_any_name() -> None:
    for device in (None, "cpu", torch.device("cpu")):
        assert fastinv.invert(features(1), inverse_network(), device=device).shape == (1, *IMAGE)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        fastinv.invert(features(5), inverse_network(), progress=True, batch_size=2)
    shown = capsys.readouterr()
    assert "5/5" in shown.err
    assert not shown.out


def test_an_interruption_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastinv.Engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastinv.invert(features(5), inverse_network(), progress=True)
    monkeypatch.undo()
    assert fastinv.invert(features(5), inverse_network()).shape == (5, *IMAGE)


def test_a_function_is_told_of_progress(backend: str) -> None:
    told: list[tuple[int, int]] = []
    options = {"batch_size": 2, "backend": backend, "progress": lambda *args: told.append(args)}
    fastinv.invert(features(5), inverse_network(), **options)
    assert told == [(2, 2), (4, 4), (5, 5)]
    told.clear()
    steps = rmle().steps
    fastinv.invert(features(5), rmle(), **options)
    assert [told[-3], told[-2], told[-1]] == [(2, 2 * steps), (4, 4 * steps), (5, 5 * steps)]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("given", [False, True])
def test_an_interruption_gives_what_is_done(kind: str, given: bool) -> None:
    """Here after the second chunk of three."""

    def stop(images: int, steps: int) -> None:
        if images == 4:
            raise KeyboardInterrupt

    x = torch.from_numpy(features(6)) if kind == "torch" else features(6)
    out = np.full((6, *IMAGE), 7, np.float32) if given else None
    options = {"batch_size": 2, "out": out, "progress": stop}
    with pytest.raises(fastinv.Interrupted, match="first 4 of 6") as stopped:
        fastinv.invert(x, inverse_network(), **options)
    found = stopped.value
    assert isinstance(found.images, torch.Tensor if kind == "torch" and not given else np.ndarray)
    assert (found.images is out) == given
    np.testing.assert_allclose(found.images[:4], expected_images(features(6))[:4], atol=1e-5)
    np.testing.assert_array_equal(found.images[4:], np.full((2, *IMAGE), 7 if given else 0))
    assert (found.begun, list(found.report.steps)) == (4, [1, 1, 1, 1, 0, 0])
    assert (found.report.objective, list(found.report.converged)) == (None, [True] * 4 + [False] * 2)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_an_interruption_within_a_chunk_of_rmle(dtype: str) -> None:
    with pytest.raises(fastinv.Interrupted) as stopped:
        fastinv.invert(features(5), rmle(steps=10_000_000), backend="cpu", dtype=dtype, progress=InterruptAt(3))
    found = stopped.value
    assert 1 <= found.begun < 5
    assert (found.report.steps > 0).tolist() == [True] * found.begun + [False] * (5 - found.begun)
    assert np.isnan(found.report.objective).tolist() == [False] * found.begun + [True] * (5 - found.begun)
    assert not found.images[found.begun :].any()
    as_far = rmle(steps=int(found.report.steps[0]))
    np.testing.assert_array_equal(found.images[:1], fastinv.invert(features(1), as_far, backend="cpu", dtype=dtype))


# Defaults and files


def test_the_default_inverter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(3)
    expected = fastinv.invert(x, inverse_network())
    other = fastinv.invert(x, inverse_network(seed=9))
    inverse_network().save(tmp_path / "a.finv")
    inverse_network(seed=9).save(tmp_path / "b.finv")
    monkeypatch.setenv("FASTINV_INVERTER", str(tmp_path / "b.finv"))
    np.testing.assert_array_equal(fastinv.invert(x), other)
    fastinv.use(tmp_path / "a.finv")
    np.testing.assert_array_equal(fastinv.invert(x), expected)
    np.testing.assert_array_equal(fastinv.invert(x, str(tmp_path / "b.finv")), other)
    fastinv.use(inverse_network(seed=9))
    np.testing.assert_array_equal(fastinv.invert(x), other)
    fastinv.use(None)
    monkeypatch.setenv("FASTINV_INVERTER", "")
    with pytest.raises(NetworkError, match="no inverter"):
        fastinv.invert(x)


def test_use_refuses_at_once(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot read"):
        fastinv.use(tmp_path / "none.finv")
    with pytest.raises(NetworkError, match="inverter: a float"):
        fastinv.use(0.5)  # type: ignore[arg-type]


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(module, "load", lambda path: reads.append(path) or fastinv.load(path))
    path = tmp_path / "a.finv"
    inverse_network().save(path)
    x = features(2)
    first = fastinv.invert(x, path)
    np.testing.assert_array_equal(fastinv.invert(x, str(path)), first)
    assert len(reads) == 1
    inverse_network(seed=9).save(path)
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(fastinv.invert(x, path), first)
    assert len(reads) == 2


# Caching, threads, forks


def test_the_second_call_compiles_nothing(compilations: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(2)
    for _ in range(3):
        fastinv.invert(x, inverse_network())  # of the same content each time
    assert len(compilations) == 1
    fastinv.invert(x, rmle())
    fastinv.invert(x, rmle(steps=8))
    assert len(compilations) == 3
    fastinv.invert(x, inverse_network(), threads=1)
    fastinv.invert(x, inverse_network(), backend="torch")
    assert len(compilations) == 5
    monkeypatch.setenv("FASTINV_BACKEND", "torch")
    _, report = fastinv.invert(x, inverse_network(), return_report=True)
    assert report.backend == "torch"
    fastinv.invert(x, inverse_network(), batch_size=1, dtype="uint8")
    assert len(compilations) <= 6


def test_the_cache_is_bounded(compilations: list[Any]) -> None:
    x = features(1)
    for seed in range(9):
        fastinv.invert(x, inverse_network(seed))
    fastinv.invert(x, inverse_network(8))
    assert len(compilations) == 9
    fastinv.invert(x, inverse_network(0))
    assert len(compilations) == 10


@pytest.mark.parametrize("name", ["backend", "precision", "threads"])
def test_lists_are_no_choice(name: str) -> None:
    with pytest.raises(BackendError, match=rf"{name} \['cpu'\], expected"):
        fastinv.invert(features(1), inverse_network(), **{name: ["cpu"]})


def test_what_fails_is_not_kept(compilations: list[Any]) -> None:
    for _ in range(2):
        with pytest.raises(BackendError):
            fastinv.invert(features(1), inverse_network(), backend="tpu")
    assert len(compilations) == 2


def test_threads_of_python(backend: str, compilations: list[Any]) -> None:
    inverters = [inverse_network(), rmle()]
    inputs = [features(9, seed) for seed in range(4)]
    found: dict[tuple[int, int, int], Any] = {}

    def work(index: int) -> None:
        for again in range(5):
            for which, inverter in enumerate(inverters):
                found[index, again, which] = fastinv.invert(inputs[index], inverter, backend=backend, threads=1)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(compilations) == 2
    assert len(found) == 40
    for (index, _, which), images in found.items():
        expected = fastinv.invert(inputs[index], inverters[which], backend=backend, threads=1)
        np.testing.assert_array_equal(images, expected)


def _child(queue: Any, x: np.ndarray, inverters: list[fastinv.Inverter], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork; those of the compiled core are made again
    try:
        queue.put([fastinv.invert(x, inverter, **options) for inverter in inverters])
    except BaseException as reason:  # or the parent would wait, and never hear of it
        queue.put(f"{type(reason).__name__}: {reason}")


def _in_a_fork(x: np.ndarray, inverters: list[fastinv.Inverter], options: dict[str, Any]) -> Any:
    """Images, or why there are none."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, x, inverters, options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of a fork with threads
        child.start()
    found = queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    return found


def test_a_forked_process_inverts_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTINV_BACKEND", raising=False)
    inverters = [inverse_network()] if backend == "torch" else [inverse_network(), rmle()]  # no autograd after a fork
    options = {"backend": backend, "threads": 1 if backend == "torch" else 2}
    x = features(40)
    expected = [fastinv.invert(x, inverter, **options) for inverter in inverters]
    found = _in_a_fork(x, inverters, options)
    if backend == "cuda":  # a driver that has been asked does not outlive a fork: the cpu then is what can run it
        assert isinstance(found, str)
        assert re.match("BackendError: .* was forked from one that has used a GPU", found), found
        expected = [fastinv.invert(x, inverter, backend="cpu", threads=2) for inverter in inverters]
        found = _in_a_fork(x, inverters, {"backend": "auto", "threads": 2})
    assert not isinstance(found, str), found
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fork_does_not_find_what_was_compiled_for_a_gpu() -> None:
    machines: Any = module._machines
    machines.get("a", lambda: SimpleNamespace(backend="cuda:1"))
    machines.get("b", lambda: SimpleNamespace(backend="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        found = [machines.get(key, lambda: SimpleNamespace(backend="new")).backend for key in "ab"]
        os._exit(found != ["new", "cpu"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert machines.get("a", lambda: None).backend == "cuda:1"
    for key in "ab":
        del machines._values[key]


def test_a_fork_while_another_thread_compiles() -> None:
    cache: Any = module.Cache(2)
    inside, go = threading.Event(), threading.Event()

    def make() -> int:
        inside.set()
        go.wait(30)
        return 1

    thread = threading.Thread(target=cache.get, args=("slow", make))
    thread.start()
    inside.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(cache.get("fast", lambda: 7))
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# Memory

PEAK = """
import re, sys
import numpy as np, torch
import fastinv
from fastinv.models import make_decoder

def memory(kind):
    return int(re.search(kind + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

network = fastinv.export(make_decoder((8, 24, 24), (1, 28, 28)).eval(), torch.zeros(2, 8, 24, 24))
inverter = fastinv.InverseNetwork(network, 0.5, 0.5)
one = np.random.default_rng(0).standard_normal((1, 8, 24, 24)).astype(sys.argv[1])
features = np.broadcast_to(one, (100_000, 8, 24, 24))  # 1.8 GB as float32, and none of it here
fastinv.invert(features[:1], inverter)
before = memory("VmRSS")
images, report = fastinv.invert(features, inverter, dtype=sys.argv[2], return_report=True)
assert (images[0] == images[-1]).all()
print(memory("VmHWM") - before - images.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of its memory")
@pytest.mark.parametrize(("features", "images"), [("float32", "float32"), ("float64", "uint8"), ("float16", "float32")])
def test_memory_is_the_images_and_a_constant(features: str, images: str) -> None:
    # -P: the folder it runs in may hold the sources, without the compiled core
    command = [sys.executable, "-P", "-c", PEAK, features, images]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert int(done.stdout) < 64 * 2**20


# The package


def test_importing_fastinv_is_light() -> None:
    code = (
        "import sys, fastinv; dir(fastinv); fastinv.InverseNetwork(fastinv.Network((3, 2, 2)));"
        "heavy = {'torch', 'triton', 'skimage', 'scipy', 'safetensors', 'tqdm', 'PIL'};"
        "loaded = heavy & set(sys.modules); assert not loaded, loaded"
    )
    # -P: the folder it runs in may hold the sources, without the compiled core
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_public_names() -> None:
    names = set(fastinv.__all__)
    assert {"invert", "export", "compile", "load", "use", "InverseNetwork", "RMLE", "Split", "psnr"} <= names
    assert names <= set(dir(fastinv))
    for name in names:
        assert getattr(fastinv, name) is not None
    for name in ("invert", "export", "compile"):
        assert callable(getattr(fastinv, name))
    with pytest.raises(AttributeError, match="no attribute 'inverse'"):
        _ = fastinv.inverse  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project.get("version", fastinv.__version__) == fastinv.__version__


def test_the_network_of_a_large_batch_is_not_copied_whole() -> None:
    import tracemalloc

    x = np.zeros((20_000, *FEATURES), np.float16)
    out = np.empty((20_000, *IMAGE), np.float32)
    fastinv.invert(x[:1], inverse_network(), out=out[:1])
    tracemalloc.start()
    fastinv.invert(x, inverse_network(), out=out, batch_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4


def test_an_edge_without_steps(backend: str) -> None:
    identity = fastinv.RMLE(Network(IMAGE, ()), IMAGE, steps=300, lr=0.05, tv_weight=0.0)
    x = np.random.default_rng(0).random((2, *IMAGE), np.float32)
    np.testing.assert_allclose(fastinv.invert(x, identity, backend=backend), x, atol=1e-2)
