"""`_core.Upload` with the host as the device, and through a stand-in for CUDA's driver whose copies are made later."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastinv import _core

STUB = Path(__file__).parent / "driver_stub.cpp"
PIECE = 64  # bytes


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("driver") / "libstub.so"
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", STUB, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.stub_stream.restype = ctypes.c_void_p
    return loaded


ISAS = [isa for isa, runnable in _core.isas() if runnable]


def upload_of(threads: int, driver: str = "", isa: str = "", piece: int = PIECE) -> _core.Upload:
    return _core.Upload(np.empty(_core.Upload.pieces * threads * piece, np.uint8), threads, driver, isa)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 20_000])
def test_pieces_are_not_filled_again_before_they_have_gone(driver: ctypes.CDLL, size: int, threads: int) -> None:
    """Of calls one after the other, too."""
    stream = driver.stub_stream()
    upload = upload_of(threads, driver._name)
    random = np.random.default_rng(0)
    sources = [random.standard_normal(size, np.float32) for _ in range(3)]
    there = [np.zeros_like(source) for source in sources]
    for source, target in zip(sources, there, strict=True):
        upload.send(source, target.ctypes.data, False, stream)
    driver.stub_wait()
    for source, target in zip(sources, there, strict=True):
        np.testing.assert_array_equal(target, source)


def test_what_is_on_its_way_outlives_its_upload(driver: ctypes.CDLL) -> None:
    source = np.random.default_rng(0).standard_normal(5000, np.float32)
    there = np.zeros_like(source)
    upload = upload_of(2, driver._name)
    upload.send(source, there.ctypes.data, False, driver.stub_stream())
    del upload
    np.testing.assert_array_equal(there, source)


def test_what_the_driver_says_is_raised(driver: ctypes.CDLL) -> None:
    upload = upload_of(2, driver._name)
    source = np.ones(5000, np.float32)
    there = np.zeros_like(source)
    driver.stub_fail_after(7)
    with pytest.raises(RuntimeError, match="cuMemcpyHtoDAsync: CUDA's driver says error 700"):
        upload.send(source, there.ctypes.data, False, driver.stub_stream())
    upload.send(source, there.ctypes.data, False, driver.stub_stream())  # and goes on
    driver.stub_wait()
    np.testing.assert_array_equal(there, source)
    with pytest.raises(RuntimeError, match="cuStreamGetCtx: CUDA's driver says error 201"):
        upload.send(source, there.ctypes.data, False, 8)


def test_a_driver_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CUDA driver: .*libnone"):
        upload_of(1, str(tmp_path / "libnone.so.1"))
    with pytest.raises(ValueError, match="has no cuStreamGetCtx"):
        upload_of(1, "libm.so.6")


@pytest.mark.parametrize("through_driver", [False, True])
@pytest.mark.parametrize("beside", [0, 1, 2**19, 2**21 + 3])
@pytest.mark.parametrize("size", [0, 7, 5000])
def test_results_are_copied_beside(
    size: int, beside: int, through_driver: bool, request: pytest.FixtureRequest
) -> None:
    driver = request.getfixturevalue("driver") if through_driver else None
    upload = upload_of(3, driver._name if driver else "")
    random = np.random.default_rng(1)
    source = random.standard_normal(size, np.float32)
    results = random.integers(0, 256, beside, np.uint8)
    there, out = np.zeros_like(source), np.zeros_like(results)
    upload.send(source, there.ctypes.data, False, driver.stub_stream() if driver else 0, results, out)
    np.testing.assert_array_equal(out, results)
    if driver:
        driver.stub_wait()
    np.testing.assert_array_equal(there, source)


@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("before", [0, 1, 64, 2**21 - 1])
@pytest.mark.parametrize("count", [0, 1, 2**21 - 1, 2**21, 2**22 + 5])
def test_results_may_belong_anywhere(count: int, before: int, size: int) -> None:
    """In a huge page and across several; those before and after stay what they are."""
    memory = np.full(2**21 + before + count + 2, 7, np.uint8)
    begin = -memory.ctypes.data % 2**21 + before
    if begin + count + 1 > len(memory):
        begin -= 2**21
    begin = max(begin, 1)
    results = np.random.default_rng(3).integers(0, 256, count, np.uint8)
    source = np.arange(size, dtype=np.float32)
    for copy in (True, False):
        there = np.zeros_like(source)
        memory[...] = 7
        out = memory[begin : begin + count]
        if copy:
            _core.copy(results, out, 3)
        else:
            upload_of(3).send(source, there.ctypes.data, False, 0, results, out)
            np.testing.assert_array_equal(there, source)
        np.testing.assert_array_equal(out, results)
        assert (memory[:begin] == 7).all()
        assert (memory[begin + count :] == 7).all()


@pytest.mark.parametrize("isa", ISAS)
def test_rounding_is_that_of_pytorch(isa: str) -> None:
    """Of every float32 with a 16-bit rest of interest: ties, their neighbours, denormals, what rounds to Inf, NaN."""
    high = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    bits = high | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    source = bits.view(np.float32)
    there = np.zeros(source.shape, np.uint16)
    upload_of(2, isa=isa, piece=2**12).send(source, there.ctypes.data, True, 0)
    found = torch.from_numpy(there.view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(source).to(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("begin", [0, 1, 2, 4, 20, 63])
@pytest.mark.parametrize("size", [0, 1, 3, 60, 63, 64, 65, 130, 1001])
def test_features_may_lie_anywhere(size: int, begin: int, isa: str) -> None:
    """Bytes, and floats, which are rounded; those before and after what is written stay what they are."""
    upload = upload_of(1, isa=isa, piece=512)
    memory = np.random.default_rng(2).integers(0, 256, begin + 4 * size, np.uint8)
    source = memory[begin : begin + size]
    there = np.full(size + 2, 7, np.uint8)
    upload.send(source, there.ctypes.data + 1, False, 0)
    np.testing.assert_array_equal(there, [7, *source, 7])
    floats = np.ndarray(size, np.float32, memory, begin)
    floats[...] = np.arange(size) / 7
    rounded = np.full(size + 2, 7, np.uint16)
    upload.send(floats, rounded.ctypes.data + 2, True, 0)
    expected = torch.from_numpy(floats.copy()).to(torch.bfloat16).view(torch.int16)
    np.testing.assert_array_equal(rounded, [7, *expected, 7])


def test_what_cannot_be_sent_is_refused() -> None:
    x = np.ones((4, 6), np.float32)
    upload = upload_of(1)
    with pytest.raises(ValueError, match="not contiguous"):
        upload.send(x[:, ::2], 0, False, 0)
    with pytest.raises(ValueError, match="floats are rounded"):
        upload.send(x.astype(np.float64), 0, True, 0)
    with pytest.raises(ValueError, match="copy: not contiguous"):
        _core.copy(x, x.T, 1)
    with pytest.raises(ValueError, match="copy: of another size"):
        _core.copy(x, np.ones(23, np.float32), 1)
    for pinned, threads in ((np.empty(128, np.uint8), 0), (np.empty(12, np.uint8), 2), (np.empty(2 * 6, np.uint8), 1)):
        with pytest.raises(ValueError, match="Upload: pinned or threads"):
            _core.Upload(pinned, threads, "")
    locked = np.zeros(4, np.float32)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _core.copy(x[0, :4].copy(), locked, 1)
