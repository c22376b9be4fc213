"""attention: softmax(scale · q · kᵀ + bias) · v of each head, forward and back; scores never reach memory.

Forward as FlashAttention-2 (Dao 2023): blocks of keys one after the other, sums scaled anew where a larger score turns
up. Back with each query's log Σ e^score, and a kernel for each of the three: no atomics, one result.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from fastinv.kernels.triton.epilogue import Epilogue, finish
from fastinv.kernels.triton.launch import Launch, ceil_div, power_of_two

MOST_CHANNELS = 512  # of a head, for which tiles of float32 take 229,440 of 232,448 bytes of shared memory

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _unit(count, heads, BLOCK: tl.constexpr):
    """Which image and head a program has, and which of its `count` tokens."""
    blocks = (count + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return program // blocks // heads, program // blocks % heads, program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _tile(n, h, t, count, heads, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Where channels of tokens t lie in [N, count, heads, CHANNELS], and which exist: both [tokens, PADDED]."""
    c = tl.arange(0, PADDED)
    at = ((n * count + t) * heads + h)[:, None] * CHANNELS + c[None, :]
    return at, (t < count)[:, None] & (c < CHANNELS)[None, :]


@triton.jit
def _load(x, n, h, t, count, heads, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    at, inside = _tile(n, h, t, count, heads, CHANNELS, PADDED)
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _score(dots, bias, unit, t, s, queries, keys, biases, scale):
    """Scores in units of log2 e, of tokens t and s, which broadcast against each other; `unit`: [N, windows, heads]."""
    score = dots * (scale * LOG2_E)
    if bias is not None:
        at = (unit % biases * queries + t) * keys + s
        score += tl.load(bias + at, mask=(t < queries) & (s < keys), other=0.0) * LOG2_E
    return score


@triton.jit
def _attention_kernel(
    q, k, v, out, total, addend, saved, a, b, bias, queries, keys, heads, biases, scale,
    C: tl.constexpr, E: tl.constexpr, PC: tl.constexpr, PE: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = finish(softmax(scale · q · kᵀ + bias) · v), q: [N, queries, heads, C], k: [N, keys, heads, C], v with E.

    N: windows of all images. bias: float32 [biases, queries, keys], taken in turns by [N, heads], or None.
    total: float32 [N, heads, queries], log2 Σ 2^score for the way back, with scores in units of log2 e; or None.
    """
    n, h, t = _unit(queries, heads, BM)
    x = _load(q, n, h, t, queries, heads, C, PC)
    sums = tl.zeros((BM, PE), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    most = tl.full((BM,), float("-inf"), tl.float32)
    for start in range(0, keys, BN):
        s = start + tl.arange(0, BN)
        y = _load(k, n, h, s, keys, heads, C, PC)
        dots = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        score = _score(dots, bias, n * heads + h, t[:, None], s[None, :], queries, keys, biases, scale)
        score = tl.where((s < keys)[None, :], score, float("-inf"))
        larger = tl.maximum(most, tl.max(score, axis=1))
        p = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(most - larger)
        weight = weight * shrink + tl.sum(p, axis=1)
        value = _load(v, n, h, s, keys, heads, E, PE)
        sums = sums * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        most = larger
    if total is not None:
        tl.store(total + (n * heads + h) * queries + t, most + tl.log2(weight), mask=t < queries)
    at, inside = _tile(n, h, t, queries, heads, E, PE)
    y = finish(sums / weight[:, None], at, inside, addend, saved, a, b, KIND)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attention_queries_kernel(
    gradient, q, k, v, y, out, total, addend, saved, a, b, bias, queries, keys, heads, biases, scale,
    C: tl.constexpr, E: tl.constexpr, PC: tl.constexpr, PE: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of q: scale · (p ∘ (gradient · vᵀ − Σ gradient ∘ y)) · k, with p the softmax and y = p · v."""
    n, h, t = _unit(queries, heads, BM)
    x = _load(q, n, h, t, queries, heads, C, PC)
    g = _load(gradient, n, h, t, queries, heads, E, PE)
    mean = tl.sum(g.to(tl.float32) * _load(y, n, h, t, queries, heads, E, PE).to(tl.float32), axis=1)
    log = tl.load(total + (n * heads + h) * queries + t, mask=t < queries, other=0.0)
    sums = tl.zeros((BM, PC), tl.float32)
    for start in range(0, keys, BN):
        s = start + tl.arange(0, BN)
        other = _load(k, n, h, s, keys, heads, C, PC)
        dots = tl.dot(x, tl.trans(other), input_precision=PRECISION)
        score = _score(dots, bias, n * heads + h, t[:, None], s[None, :], queries, keys, biases, scale)
        p = tl.where((s < keys)[None, :], tl.exp2(score - log[:, None]), 0.0)
        value = _load(v, n, h, s, keys, heads, E, PE)
        d = tl.dot(g, tl.trans(value), input_precision=PRECISION) - mean[:, None]
        sums += tl.dot((p * d).to(other.dtype), other, input_precision=PRECISION)
    at, inside = _tile(n, h, t, queries, heads, C, PC)
    y = finish(sums * scale, at, inside, addend, saved, a, b, KIND)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attention_keys_kernel(
    gradient, q, k, v, y, out, total, addend, saved, a, b, bias, queries, keys, heads, biases, scale,
    C: tl.constexpr, E: tl.constexpr, PC: tl.constexpr, PE: tl.constexpr, PRECISION: tl.constexpr,
    OF_VALUES: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of k, as that of q; or with OF_VALUES that of v, pᵀ · gradient; by blocks of keys."""
    n, h, s = _unit(keys, heads, BN)
    other = _load(k, n, h, s, keys, heads, C, PC)
    if OF_VALUES:
        sums = tl.zeros((BN, PE), tl.float32)
    else:
        value = _load(v, n, h, s, keys, heads, E, PE)
        sums = tl.zeros((BN, PC), tl.float32)
    for start in range(0, queries, BM):
        t = start + tl.arange(0, BM)
        x = _load(q, n, h, t, queries, heads, C, PC)
        g = _load(gradient, n, h, t, queries, heads, E, PE)
        log = tl.load(total + (n * heads + h) * queries + t, mask=t < queries, other=0.0)
        dots = tl.dot(other, tl.trans(x), input_precision=PRECISION)
        score = _score(dots, bias, n * heads + h, t[None, :], s[:, None], queries, keys, biases, scale)
        p = tl.where((t < queries)[None, :], tl.exp2(score - log[None, :]), 0.0)
        if OF_VALUES:
            sums += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
        else:
            mean = tl.sum(g.to(tl.float32) * _load(y, n, h, t, queries, heads, E, PE).to(tl.float32), axis=1)
            d = tl.dot(value, tl.trans(g), input_precision=PRECISION) - mean[None, :]
            sums += tl.dot((p * d).to(x.dtype), x, input_precision=PRECISION)
    if OF_VALUES:
        at, inside = _tile(n, h, s, keys, heads, E, PE)
    else:
        at, inside = _tile(n, h, s, keys, heads, C, PC)
        sums *= scale
    result = finish(sums, at, inside, addend, saved, a, b, KIND)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


class Attention:
    """Attention of `queries` tokens to `keys`, of `heads` with `channels`, and with `value_channels` in values.

    Args:
        windows: of an image, each with so many queries and keys.
        bias: float32 [biases, queries, keys], on the device, or None; what divides windows · heads.
        precision: `tl.dot`'s input_precision.
    """

    def __init__(
        self,
        windows: int,
        queries: int,
        keys: int,
        heads: int,
        channels: int,
        value_channels: int,
        *,
        scale: float,
        bias: Any,
        precision: str,
    ) -> None:
        self._queries, self._keys, self._heads = queries, keys, heads
        biases = 1 if bias is None else len(bias)
        sizes = {"queries": queries, "keys": keys, "heads": heads, "biases": biases}
        self._args = {**sizes, "bias": bias, "scale": scale}
        self._constants = {
            "C": channels, "E": value_channels, "PC": max(16, power_of_two(channels)),
            "PE": max(16, power_of_two(value_channels)), "PRECISION": precision,
        }  # fmt: skip
        self.totals = windows * heads * queries  # floats that the way back needs, of an image

    def launch(self, q: Any, k: Any, v: Any, out: Any, total: Any, epilogue: Epilogue) -> Launch:
        """`total`: float32 [N, `self.totals`], or None where no gradient goes back."""
        tensors = {"q": q, "k": k, "v": v, "out": out, "total": total}
        return self._launch(_attention_kernel, tensors, self._queries, "BM", {}, epilogue)

    def launch_backward(
        self, which: int, gradient: Any, q: Any, k: Any, v: Any, y: Any, total: Any, out: Any, epilogue: Epilogue
    ) -> Launch:
        """`out`: the gradient of input `which`: 0 q, 1 k, 2 v. `y`: the results."""
        tensors = {"gradient": gradient, "q": q, "k": k, "v": v, "y": y, "out": out, "total": total}
        if which == 0:
            return self._launch(_attention_queries_kernel, tensors, self._queries, "BM", {}, epilogue)
        constants = {"OF_VALUES": which == 2}
        return self._launch(_attention_keys_kernel, tensors, self._keys, "BN", constants, epilogue)

    def _launch(
        self,
        kernel: Any,
        tensors: dict[str, Any],
        tokens: int,
        block: str,
        constants: dict[str, Any],
        epilogue: Epilogue,
    ) -> Launch:
        """A program for every block of so many tokens."""
        windows = tensors["q"].numel() // (self._queries * self._heads * self._constants["C"])  # of all images
        # Registers hold the sums, and with tf32x3 the halves of factors: what is left is for tiles of the others.
        width = max(self._constants["PC"], self._constants["PE"]) * tensors["q"].element_size()
        own = 64 if width <= 256 else 32 if width <= 512 else 16
        other = 64 if width <= 128 else min(own, 32)
        tiles = {"BM": other, "BN": other, block: own}
        constants = {**self._constants, **constants, **tiles, "KIND": epilogue.kind}
        programs = windows * self._heads * ceil_div(tokens, tiles[block])
        args = {**tensors, **self._args, **epilogue.args}
        return Launch(kernel, programs, args, constants, warps=8 if width > 256 else 4, stages=2)
