"""How every kernel ends: y = activation(x + addend), or on the way back g = (x + addend) · activation'(saved).

The activations are those of `fastinv.ops.activation`, by name. libdevice is avoided: the interpreter has none. All of
it is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

# Activations whose derivative can be told from their result; for the others the argument has to be kept.
FROM_RESULT = ("identity", "relu", "leaky_relu", "sigmoid", "tanh", "hardtanh", "elu", "exp", "sqrt", "reciprocal")


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What is done to a kernel's result before it is stored.

    Attributes:
        kind, a, b: the activation.
        addend: a tensor like the result, added before.
        saved: the activation's results, a tensor like the result: then its derivative there is multiplied by.
    """

    kind: str = "identity"
    a: float = 0.0
    b: float = 0.0
    addend: Any = None
    saved: Any = None

    @property
    def args(self) -> dict[str, Any]:
        return {"addend": self.addend, "saved": self.saved, "a": self.a, "b": self.b}


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))  # at most 1: no overflow
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """Within 4e-7 (relative): below 1/4, where 1 − e loses digits, by its series in x², which ends 1e-8 off."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    t = (1.0 - e) / (1.0 + e)
    small = tl.minimum(size, 0.25)  # nothing overflows
    q = small * small
    series = x * (1.0 + q * (-0.33333333 + q * (0.13333333 + q * (-0.053968254 + q * 0.021869489))))
    return tl.where(size < 0.25, series, tl.where(x >= 0, t, -t))


@triton.jit
def exp_less_one(z):
    """e^z − 1 for z <= 0, within 1e-6 (relative): above −1/4, where digits are lost, by its series, 5e-8 off."""
    series = z * (1.0 + z * (0.5 + z * (0.16666667 + z * (0.041666667 + z * (0.0083333333 + z * 0.0013888889)))))
    return tl.where(z > -0.25, series, tl.exp(z) - 1.0)


@triton.jit
def log_of_one_more(e):
    """log(1 + e) for e in 0 to 1, within 4e-7 (relative): 2 · artanh(s), s = e / (2 + e).

    Its series in s² is fitted for s to 1/3, where it is 4e-9 off. `tl.log` ends in a branch for each element, which the
    compiler schedules nothing across: of the 128 sums that a thread has of a tile of 128 × 128, 1.1 to 1.7 KB spilled.
    """
    s = e / (2.0 + e)
    q = s * s
    return s * (2.0 + q * (0.66666317 + q * (0.40024909 + q * (0.2796061 + q * 0.2817834))))


@triton.jit
def normal(x):
    """Φ(x), the normal distribution: within 1e-6 (relative) from -3 on, 2e-9 (absolute) below.

    Φ(-|x|) = 2^P(|x|), P fitted to its log2 for |x| to 7; beyond, P goes on falling, the faster the further. `tl.erf`
    branches for each element, as `tl.log` does: with it a tile of 128 × 128 spilled up to 368 bytes a thread.
    """
    u = tl.abs(x)
    p = 7.525312e-3 + u * (-4.5372918e-4 + u * (-6.7131972e-5 + u * (1.6365189e-5 + u * -1.0516554e-6)))
    p = -0.9999995 + u * (-1.1511252 + u * (-0.45906994 + u * (-0.05285833 + u * p)))
    tail = tl.exp2(p)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def normal_by_tanh(x):
    """(1 + tanh u) / 2 for u = √(2/π) · (x + 0.044715 x³): sigmoid(2u), which does not cancel."""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, a, b, KIND: tl.constexpr):
    """activation(x). NaN stays NaN, as in PyTorch."""
    if KIND == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif KIND == "leaky_relu":
        x = tl.where(x < 0, a * x, x)
    elif KIND == "sigmoid":
        x = sigmoid(x)
    elif KIND == "tanh":
        x = tanh(x)
    elif KIND == "silu":
        x = x * sigmoid(x)
    elif KIND == "gelu":
        x = x * normal(x)
    elif KIND == "gelu_tanh":
        x = x * normal_by_tanh(x)
    elif KIND == "softplus":
        z = a * x
        smooth = tl.maximum(z, 0.0) + log_of_one_more(tl.exp(-tl.abs(z)))
        x = tl.where(z > b, x, smooth * (1.0 / a))
    elif KIND == "hardtanh" or KIND == "clamp":
        x = tl.where(x < a, a, tl.where(x > b, b, x))
    elif KIND == "elu":
        z = b * tl.where(x > 0, 0.0, x)
        x = tl.where(x > 0, x, a * exp_less_one(z))
    elif KIND == "exp":
        x = tl.exp(x)
    elif KIND == "sqrt":
        x = tl.sqrt(tl.where(x < 0, 0.0, x))
    elif KIND == "reciprocal":
        x = 1.0 / x
    return x


@triton.jit
def slope_at_result(y, a, b, KIND: tl.constexpr):
    """activation'(x), from y = activation(x)."""
    if KIND == "relu":
        s = tl.where(y > 0, 1.0, 0.0)
    elif KIND == "leaky_relu":
        s = tl.where(y > 0, 1.0, a)
    elif KIND == "sigmoid":
        s = y * (1.0 - y)
    elif KIND == "tanh":
        s = 1.0 - y * y
    elif KIND == "hardtanh":
        s = tl.where((y > a) & (y < b), 1.0, 0.0)
    elif KIND == "elu":
        s = tl.where(y > 0, 1.0, b * (y + a))
    elif KIND == "exp":
        s = y
    elif KIND == "sqrt":
        s = tl.where(y > 0, 0.5 / tl.where(y > 0, y, 1.0), 0.0)
    elif KIND == "reciprocal":
        s = -y * y
    else:
        s = tl.full(y.shape, 1.0, tl.float32)
    return s


