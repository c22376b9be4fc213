"""From the aten calls of a torch.export graph to steps: one converter for each call, listed in `CONVERTERS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastinv.aten import arithmetic, attention, axes, layers, norms, products
from fastinv.aten.activations import ACTIVATIONS
from fastinv.aten.conversion import Conversion, Value
from fastinv.network import Network
from fastinv.ops.base import Shape


def convert(program: torch.export.ExportedProgram, input_shape: Shape) -> Network:
    """The network of an exported program with one input and one output.

    Raises:
        UnsupportedOp: a call without a converter, or with arguments that its converter cannot express.
        NetworkError: several inputs or outputs, or a step that mixes images of a batch.
    """
    return Conversion(program, input_shape, CONVERTERS).network()


def _same(to: Conversion, x: Value, *_: Any, **__: Any) -> Value:
    """What changes nothing: contiguous, clone, detach."""
    return x


def _cast(to: Conversion, x: Value, *args: Any, **kwargs: Any) -> Value:
    for dtype in (*args, *kwargs.values()):
        if isinstance(dtype, torch.dtype) and dtype not in (torch.float32, torch.float64):
            to.unsupported(f"a cast to {dtype}, which rounds")
    return x


def _as_type(to: Conversion, x: Any, other: Any) -> Any:
    """All that is computed is float32."""
    if isinstance(x, Value):
        return x if isinstance(other, Value) else _cast(to, x, other.dtype)
    return x.float()


def _like(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A constant of the shape of a value, for one image."""

    def converter(to: Conversion, x: Value, **_: Any) -> torch.Tensor:
        if x.batch or x.merged:
            to.unsupported("a constant that is made like parts of images")
        return fill(1, *x.shape)

    return converter


def _dropout(to: Conversion, x: Value, p: float, train: bool) -> Value:
    if train and p > 0:
        to.unsupported("dropout in training mode")
    return x


def _named(converter: Callable[..., Any], *calls: str) -> dict[str, Callable[..., Any]]:
    return {f"aten.{call}": converter for call in calls}


