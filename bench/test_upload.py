"""Filling the pinned memory through which features of the host go to a GPU: in pieces, and as one copy of a batch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastinv import _core
from fastinv.backends.cuda import host as cuda_host
from fastinv.backends.cuda.device import Streams

VALUES = 2**26  # float32, 256 MiB: more than a cache holds
BATCH = 2**25  # values: 1,024 images' features at CIFAR-10's ReLU22
DRIVER = """
extern "C" {
int cuStreamGetCtx(void*, void**) { return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuMemcpyHtoDAsync_v2(unsigned long long, const void*, unsigned long, void*) { return 0; }
int cuEventCreate(void** event, unsigned) { return *event = event, 0; }
int cuEventRecord(void*, void*) { return 0; }
int cuEventSynchronize(void*) { return 0; }
int cuEventDestroy_v2(void*) { return 0; }
}
"""


def idle_driver(folder: Path) -> str:
    """A CUDA driver that does nothing, in no time."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a GPU, or g++")
    library = folder / "libidle.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return str(library)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["pieces", "batches"])
def test_upload(way: str, dtype: str, benchmark, tmp_path: Path) -> None:
    benchmark.group = f"{dtype}, 256 MiB of float32"
    kind: torch.dtype = getattr(torch, dtype)
    source = np.random.default_rng(0).standard_normal(VALUES, np.float32)
    if way == "pieces":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        upload = cuda_host.Upload(device, Streams(device))
        there = torch.empty(VALUES, dtype=kind, device=device)
        upload.send(source, there)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(there.cpu(), torch.from_numpy(source).to(kind))
        if device.type == "cuda":
            benchmark(upload.send, source, there)
        else:
            threads = _core.available_threads()
            pinned = np.empty(_core.Upload.pieces * threads * cuda_host.PIECE, np.uint8)
            benchmark(_core.Upload(pinned, threads, idle_driver(tmp_path)).send, source, 0, dtype == "bfloat16", 0)
    else:
        pinned = torch.empty(BATCH, dtype=kind, pin_memory=torch.cuda.is_available())
        parts = torch.from_numpy(source).split(BATCH)
        benchmark(lambda: [pinned.copy_(part) for part in parts])
