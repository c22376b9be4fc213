"""The public doors with `backend="cuda"`; without a GPU the CPU stands in for it, and Triton interprets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import DEVICE

import fastinv
from fastinv import tensors
from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda import device as cuda_device
from fastinv.backends.cuda import network as cuda_network
from fastinv.backends.cuda.batch import Batch
from fastinv.backends.cuda.solver import CudaSolver
from fastinv.errors import FeatureError
from fastinv.inverters import RMLE, InverseNetwork, Inverter


@pytest.fixture(scope="module")
def inverse_network() -> InverseNetwork:
    torch.manual_seed(0)
    network = exported((4, 3, 4), torch.nn.ConvTranspose2d(4, 2, 2, stride=2), torch.nn.Tanh())
    return InverseNetwork(network, mean=(0.5, 0.4), std=(0.3, 0.2))


@pytest.fixture(scope="module")
def rmle(inverse_network: InverseNetwork) -> RMLE:
    torch.manual_seed(0)
    edge = exported((2, 6, 8), torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.AvgPool2d(2))
    return RMLE(edge, (2, 6, 8), mean=(0.5, 0.4), std=(0.3, 0.2), steps=4, lr=0.05, init=inverse_network)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of the tests takes the place of the first GPU."""
    monkeypatch.setattr(CudaBackend, "available", lambda self: None)
    monkeypatch.setattr(CudaBackend, "_device", lambda self: torch.empty(0, device=DEVICE).device)  # with its number


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch tensors are taken to be on the GPU."""
    monkeypatch.setattr(tensors, "on_gpu", lambda x: isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", ["inverse_network", "rmle"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_invert(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    inverter: Inverter = request.getfixturevalue(name)
    x = randn(3, 4, 3, 4)
    images, report = fastinv.invert(x, inverter, backend="cuda", dtype=dtype, return_report=True)
    expected, told = fastinv.invert(x, inverter, backend="cpu", dtype=dtype, return_report=True)
    assert report.backend == "cuda"
    assert images.dtype == expected.dtype
    assert np.abs(images.astype(float) - expected).max() <= (1 if dtype == "uint8" else 1e-4)
    np.testing.assert_array_equal(report.steps, told.steps)
    np.testing.assert_array_equal(fastinv.invert(x, inverter, device="cuda", dtype=dtype), images)


@pytest.mark.parametrize("name", ["inverse_network", "rmle"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_what_is_on_the_gpu_stays_there(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    inverter: Inverter = request.getfixturevalue(name)
    x = torch.from_numpy(randn(3, 4, 3, 4))
    expected = fastinv.invert(x.numpy(), inverter, backend="cuda", dtype=dtype)
    request.getfixturevalue("there")
    out = torch.empty(expected.shape, dtype=getattr(torch, dtype), device=DEVICE)
    images, report = fastinv.invert(x.to(DEVICE), inverter, dtype=dtype, out=out, return_report=True)
    assert images is out
    assert (report.backend, len(report.steps)) == ("cuda", 3)
    assert np.abs(images.cpu().numpy().astype(float) - expected).max() <= (1 if dtype == "uint8" else 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8", "float64"])
def test_starts_from_an_inverse_network(rmle: RMLE, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on the GPU, where the features go there as they are; of others by the way of the host."""
    values, options = randn(5, 4, 3, 4), {}
    if dtype == "uint8":
        values, options = values * 20 + 60, {"scale": 0.05, "zero_point": 60}
    x = values.astype(dtype)
    expected = fastinv.invert(x, rmle, backend="cpu", **options)
    taken: list[str] = []
    solve = CudaSolver.solve
    monkeypatch.setattr(CudaSolver, "solve", lambda *args: taken.append("host") or solve(*args))
    assert np.abs(fastinv.invert(x, rmle, backend="cuda", **options) - expected).max() < 1e-4
    assert taken == ([] if dtype in ("float32", "float16") else ["host"])


