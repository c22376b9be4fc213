"""3×3 convolutions of float32 as the kernel of `kernels/cuda/window_halves.h`, forward and back to the input."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.backends.cuda.fragments import halved, scale_below
from fastinv.backends.cuda.layers import (
    AROUND,
    FINISHES,
    OUTPUTS,
    are_few,
    finish_of,
    for_tensor_cores,
    reads,
    runs_on,
    tap_tiles,
)
from fastinv.backends.cuda.native import extension, launching, set_fields
from fastinv.backends.cuda.tuning import native_is_faster

if TYPE_CHECKING:
    from fastinv import _cuda

INPUTS = 64  # of a launch
FEW = 2  # see `are_few`: at best this is not three times as fast as tile by tile, in tf32
EMPTY = 16  # of the OUTPUTS of a launch, at most: they take as long as the others
LARGEST = 14  # below this power of two are the weights, multiplied by one
MOST_SCALE = 2.0**126  # which has an inverse
SLOPES_FROM_SIGN = ("relu", "leaky_relu")  # activations whose slope is told from the sign of their result


class HalvedConvolution:
    """A convolution of float32 as three products of float16 a factor; see `fits`.

    Args:
        kernel: the `fastinv.kernels.triton.convolution.Convolution` that it takes the place of. What it cannot do, few
            images, other orders and other activations, that one still does.
        weight: float32 [1, outputs, inputs, kh, kw].
    """

    def __init__(self, kernel: Any, weight: npt.NDArray[np.float32]) -> None:
        import torch

        self.other = kernel
        self.weight = kernel.weight  # for its device and type
        self.input_shape, self.output_shape = kernel.input_shape, kernel.output_shape
        scale = np.float32(min(scale_below(weight, LARGEST), MOST_SCALE))
        self._unscale = float(1 / scale)
        self._parts: list[tuple[int, int, Any]] = []  # first output, first input, and the weights between
        for first, start in itertools.product(range(0, kernel.outputs, OUTPUTS), range(0, kernel.inputs, INPUTS)):
            part = scale * weight[:, first : first + OUTPUTS, start : start + INPUTS]
            halves = itertools.chain.from_iterable(map(halved, tap_tiles(kernel.geometry, part, AROUND)))
            self._parts.append((first, start, for_tensor_cores(halves, torch.float16, kernel.weight.device)))

    @staticmethod
    def fits(kernel: Any) -> bool:
        """Whether there is such a kernel, built, for this device."""
        from fastinv.kernels.triton.convolution import Convolution

        return (
            isinstance(kernel, Convolution)
            and kernel.groups == 1
            and kernel.precision == "tf32x3"
            and kernel.inputs % INPUTS == 0
            and kernel.outputs % 8 == 0
            and -kernel.outputs % OUTPUTS <= EMPTY
            and reads(kernel.geometry, AROUND)
            and runs_on(kernel.weight.device)
            and _sized(kernel, 0).fits()
        )

    def planar(self) -> Any:
        """As `Weights.planar`."""
        return self.other.planar()

    def launch(self, x: Any, out: Any, epilogue: Any, out_strides: Any = None) -> Any:
        """As `Convolution.launch`."""
        kinds = FINISHES if epilogue.saved is None else SLOPES_FROM_SIGN
        other = out_strides is not None or out.dtype != self.weight.dtype or epilogue.kind not in kinds
        if other or are_few(len(x), x.device, FEW):
            return self.other.launch(x, out, epilogue, out_strides)
        return launching(functools.partial(_run, list(self._layers(x, out, epilogue))), x.device)

    def _layers(self, x: Any, out: Any, epilogue: Any) -> Iterator[_cuda.HalvedLayer]:
        """For every `OUTPUTS` of the outputs, those that add up its inputs; the last of them ends as is asked."""
        for first, start, weights in self._parts:
            layer = _sized(self.other, first)
            outputs = {"addend": epilogue.addend if start == 0 else out, "out": out}
            numbers = {"images": len(x), "unscale": self._unscale, "finish": FINISHES["identity"]}
            if start + INPUTS == self.other.inputs:
                outputs |= {"saved": epilogue.saved, "bias": self.other.bias}
                numbers |= finish_of(epilogue)
            channels = {name: _from(tensor, first) for name, tensor in outputs.items()}
            set_fields(layer, {"x": _from(x, start), "weights": weights, **channels}, numbers)
            yield layer


def in_halves(kernel: Any, weight: npt.NDArray[np.float32]) -> Any:
    """A kernel of weights [groups, outputs, inputs, kh, kw], or the faster one that there is for what it does."""
    if HalvedConvolution.fits(kernel) and native_is_faster(kernel, kernel.weight.device):
        return HalvedConvolution(kernel, weight)
    return kernel


def _run(layers: Sequence[_cuda.HalvedLayer], device: int, stream: int) -> None:
    for layer in layers:
        layer.run(device, stream)


def _from(tensor: Any, channel: int) -> Any:
    """What lies from a channel of the first pixel on, or from an entry of a bias."""
    return None if tensor is None else tensor.view(-1)[channel:]


def _sized(kernel: Any, first: int) -> _cuda.HalvedLayer:
    """For the outputs from `first` on."""
    layer: _cuda.HalvedLayer = extension().HalvedLayer()
    height, width, inputs = kernel.input_shape
    outputs = min(OUTPUTS, kernel.outputs - first)
    sizes = {"height": height, "width": width, "x_pitch": inputs, "out_pitch": kernel.outputs, "outputs": outputs}
    set_fields(layer, {}, sizes)
    return layer