def _table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {
        **ACTIVATIONS,
        **_named(layers.conv2d, "conv2d.default", "conv2d.padding"),
        **_named(layers.conv_transpose2d, "conv_transpose2d.input"),
        **_named(layers.linear, "linear.default"),
        **_named(attention.attention, "scaled_dot_product_attention.default"),
        **_named(norms.batch_norm, "batch_norm.default"),
        **_named(norms.instance_norm, "instance_norm.default"),
        **_named(norms.group_norm, "group_norm.default"),
        **_named(norms.layer_norm, "layer_norm.default"),
        **_named(norms.rms_norm, "rms_norm.default"),
        **_named(norms.vector_norm, "linalg_vector_norm.default", "norm.ScalarOpt_dim"),
        **_named(norms.variance, "var.correction", "var.dim"),
        **_named(norms.deviation, "std.correction", "std.dim"),
        **_named(layers.max_pool2d, "max_pool2d.default"),
        **_named(layers.max_pool2d_with_indices, "max_pool2d_with_indices.default"),
        **_named(layers.adaptive_max_pool2d, "adaptive_max_pool2d.default"),
        **_named(layers.avg_pool2d, "avg_pool2d.default"),
        **_named(layers.adaptive_avg_pool2d, "adaptive_avg_pool2d.default"),
        **_named(layers.upsample("nearest"), "upsample_nearest2d.vec"),
        **_named(layers.upsample("bilinear"), "upsample_bilinear2d.vec"),
        **_named(layers.upsample_plain("nearest"), "upsample_nearest2d.default"),
        **_named(layers.upsample_plain("bilinear"), "upsample_bilinear2d.default"),
        **_named(layers.pixel_shuffle, "pixel_shuffle.default"),
        **_named(layers.unfold, "im2col.default"),
        **_named(axes.pixel_unshuffle, "pixel_unshuffle.default"),
        **_named(axes.channel_shuffle, "channel_shuffle.default"),
        **_named(axes.expand, "expand.default", "expand_as.default"),
        **_named(axes.reordered, "permute.default", "transpose.int", "movedim.int", "movedim.intlist"),
        **_named(axes.reordered, "swapaxes.default", "swapdims.default", "t.default", "mT.default"),
        **_named(axes.cat, "cat.default", "concat.default"),
        **_named(axes.stack, "stack.default"),
        **_named(axes.pad, "pad.default"),
        **_named(lambda to, x, padding, value=0: axes.pad(to, x, padding, value=value), "constant_pad_nd.default"),
        **_named(axes.slice_, "slice.Tensor"),
        **_named(axes.narrow, "narrow.default"),
        **_named(axes.select, "select.int"),
        **_named(axes.index_select, "index_select.default"),
        **_named(axes.index, "index.Tensor"),
        **_named(axes.split(torch.chunk), "chunk.default"),
        **_named(axes.split(torch.split), "split.Tensor", "split.sizes", "split_with_sizes.default"),
        **_named(axes.split(torch.tensor_split), "tensor_split.sections", "tensor_split.indices"),
        **_named(axes.unbind, "unbind.int"),
        **_named(axes.windows, "unfold.default"),
        **_named(axes.flip, "flip.default"),
        **_named(axes.roll, "roll.default"),
        **_named(axes.repeat, "repeat.default"),
        **_named(axes.repeat_interleave, "repeat_interleave.self_int"),
        **_named(axes.mean, "mean.dim"),
        **_named(axes.sum_, "sum.dim_IntList"),
        **_named(axes.amax, "amax.default"),
        **_named(axes.max_along, "max.dim"),
        **_named(products.matmul, "mm.default", "matmul.default", "bmm.default"),
        **_named(attention.softmax, "softmax.int"),
        **_named(products.addmm, "addmm.default"),
        **_named(products.einsum, "einsum.default"),
        **_named(axes.reshape, "flatten.using_ints", "unflatten.int", "squeeze.default", "squeeze.dim", "squeeze.dims"),
        **_named(axes.reshape, "unsqueeze.default", "view.default", "_unsafe_view.default", "reshape.default"),
        **_named(axes.reshape, "view_as.default", "reshape_as.default"),
        **_named(arithmetic.where, "where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"),
        **_named(arithmetic.masked_fill, "masked_fill.Scalar", "masked_fill_.Scalar"),
        **_named(_like(torch.zeros), "zeros_like.default"),
        **_named(_like(torch.ones), "ones_like.default"),
        **_named(_as_type, "type_as.default"),
        **_named(_cast, "to.dtype", "to.dtype_layout", "to.device", "_to_copy.default"),
        **_named(_same, "_assert_tensor_metadata.default"),
        **_named(lambda to, x, other, alpha=1: arithmetic.linear_map(to, x, -alpha, other), "rsub.Scalar"),
    }
    for name in ("contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy"):
        table |= _named(_same, f"{name}.default")
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"):
        table |= _named(_dropout, f"{name}.default", f"{name}_.default")
    for name, converter in (
        ("add", arithmetic.add),
        ("sub", arithmetic.sub),
        ("mul", arithmetic.mul),
        ("div", norms.quotient),
    ):
        table |= _named(converter, *(f"{name}{end}.{kind}" for end in ("", "_") for kind in ("Tensor", "Scalar")))
    for name, converter in layers.LAYERS_1D.items():
        table |= _named(converter, name)
    for name, plain in layers.RESIZES.items():
        table |= _named(layers.resize(plain), f"{name}.vec")
    table |= _named(arithmetic.addcmul, "addcmul.default", "addcmul_.default")
    return table | _named(arithmetic.neg, "neg.default", "neg_.default")


CONVERTERS: dict[str, Callable[..., Any]] = _table()
