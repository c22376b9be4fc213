"""A 3×3 convolution of features in the user's order to a few channels, as the kernel of `kernels/cuda/planar.h`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.device import shared_memory
from fastinv.backends.cuda.fragments import left
from fastinv.backends.cuda.layers import AROUND, FINISHES, finish_of, reads, result_of
from fastinv.backends.cuda.native import extension, launching, set_fields, usable_on
from fastinv.backends.cuda.nodes import ConvolutionNode, Node
from fastinv.backends.cuda.plan import Buffer
from fastinv.backends.cuda.tuning import native_is_faster

if TYPE_CHECKING:
    import torch

    from fastinv import _cuda

INPUTS, OUTPUTS = 64, 3  # channels; of those that are made, at most
TAPS = 9
ROWS = 32  # of the left factor, one for each output and tap
STEP, OWN = 16, 4  # channels of a product, and those that a lane has of them
ALIGNMENT = 8  # bytes


class PlanarConvolution:
    """A convolution of two-byte features as they are given; see `fits`.

    Args:
        node: whose kernel, a `fastinv.kernels.triton.direct.DirectConvolution`, it takes the place of. Other features
            that one still reads, all of them.
        dtype: of the features, and of the weights as they are multiplied.
    """

    takes_all = True

    def __init__(self, node: ConvolutionNode, dtype: torch.dtype) -> None:
        kernel = node.kernel
        self.other = kernel
        self.dtype = dtype
        self.outputs, self.bias = kernel.outputs, kernel.bias
        self.input_shape: tuple[int, int, int] = kernel.input_shape
        self._planar = kernel.planar()
        self.weights = _factors(kernel.geometry, node.weight, dtype, kernel.weight.device)

    @staticmethod
    def fits(node: Node, features: Buffer, dtype: torch.dtype) -> bool:
        """Whether there is such a kernel, built, for this device; `node` has to read the features, and adds nothing."""
        from fastinv.kernels.triton.direct import DirectConvolution

        if not isinstance(node, ConvolutionNode) or node.inputs != (features,):
            return False
        kernel = node.kernel
        return (
            isinstance(kernel, DirectConvolution)
            and dtype.itemsize == 2
            and kernel.inputs == INPUTS
            and kernel.outputs <= OUTPUTS
            and reads(kernel.geometry, AROUND)
            and node.ending.activation.kind in FINISHES
            and usable_on(kernel.weight.device)
            and _sized(kernel).fits()
        )

    def planar(self) -> PlanarConvolution:
        """As `Weights.planar`."""
        return self

    def takes(self, features: Any, scale: Any) -> bool:
        """Whether `launch_planar` can read them: always."""
        return True

    def launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any = None) -> Any:
        """As `Convolution.launch`."""
        return self.other.launch(x, out, epilogue, out_strides)

    def launch_planar(
        self, x: Any, out: Any, epilogue: Any, out_strides: Any, scale: Any, zero_point: Any, flag: Any
    ) -> Any:
        """For x [N, C, H, W], contiguous; `flag` is set to 1 where a value is NaN or Inf."""
        import torch

        from fastinv.kernels.triton.geometry import strides

        if x.dtype is not self.dtype or x.data_ptr() % ALIGNMENT != 0 or scale is not None:
            return self._planar.launch_planar(x, out, epilogue, out_strides, scale, zero_point, flag)
        layer = _sized(self.other)
        out_n, out_y, out_x, out_c = out_strides or strides(layer.height, layer.width, self.outputs)
        numbers = {
            "images": len(x), "float16": int(self.dtype is torch.float16),
            "out_n": out_n, "out_y": out_y, "out_x": out_x, "out_c": out_c,
            "result": result_of(out), **finish_of(epilogue),
        }  # fmt: skip
        set_fields(layer, {"x": x, "weights": self.weights, "bias": self.bias, "out": out, "flag": flag}, numbers)
        return launching(layer.run, x.device)


def use_planar(nodes: list[Node], features: Buffer, dtype: torch.dtype) -> None:
    """Give the node of a forward pass that reads the features this kernel where there is one for it, unless it was
    measured to be slower."""
    for node in nodes:
        if PlanarConvolution.fits(node, features, dtype):
            assert isinstance(node, ConvolutionNode)
            if native_is_faster(node.kernel, node.kernel.weight.device):
                node.kernel = PlanarConvolution(node, dtype)


def _sized(kernel: Any) -> _cuda.PlanarLayer:
    layer: _cuda.PlanarLayer = extension().PlanarLayer()
    height, width, _ = kernel.input_shape
    room = shared_memory(kernel.weight.device)
    set_fields(layer, {}, {"height": height, "width": width, "outputs": kernel.outputs, "room": room})
    return layer


def _factors(geometry: Any, weight: npt.NDArray[np.float32], dtype: torch.dtype, device: Any) -> Any:
    """The left factors of all channels, [step, half of the rows, lane, word], of weights [1, outputs, 64, 3, 3].

    A lane brings `OWN` neighbouring channels of every `STEP`: two are its pair of the factor's first eight columns, two
    that of the others.
    """
    import torch

    rows = np.zeros((ROWS, INPUTS), np.float32)
    ((y, x),) = geometry.phases()
    for t, tap_y in enumerate(y.taps):
        for s, tap_x in enumerate(x.taps):
            down, right = y.first + t * geometry.spacing[0], x.first + s * geometry.spacing[1]
            rows[3 * (down + 1) + right + 1 : TAPS * weight.shape[1] : TAPS] = weight[0, :, :, tap_y, tap_x]
    # [half, row, step, lane, pair, entry] to [step, half, row, column]: all lanes' first pairs, then their second ones.
    grouped = rows.reshape(2, ROWS // 2, INPUTS // STEP, STEP // OWN, 2, OWN // 2).transpose(2, 0, 1, 4, 3, 5)
    halves = torch.from_numpy(grouped.reshape(INPUTS // STEP, 2, ROWS // 2, STEP).copy()).to(dtype)
    return torch.from_numpy(left(halves.view(torch.int16).numpy()).view(np.int32).copy()).to(device)
