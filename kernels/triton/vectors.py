"""Vectors of one image that lie in memory, for methods of which one program has a whole image: sums in float64.

A program's threads read what others of them wrote only behind a barrier; each function ends with one where it writes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, size, BLOCK: tl.constexpr):
    """Σ a·b over float32 vectors [size]."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(a + k, mask=k < size, other=0.0).to(tl.float64)
        total += x * tl.load(b + k, mask=k < size, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def add_scaled(out, a, factor, b, size, BLOCK: tl.constexpr):
    """out = a + factor · b, for a float64 number and float32 vectors [size]; out may be one of them."""
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(a + k, mask=k < size, other=0.0)
        y = tl.load(b + k, mask=k < size, other=0.0)
        tl.store(out + k, x + factor.to(tl.float32) * y, mask=k < size)
    tl.debug_barrier()


@triton.jit
def scale(out, factor, a, size, BLOCK: tl.constexpr):
    """out = factor · a, for a number and float32 vectors [size]; out may be a."""
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(a + k, mask=k < size, other=0.0)
        tl.store(out + k, (factor * x).to(tl.float32), mask=k < size)
    tl.debug_barrier()
