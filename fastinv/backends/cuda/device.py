"""The device under the GPU backend: which there are, memory, streams and graphs.

A CPU stands in for a GPU wherever its tensors do, so that all else can be tested without one: then launches are run one
by one in Triton's interpreter, and there are no streams.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import statistics
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fastinv.errors import BackendError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

DRIVER = "libcuda.so.1"
NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED, of cuInit after a fork (triton-lang/triton, pull request 10443)
OLDEST = (8, 0)  # compute capability: the first with bfloat16 and tf32


@functools.cache
def missing(index: int) -> str | None:
    """Why GPU number `index` cannot be used here, and what to do; None when it can.

    The driver is asked before torch is: where there is no GPU, that takes no time and loads nothing.
    """
    count = _driver_count()
    if count is None:
        return "this process was forked from one that has used a GPU, and cannot use CUDA: start it by 'spawn'"
    if count == 0:
        return "no GPU is to be seen (no NVIDIA driver, or CUDA_VISIBLE_DEVICES hides all)"
    if index >= count:
        return f"there is no GPU {index}: {count} can be seen, from 0"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'fastinv[gpu]' (Linux on x86-64 or ARM64)"
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported ({error})"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA: install a build with it"
    if not torch.cuda.is_available():
        return "PyTorch finds no usable GPU: is the driver new enough for its CUDA version?"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"GPU {index} has compute capability {capability[0]}.{capability[1]}, expected 8.0 (Ampere) or more"
    return None


os.register_at_fork(after_in_child=missing.cache_clear)


def _driver_count() -> int | None:
    """How many GPUs NVIDIA's driver shows to this process; None where it was forked from one that has asked before."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    status, count = driver.cuInit(0), ctypes.c_int(0)
    if status == NOT_INITIALIZED:
        return None
    if status != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def isa_of(device: torch.device) -> str:
    """As in "sm_90"."""
    import torch

    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def gpu_name(device: torch.device) -> str | None:
    """As in "NVIDIA H100 80GB HBM3"; None for what only stands in for a GPU."""
    import torch

    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def shared_memory(device: torch.device) -> int:
    """Bytes that a block can have; those of an H100 for what only stands in for a GPU."""
    import torch

    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Within, launches and new streams go to this device; and tensors outlive the caller's inference mode: those of
    one cannot be written outside it."""
    import torch

    with torch.inference_mode(False), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def wait(device: torch.device) -> None:
    """Wait for what is on the current stream: the next one to use the same memory may be on another."""
    import torch

    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def mark(device: torch.device) -> Callable[[], None]:
    """A function that waits for what is on the current stream by now."""
    import torch

    if device.type != "cuda":
        return nothing
    waits: Callable[[], None] = torch.cuda.current_stream(device).record_event().synchronize
    return waits


def wait_for_all(device: torch.device) -> None:
    """Wait for all streams of a device."""
    import torch

    if device.type == "cuda":
        with _capturing:  # a capture on any stream would not survive it
            torch.cuda.synchronize(device)


def flag_on(device: torch.device) -> torch.Tensor:
    """A 0, int32 [1], that kernels on this device can set: in pinned memory of the host, which they reach at the same
    address (CUDA C++ Programming Guide, "Unified Virtual Address Space"). After a wait it is read without a copy.
    """
    import torch

    return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


_capturing = threading.Lock()  # PyTorch captures one graph at a time


def repeatable(launches: Sequence[Callable[[], None]], device: torch.device) -> Callable[[], None]:
    """The launches as one call: a CUDA graph. They are run once here, after what is on the current stream, which
    compiles them."""
    import torch

    def run() -> None:
        for launch in launches:
            launch()

    if device.type != "cuda" or not launches:
        return run
    with _capturing, on_device(device):
        side = _capture_stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Not by `torch.cuda.graph`, which waits for the whole device first and empties PyTorch's cache, the
            # caller's memory, too: the launches allocate nothing. Other threads of the program may allocate meanwhile,
            # as a data loader's that pins memory does.
            try:
                graph.capture_begin(capture_error_mode="thread_local")
                run()
            finally:
                if torch.cuda.is_current_stream_capturing():
                    graph.capture_end()
    return graph.replay


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """Where graphs are captured, and nothing else runs: what another thread launches there would become part of one.

    PyTorch gives each of its 32 streams to several who ask, and kernels keep the priority of the stream of their
    capture: hence one of the driver's own, of the usual priority, that does not wait for the legacy default stream.
    """
    import torch

    torch.cuda.mem_get_info(device)  # makes the device's context this thread's, which the driver goes by
    handle, not_blocking = ctypes.c_void_p(), 1
    status = ctypes.CDLL(DRIVER).cuStreamCreate(ctypes.byref(handle), not_blocking)
    if status != 0:
        raise BackendError(f"backend 'cuda': no stream can be made on {device} (CUDA error {status})")
    make: Any = torch.cuda.ExternalStream
    return make(handle.value, device=device)


REPEATED = 10  # launches between two events: Python alone takes up to 100 µs for one, more than many kernels
MEASURED = 7


def seconds(launch: Callable[[], None], device: torch.device) -> float:
    """What a launch takes on the device: the median of some runs of a CUDA graph of several, after one that compiles
    it. Of what only stands in for a GPU, one run by the clock."""
    import torch

    if device.type != "cuda":
        start = time.perf_counter()
        launch()
        return time.perf_counter() - start
    run = repeatable([launch] * REPEATED, device)
    times: list[float] = []
    for _ in range(MEASURED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / REPEATED)
    return statistics.median(times)


class Keeper(Protocol):
    """What keeps memory on a device for its next call.

    Attributes:
        lock: held while it runs.
        most: images that it takes at once.
    """

    lock: threading.Lock
    most: int

    def release(self) -> bool:
        """Give the memory back; whether there was any."""


_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()


def keeps_memory(keeper: Keeper) -> None:
    """Where memory does not suffice for another, it may be released, unless it runs."""
    _keepers.add(keeper)


def _release_idle() -> bool:
    """Whether any memory was given back."""
    found = False
    for keeper in list(_keepers):
        if keeper.lock.acquire(blocking=False):  # that of whoever asks is held
            try:
                found |= keeper.release()
            finally:
                keeper.lock.release()
    return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory did not suffice. Only PyTorch's own allocator says so by a type; where CUDA does, of memory that
    is pinned or a graph's, the message does: "CUDA error: out of memory"."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def halving(work: Callable[[], Value], keeper: Keeper, device: torch.device) -> Value:
    """What `work` gives, the keeper's, which is begun again with half as many images at once as often as memory does
    not suffice: for tensors, for what PyTorch and Triton load, or for CUDA graphs. Before that the keeper gives back
    what it has taken, and others who do not run what they keep.

    Raises:
        BackendError: there is not even room for one image.
    """
    import torch

    before = keeper.most
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = f"{error!s:.200}"
        wait_for_all(device)  # graphs and memory are in use until then
        keeper.release()
        released = _release_idle()
        torch.cuda.empty_cache()
        if released:
            continue
        images = keeper.most
        if images == 1:
            keeper.most = before  # there may be room for the next call
            raise BackendError(f"backend 'cuda': the GPU has no room for one image ({reason})")
        warnings.warn(
            f"the GPU has no room for {images:,} images at once: going on with {images // 2:,}", RuntimeWarning, 3
        )
        keeper.most = images // 2


class room_for(AbstractContextManager[None]):
    """What is allocated within is needed whole.

    Args:
        what: that is, and `instead` what to do where there is no room for it.

    Raises:
        BackendError: memory does not suffice.
    """

    def __init__(self, what: str, instead: str) -> None:
        self._what = what
        self._instead = instead

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise BackendError(f"backend 'cuda': no room for {self._what}: {self._instead} ({error!s:.200})") from error


def room_for_images(count: int) -> AbstractContextManager[None]:
    """What is allocated within is for all images of a call whose features are on the device."""
    return room_for(
        f"the images of {count:,} features on the GPU",
        "pass fewer at once, or features on the host, whose images go there as they come",
    )


class Streams:
    """Three streams that overlap: features "in", "compute", results "out"; and "current", the caller's. On a CPU
    everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._streams: dict[str, Any] = {}
        if device.type == "cuda":
            make: Any = torch.cuda.Stream
            self._streams = {name: make(device) for name in ("in", "compute", "out")}

    def on(self, name: str) -> AbstractContextManager[Any]:
        """What is launched within goes to this stream."""
        import torch

        return torch.cuda.stream(self._streams[name]) if self._streams else nullcontext()

    def begin(self) -> None:
        """What comes next on "in" and "compute" waits for what is on "current": memory that is fresh to the caller may
        have been another tensor's until then."""
        for name in ("in", "compute"):
            self.after(name, "current")

    def after(self, name: str, before: str) -> None:
        """What comes next on stream `name` waits for what is on `before` by now."""
        if self._streams:
            self._of(name).wait_stream(self._of(before))

    def handle(self, name: str) -> int:
        """What CUDA's driver knows the stream by."""
        return int(self._of(name).cuda_stream) if self._streams else 0

    def mark(self, name: str) -> Callable[[], None]:
        """A function that waits for what is on the stream by now."""
        if not self._streams:
            return nothing
        waits: Callable[[], None] = self._of(name).record_event().synchronize
        return waits

    def _of(self, name: str) -> Any:
        import torch

        return torch.cuda.current_stream(self._device) if name == "current" else self._streams[name]


def nothing() -> None:
    """A launch of nothing, or a wait for it."""
