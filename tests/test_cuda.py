"""What the cuda backend says and decides where there is no GPU, and its parts that need none."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import exported, randn
from hypothesis import given
from hypothesis import strategies as st

import fastinv
from fastinv.backends import BACKENDS, select
from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda import device as cuda_device
from fastinv.backends.cuda import host as cuda_host
from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda.device import halving, missing, room_for_images
from fastinv.backends.cuda.host import Copy
from fastinv.backends.cuda.lowering import PRECISIONS
from fastinv.backends.cuda.plan import ALIGNMENT, Arena, Buffer, Stage, bucket, place
from fastinv.errors import BackendError
from fastinv.inverters import METHODS, RMLE, InverseNetwork
from fastinv.network import Network, Step
from fastinv.ops.activation import Activation
from fastinv.ops.linear import Linear

NETWORK = Network((4,), (Step(Linear(), (0,), {"weight": randn(3, 4), "bias": randn(3)}),))
CPU = torch.device("cpu")
EDGE = Network((1, 4, 5), (Step(Activation("relu"), (0,)),))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "DRIVER", "libcuda-that-is-not-there.so")
    missing.cache_clear()
    yield
    missing.cache_clear()


def test_no_gpu_is_told_with_the_alternatives(no_gpu: None) -> None:
    message = (
        r"backend 'cuda': no GPU is to be seen .*CUDA_VISIBLE_DEVICES.* Backends that can run this here: cpu, torch"
    )
    with pytest.raises(BackendError, match=message):
        fastinv.compile(NETWORK, backend="cuda")
    with pytest.raises(BackendError, match=message):
        fastinv.compile(RMLE(EDGE, (1, 4, 5)), backend="cuda")


def test_no_triton_is_told(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    monkeypatch.setattr(cuda_device, "_driver_count", lambda: 1)
    monkeypatch.setattr(cuda_device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"Triton is not installed: pip install 'fastinv\[gpu\]'"):
        fastinv.compile(NETWORK, backend="cuda")


def test_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")
    monkeypatch.setattr(cuda_device, "_driver_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in missing(1)
    assert "there is no GPU 2: 2 can be seen, from 0" in missing(2)


def test_a_fork_is_told(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    monkeypatch.setattr(cuda_device.ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: 3))
    with pytest.raises(BackendError, match=r"was forked.* start it by 'spawn'.* can run this here: cpu, torch"):
        fastinv.compile(NETWORK, backend="cuda")


def test_a_fork_asks_again() -> None:
    code = """
import os
from fastinv.backends.cuda import device as cuda_device

parent = os.getpid()
cuda_device._driver_count = lambda: 0 if os.getpid() == parent else None
assert "no GPU is to be seen" in cuda_device.missing(0)
if os.fork() == 0:
    os._exit("was forked" not in cuda_device.missing(0))
assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_auto_falls_to_the_cpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTINV_BACKEND", raising=False)
    assert [backend.name for backend in BACKENDS] == ["cuda", "cpu", "torch"]
    assert fastinv.compile(NETWORK).backend == "cpu"
    assert fastinv.compile(RMLE(EDGE, (1, 4, 5))).backend == "cpu"


