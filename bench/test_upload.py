"""Filling the pinned memory through which features of the host go to a GPU: in pieces, and as one copy of a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastinv.backends.cuda_device import Streams
from fastinv.backends.cuda_host import Upload

VALUES = 2**26  # float32, 256 MiB: more than a cache holds
BATCH = 2**25  # values: 1,024 images' features at CIFAR-10's ReLU22


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["pieces", "batches"])
def test_upload(way: str, dtype: str, benchmark) -> None:
    benchmark.group = f"{dtype}, 256 MiB of float32"
    kind: torch.dtype = getattr(torch, dtype)
    source = np.random.default_rng(0).standard_normal(VALUES, np.float32)
    if way == "pieces":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        upload = Upload(device, Streams(device))
        there = torch.empty(VALUES, dtype=kind, device=device)
        upload.send(source, there)
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(there.cpu(), torch.from_numpy(source).to(kind))
        # Where there is no GPU, what would be its part costs nothing.
        target = there if device.type == "cuda" else there.to("meta")
        benchmark(upload.send, source, target)
    else:
        pinned = torch.empty(BATCH, dtype=kind, pin_memory=torch.cuda.is_available())
        parts = torch.from_numpy(source).split(BATCH)
        benchmark(lambda: [pinned.copy_(part) for part in parts])
