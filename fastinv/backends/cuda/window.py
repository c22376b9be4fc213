"""Convolutions that see the 3×3 pixels around a cell as the kernel of `kernels/cuda/window_layer.h`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda.layers import (
    AROUND,
    AROUND_TWO,
    FINISHES,
    ONWARD_TWO,
    OUTPUTS,
    are_few,
    finish_of,
    for_tensor_cores,
    reads,
    runs_on,
    tap_tiles,
)
from fastinv.backends.cuda.native import extension, launching, set_fields
from fastinv.backends.cuda.nodes import ConvolutionNode, Node
from fastinv.backends.cuda.tuning import native_is_faster

if TYPE_CHECKING:
    from fastinv import _cuda


MANY = 128  # inputs of which there is a kernel for three taps at a stride of 2; of 64, for four


class WindowConvolution:
    """A convolution of two-byte values whose weights stay in shared memory; see `fits`.

    Args:
        node: whose kernel, a `fastinv.kernels.triton.convolution.Convolution`, it takes the place of. What it cannot
            do, few images or results of another type or order, that one still does.
    """

    def __init__(self, node: ConvolutionNode) -> None:
        self.other = other = node.kernel
        self.weight = other.weight  # for its device and type
        self.input_shape: tuple[int, int, int] = other.input_shape
        parts = np.split(node.weight, range(OUTPUTS, other.outputs, OUTPUTS), axis=1)
        tiles = itertools.chain.from_iterable(tap_tiles(other.geometry, part, _around(other)) for part in parts)
        self.tiles = for_tensor_cores(tiles, other.weight.dtype, other.weight.device)

    @staticmethod
    def fits(node: ConvolutionNode) -> bool:
        """Whether there is such a kernel, built, for this device."""
        from fastinv.kernels.triton.convolution import Convolution

        kernel = node.kernel
        return (
            isinstance(kernel, Convolution)
            and kernel.groups == 1
            and kernel.weight.dtype.itemsize == 2
            and reads(kernel.geometry, _around(kernel))
            and node.ending.activation.kind in FINISHES
            and runs_on(kernel.weight.device)
            and _sized(kernel).fits()
        )

    def planar(self) -> Any:
        """As `Weights.planar`."""
        return self.other.planar()

    def launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any = None) -> Any:
        """As `Convolution.launch`."""
        import torch

        if out_strides is not None or out.dtype != self.weight.dtype or are_few(len(x), x.device):
            return self.other.launch(x, out, epilogue, out_strides)
        layer = _sized(self.other)
        tensors = {"x": x, "weights": self.tiles, "bias": self.other.bias, "addend": epilogue.addend, "out": out}
        numbers = {"images": len(x), "float16": int(self.weight.dtype is torch.float16), **finish_of(epilogue)}
        set_fields(layer, tensors, numbers)
        return launching(layer.run, x.device)


def use_windows(nodes: list[Node]) -> None:
    """Give the nodes of a forward pass this kernel where there is one for them."""
    for node in nodes:
        if not isinstance(node, ConvolutionNode) or not WindowConvolution.fits(node):
            continue
        if native_is_faster(node.kernel, node.kernel.weight.device):
            node.kernel = WindowConvolution(node)


def _around(kernel: Any) -> list[list[int]]:
    """Where the phases of an axis must read, by what there is a kernel for."""
    if kernel.geometry.count == 1:
        return AROUND
    return ONWARD_TWO if kernel.inputs == MANY else AROUND_TWO


def _sized(kernel: Any) -> _cuda.WindowLayer:
    layer: _cuda.WindowLayer = extension().WindowLayer()
    height, width, inputs = kernel.input_shape
    sizes = {"height": height, "width": width, "inputs": inputs, "outputs": kernel.outputs}
    set_fields(layer, {}, {**sizes, "phases": kernel.geometry.count})
    return layer