def test_looking_for_a_gpu_loads_nothing() -> None:
    code = (
        "import sys, numpy, fastinv; from fastinv.backends.cuda import device; device._driver_count = lambda: 0;"
        "from fastinv.network import Network; assert fastinv.compile(Network((4,))).backend == 'cpu';"
        "assert not {'torch', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_solver_it_does_not_have_goes_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "available", lambda self: None)
    monkeypatch.delenv("FASTINV_BACKEND", raising=False)
    for method in METHODS:
        assert select("auto", "float32", EDGE.steps, True, method)[0].name == "cuda"
    monkeypatch.setattr(CudaBackend, "methods", ("adam", "amsgrad", "sgd"))
    assert select("auto", "float32", EDGE.steps, True, "lbfgs")[0].name == "cpu"
    with pytest.raises(BackendError, match="no optimizer lbfgs, only adam, amsgrad, sgd"):
        select("cuda", "float32", EDGE.steps, True, "lbfgs")
    assert select("cuda:1", "float32", EDGE.steps)[0].name == "cuda:1"
    assert select("cuda", "auto", EDGE.steps)[1] == "bfloat16"
    assert select("cuda", "auto", EDGE.steps, True)[1] == "float32"
    assert set(CudaBackend().precisions(False)) == set(PRECISIONS)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_buffers_that_live_together_lie_apart(spans) -> None:
    buffers = [(ALIGNMENT * size, min(a, b), max(a, b)) for size, a, b in spans]
    offsets, total = place(buffers)
    for i, (size, first, last) in enumerate(buffers):
        assert 0 <= offsets[i] <= total - size
        assert offsets[i] % ALIGNMENT == 0
        for j in range(i):
            other, begin, end = buffers[j]
            if begin <= last and first <= end:
                assert offsets[i] + size <= offsets[j] or offsets[j] + other <= offsets[i]


def test_a_chain_needs_two_buffers() -> None:
    chain = [Buffer(256, "float32") for _ in range(6)]
    stages = [Stage(lambda tensors: tensors, (a,), (b,)) for a, b in itertools.pairwise(chain)]
    arena = Arena(stages, (chain[0], chain[-1]))
    assert arena.bytes(8) == 2 * chain[0].bytes(8)
    outside = {chain[0]: "in", chain[-1]: "out"}
    launches = arena.bind(8, torch.empty(arena.bytes(8), dtype=torch.uint8), outside)
    first = launches[0](chain[1])
    assert first.shape == (8, 256)
    assert first.data_ptr() != launches[0](chain[2]).data_ptr()
    assert first.data_ptr() == launches[0](chain[3]).data_ptr()


def test_batches_come_in_powers_of_two() -> None:
    assert [bucket(n, 100) for n in (1, 2, 3, 64, 65, 100)] == [1, 2, 4, 64, 100, 100]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no room"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),  # pinned
    RuntimeError("CUDA driver error: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch(error: RuntimeError) -> None:
    cuda_device._release_idle()  # what other tests' engines keep is given back first
    asked: list[int | str] = []
    keeper = SimpleNamespace(release=lambda: asked.append("release"), most=1000)

    def work(room: int = 100) -> str:
        asked.append(keeper.most)
        if keeper.most > room:
            raise error
        return "done"

    with pytest.warns(RuntimeWarning, match="no room for") as told:
        assert halving(work, keeper, CPU) == "done"
    assert asked == [1000, "release", 500, "release", 250, "release", 125, "release", 62]
    assert "no room for 500 images at once: going on with 250" in str(told[1].message)
    with pytest.warns(RuntimeWarning), pytest.raises(BackendError, match="no room for one image"):
        halving(lambda: work(room=0), keeper, CPU)
    assert keeper.most == 62  # there may be room for the next call


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_no_room_for_all_images_is_told(error: RuntimeError) -> None:
    with (
        pytest.raises(BackendError, match="no room for the images of 1,234 features on the GPU: pass fewer"),
        room_for_images(1234),
    ):
        raise error


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: illegal memory access"), ValueError("memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error), match="memory"):
        halving(work, SimpleNamespace(most=8), CPU)
    with pytest.raises(type(error), match="memory"), room_for_images(8):
        raise error


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
def test_copies_on_the_host(dtype: str) -> None:
    values = (100 * randn(5, 3, 4)).astype(np.int64).astype(dtype)
    whole = np.array(values)
    whole.flags.writeable = False
    for source in (whole, np.asfortranarray(values), values[:0]):
        for target in (np.zeros_like(values), np.zeros((5, 3, 8), dtype)[..., ::2]):
            Copy(source, target[: len(source)]).make()
            np.testing.assert_array_equal(target[: len(source)], source)


