"""Tiles of matrix products, and who computes them, by measurement, kept in a file under the user's cache folder.

`tune` measures the few candidates of every convolution of a network, or of two that go together, and writes down the
fastest tile, and where there is a kernel in CUDA C++ for them, too, whether that one is faster (`SmallTail` is not
compared). Compiling only looks this up: it takes no time, and what was never measured keeps the tile that it has by its
shapes, and the kernel in CUDA C++. All tiles add up the same products in the same order.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinv.backends.cuda.device import gpu_name, on_device, seconds
from fastinv.errors import BackendError
from fastinv.network import Network
from fastinv.places import beside

if TYPE_CHECKING:
    import torch

VERSION = 3  # of the file
NUMBERS = 7  # of a `Tile`
TUNED_BYTES = 2**28  # of what a measured launch reads or writes: more than the L2 holds
TUNED_IMAGES = 4096  # at most


def tiles_file() -> Path:
    """Where it is kept: `$XDG_CACHE_HOME/fastinv/tiles.json`, or in `~/.cache`."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastinv" / "tiles.json"


@dataclass(frozen=True)
class Measured:
    """What the file holds.

    Attributes:
        tiles: the numbers of a `Tile` by convolution.
        native: whether the kernel in CUDA C++ is faster, by the convolution that it does.
    """

    tiles: dict[str, list[int]] = field(default_factory=dict)
    native: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tiles, native = self.tiles.values(), self.native.values()
        if not all(isinstance(tile, list) and [type(n) for n in tile] == [int] * NUMBERS for tile in tiles):
            raise ValueError(f"a tile is not {NUMBERS} integers")
        if not all(isinstance(faster, bool) for faster in native):
            raise ValueError("whether a kernel is faster is not true or false")


def read_measured() -> Measured:
    """What was measured; nothing where there is no file. One that is broken is told, and ignored."""
    path = tiles_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return Measured()
        return Measured(content["tiles"], content["native"])
    except FileNotFoundError:
        return Measured()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the file of measured tiles {path} is ignored ({type(error).__name__}: {error!s:.200}): delete it, and "
            "measure again",
            RuntimeWarning,
            stacklevel=2,
        )
        return Measured()


def write_measured(fresh: Measured) -> None:
    """Add to the file, whole or not at all: other processes see the old one or the new one.

    Raises:
        BackendError: it cannot be written.
    """
    path = tiles_file()
    old = read_measured()  # one that is broken is replaced
    content = {"version": VERSION, "tiles": old.tiles | fresh.tiles, "native": old.native | fresh.native}
    text = json.dumps(content, indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BackendError(
            f"the measured tiles cannot be written to {path} ({error.strerror or error}): set XDG_CACHE_HOME to a "
            "folder that can"
        ) from error


def key_of(gpu: str, kernel: Any) -> str:
    """What a tile is measured for: the GPU, the kernel, the shapes, the types."""
    dtype = str(kernel.weight.dtype).removeprefix("torch.")
    return f"{gpu} | {type(kernel).__name__.lower()} | {kernel.reads} | {dtype} {kernel.precision}"


_anew: ContextVar[bool] = ContextVar("anew", default=False)  # whether what was measured before does not count


def tuned(kernel: Any, device: torch.device) -> Any:
    """What is `Tiled`, a convolution or a pair, with the tile that was measured for it on this device, if one was."""
    gpu = gpu_name(device)
    if gpu is None or _anew.get():
        return kernel
    found = read_measured().tiles.get(key_of(gpu, kernel))
    fitting = (tile for tile in kernel.candidates if list(tile.numbers) == found)  # the file may be another's
    return kernel.with_tile(next(fitting, kernel.tile))


def native_is_faster(kernel: Any, device: torch.device) -> bool:
    """Whether the kernel in CUDA C++ is taken for what this one does, a convolution or a pair: if not measured, yes."""
    gpu = gpu_name(device)
    return gpu is None or _anew.get() or read_measured().native.get(key_of(gpu, kernel), True)


def tune(
    network: Network,
    precision: str,
    device: torch.device,
    differentiable: bool = False,
    timer: Callable[[Any], float] | None = None,
) -> Measured:
    """Measure the tiles of the network's convolutions and pairs, and of the ways back where it is a solver's edge.

    Args:
        timer: seconds of a launch; by default those it takes on the device.

    Returns:
        What was written to the file.

    Raises:
        BackendError: the file cannot be written.
    """
    from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
    from fastinv.kernels.triton.convolution import Tiled

    gpu = gpu_name(device) or device.type
    token = _anew.set(True)
    try:
        to = Lowering(network, device, PRECISIONS[precision], differentiable=differentiable)
    finally:
        _anew.reset(token)
    kernels: list[Any] = [getattr(node, name, None) for node in to.nodes for name in ("kernel", "back")]
    timer = timer or (lambda launch: seconds(launch, device))
    found = Measured()
    with on_device(device):
        for kernel in kernels:
            other = getattr(kernel, "other", kernel)  # of a kernel in CUDA C++ what it takes the place of
            tiled = isinstance(other, Tiled)
            if not tiled and kernel is other:
                continue
            key = key_of(gpu, other)
            if key in found.tiles or key in found.native:
                continue
            fastest = _fastest(other, device, timer) if tiled else other
            if tiled:
                found.tiles[key] = list(fastest.tile.numbers)
            if kernel is not other:
                native, triton = map(timer, _rivals(kernel, fastest, device))
                found.native[key] = native <= triton
    write_measured(found)
    return found


def _fastest(kernel: Any, device: torch.device, timer: Callable[[Any], float]) -> Any:
    from triton.runtime.errors import OutOfResources

    from fastinv.kernels.triton.epilogue import Epilogue

    x, out = _batch(kernel, device)

    def measured(tile: Any) -> float:
        try:
            return timer(kernel.with_tile(tile).launch(x, out, Epilogue()))
        except OutOfResources:
            return float("inf")

    return kernel.with_tile(min(kernel.candidates, key=measured))


def _rivals(kernel: Any, other: Any, device: torch.device) -> tuple[Any, Any]:
    """Launches of a kernel in CUDA C++, and of what it takes the place of, on the same values."""
    import torch

    from fastinv.backends.cuda.planar import PlanarConvolution
    from fastinv.kernels.triton.epilogue import Epilogue

    x, out = _batch(other, device)
    end = Epilogue()
    if not isinstance(kernel, PlanarConvolution):
        return kernel.launch(x, out, end), other.launch(x, out, end)
    features = x.permute(0, 3, 1, 2).to(kernel.dtype, memory_format=torch.contiguous_format)
    rest = None, None, None, torch.zeros(1, dtype=torch.int32, device=device)
    return tuple(way.launch_planar(features, out, end, *rest) for way in (kernel, other.planar()))


def _batch(kernel: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a kernel reads, random, and what it writes."""
    import torch

    dtype, sizes = kernel.weight.dtype, (kernel.input_shape, kernel.output_shape)
    largest = max(h * w * c * dtype.itemsize for h, w, c in sizes)
    images = min(TUNED_IMAGES, max(1, TUNED_BYTES // largest)) if device.type == "cuda" else 1
    x, out = (torch.randn(images, *size, device=device).to(dtype) for size in sizes)
    return x, out
