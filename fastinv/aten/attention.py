"""From aten calls to steps: attention. `fastinv.aten` lists it.

Models write queries, keys and values as [N, heads, T, channels], moved there from linear layers of tokens. The op takes
tokens: what was moved is followed back to those layers, of which each one's own columns are computed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from fastinv.aten.axes import take
from fastinv.aten.conversion import Conversion, Value
from fastinv.aten.layers import axis_of
from fastinv.network import Step
from fastinv.ops.activation import IDENTITY
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Shape
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.linear import Linear
from fastinv.ops.permute import Permute
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.reshape import Reshape
from fastinv.ops.separable import Separable
from fastinv.simplify import picked, picked_channels

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Scores(Value):
    """q · kᵀ, or its softmax: no value, but what attention by hand leads through on its way.

    Attributes:
        q, k: [heads, T, D] and [heads, S, D], or without heads.
        scale: times which they are taken.
        softmax: whether the softmax over the keys has been taken.
    """

    q: Value
    k: Value
    scale: float = 1.0
    softmax: bool = False


def attention(
    to: Conversion,
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """scaled_dot_product_attention of q [T, D], k [S, D] and v [S, E], or of [heads, T, D] and so on."""
    if mask is not None or causal:
        to.unsupported("attention with a mask")
    if dropout > 0:
        to.unsupported("attention with dropout")
    if not all(isinstance(x, Value) for x in (q, k, v)):
        to.unsupported("attention to constants")
    return _attention(to, q, k, v, 1 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _attention(to: Conversion, q: Value, k: Value, v: Value, scale: float) -> Value:
    heads = q.shape[0] if len(q.shape) == 3 else 1
    if len(q.shape) not in (2, 3) or any(x.shape[:-2] != q.shape[:-2] for x in (k, v)):
        to.unsupported(f"attention of shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    (q, q_factor), (k, k_factor) = (_unscaled(to, x) for x in (q, k))
    y = to.emit(Attention(heads, scale * q_factor * k_factor), [_tokens(to, x) for x in (q, k, v)])
    if len(q.shape) == 2:
        return y
    return to.emit(Permute((1, 0, 2)), [to.emit(Reshape((y.shape[0], heads, v.shape[2])), [y])])


# ---- attention by hand: what computes q · kᵀ, scales it, and takes its softmax times v -----------------------------


def or_scores(otherwise: Callable[..., Any], of_scores: Callable[..., Any]) -> Callable[..., Any]:
    """A converter that is another where one of its two first arguments is `Scores`."""

    def converter(to: Conversion, *args: Any, **kwargs: Any) -> Any:
        known = any(isinstance(a, Scores) for a in args[:2])
        return (of_scores if known else otherwise)(to, *args, **kwargs)

    return converter


def matmul(to: Conversion, a: Any, b: Any) -> Value:
    """Of two computed values: q · kᵀ, or what its softmax weighs."""
    if isinstance(a, Scores) and a.softmax and isinstance(b, Value) and not isinstance(b, Scores):
        return _attention(to, a.q, a.k, b, a.scale)
    known = isinstance(a, Scores) or isinstance(b, Scores)
    if known or len(a.shape) not in (2, 3) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        to.unsupported("a product of two computed values, which only attention may be,")
    axes = (*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2)
    keys = to.emit(Permute(axes), [b])
    return Scores(-1, (*a.shape[:-1], b.shape[-1]), q=a, k=keys)


def scaled(to: Conversion, a: Any, b: Any) -> Value:
    scores, factor = (a, b) if isinstance(a, Scores) else (b, a)
    if isinstance(factor, Value) or scores.softmax or torch.as_tensor(factor).numel() != 1:
        to.unsupported("attention whose scores are changed by anything but a factor")
    return replace(scores, scale=scores.scale * float(factor))


def divided(to: Conversion, a: Any, b: Any) -> Value:
    return scaled(to, a, b if isinstance(b, Value) else 1 / b)


def softmax(to: Conversion, x: Value, axis: int, *_: Any) -> Value:
    if not isinstance(x, Scores) or x.softmax:
        to.unsupported("a softmax that is not attention's")
    if axis_of(to, x, axis) != len(x.shape) - 1:
        to.unsupported("attention with a softmax that is not over the keys")
    return replace(x, softmax=True)


# ---- from [heads, T, D] to tokens ----------------------------------------------------------------------------------


def _unscaled(to: Conversion, x: Value) -> tuple[Value, float]:
    """x without a factor that all of it was multiplied by, and the factor."""
    step = to.steps[x.index - 1] if x.index > 0 else None
    if step is not None and isinstance(step.op, Affine) and step.activation == IDENTITY:
        scale, shift = step.weights["scale"], step.weights["shift"]
        if not shift.any() and (scale == scale.flat[0]).all():
            return Value(step.inputs[0], x.shape), float(scale.flat[0])
    return x, 1.0


def _tokens(to: Conversion, x: Value) -> Value:
    """x [heads, T, D] as [T, heads · D]; [T, D] as it is."""
    shape = x.shape if len(x.shape) == 3 else (1, *x.shape)
    tokens, size = shape[1], math.prod(shape)
    index = np.arange(size).reshape(shape).transpose(1, 0, 2).reshape(tokens, -1)
    found = None
    value = x.index
    while True:  # back through what only moves elements
        columns = _columns(index, to.shapes[value])
        found = (value, columns) if columns is not None else found
        moved = _moved(to.steps[value - 1], to.shapes) if value > 0 else None
        if moved is None:
            break
        index = moved.ravel()[index]
        value = to.steps[value - 1].inputs[0]
    if found is None:
        turned = to.emit(Permute((1, 0, 2)), [x])
        return to.emit(Reshape((tokens, size // tokens)), [turned])
    value, columns = found
    width = to.shapes[value][1]
    if np.array_equal(columns, np.arange(width)):
        return Value(value, to.shapes[value])
    step = to.steps[value - 1] if value > 0 else None
    if step is None or not isinstance(step.op, Linear) or step.activation != IDENTITY:
        return take(to, Value(value, to.shapes[value]), 1, torch.from_numpy(columns))
    weights = {key: torch.from_numpy(weight[columns]) for key, weight in step.weights.items()}
    return to.emit(Linear(), [Value(step.inputs[0], to.shapes[step.inputs[0]])], **weights)


def _columns(index: Index, shape: Shape) -> Index | None:
    """Which columns of a matrix [T, ·] the elements `index` [T, ·] are, the same for each row; None if they are not."""
    if len(shape) != 2 or len(index) != shape[0]:
        return None
    columns = index[0]
    rows = np.arange(shape[0])[:, None] * shape[1]
    return columns if columns.max() < shape[1] and np.array_equal(index, rows + columns) else None


def _moved(step: Step, shapes: list[Shape]) -> Index | None:
    """For each element of the result the one of the input that it is; None where it is none."""
    (shape,) = (shapes[i] for i in step.inputs[:1])
    if step.activation != IDENTITY:
        return None
    if isinstance(step.op, Rearrange):
        return step.op.source_index(shape)
    if isinstance(step.op, Conv2d) and (channels := picked_channels(step)) is not None:
        return np.arange(math.prod(shape)).reshape(shape)[channels]
    if isinstance(step.op, Separable) and "columns" not in step.weights:
        rows = picked(step.weights["rows"])
        return None if rows is None else np.arange(math.prod(shape)).reshape(shape)[:, rows]
    return None


@contextlib.contextmanager
def batch_first_attention() -> Iterator[None]:
    """PyTorch's own attention layers, which put the tokens before the batch, or take kernels of their own where no
    gradient is asked for, go through `scaled_dot_product_attention` with the batch first, which computes the same."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    nn.MultiheadAttention.forward = _multihead_attention  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = _original  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fast)


_original = nn.MultiheadAttention.forward


def _multihead_attention(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Without the weights of attention, which no image needs: (result, None)."""
    masked = key_padding_mask is not None or attn_mask is not None or is_causal
    if masked or not self.batch_first or self.bias_k is not None or self.add_zero_attn or query.ndim != 3:
        options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return _original(self, query, key, value, *options)
    if self.in_proj_weight is not None:
        weights = self.in_proj_weight.chunk(3)
    else:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
    biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return self.out_proj(y), None