def test_what_lies_where_it_did_is_a_graph(
    inverse_network: InverseNetwork, there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def repeatable(launches, device):
        made.append(len(launches))
        return cuda_device.repeatable(launches, device)

    monkeypatch.setattr(cuda_network, "repeatable", repeatable)
    monkeypatch.setattr(cuda_network, "PLACES", 2)
    network = inverse_network.network
    compiled = cuda_network.CudaNetwork(network, "float32", torch.device(DEVICE))
    x, out = (torch.empty(3, *shape, device=DEVICE) for shape in (network.input_shape, network.output_shape))
    compiled.run_there(x.zero_(), "float32")

    def check(count: int) -> None:
        x.copy_(torch.from_numpy(randn(3, 4, 3, 4, seed=len(made) + count)))
        compiled._run_part(x[:count], out[:count])
        assert relative(out[:count].cpu().numpy(), reference(network, x[:count].cpu().numpy())) < 1e-5

    for count, graphs in ((3, 0), (3, 1), (3, 1), (2, 1), (2, 2), (3, 2), (2, 2), (1, 2), (2, 2), (3, 2), (3, 3)):
        check(count)
        assert len(made) == graphs


def test_quantised_features_on_the_gpu(inverse_network: InverseNetwork, there: None) -> None:
    x = torch.from_numpy((randn(3, 4, 3, 4) * 20 + 60).astype(np.uint8)).to(DEVICE)
    options = {"scale": [0.05, 0.1, 0.05, 0.1], "zero_point": 60}
    images = fastinv.invert(x, inverse_network, **options)
    expected = fastinv.invert(x.cpu().numpy(), inverse_network, backend="cpu", **options)
    assert relative(images.cpu().numpy(), expected) < 1e-5


def test_an_engine_takes_what_is_on_the_gpu(inverse_network: InverseNetwork, there: None) -> None:
    engine = fastinv.compile(inverse_network, backend="cuda")
    x = torch.from_numpy(randn(3, 4, 3, 4)).to(DEVICE)
    assert relative(engine(x).cpu().numpy(), fastinv.compile(inverse_network, backend="cpu")(x.cpu().numpy())) < 1e-5
    assert engine.describe()[0]["op"] == "conv_transpose2d"


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((5,), [nn.Linear(5, 12), nn.Sigmoid(), nn.Unflatten(1, (1, 3, 4))]),
        ((5,), [nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.Unflatten(1, (3, 2, 2))]),
        ((16, 4, 4), [nn.Conv2d(16, 1, 3, padding=1), nn.Flatten(), nn.Unflatten(1, (1, 8, 2))]),
        ((2, 3, 3), [nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Unflatten(1, (1, 2, 3))]),
    ],
)
def test_a_reshape_at_the_end(shape: tuple[int, ...], layers: list[nn.Module]) -> None:
    """It launches nothing, but what is before it has other channels: nothing may be written beyond the results."""
    torch.manual_seed(0)
    network = exported(shape, *layers)
    compiled = cuda_network.CudaNetwork(network, "float32", torch.empty(0, device=DEVICE).device)
    x = torch.from_numpy(randn(3, *shape)).to(DEVICE)
    whole = torch.full((9, *network.output_shape), 7.0, device=DEVICE)
    out = whole[3:6]
    compiled._run_part(x, out)
    assert relative(out.cpu().numpy(), reference(network, x.cpu().numpy())) < 1e-5
    assert (whole[:3] == 7).all()
    assert (whole[6:] == 7).all()


def test_wrong_features_on_the_gpu(inverse_network: InverseNetwork, rmle: RMLE, there: None) -> None:
    x = torch.from_numpy(randn(3, 4, 3, 4)).to(DEVICE)
    bad = x.clone()
    bad[1, 2, 0, 0] = torch.inf
    for inverter in (inverse_network, rmle):
        with pytest.raises(FeatureError, match=r"shape \[3, 4, 3, 3\], expected \[N, 4, 3, 4\]"):
            fastinv.invert(x[..., :3], inverter)
        with pytest.raises(FeatureError, match="NaN or Inf"):
            fastinv.invert(bad, inverter)
        assert torch.isfinite(fastinv.invert(x, inverter)).all()  # what was wrong is not remembered
        with pytest.raises(FeatureError, match="out does not fit: expected a tensor"):
            fastinv.invert(x, inverter, out=np.empty((3, *inverter.image_shape), np.float32))
    with pytest.raises(FeatureError, match=r"backend 'cpu' .* leave both out"):
        fastinv.invert(x, inverse_network, backend="cpu")


