"""Products of float32 on tensor cores, which take 11 of the 24 bits of a factor (tf32): each factor in two halves.

x = hi + lo, hi the nearest of tf32; of their four products that of both lo is below 2^-22 of the whole, and is left
out (3xTF32, as in CUTLASS). The halves of weights are taken once, ahead: in the loop that leaves pixels, three
instructions each, on their way from shared memory to the tensor cores, which take one factor from registers. Triton's
own "tf32x3" splits both factors in the loop, writes the second's halves back to shared memory, and looks for NaN in
every sum between two products: for 24 wgmma 595 other instructions, here 353.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl


@triton.jit
def halves(x):
    """hi + lo = x, float32 and exact: hi has 11 bits, lo 12 and a sign. The lo of an infinite x is NaN."""
    hi = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return hi, x - hi


@triton.jit
def add_product(sums, x, w, w_lo, PRECISION: tl.constexpr):
    """sums + x · w, float32 [M, N], of x [M, K] and w [K, N]; where PRECISION is "tf32x3" w and w_lo are halves.

    Their products are summed apart, the small ones first: as sums they would be carried from one block's to the next
    one's, and the compiler lets each wgmma end before the next begins where registers with a factor change between.
    """
    if PRECISION == "tf32x3":
        hi, lo = halves(x)
        product = tl.dot(lo, w, input_precision="tf32")
        product = tl.dot(hi, w_lo, product, input_precision="tf32")
        sums += tl.dot(hi, w, product, input_precision="tf32")
    else:
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


def halved(matrix: Any) -> Any:
    """Float32 [2, *matrix.shape]: hi and lo, each to the nearest of tf32."""
    hi = _to_tf32(matrix)
    return np.stack([hi, _to_tf32(matrix - hi)])


def _to_tf32(x: Any) -> Any:
    return ((x.view(np.int32) + np.int32(0x1000)) & np.int32(-0x2000)).view(np.float32)
