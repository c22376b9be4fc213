"""`compile`, engines and solvers: every kind of input on every backend, and every wrong one refused."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch
from checks import ISAS, exported, randn
from samples import FEATURES, IMAGE, features, inverse_network, rmle
from torch import nn

import fastinv
from fastinv import BackendError, Engine, FeatureError, Network, NetworkError, Solver, Step
from fastinv.backends import BACKENDS, select
from fastinv.backends.cuda import CudaBackend
from fastinv.ops.activation import Activation

NETWORK = inverse_network().network


def reference(x: np.ndarray) -> np.ndarray:
    """`NETWORK` in float64."""
    values = [torch.from_numpy(np.array(x, np.float64))]
    for step in NETWORK.steps:
        weights = {name: torch.from_numpy(np.array(w, np.float64)) for name, w in step.weights.items()}
        values.append(step.activation.reference([step.op.reference([values[i] for i in step.inputs], weights)], {}))
    return np.asarray(values[-1].numpy())


def engine(backend: str, **options: Any) -> Engine:
    return fastinv.compile(NETWORK, backend, **options)


def solver(backend: str, **changes: Any) -> Solver:
    return fastinv.compile(rmle(**changes), backend)


def test_an_engine_computes_its_network(backend: str) -> None:
    x = features(7)
    made = engine(backend)
    assert (made.backend, made.precision, made.network) == (backend, "float32", NETWORK)
    assert made.isa
    assert backend in repr(made)
    y = made(x)
    assert type(y) is np.ndarray
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, reference(x), rtol=1e-4, atol=1e-5)


def test_the_plan_names_every_kernel(backend: str) -> None:
    plan = engine(backend).describe()
    assert plan
    assert all({"kernel", "step", "flops", "bytes"} <= set(launch) for launch in plan)
    assert sum(launch["flops"] for launch in plan) == NETWORK.flops


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", ">f4"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_float_types(backend: str, dtype: str, kind: str) -> None:
    if kind == "torch":
        if dtype == ">f4":
            pytest.skip("torch has native byte order only")
        x: Any = torch.from_numpy(features(3)).to(getattr(torch, dtype))
        exact = x.double().numpy()
    elif dtype == "bfloat16":
        x = features(3).astype(pytest.importorskip("ml_dtypes").bfloat16)
        exact = x.astype(np.float64)
    else:
        x = features(3).astype(dtype)
        exact = x.astype(np.float64)
    y = engine(backend)(x)
    assert type(y) is (torch.Tensor if kind == "torch" else np.ndarray)
    assert y.dtype == (torch.float32 if kind == "torch" else np.float32)
    np.testing.assert_allclose(np.asarray(y), reference(exact), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_widened_exactly() -> None:
    from fastinv import tensors

    x = torch.randn(4, *FEATURES).bfloat16().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    widened = tensors.source(x, FEATURES).chunk(1, 3)
    assert np.array_equal(widened, x[1:3].float().numpy())


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("channels", [False, True])
def test_quantised_types(backend: str, dtype: str, kind: str, channels: bool) -> None:
    low, high = (0, 256) if dtype == "uint8" else (-128, 128)
    q = np.random.default_rng(0).integers(low, high, (3, *FEATURES)).astype(dtype)
    scale = np.array([0.01, 0.02]) if channels else 0.01
    zero = np.array([3, 128]) if channels else 7
    shape = (2, 1, 1) if channels else ()
    exact = (q.astype(np.float64) - np.reshape(zero, shape)) * np.reshape(scale, shape)
    x: Any = torch.from_numpy(q) if kind == "torch" else q
    y = engine(backend)(x, scale=scale, zero_point=zero)
    np.testing.assert_allclose(np.asarray(y), reference(exact), rtol=1e-4, atol=1e-5)
    unshifted = engine(backend)(x, scale=scale)
    expected = reference(q.astype(np.float64) * np.reshape(scale, shape))
    np.testing.assert_allclose(np.asarray(unshifted), expected, rtol=1e-4, atol=1e-5)


def layouts() -> dict[str, Any]:
    x = features(5)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not unaligned.flags.aligned
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "channels-last": x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
        "fortran": np.asfortranarray(x),
        "every-second": np.repeat(x, 2, axis=0)[::2],
        "reversed": x[::-1].copy()[::-1],
        "read-only": frozen,
        "unaligned": unaligned,
        "subclass": x.view(np.recarray),
        "torch-channels-last": torch.from_numpy(x).to(memory_format=torch.channels_last),
        "torch-with-gradient": torch.from_numpy(x).requires_grad_(),
        "torch-parameter": torch.nn.Parameter(torch.from_numpy(x)),
        "torch-negative": torch._neg_view(torch.from_numpy(-x)),
    }


@pytest.mark.parametrize("layout", layouts())
def test_layouts(backend: str, layout: str) -> None:
    y = engine(backend)(layouts()[layout])
    np.testing.assert_array_equal(np.asarray(y), engine(backend)(features(5)))


def test_broadcast_input(backend: str) -> None:
    x = np.broadcast_to(features(1), (4, *FEATURES))
    np.testing.assert_allclose(engine(backend)(x), np.repeat(engine(backend)(features(1)), 4, axis=0), rtol=1e-5)


def test_contiguous_float32_is_not_copied() -> None:
    from fastinv import tensors

    x = features(5)
    assert np.shares_memory(tensors.source(x, FEATURES).chunk(1, 4), x)
    assert np.shares_memory(tensors.source(torch.from_numpy(x), FEATURES).chunk(1, 4), x)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_empty_batches(backend: str, kind: str) -> None:
    x: Any = torch.empty(0, *FEATURES) if kind == "torch" else np.empty((0, *FEATURES), np.float16)
    assert tuple(engine(backend)(x).shape) == (0, *IMAGE)
    images, report = solver(backend).solve(x)
    assert tuple(images.shape) == (0, *IMAGE)
    assert report.objective is not None
    assert report.objective.shape == report.steps.shape == report.converged.shape == (0,)


def test_a_network_without_steps(backend: str) -> None:
    identity = fastinv.compile(Network(FEATURES, ()), backend)
    x = features(2)
    assert np.array_equal(identity(x), x)


def test_the_result_does_not_depend_on_the_chunks(backend: str) -> None:
    x = features(23)
    whole, cut = engine(backend), engine(backend)
    cut.batch_size = 5
    np.testing.assert_allclose(
        whole(x), cut(x), rtol=0 if backend == "cpu" else 1e-5, atol=0 if backend == "cpu" else 1e-6
    )


def test_threads_of_python(backend: str) -> None:
    made = engine(backend, threads=1)
    inputs = [features(9, seed) for seed in range(8)]
    expected = [made(x) for x in inputs]
    found: list[Any] = [None] * len(inputs)

    def work(index: int) -> None:
        for _ in range(20):
            found[index] = made(inputs[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


# Wrong inputs


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (features(1)[0], r"\[2, 6, 5\], expected \[N, 2, 6, 5\]: this is one image without the batch axis"),
        (features(3).transpose(0, 2, 3, 1), "the channels come last"),
        (features(3).reshape(3, -1), r"pass features\.reshape\(-1, 2, 6, 5\)"),
        (np.zeros((3, 4, 6, 5), np.float32), "another split point"),
        (np.float32(3), r"a float32, expected a numpy array"),
        (np.zeros((), np.float32), r"features of shape \[\]"),
        ([[1.0]], "a list, expected a numpy array or a torch tensor"),
        (None, "a NoneType"),
        (np.zeros((1, *FEATURES), np.int64), "dtype int64, expected float32, .* uint8"),
        (np.zeros((1, *FEATURES), np.complex64), "dtype complex64"),
        (np.zeros((1, *FEATURES), np.bool_), "dtype bool"),
        (np.zeros((1, *FEATURES), object), "dtype object"),
        (np.zeros((1, *FEATURES), "U3"), "dtype str"),
        (torch.zeros(1, *FEATURES, dtype=torch.int32), "dtype int32"),
        (torch.zeros(1, *FEATURES, dtype=torch.complex64), "dtype complex64"),
        (torch.zeros(1, *FEATURES, device="meta"), "on device 'meta', expected cpu: .*cpu"),
        (torch.zeros(1, *FEATURES).to_sparse(), "sparse"),
        (np.zeros((1, *FEATURES), np.uint8), "uint8 features need the scale"),
        (torch.zeros(1, *FEATURES, dtype=torch.int8), "int8 features need the scale"),
    ],
)
def test_wrong_features(x: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        engine("auto")(x)
    with pytest.raises(FeatureError, match=message):
        solver("auto").solve(x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_features_must_be_finite(value: float, dtype: str) -> None:
    x = features(40).astype(dtype)
    x[29, 1, 2, 3] = x[31, 0, 0, 0] = value
    made = engine("auto")
    made.batch_size = 8
    with pytest.raises(FeatureError, match=r"hold 2 values that are NaN or Inf .* image 29"):
        made(x)
    with pytest.raises(FeatureError, match="image 29"):
        engine("auto")(torch.from_numpy(x).bfloat16())


AFFINE = {
    "every input counts": nn.ConvTranspose2d(3, 2, 3, padding=1),
    "large": nn.ConvTranspose2d(3, 2, 3, 2, 1),
    "chain": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 5, padding=2)),
    "some are never read": nn.Conv2d(3, 2, 1, 2),
    "the border is never read": nn.ConvTranspose2d(3, 2, 3, 1, 3),
    "hidden by ReLU": nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU()),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", AFFINE)
def test_no_value_that_is_not_finite_hides(monkeypatch: pytest.MonkeyPatch, isa: str, name: str) -> None:
    """Wherever it lies: compiled networks may look for it in their results instead."""
    monkeypatch.setenv("FASTINV_ISA", isa)
    shape = (3, 30, 38) if name == "large" else (3, 8, 10)
    made = fastinv.compile(exported(shape, AFFINE[name]), backend="cpu", threads=2)
    for count, step in ((1, 1), (37, 97)):
        x = randn(count, *shape)
        for at in range(0, x.size, step * (7 if name == "large" else 1)):
            broken = x.copy()
            broken.flat[at] = (np.nan, np.inf, -np.inf)[at % 3]
            image = at // (x.size // count)
            with pytest.raises(FeatureError, match=f"hold 1 values that are NaN or Inf .* image {image}"):
                made(broken)
            if at % 5 == 0:
                with pytest.raises(FeatureError, match=f"image {image}"):
                    made(broken.astype(np.float16))


@pytest.mark.parametrize("count", [1, 37])
def test_finite_features_may_overflow(count: int) -> None:
    """What is computed from them is not their fault."""
    module = nn.Conv2d(3, 1, 3, padding=1)
    nn.init.ones_(module.weight)
    made = fastinv.compile(exported((3, 8, 10), module), backend="cpu")
    images = made(np.full((count, 3, 8, 10), 3e38, np.float32))
    assert images.shape == (count, 1, 8, 10)
    assert not np.isfinite(images).all()


def test_a_float64_that_float32_cannot_hold() -> None:
    with pytest.raises(FeatureError, match=r"NaN or Inf \(as float32\)"):
        engine("auto")(np.full((1, *FEATURES), 1e300))


@pytest.mark.parametrize(
    ("dtype", "options", "message"),
    [
        ("float32", {"scale": 0.1}, "these are float32: leave them out"),
        ("float16", {"zero_point": 3}, "these are float16"),
        ("uint8", {"scale": 0.0}, "scale 0.0, expected numbers above 0"),
        ("uint8", {"scale": [1.0, -1.0]}, "expected numbers above 0"),
        ("uint8", {"scale": [1.0] * 3}, "expected a finite number or 2 of them"),
        ("uint8", {"scale": float("nan")}, "scale nan"),
        ("uint8", {"scale": "big"}, "scale 'big'"),
        ("int8", {"scale": 1.0, "zero_point": [1, 2, 3]}, "zero_point"),
        ("int8", {"scale": 1.0, "zero_point": np.inf}, "zero_point inf"),
        ("int8", {"scale": 3e38}, "NaN or Inf"),
    ],
)
def test_wrong_scales(dtype: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        engine("auto")(np.full((1, *FEATURES), 100).astype(dtype), **options)


# compile and select


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cuda:77"}, BackendError, "'cuda:77': .* can run this here: cpu, torch"),
        ({"backend": "cuda:x"}, BackendError, "'cuda:x' is unknown"),
        ({"backend": "tpu"}, BackendError, "'tpu' is unknown"),
        ({"backend": 3}, BackendError, "backend 3, expected a name"),
        ({"backend": ["cpu"]}, BackendError, r"backend \['cpu'\], expected a name"),
        ({"precision": "int4"}, BackendError, "precision 'int4', expected one of auto, float32"),
        ({"precision": None}, BackendError, "precision None"),
        (
            {"precision": "tf32"},
            BackendError,
            "no backend can run this: cuda: .*; cpu: .*; torch: it has no precision tf32",
        ),
        ({"precision": "tf32", "backend": "torch"}, BackendError, "'torch': it has no precision tf32 here, only"),
        ({"threads": 0}, BackendError, "threads 0, expected an integer from 1"),
        ({"threads": 2.0}, BackendError, "threads 2.0"),
        ({"threads": True}, BackendError, "threads True"),
        ({"threads": 10**9}, BackendError, "threads 1000000000"),
        ({"what": torch.nn.ReLU()}, NetworkError, "a ReLU, expected a Network.*export"),
        ({"what": None}, NetworkError, "a NoneType"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastinv.compile(**({"what": NETWORK} | options))


def test_the_environment_names_the_backend_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINV_BACKEND", "torch")
    assert select("auto", "auto", NETWORK.steps)[0].name == "torch"
    assert select(None, "float32", NETWORK.steps) == (BACKENDS[-1], "float32")
    monkeypatch.setenv("FASTINV_BACKEND", "tpu")
    assert select("torch", "float32", NETWORK.steps)[0].name == "torch"
    with pytest.raises(BackendError, match="'tpu' is unknown"):
        select("auto", "float32", NETWORK.steps)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTINV_BACKEND", raising=False)
    monkeypatch.setattr(CudaBackend, "available", lambda self: "no GPU")
    first, last = BACKENDS[1], BACKENDS[-1]
    monkeypatch.setattr(type(first), "available", lambda self: None)
    assert select("auto", "float32", NETWORK.steps)[0] is first
    monkeypatch.setattr(type(first), "supports", lambda self, step: step.op.name != "activation")
    steps = (*NETWORK.steps, Step(Activation("relu"), (0,), source="tail"))
    assert select("auto", "float32", NETWORK.steps)[0] is first
    assert select("auto", "float32", steps)[0] is last
    with pytest.raises(BackendError, match=r"no kernel for activation \(tail\)\. Backends .* here: torch"):
        select(first.name, "float32", steps)
    monkeypatch.setattr(type(first), "available", lambda self: "the core is missing: reinstall")
    assert select("auto", "float32", NETWORK.steps)[0] is last
    with pytest.raises(BackendError, match="the core is missing: reinstall"):
        select(first.name, "float32", NETWORK.steps)


def test_compile_takes_inverters() -> None:
    inverter = inverse_network()
    made = fastinv.compile(inverter)
    assert isinstance(made, Engine)
    assert made.network == inverter.network
    assert isinstance(fastinv.compile(rmle()), Solver)


# Solvers


def objective(images: np.ndarray, x: np.ndarray) -> np.ndarray:
    """rMLE's objective in float64."""
    recipe = rmle()
    mean, std = np.reshape(recipe.mean, (3, 1, 1)), np.reshape(recipe.std, (1, 1, 1))
    z = torch.from_numpy((images.astype(np.float64) - mean) / std)
    (step,) = recipe.edge.steps
    weights = {name: torch.from_numpy(np.array(w, np.float64)) for name, w in step.weights.items()}
    found = step.activation.reference([step.op.reference([z], weights)], {})
    residual = ((found - torch.from_numpy(x.astype(np.float64))) ** 2).sum(dim=(1, 2, 3))
    tv = (z.diff(dim=2) ** 2).sum(dim=(1, 2, 3)) + (z.diff(dim=3) ** 2).sum(dim=(1, 2, 3))
    return np.asarray((residual + recipe.tv_weight * tv).numpy())


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_solver_lowers_its_objective(backend: str, kind: str) -> None:
    x = features(4)
    made = solver(backend, steps=200, clamp=(0.0, 1.0))
    assert (made.backend, made.precision) == (backend, "float32")
    assert backend in repr(made)
    images, report = made.solve(torch.from_numpy(x) if kind == "torch" else x)
    assert type(images) is (torch.Tensor if kind == "torch" else np.ndarray)
    images = np.asarray(images)
    assert images.shape == (4, *IMAGE)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert (report.backend, report.isa) == (backend, made.isa)
    np.testing.assert_allclose(report.objective, objective(images, x), rtol=1e-3)
    assert report.objective is not None
    assert (report.objective < objective(np.full_like(images, 0.5), x)).all()
    assert report.steps.tolist() == [200] * 4
    assert not report.converged.any()