@pytest.mark.parametrize("name", ["inverse_network", "rmle"])
def test_no_room_for_all_images_is_told(
    name: str, request: pytest.FixtureRequest, there: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of features that are on the GPU stay there, all at once."""
    inverter: Inverter = request.getfixturevalue(name)
    x = torch.from_numpy(randn(1234, 4, 3, 4)).to(DEVICE)
    allocate = torch.empty

    def few(shape: object, *args: object, **options: object) -> torch.Tensor:
        if isinstance(shape, tuple) and shape[0] == 1234:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return allocate(shape, *args, **options)

    monkeypatch.setattr(torch, "empty", few)
    with pytest.raises(
        fastinv.FastinvError, match=r"no room for the images of 1,234 features on the GPU: pass fewer at once"
    ):
        fastinv.invert(x, inverter, backend="cuda")


@pytest.mark.parametrize("name", ["inverse_network", "rmle"])
def test_the_program_s_own_modes_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    """Engines are kept: what one call leaves, made in any mode, serves the next in any other."""
    inverter: Inverter = request.getfixturevalue(name)
    bytes_ = (randn(3, 4, 3, 4) * 20 + 60).astype(np.uint8)

    def run() -> np.ndarray:
        return fastinv.invert(bytes_, inverter, backend="cuda", scale=0.0537, zero_point=60)

    expected = fastinv.invert(bytes_, inverter, backend="cpu", scale=0.0537, zero_point=60)
    fastinv.invert.__globals__["_machines"].__init__(8)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            found = [run()]
        found.append(run())
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        found.append(run())
    for images in found:
        assert np.abs(images - expected).max() < 1e-5


@pytest.mark.parametrize("name", ["inverse_network", "rmle"])
def test_another_byte_order(name: str, request: pytest.FixtureRequest) -> None:
    inverter: Inverter = request.getfixturevalue(name)
    x = randn(3, 4, 3, 4)
    expected = fastinv.invert(x, inverter, backend="cuda")
    for precision in ("float32", "float16") if name == "inverse_network" else ("float32",):
        found = fastinv.invert(x.astype(">f4"), inverter, backend="cuda", precision=precision)
        assert np.abs(found - expected).max() < (1e-6 if precision == "float32" else 1e-2)
    with pytest.raises(FeatureError, match="out is of another byte order"):
        fastinv.invert(x, inverter, backend="cuda", out=np.empty(expected.shape, ">f4"))


@pytest.mark.parametrize("where", ["load", "results"])
def test_ctrl_c_between_the_batches_of_rmle_loses_none(where: str, rmle: RMLE, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.empty(0, device=DEVICE).device
    solver = CudaSolver(dataclasses.replace(rmle, init=0.5), "float32", device, most=4)  # two at a time
    x = randn(6, 4, 3, 4)
    source, init = tensors.source(x, rmle.feature_shape), np.zeros(rmle.image_shape, np.float32)
    whole = np.zeros((6, *rmle.image_shape), np.float32)
    solver.solve_raw(source, init, whole)
    calls: list[int] = []
    original = getattr(Batch, where)

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(Batch, where, interrupted)
    out = np.zeros_like(whole)
    found = solver.solve_raw(source, init, out)
    assert found is not None
    report, finished = found
    assert not finished
    np.testing.assert_array_equal(report.steps, [4, 4, 4, 4, 0, 0])
    np.testing.assert_array_equal(out[:4], whole[:4])
    assert np.isnan(report.objective[4:]).all()


def test_names_of_the_first_gpu(inverse_network: InverseNetwork) -> None:
    x = randn(2, 4, 3, 4)
    for options in ({"backend": "cuda:0"}, {"backend": "cuda:0", "device": "cuda"}, {"device": "cuda:0"}):
        assert fastinv.invert(x, inverse_network, return_report=True, **options)[1].backend == "cuda"
    for options in ({"backend": "cuda:1", "device": "cuda:2"}, {"backend": "cuda:0", "device": "cuda:1"}):
        with pytest.raises(fastinv.FastinvError, match="does not go with backend"):
            fastinv.invert(x, inverse_network, **options)
