"""The GPU backend: Triton kernels of `fastinv.kernels`."""

from __future__ import annotations

import ctypes
import importlib.util


class CudaBackend:
    name = "cuda"

    def available(self) -> str | None:
        return "no GPU"