@triton.jit
def slope(x, a, b, KIND: tl.constexpr):
    """activation'(x)."""
    if KIND == "silu":
        s = sigmoid(x)
        s = s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        s = normal(x) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = normal_by_tanh(x)
        s = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "softplus":
        s = tl.where(a * x > b, 1.0, sigmoid(a * x))
    elif KIND == "clamp":
        s = tl.where((x >= a) & (x <= b), 1.0, 0.0)
    elif KIND == "leaky_relu":
        s = tl.where(x > 0, 1.0, a)
    else:
        s = slope_at_result(activate(x, a, b, KIND), a, b, KIND)
    return s


@triton.jit
def finish(x, position, inside, addend, saved, a, b, KIND: tl.constexpr):
    """The result, for float32 x at these positions of the output; `addend` and `saved` may be None."""
    if addend is not None:
        x += tl.load(addend + position, mask=inside, other=0.0).to(tl.float32)
    if saved is not None:
        x *= slope_at_result(tl.load(saved + position, mask=inside, other=0.0).to(tl.float32), a, b, KIND)
    else:
        if KIND == "reciprocal":  # of lanes that nobody reads none is divided by 0
            x = tl.where(inside, x, 1.0)
        x = activate(x, a, b, KIND)
    return x


@triton.jit
def stored(x, BYTES: tl.constexpr):
    """What is stored for x: with BYTES round(255 · x) in 0 to 255, NaN as 0."""
    if BYTES:
        x = tl.where(x > 0, tl.where(x < 1, x, 1.0), 0.0) * 255.0
        x = (x + 12582912.0) - 12582912.0  # 1.5 · 2^23: rounds halves to even, as numpy's rint
    return x


@triton.jit
def put(
    sums, n, y, x, o, inside, outputs, bias, out, addend, saved, a, b,
    height, width, out_n, out_y, out_x, out_c, KIND: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[n, y, x, o] = finish(bias[o] + sums), of those `inside`, for float32 sums [pixels, channels]."""
    if bias is not None:
        sums += tl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    position = ((n * height + y) * width + x)[:, None] * outputs + o[None, :]
    sums = finish(sums, position, inside, addend, saved, a, b, KIND)
    place = (n * out_n + y * out_y + x * out_x)[:, None] + (o * out_c)[None, :]
    tl.store(out + place, stored(sums, BYTES).to(out.dtype.element_ty), mask=inside)
