"""A small decoder's two layers as the one kernel of `kernels/cuda/small_tail.h`, where they have the shapes that it is
made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda.layers import FINISHES, LINEAR, finish_of, padded, result_of, slope_of
from fastinv.backends.cuda.native import extension, launching, set_fields, usable_on
from fastinv.backends.cuda.nodes import ConvolutionNode

if TYPE_CHECKING:
    from fastinv.kernels.triton.geometry import Geometry

INPUTS, BETWEEN = 16, 8  # channels
SIDE, WIDE, OUT = 8, 12, 28  # pixels across
TAPS = 5
SHARE = 4  # channels of a thread
LAST = 8  # weights of a channel and a row of taps, with what fills them up


class SmallTail:
    """A transposed convolution to more pixels, an activation, and one to an image of one channel; see `fits`.

    Args:
        first, last: the two nodes, as they were for two launches.
    """

    takes_all = False  # of features in the user's order, those in floats that begin at a multiple of 16 bytes

    def __init__(self, first: ConvolutionNode, last: ConvolutionNode) -> None:
        self.input_shape: tuple[int, int, int] = first.kernel.input_shape
        self.slope = slope_of(first.ending.activation)
        self.weights = _packed(first, last)

    @staticmethod
    def fits(first: ConvolutionNode, last: ConvolutionNode) -> bool:
        """Whether the two are those of the kernel, and it is built; `last` reads what `first` writes."""
        from fastinv.kernels.triton.geometry import Weights, transposed

        def same(node: ConvolutionNode, geometry: Geometry, outputs: int, inputs: int) -> bool:
            kernel = node.kernel
            channels = isinstance(kernel, Weights) and (kernel.groups, kernel.outputs, kernel.inputs)
            return channels == (1, outputs, inputs) and bool(kernel.geometry == geometry)

        sides = [(side, side) for side in (SIDE, WIDE, OUT)]
        to_between, to_image = (
            transposed(sides[i], sides[i + 1], (TAPS, TAPS), (1 + i, 1 + i), (0, 0), (1, 1)) for i in (0, 1)
        )
        return (
            same(first, to_between, BETWEEN, INPUTS)
            and same(last, to_image, 1, BETWEEN)
            and first.ending.activation.kind in LINEAR
            and last.ending.activation.kind in FINISHES
            and len(first.inputs) == len(last.inputs) == 1
            and usable_on(first.kernel.weight.device)
        )

    def planar(self) -> SmallTail:
        """As `Weights.planar`."""
        return self

    def takes(self, features: Any, scale: Any) -> bool:
        """Whether `launch_planar` can read them."""
        import torch

        kinds = (torch.float32, torch.bfloat16, torch.float16)
        return features.dtype in kinds and features.data_ptr() % 16 == 0 and scale is None

    def launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any = None) -> Any:
        """As `Convolution.launch`, of the two; x is contiguous."""
        return self._launch(x, out, epilogue, None, channels_last=True)

    def launch_planar(
        self, x: Any, out: Any, epilogue: Any, out_strides: Any, scale: Any, zero_point: Any, flag: Any
    ) -> Any:
        """For x [N, C, H, W] that it `takes`, contiguous; `flag` is set to 1 where a value is NaN or Inf."""
        return self._launch(x, out, epilogue, flag, channels_last=False)

    def _launch(self, x: Any, out: Any, epilogue: Any, flag: Any, channels_last: bool) -> Any:
        small = extension().SmallTail()
        numbers = {
            "images": len(x), "channels_last": int(channels_last), "slope": self.slope,
            "given": result_of(x), "result": result_of(out), **finish_of(epilogue),
        }  # fmt: skip
        set_fields(small, {"x": x, "weights": self.weights, "out": out, "flag": flag}, numbers)
        return launching(small.run, x.device)


def _packed(first: ConvolutionNode, last: ConvolutionNode) -> Any:
    """[input channel, row of taps, BETWEEN / SHARE, SHARE, tap] of the first layer, [channel, row of taps, LAST] of the
    last, and their biases, [BETWEEN] and [4]."""
    import torch

    to_between = first.weight[0].reshape(BETWEEN // SHARE, SHARE, INPUTS, TAPS, TAPS).transpose(2, 3, 0, 1, 4)
    to_image = np.pad(last.weight[0, 0], [(0, 0), (0, 0), (0, LAST - TAPS)])
    device = first.kernel.weight.device
    parts = [torch.from_numpy(np.array(part, np.float32, order="C")).to(device) for part in (to_between, to_image)]
    for bias, size in ((first.kernel.bias, BETWEEN), (last.kernel.bias, 4)):
        parts.append(torch.zeros(size, device=device) if bias is None else padded(bias, size))
    return torch.cat([part.flatten() for part in parts])
