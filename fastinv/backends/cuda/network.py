"""A network on the GPU: features stream through it, or lie there; the launches are CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends.base import Array
from fastinv.backends.compiled import RAW_DTYPES, timed
from fastinv.backends.cuda.describe import plan_of
from fastinv.backends.cuda.device import (
    flag_on,
    halving,
    isa_of,
    keeps_memory,
    nothing,
    on_device,
    repeatable,
    room_for_images,
    seconds,
    wait,
    wait_for_all,
)
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.nodes import ConvolutionNode, Door, pixels_and_channels
from fastinv.backends.cuda.plan import MOST_IMAGES, Arena, Buffer, Stage, fitting
from fastinv.backends.cuda.stream import Stream
from fastinv.errors import FeatureError
from fastinv.network import Network

if TYPE_CHECKING:
    import torch

MEASURED_IMAGES = MOST_IMAGES  # at most: as in a full batch
STREAMED_BATCHES = 64  # of one call
PLANAR_CHANNELS = 64  # that a convolution can write in the user's order: with more, the addresses spill
PLACES = 32  # of features and results on the device for which there are graphs

NOT_FINITE = "features hold NaN or Inf: drop or mend these images"


class CudaNetwork:
    """A network compiled for one device.

    Args:
        most: images at once, at most.
    """

    def __init__(self, network: Network, precision: str, device: torch.device, most: int = MOST_IMAGES) -> None:
        self.precision = precision
        self.isa = isa_of(device)
        self._network = network
        self._device = device
        self._lowering = Lowering(network, device, PRECISIONS[precision])
        self._features, self._results, self._flag = (Buffer(0, "float32") for _ in range(3))
        self._scale, self._zero_point = Buffer(0, "float32"), Buffer(0, "float32")
        self._outside = (self._features, self._results, self._flag, self._scale, self._zero_point)
        self._arena = Arena(self._stages(), self._outside)
        doors = [Buffer(int(np.prod(shape)), "float32") for shape in (network.input_shape, network.output_shape)]
        self.most = fitting([self._arena], [*doors, *doors], most)  # of both slots of the stream
        self._stream = Stream(network.input_shape, network.output_shape, self._lowering.numbers.dtype, device)
        self.batch_size: int | None = STREAMED_BATCHES * min(self.most, self._stream.most)
        self._memory: torch.Tensor | None = None  # the arena, for `most` images
        # Runs of what lies on the device, by its place, the last used last: a graph, or None where there was but one.
        self._there: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        with on_device(device):
            self._flag_there = flag_on(device)
        self._cut_short = False  # whether the last call was
        self.lock = threading.Lock()
        keeps_memory(self)

    def run(self, x: Array, out: Array) -> None:
        self._run_rows(tensors.Source(x, "float32", False), out)

    def run_plain(self, x: Any, most: int) -> Any:
        if not tensors.on_gpu(x) or x.device != self._device:
            return None
        return self.run_there(tensors.features_there(x, self._network.input_shape), "float32")

    def run_raw(self, rows: tensors.Source, out: npt.NDArray[Any]) -> bool:
        return rows.dtype in RAW_DTYPES and rows.data.dtype.isnative and self._run_rows(rows, out)

    def _run_rows(self, rows: tensors.Source, out: npt.NDArray[Any]) -> bool:
        """Features from the host, results to it; False on NaN or Inf."""

        def stream() -> bool:
            self._ready()  # before the stream begins: see `Streams.begin`
            return self._stream.run(rows, out, self._bind, self.most)

        with self.lock, on_device(self._device):
            self._begin()
            self._stream.open()
            good = halving(stream, self, self._device)
            self._cut_short = False
        return good

    def run_there(self, x: torch.Tensor, dtype: str) -> torch.Tensor:
        """Results [N, *output_shape] for x [N, *input_shape] on this device, contiguous, computed where it lies, on the
        current stream. Where features and results lie as they did before, as in a loop, the launches are a CUDA graph.

        Raises:
            FeatureError: x holds NaN or Inf.
            BackendError: the GPU has no room for the results.
        """
        import torch

        count = x.shape[0]
        with room_for_images(count):
            out = torch.empty((count, *self._network.output_shape), dtype=getattr(torch, dtype), device=self._device)
        with self.lock:
            self._begin()
            start = 0
            while start < count:
                start = halving(partial(self._run_from, start, x, out), self, self._device)
            wait(self._device)  # the arena is free again, too
            wrong = bool(self._flag_there.item())
            if wrong:
                self._flag_there.zero_()
            self._cut_short = False
        if wrong:
            raise FeatureError(NOT_FINITE)
        return out

    def _begin(self) -> None:
        """A call: what one before it that was cut short has left on its way is not to be this one's."""
        if self._cut_short:
            wait_for_all(self._device)
            self._flag_there.zero_()
            self._stream.forget()
        self._cut_short = True

    def _run_from(self, start: int, x: torch.Tensor, out: torch.Tensor) -> int:
        """As many as there is memory for at once, from `start` on; where the next begin."""
        count = x.shape[0]
        stop = min(start + self.most, count)
        if stop - start < count:  # a slice of all would take as long as the rest of the way to a launch
            x, out = x[start:stop], out[start:stop]
        self._run_part(x, out)
        return stop

    def _run_part(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """In a loop the GPU waits for what comes before `run()`, which therefore is little: a graph needs no
        `on_device`, it goes to the device that it was captured on."""
        key = (x.shape[0], x.data_ptr(), x.dtype, out.data_ptr(), out.dtype)
        run = self._there.get(key)
        if run is None:
            self._run_new_part(key, x, out)
        else:
            run()
            self._there.move_to_end(key)

    def _run_new_part(self, key: tuple[Any, ...], x: torch.Tensor, out: torch.Tensor) -> None:
        """What has no graph yet: it gets one the second time that it is met."""
        known, run = key in self._there, None
        self._there.pop(key, None)
        with on_device(self._device):
            launches = self._bind(x, out, self._flag_there)
            if known:
                run = repeatable(launches, self._device)
                run()
            else:
                for launch in launches:
                    launch()
        self._there[key] = run
        if len(self._there) > PLACES:
            self._there.popitem(last=False)

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        plan = plan_of(self._network, self._lowering)
        if measure:
            with self.lock, on_device(self._device):
                return timed(plan, halving(self._measured, self, self._device))
        return plan

    def _measured(self) -> list[float]:
        """Seconds that every node takes for one image, of a large batch of random features: of the type that values
        are kept in, since what reads such features where they are is what a call in this precision is to use."""
        import torch

        network = self._network
        images = min(self.most, MEASURED_IMAGES)
        dtype: torch.dtype = getattr(torch, self._lowering.numbers.dtype)
        features = torch.randn((images, *network.input_shape), dtype=dtype, device=self._device)
        results = torch.empty((images, *network.output_shape), dtype=torch.float32, device=self._device)
        # In turn, so that each reads what those before have written.
        launches = self._bind(features, results, flag_on(self._device))
        taken = [0.0 if launch is nothing else seconds(launch, self._device) / images for launch in launches]
        stages = zip(self._arena.stages, taken, strict=True)
        return [next(t for stage, t in stages if node.output in stage.writes) for node in self._lowering.nodes]

    def _stages(self) -> list[Stage]:
        """From features [N, *input_shape] of any type, through the nodes, to results [N, *output_shape]."""
        from fastinv.kernels.triton.layout import launch_channels_first, launch_channels_last

        to, network = self._lowering, self._network
        reader = self._reader()
        # Of `self` the stages must keep nothing: a network that is not used any more is to free its memory at once.
        given, made, noted = self._features, self._results, (self._scale, self._zero_point, self._flag)

        def features(tensors: Any) -> Any:
            if reader is not None and reader.takes(tensors):
                return nothing
            return launch_channels_last(
                tensors(given), tensors(to.input), *pixels_and_channels(network.input_shape), *map(tensors, noted)
            )

        def results(tensors: Any) -> Any:
            return launch_channels_first(tensors(to.output), tensors(made), *pixels_and_channels(network.output_shape))

        always = reader is not None and reader.kernel.takes_all
        first = [] if always else [Stage(features, (given,), (to.input,))]
        last = to.nodes[-1] if to.nodes else None
        read = {source for node in to.nodes for source in node.inputs}
        if (
            isinstance(last, ConvolutionNode)
            and last.output is to.output
            and to.output not in read
            and last.ending.addend is None
            and len(network.output_shape) == 3
            and network.shapes[to.steps[-1][-1] + 1] == network.output_shape  # no reshape that launches nothing since
            and network.output_shape[0] <= PLANAR_CHANNELS
        ):  # it can write the results where they are to be
            pixels, channels = pixels_and_channels(network.output_shape)
            last.output = made
            last.out_strides = (pixels * channels, network.output_shape[2], 1, pixels)
            return [*first, *to.forward()]
        return [*first, *to.forward(), Stage(results, (to.output,), (made,))]

    def _reader(self) -> ConvolutionNode | None:
        """The node that reads the features where they are: where a kernel can, and nothing else reads them."""
        to, shape = self._lowering, self._network.input_shape
        readers = [node for node in to.nodes for source in node.inputs if source is to.input]
        node = readers[0] if len(readers) == 1 and to.output is not to.input else None
        if not isinstance(node, ConvolutionNode) or node.inputs[0] is not to.input:
            return None
        kernel = node.kernel.planar() if len(shape) == 3 else None
        if kernel is None or kernel.input_shape != (*shape[1:], shape[0]):
            return None
        node.kernel = kernel
        node.door = Door(self._features, self._scale, self._zero_point, self._flag)
        if kernel.takes_all:
            node.inputs = (self._features, *node.inputs[1:])
        return node

    def _bind(
        self,
        features: torch.Tensor,
        results: torch.Tensor,
        flag: torch.Tensor,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> list[Callable[[], None]]:
        """The launches that make results of features, all on the device."""
        outside = dict(zip(self._outside, (features, results, flag, scale, zero_point), strict=True))
        return self._arena.bind(len(features), self._ready(), outside)

    def release(self) -> bool:
        """Give back what is kept for the next call; whether there was anything."""
        kept = self._stream.release() or self._memory is not None
        self._memory = None
        self._there.clear()
        return kept

    def _ready(self) -> torch.Tensor:
        import torch

        if self._memory is None:
            self._memory = torch.empty(max(1, self._arena.bytes(self.most)), dtype=torch.uint8, device=self._device)
        return self._memory
