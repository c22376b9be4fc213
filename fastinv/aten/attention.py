"""From aten calls to steps: attention, and products of computed values. `fastinv.aten` lists them.

Models write queries, keys and values as [N, heads, T, channels], or with windows of tokens, too, moved there from
linear layers of tokens. The op takes tokens: what was moved is followed back to those layers, of which each one's own
columns are computed. Written by hand, attention is found where the softmax of a product is multiplied by the values:
what was computed until there has no reader then, and goes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from fastinv.aten.arithmetic import MASKED, affine, linear_map
from fastinv.aten.axes import permuted, reshaped, take
from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.aten.layers import axis_of
from fastinv.network import Step
from fastinv.ops.activation import IDENTITY
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Shape
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.linear import Linear
from fastinv.ops.matmul import Matmul
from fastinv.ops.normalize import Normalize
from fastinv.ops.permute import Permute
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.reshape import Reshape
from fastinv.ops.separable import Separable
from fastinv.ops.softmax import Softmax
from fastinv.picking import picked, picked_channels

Index = npt.NDArray[np.int64]

MOST_CHANNELS = 512  # of a head of `Attention`, which a GPU's tiles hold; of more, products and a softmax


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
    """scaled_dot_product_attention of q [..., T, D], k [..., S, D] and v [..., S, E]."""
    if dropout > 0:
        to.unsupported("attention with dropout")
    if not all(isinstance(x, Value) for x in (q, k, v)):
        to.unsupported("attention to constants")
    if holds(mask, Value):
        to.unsupported("attention with a computed mask")
    fits = len(q.shape) >= 2 and all(x.shape[:-2] == q.shape[:-2] and x.merged == q.merged for x in (k, v))
    if not fits or k.shape[-1] != q.shape[-1] or v.shape[-2] != k.shape[-2]:
        to.unsupported(f"attention of shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, MASKED)
    if mask is not None and mask.ndim == q.rank:
        if len(mask) != 1:
            to.unsupported("attention with a mask that differs from image to image")
        mask = mask if q.merged else mask[0]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if max(q.shape[-1], v.shape[-1]) > MOST_CHANNELS:
        scores = linear_map(to, _product(to, q, k, transposed=True), scale, 0.0 if mask is None else mask)
        return _product(to, softmax(to, scores, -1), v, transposed=False)
    bias = None if mask is None else mask.expand(*q.shape[:-1], k.shape[-2]).numpy()
    return _attention(to, q, k, v, scale, bias)


def _attention(
    to: Conversion, q: Value, k: Value, v: Value, scale: float, bias: npt.NDArray[np.float32] | None
) -> Value:
    """Of q [..., T, D] and so on, with bias [..., T, S]."""
    (q, q_factor), (k, k_factor) = (_unscaled(to, x) for x in (q, k))
    windows, heads = _windows_and_heads(to, q)
    sizes = [[q.shape[axis] for axis in axes] for axes in (windows, heads)]
    op = Attention(math.prod(sizes[1]), scale * q_factor * k_factor, math.prod(sizes[0]))
    weights = {} if bias is None else {"bias": _biases(bias, windows, heads)}
    y = to.emit(op, [_tokens(to, x, windows, heads) for x in (q, k, v)], **weights)
    lead = len(q.shape) - 2
    tokens, channels = q.shape[-2], v.shape[-1]
    order = (*windows, lead, *heads, lead + 1)  # of the result's axes in `y`
    y = reshaped(to, y, (*sizes[0], tokens, *sizes[1], channels))
    return permuted(to, y, [order.index(axis) for axis in range(lead + 2)])


def _windows_and_heads(to: Conversion, q: Value) -> tuple[list[int], list[int]]:
    """Which of the axes before the tokens are of windows, which of heads: those by which queries are a layer's result.

    Where none are, the last axis is of heads, as most models have it.
    """
    lead = list(range(len(q.shape) - 2))
    choices = [(lead[:-1], lead[-1:]), (lead[1:], lead[:1]), (lead, []), ([], lead)]
    q, _ = _peeled(to, q)
    for windows, heads in choices:
        if _layer(to, q, windows, heads) is not None:
            return windows, heads
    return choices[0]


def _biases(bias: npt.NDArray[np.float32], windows: list[int], heads: list[int]) -> torch.Tensor:
    """As `Attention` takes them, one for all windows, or for all heads, too, where they are the same."""
    *_, tokens, keys = bias.shape
    by_window = bias.transpose(*windows, *heads, bias.ndim - 2, bias.ndim - 1)
    by_window = by_window.reshape(math.prod(bias.shape[axis] for axis in windows), -1, tokens, keys)
    if (by_window == by_window[:1]).all():
        by_window = by_window[:1]
        if (by_window == by_window[:, :1]).all():
            by_window = by_window[:, :1]
    return torch.from_numpy(np.maximum(by_window.reshape(-1, tokens, keys), MASKED))


# ---- products and softmaxes by hand --------------------------------------------------------------------------------


def matmul(to: Conversion, a: Value, b: Value) -> Value:
    """Of two computed values [..., M, K] and [..., K, N]: attention, where a is the softmax of a product."""
    if len(a.shape) < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2] or a.merged != b.merged:
        to.unsupported(f"a product of computed values of shapes {list(a.shape)} and {list(b.shape)}")
    weighed = _softmax_of_product(to, a)
    if weighed is not None and max(weighed[0].shape[-1], b.shape[-1]) <= MOST_CHANNELS:
        q, k, scale, bias = weighed
        return _attention(to, q, k, b, scale, bias)
    step = to.steps[b.index - 1] if b.index > 0 else None
    if step is None or not isinstance(step.op, Permute):
        return _product(to, a, b, transposed=False)
    turn = Permute((*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2))
    if step.op == turn:
        before = Value(step.inputs[0], to.shapes[step.inputs[0]], merged=b.merged)
        return _product(to, a, before, transposed=True)
    return _product(to, a, to.emit(turn, [b]), transposed=True)


def _product(to: Conversion, a: Value, b: Value, transposed: bool) -> Value:
    """a [..., M, K] times b [..., K, N], or [..., N, K]."""
    rows = [reshaped(to, x, (math.prod(x.shape[:-1]), x.shape[-1])) for x in (a, b)]
    columns = b.shape[-2] if transposed else b.shape[-1]
    y = to.emit(Matmul(math.prod(a.shape[:-2]), transposed), rows)
    return reshaped(to, y, (*a.shape[:-1], columns))


def softmax(to: Conversion, x: Value, axis: int, *_: Any) -> Value:
    axis = axis_of(to, x, axis)
    order = [*(k for k in range(len(x.shape)) if k != axis), axis]
    turned = permuted(to, x, order)
    y = to.emit(Softmax(), [reshaped(to, turned, (math.prod(turned.shape[:-1]), turned.shape[-1]))])
    return permuted(to, reshaped(to, y, turned.shape), np.argsort(order).tolist())


def _softmax_of_product(to: Conversion, a: Value) -> tuple[Value, Value, float, npt.NDArray[np.float32] | None] | None:
    """q [..., T, D], k [..., S, D], scale and bias [..., T, S], if a [..., T, S] is softmax(scale · q · kᵀ + bias)."""
    step = _step(to, a.index, Softmax)
    if step is None:
        return None
    scale, shift = np.ones((), np.float64), np.zeros((), np.float64)  # of [..., T, S]
    index = step.inputs[0]
    while (step := _step(to, index, Affine)) is not None:
        index = step.inputs[0]
        own_scale, own_shift = (
            np.broadcast_to(step.weights[key].astype(np.float64), to.shapes[index]).reshape(a.shape)
            for key in ("scale", "shift")
        )
        scale, shift = scale * own_scale, scale * own_shift + shift
    product = _step(to, index, Matmul)
    if product is None:
        return None
    op = product.op
    assert isinstance(op, Matmul)
    scale = np.broadcast_to(scale, a.shape)
    if not op.transposed or op.groups != math.prod(a.shape[:-2]) or (scale != scale[..., :1, :1]).any():
        return None
    q, k = (Value(i, to.shapes[i], merged=a.merged) for i in product.inputs)
    q, k = (reshaped(to, x, (*a.shape[:-2], x.shape[0] // op.groups, x.shape[1])) for x in (q, k))
    factor = 1.0
    if (scale == scale.flat[0]).all():
        factor = float(scale.flat[0])
    else:
        q = affine(to, q, torch.from_numpy(scale[..., :1, :1].copy()), torch.zeros(()))
    bias = np.broadcast_to(shift, a.shape).astype(np.float32) if shift.any() else None
    return q, k, factor, bias


def _step(to: Conversion, index: int, kind: type) -> Step | None:
    """The step of this kind whose result value `index` is, in another shape or not."""
    while index > 0:
        step = to.steps[index - 1]
        if isinstance(step.op, kind) or step.activation != IDENTITY:
            return step if step.activation == IDENTITY else None
        if not isinstance(step.op, Reshape):
            return None
        index = step.inputs[0]
    return None


# ---- from [..., T, D] to tokens ------------------------------------------------------------------------------------


def _unscaled(to: Conversion, x: Value) -> tuple[Value, float]:
    """x without a factor that all of it was multiplied by, and the factor."""
    step = _step(to, x.index, Affine)
    if step is not None:
        scale, shift = step.weights["scale"], step.weights["shift"]
        if not shift.any() and (scale == scale.flat[0]).all():
            before = Value(step.inputs[0], to.shapes[step.inputs[0]], merged=x.merged)
            return reshaped(to, before, x.shape), float(scale.flat[0])
    return x, 1.0


def _layer(to: Conversion, x: Value, windows: list[int], heads: list[int]) -> tuple[int, Index] | None:
    """Which value [windows · T, ·] has x [..., T, D] in columns, and in which; the first one, if there is one."""
    shape, lead = x.shape, len(x.shape) - 2
    size = math.prod(shape)
    order = (*windows, lead, *heads, lead + 1)
    rows = math.prod(shape[axis] for axis in windows) * shape[lead]
    index = np.arange(size).reshape(shape).transpose(order).reshape(rows, -1)
    found = None
    value = x.index
    while True:  # back through what only moves elements
        columns = _columns(index, to.shapes[value])
        found = (value, columns) if columns is not None else found
        moved = _moved(to.steps[value - 1], to.shapes) if value > 0 else None
        if moved is None:
            return found
        index = moved.ravel()[index]
        value = to.steps[value - 1].inputs[0]


def _tokens(to: Conversion, x: Value, windows: list[int], heads: list[int]) -> Value:
    """x [..., T, D] as [windows · T, heads · D]. Norms and factors of heads are those of groups of columns then."""
    before, steps = _peeled(to, x)
    by_columns = [_of_columns(to, step, x.shape, windows, heads) for step in steps]
    if not steps or None in by_columns:
        return _moved_to_tokens(to, x, windows, heads)
    y = _moved_to_tokens(to, before, windows, heads)
    for step in filter(None, by_columns):
        y = to.emit(step.op, [y], **{key: torch.tensor(weight) for key, weight in step.weights.items()})
    return y


def _peeled(to: Conversion, x: Value) -> tuple[Value, list[Step]]:
    """What x [..., T, D] is made of by norms of each D, and by factors and shifts; and these, in their order."""
    steps: list[Step] = []
    index = x.index
    while True:
        step = _step(to, index, Affine) or _step(to, index, Normalize)
        if step is None or (isinstance(step.op, Normalize) and to.shapes[step.inputs[0]][1:] != x.shape[-1:]):
            before = Value(index, to.shapes[index], merged=x.merged)
            return reshaped(to, before, x.shape), steps
        steps.insert(0, step)
        index = step.inputs[0]


def _of_columns(to: Conversion, step: Step, shape: Shape, windows: list[int], heads: list[int]) -> Step | None:
    """The same step on [windows · T, heads · D]; None where it is not the same for all windows and tokens."""
    count = math.prod(shape[axis] for axis in heads)
    if isinstance(step.op, Normalize):
        op = replace(step.op, groups=count * step.op.groups)
        return replace(step, op=op, weights={key: np.tile(weight, count) for key, weight in step.weights.items()})
    weights, lead = {}, len(shape) - 2
    for key, weight in step.weights.items():
        whole = np.broadcast_to(weight, to.shapes[step.inputs[0]]).reshape(shape)
        rows = whole.transpose(*windows, lead, *heads, lead + 1).reshape(-1, count * shape[-1])
        if (rows != rows[:1]).any():
            return None
        weights[key] = rows[:1].copy()
    return replace(step, weights=weights)


def _moved_to_tokens(to: Conversion, x: Value, windows: list[int], heads: list[int]) -> Value:
    lead = len(x.shape) - 2
    found = _layer(to, x, windows, heads)
    if found is None:
        turned = to.emit(Permute((*windows, lead, *heads, lead + 1)), [x])
        rows = math.prod(x.shape[axis] for axis in windows) * x.shape[lead]
        return reshaped(to, turned, (rows, math.prod(x.shape) // rows))
    value, columns = found
    width = to.shapes[value][1]
    layer = Value(value, to.shapes[value], merged=x.merged)
    if np.array_equal(columns, np.arange(width)):
        return layer
    step = to.steps[value - 1] if value > 0 else None
    if step is None or not isinstance(step.op, Linear) or step.activation != IDENTITY:
        return take(to, layer, 1, torch.from_numpy(columns))
    weights = {key: torch.from_numpy(weight[columns]) for key, weight in step.weights.items()}
    read = step.inputs[0]
    return to.emit(Linear(), [Value(read, to.shapes[read], merged=x.merged)], **weights)


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