def test_no_step_gives_the_start_in_pixels(backend: str) -> None:
    x = features(3)
    start = np.random.default_rng(0).random((3, *IMAGE))
    made = solver(backend, steps=0, init=start[0])
    np.testing.assert_allclose(made.solve(x)[0], np.repeat(start[:1], 3, axis=0), atol=1e-6)
    np.testing.assert_allclose(made.solve(x, 0.25)[0], np.full((3, *IMAGE), 0.25), atol=1e-6)
    np.testing.assert_allclose(made.solve(x, start[1])[0], np.repeat(start[1:2], 3, axis=0), atol=1e-6)
    np.testing.assert_allclose(made.solve(x, torch.from_numpy(start))[0], start, atol=1e-6)
    made.batch_size = 2
    np.testing.assert_allclose(made.solve(x, start)[0], start, atol=1e-6)


def test_divergence_shows_in_the_objective(backend: str) -> None:
    images, report = solver(backend, lr=1e6, tv_weight=3e38, steps=3).solve(features(2))
    assert images.shape == (2, *IMAGE)
    assert report.objective is not None
    assert not (report.objective < 1e30).any()


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (np.zeros((5, *IMAGE)), r"init of shape \[5, 3, 6, 5\] .* \[3, 6, 5\] or \[2, 3, 6, 5\]"),
        (np.zeros(IMAGE, np.uint8), "dtype uint8"),
        (np.full(IMAGE, np.nan), "init holds NaN"),
        (float("inf"), "init holds NaN"),
        (1e300, "init holds NaN"),
        (True, "init: a bool"),
        ("grey", "init: a str"),
    ],
)
def test_wrong_starts(init: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        solver("auto").solve(features(2), init)


def test_chunks_fill_the_threads_and_stay_short() -> None:
    cores = len(os.sched_getaffinity(0))
    small = fastinv.compile(Network((1, 2, 2), ()), "torch")
    assert small.batch_size >= 4 * cores
    assert solver("torch", steps=10_000_000).batch_size == 4 * cores
    # This one stops within a chunk, and takes the longer the less often it begins anew.
    assert solver("cpu", steps=10_000_000).batch_size > 1000


@pytest.mark.parametrize("torch_features", [False, True])
def test_a_start_from_an_inverse_network(backend: str, torch_features: bool) -> None:
    network = inverse_network(mean=0.3, std=(0.5, 0.25, 0.1))
    recipe = rmle(init=network, clamp=(0.0, 1.0))
    x: Any = features(7)
    starts = fastinv.invert(x, network, backend=backend)
    expected, reported = fastinv.compile(rmle(clamp=(0.0, 1.0)), backend).solve(x, init=starts)
    made = fastinv.compile(recipe, backend)
    images, report = made.solve(torch.from_numpy(x) if torch_features else x)
    np.testing.assert_allclose(np.asarray(images), expected, atol=1e-4)
    np.testing.assert_allclose(report.objective, reported.objective, rtol=1e-4)
    again = fastinv.invert(x, recipe, backend=backend, batch_size=3)
    np.testing.assert_allclose(again, expected, atol=1e-4)
    unrefined, _ = fastinv.compile(rmle(init=network, steps=0), backend).solve(x)
    np.testing.assert_allclose(unrefined, starts, atol=1e-6)
    grey, _ = made.solve(x, init=0.5)  # a start at the call comes first
    assert not np.array_equal(grey, expected)


def test_plain_arrays_take_the_short_way_to_the_same_results(backend: str) -> None:
    """A plain array is read where it lies; whatever else holds the same numbers goes another way."""
    made = engine(backend)
    x = features(5)
    plain = made(x)
    bytes_off = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not bytes_off.flags.aligned
    read_only = x.copy()
    read_only.flags.writeable = False
    for other in (
        np.asfortranarray(x),
        x.astype(">f4"),
        x.view(np.recarray),
        bytes_off,
        read_only,
        torch.from_numpy(x),
    ):
        assert np.array_equal(np.asarray(made(other)), plain)
    assert plain.flags.owndata
    assert made(x[:0]).shape == (0, *NETWORK.output_shape)
