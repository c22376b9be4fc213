"""A network on the GPU: features stream through it, or lie there; the launches are CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends.base import Array
from fastinv.backends.compiled import RAW_DTYPES, timed
from fastinv.backends.cuda_describe import plan_of
from fastinv.backends.cuda_device import (
    Streams,
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
from fastinv.backends.cuda_host import Copy, Upload
from fastinv.backends.cuda_lowering import PRECISIONS, Lowering
from fastinv.backends.cuda_nodes import ConvolutionNode, Door
from fastinv.backends.cuda_plan import MOST_IMAGES, Arena, Buffer, Stage, bucket, fitting
from fastinv.errors import FeatureError
from fastinv.network import Network
from fastinv.ops.base import Shape

if TYPE_CHECKING:
    import torch

# Bytes of a batch from the host, as float32, at most: on an H200 each batch took 0.6 ms beside what its bytes did.
STREAMED_FEATURES = 2**27
STREAMED_RESULTS = 2**25  # these are in pinned memory, too
STREAMED_LEAST = 2**24  # of both together, where a call is more than one batch
STREAMED_OVERLAP = 8  # batches of a call where that allows it: its last overlaps with nothing
MEASURED_IMAGES = MOST_IMAGES  # at most: as in a full batch
STREAMED_BATCHES = 64  # of one call
PLANAR_CHANNELS = 64  # that a convolution can write in the user's order: with more, the addresses spill
PLACES = 32  # of features and results on the device for which there are graphs

NOT_FINITE = "features hold NaN or Inf: drop or mend these images"


@dataclass(eq=False)
class Slot:
    """Memory for one batch on its way, as bytes: features and results on the device, results on the host, pinned."""

    features: torch.Tensor
    results: torch.Tensor
    host: torch.Tensor
    flag: torch.Tensor  # of features that are not finite
    host_bytes: npt.NDArray[np.uint8]  # the same memory as `host`
    flag_value: npt.NDArray[np.int32]  # and as `flag`
    wait: Any = None  # for the batch that is on its way
    rows: tuple[int, int] = (0, 0)


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
        self.most = fitting([self._arena], [*doors, *doors], most)  # of both slots
        given, made = (buffer.bytes(1) for buffer in doors)
        self._most_streamed = max(1, min(self.most, STREAMED_FEATURES // given, STREAMED_RESULTS // made))
        self._least_streamed = max(1, STREAMED_LEAST // (given + made))
        self.batch_size: int | None = STREAMED_BATCHES * self._most_streamed
        self._memory: torch.Tensor | None = None  # the arena, for `most` images
        # One slot is filled and emptied while the other is computed on, with so many images at once.
        self._slots: tuple[Slot, Slot] | None = None
        self._bound: dict[tuple[Any, ...], Any] = {}
        # Runs of what lies on the device, by its place, the last used last: a graph, or None where there was but one.
        self._there: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._flag_there: torch.Tensor | None = None
        self._unread = False  # whether that flag is one that a call left which was cut short
        self._streams: Streams | None = None
        self._upload: Upload | None = None
        self._quantised: tuple[torch.Tensor, ...] = ()
        self.lock = threading.Lock()
        keeps_memory(self)

    def run(self, x: Array, out: Array) -> None:
        self._stream(tensors.Source(x, "float32", False), out)

    def run_plain(self, x: Any, most: int) -> Any:
        if not tensors.on_gpu(x) or x.device != self._device:
            return None
        return self.run_there(tensors.features_there(x, self._network.input_shape), "float32")

    def run_raw(self, rows: tensors.Source, out: npt.NDArray[Any]) -> bool:
        return rows.dtype in RAW_DTYPES and rows.data.dtype.isnative and self._stream(rows, out)

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
            if self._flag_there is None or self._unread:
                self._clear_flag()
            assert self._flag_there is not None
            self._unread = True
            start = 0
            while start < count:
                start = halving(partial(self._run_from, start, x, out), self, self._device)
            wait(self._device)  # the arena is free again, too
            wrong = bool(self._flag_there.item())
            if wrong:
                self._flag_there.zero_()
            self._unread = False
        if wrong:
            raise FeatureError(NOT_FINITE)
        return out

    def _clear_flag(self) -> None:
        """Before the first call, and after one that was cut short."""
        if self._flag_there is None:
            with on_device(self._device):
                self._flag_there = flag_on(self._device)
        else:
            wait_for_all(self._device)
            self._flag_there.zero_()

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
            outside = {self._features: x, self._results: out, self._flag: self._flag_there}
            launches = self._arena.bind(x.shape[0], self._ready(), self._all(outside))
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

        network, memory = self._network, self._ready()
        images = min(self.most, MEASURED_IMAGES)
        dtype: torch.dtype = getattr(torch, self._lowering.numbers.dtype)
        features = torch.randn((images, *network.input_shape), dtype=dtype, device=self._device)
        results = torch.empty((images, *network.output_shape), dtype=torch.float32, device=self._device)
        outside = {self._features: features, self._results: results, self._flag: flag_on(self._device)}
        # In turn, so that each reads what those before have written.
        launches = self._arena.bind(images, memory, self._all(outside))
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
                tensors(given), tensors(to.input), *door(network.input_shape), *map(tensors, noted)
            )

        def results(tensors: Any) -> Any:
            return launch_channels_first(tensors(to.output), tensors(made), *door(network.output_shape))

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
            pixels, channels = door(network.output_shape)
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

    def _all(self, outside: dict[Buffer, Any]) -> dict[Buffer, Any]:
        return {buffer: outside.get(buffer) for buffer in self._outside}

    def release(self) -> bool:
        """Give back what is kept for the next call; whether there was anything."""
        kept = self._memory is not None or self._slots is not None
        self._memory = self._slots = None
        self._bound.clear()
        self._there.clear()
        return kept

    def _ready(self) -> torch.Tensor:
        import torch

        if self._memory is None:
            self._memory = torch.empty(max(1, self._arena.bytes(self.most)), dtype=torch.uint8, device=self._device)
        return self._memory

    @property
    def _streamed(self) -> int:
        """Images at once from the host, at most."""
        return min(self.most, self._most_streamed)

    def _streamed_of(self, count: int) -> int:
        """Images at once of a call with so many: a power of two where it is fewer than the most, as graphs are kept."""
        return bucket(max(self._least_streamed, -(-count // STREAMED_OVERLAP)), self._streamed)

    def _ready_slots(self) -> tuple[Slot, Slot]:
        if self._slots is None:
            self._slots = self._slot(self._streamed), self._slot(self._streamed)
        return self._slots

    def _slot(self, images: int) -> Slot:
        import torch

        def memory(shape: Shape, device: torch.device, pinned: bool = False) -> torch.Tensor:
            size = 4 * images * int(np.prod(shape))
            return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)

        network, device = self._network, self._device
        host = memory(network.output_shape, torch.device("cpu"), device.type == "cuda")
        features, results = (memory(shape, device) for shape in (network.input_shape, network.output_shape))
        flag = flag_on(device)
        return Slot(features, results, host, flag, host.numpy(), flag.numpy())

    def _stream(self, rows: tensors.Source, out: npt.NDArray[Any]) -> bool:
        """Features from the host, results to it, while the batch between them is computed; False on NaN or Inf."""
        with self.lock, on_device(self._device):
            self._streams = self._streams or Streams(self._device)
            self._upload = self._upload or Upload(self._device, self._streams)
            return halving(partial(self._stream_all, rows, out, self._streams), self, self._device)

    def _stream_all(self, rows: tensors.Source, out: npt.NDArray[Any], streams: Streams) -> bool:
        memory, slots = self._ready(), self._ready_slots()
        streams.begin()
        with streams.on("compute"):
            scale = self._constants(rows)
        rounds = rows.dtype == "float32" and self._lowering.numbers.dtype == "bfloat16"
        sent = "bfloat16" if rounds else rows.dtype
        good = True
        try:
            for number, (start, stop) in enumerate(tensors.chunks(len(rows), self._streamed_of(len(rows)))):
                slot = slots[number % 2]
                finite, results = _wait(slot, out)
                good &= finite
                self._send(slot, memory, rows.data[start:stop], sent, scale, out.dtype.name, results)
                slot.rows = (start, stop)
            for slot in sorted(slots, key=lambda slot: slot.rows):
                finite, results = _wait(slot, out)
                good &= finite
                if results is not None:
                    results.make()
        except BaseException:  # what is still on its way is not to be the next call's
            for name in ("in", "compute", "out"):
                streams.mark(name)()
            for slot in slots:
                slot.wait = None
                slot.flag.zero_()
            raise
        return good

    def _send(
        self,
        slot: Slot,
        memory: torch.Tensor,
        part: npt.NDArray[Any],
        dtype: str,
        scale: Any,
        result: str,
        before: Copy | None,
    ) -> None:
        """Start a batch on its way, as `dtype`; the results of that before it in the slot come to their place."""
        import torch

        assert self._streams is not None
        assert self._upload is not None
        streams, count = self._streams, len(part)
        images = bucket(count, self._streamed)
        run = self._launched(slot, memory, images, dtype, scale, result)
        there = slot.features.view(getattr(torch, dtype))[: part.size // count * images]
        self._upload.send(part, there[: part.size], before)
        if images > count:  # the rest of the bucket is computed on, too
            with streams.on("in"):
                there[part.size :].zero_()
        streams.after("compute", "in")
        with streams.on("compute"):
            run()
        streams.after("out", "compute")
        size = count * int(np.prod(self._network.output_shape)) * np.dtype(result).itemsize
        with streams.on("out"):
            slot.host[:size].copy_(slot.results[:size], non_blocking=True)
        slot.wait = streams.mark("out")

    def _launched(self, slot: Slot, memory: torch.Tensor, images: int, dtype: str, scale: Any, result: str) -> Any:
        """The whole run for so many images in a slot."""
        import torch

        key = (id(slot), images, dtype, scale is not None, result)
        if key not in self._bound:
            network = self._network
            shapes = (images, *network.input_shape), (images, *network.output_shape)
            views = []
            for raw, shape, name in zip((slot.features, slot.results), shapes, (dtype, result), strict=True):
                kind: torch.dtype = getattr(torch, name)
                views.append(raw[: int(np.prod(shape)) * kind.itemsize].view(kind).view(shape))
            outside = {self._features: views[0], self._results: views[1], self._flag: slot.flag}
            if scale is not None:
                outside |= {self._scale: scale[0], self._zero_point: scale[1]}
            launches = self._arena.bind(images, memory, self._all(outside))
            assert self._streams is not None
            with self._streams.on("compute"):  # where the batch before may still be, in the same arena
                self._bound[key] = repeatable(launches, self._device)
            slot.flag.zero_()  # that was one run, on whatever there was
        return self._bound[key]

    def _constants(self, rows: tensors.Source) -> Any:
        """Scale and zero point on the device, one entry for each channel; always in the same memory, as graphs need."""
        import torch

        if rows.scale is None or rows.zero_point is None:
            return None
        shape = self._network.input_shape
        if not self._quantised:
            channels = door(shape)[1]
            self._quantised = tuple(torch.empty(channels, dtype=torch.float32, device=self._device) for _ in range(2))
        for tensor, values in zip(self._quantised, (rows.scale, rows.zero_point), strict=True):
            tensor.copy_(torch.from_numpy(of_channels(values, shape)))
        return self._quantised


def door(shape: Shape) -> tuple[int, int]:
    """Pixels and channels of a value: all of it is channels where it is no image."""
    size = int(np.prod(shape))
    return (size // shape[0], shape[0]) if len(shape) == 3 else (1, size)


def of_channels(values: Array, shape: Shape) -> Array:
    """Numbers that are broadcast over a value of this shape, one for each of its channels (see `door`)."""
    whole = np.broadcast_to(values, shape)
    return (whole[:, 0, 0] if len(shape) == 3 else whole.ravel()).copy()


def _wait(slot: Slot, out: npt.NDArray[Any]) -> tuple[bool, Copy | None]:
    """Wait for the batch in a slot, if there is one: whether its features were finite, and how its results come to
    their place. What is next in the slot may start on its way meanwhile, but not be run."""
    if slot.wait is None:
        return True, None
    slot.wait()
    slot.wait = None
    start, stop = slot.rows
    part = out[start:stop]
    wrong = bool(slot.flag_value[0])
    if wrong:
        slot.flag.zero_()
    return not wrong, Copy(slot.host_bytes[: part.nbytes].view(part.dtype).reshape(part.shape), part)