@pytest.mark.parametrize("piece", [4 * 7, 2**12])
def test_float32_is_rounded_on_its_way_to_the_device(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """As PyTorch rounds, whatever the layout; all else is copied as it is."""
    monkeypatch.setattr(cuda_host, "PIECE", piece)  # which ends within an image, or after the last
    monkeypatch.setattr(cuda_host, "PART", 100)  # an image, or as many as fit
    upload = cuda_host.Upload(torch.device("cpu"), cuda_device.Streams(torch.device("cpu")))
    x = randn(6, 5, 4)
    x[0, 0, :3] = np.nan, np.inf, -np.inf
    locked = x.copy()
    locked.flags.writeable = False
    for source in (x, locked, x[::2], x[..., 1:], x.transpose(2, 0, 1), x[:0], x[:, :0]):
        for dtype in (torch.bfloat16, torch.float32):
            there = torch.full((source.size,), 7.0, dtype=dtype)
            target = np.zeros_like(x)
            for results in (target, target[::2], target[:0]):
                upload.send(source, there, cuda_host.Copy(x[: len(results)], results))
                np.testing.assert_array_equal(results, x[: len(results)])
            expected = torch.from_numpy(np.array(source)).to(dtype).flatten()
            np.testing.assert_array_equal(there.float(), expected.float())  # one NaN is as good as another
    for dtype in ("uint8", "int8", "float16"):
        values = np.arange(256).astype(dtype)
        there = torch.zeros(256, dtype=getattr(torch, dtype))
        upload.send(values, there)
        np.testing.assert_array_equal(there.numpy(), values)


def test_what_the_driver_says_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Way:
        def send(self, *args: object) -> None:
            raise RuntimeError("cuMemcpyHtoDAsync: CUDA's driver says error 700")

    upload = cuda_host.Upload(torch.device("cpu"), cuda_device.Streams(torch.device("cpu")))
    monkeypatch.setattr(upload, "_way", Way())
    with pytest.raises(BackendError, match=r"backend 'cuda': features cannot be sent to the GPU: .* error 700"):
        upload.send(randn(3), torch.empty(3))


def test_features_go_to_the_device_a_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of pinned memory, whose end is that of no batch and no image."""
    monkeypatch.setattr(cuda_host, "PIECE", 4 * 7)
    cpu = torch.device("cpu")
    upload = cuda_host.Upload(cpu, cuda_device.Streams(cpu))
    x = randn(9, 3, 2)
    x.flags.writeable = False
    for dtype in ("float32", "float16"):
        features = x.astype(dtype)
        feed = cuda_host.Feed(features, dtype, torch.empty(4 * 4 * 6, dtype=torch.uint8), upload)
        feed.send(0, 4)
        for (start, stop), following in itertools.pairwise([(0, 4), (4, 8), (8, 9), (9, 9), (9, 9)]):
            taken = feed.take(start, stop)
            assert taken.shape == (stop - start, 3, 2)
            np.testing.assert_array_equal(taken.numpy(), features[start:stop])
            feed.free()
            feed.send(*following)


@pytest.mark.parametrize("piece", [7, 2**12])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_images_go_to_the_host(monkeypatch: pytest.MonkeyPatch, piece: int, dtype: str) -> None:
    """When they are flushed, to a target of any layout."""
    monkeypatch.setattr(cuda_host, "PIECE_BACK", piece)
    cpu = torch.device("cpu")
    download = cuda_host.Download(cpu, cuda_device.Streams(cpu))
    images = torch.from_numpy((40 * randn(5, 3, 4)).astype(np.int32)).float()
    kind: torch.dtype = getattr(torch, dtype)
    expected = (2 * images).to(kind).numpy()
    for target in (np.zeros((5, 3, 4), dtype), np.zeros((5, 3, 8), dtype)[..., ::2], np.zeros((4, 3, 5), dtype).T):
        drain = cuda_host.Drain(target, lambda z: (2 * z).to(kind), download)
        drain.flush()
        drain.put(0, 4, images[:4])
        assert not target.any()
        drain.flush()
        np.testing.assert_array_equal(target[:4], expected[:4])
        assert not target[4].any()
        drain.put(4, 5, images[4:])
        drain.flush()
        drain.flush()
        drain.put(5, 5, images[5:])
        drain.flush()
        np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], True),
        ([], True),
        ([3e38, 3e38, -1.0], True),  # the sum is Inf
        ([np.inf, 1.0], False),
        ([np.inf, -np.inf], False),
        ([1.0, np.nan], False),
    ],
)
def test_whether_features_are_finite(values: list[float], expected: bool) -> None:
    x = np.array(values, np.float32)
    x.flags.writeable = False
    assert cuda_host.finite(x) is expected
    assert cuda_host.finite(np.stack([x, x])[:, ::-1]) is expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_gpu() -> None:
    """Computes what the first does; what is there stays there; the current device stays what it is."""
    torch.manual_seed(0)
    network = exported((4, 3, 4), torch.nn.ConvTranspose2d(4, 2, 2, stride=2))
    edge = exported((2, 5, 6), torch.nn.Conv2d(2, 4, 3))
    x = randn(9, 4, 3, 4)
    for inverter in (InverseNetwork(network), RMLE(edge, (2, 5, 6), steps=5)):
        first, second = (fastinv.invert(x, inverter, device=device) for device in ("cuda:0", "cuda:1"))
        np.testing.assert_array_equal(first, second)
        there = fastinv.invert(torch.from_numpy(x).to("cuda:1"), inverter)
        assert there.device == torch.device("cuda", 1)
        np.testing.assert_allclose(there.cpu().numpy(), first, atol=1e-6)
        assert torch.cuda.current_device() == 0


def test_an_extension_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(cuda_native.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match=r"fastinv\._cuda is built, but cannot be loaded .*undefined symbol"):
        assert cuda_native.extension() is None


@pytest.mark.filterwarnings("error")
def test_an_extension_that_is_not_built_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastinv._cuda", None)
    assert cuda_native.extension() is None


def test_the_extension_is_built_where_it_can_be() -> None:
    """Where it is missing, all its tests are skipped: nothing else would tell that it does not compile any more."""
    if os.environ.get("FASTINV_CUDA") == "OFF":
        pytest.skip("the kernels in CUDA C++ are left out on purpose: FASTINV_CUDA=OFF")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))  # as CMake looks for it
    if nvcc is None:
        pytest.skip("the kernels in CUDA C++ cannot be built: no nvcc")
    assert importlib.util.find_spec("fastinv._cuda"), (
        f"{nvcc} is there, but fastinv._cuda is not built: see what CMake said, or set FASTINV_CUDA=OFF"
    )
