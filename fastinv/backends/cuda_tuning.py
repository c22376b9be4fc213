"""Tiles of matrix products by measurement, kept in a file under the user's cache folder.

`tune` measures the few candidates of every convolution of a network, or of two that go together, and writes down the
fastest. Compiling only looks them up: it takes no time, and what was never measured keeps the tile that it has by its
shapes. All candidates add up the same products in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinv.backends.cuda_device import gpu_name, on_device, seconds
from fastinv.errors import BackendError
from fastinv.network import Network

if TYPE_CHECKING:
    import torch

VERSION = 2  # of the file
NUMBERS = 7  # of a `Tile`
TUNED_BYTES = 2**28  # of what a measured launch reads or writes: more than the L2 holds
TUNED_IMAGES = 4096  # at most


def tiles_file() -> Path:
    """Where the tiles are kept: `$XDG_CACHE_HOME/fastinv/tiles.json`, or in `~/.cache`."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "fastinv" / "tiles.json"


def read_tiles() -> dict[str, list[int]]:
    """The numbers of a `Tile` by convolution; none where there is no file. One that is broken is told, and ignored."""
    path = tiles_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tiles: dict[str, list[int]] = content["tiles"]
        if content["version"] != VERSION:
            return {}
        if not all(isinstance(tile, list) and [type(n) for n in tile] == [int] * NUMBERS for tile in tiles.values()):
            raise ValueError(f"a tile is not {NUMBERS} integers")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the file of measured tiles {path} is ignored ({type(error).__name__}: {error!s:.200}): delete it, and "
            "measure again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}
    return tiles


def write_tiles(fresh: dict[str, list[int]]) -> None:
    """Add tiles to the file, whole or not at all: other processes see the old one or the new one.

    Raises:
        BackendError: it cannot be written.
    """
    path = tiles_file()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is broken is replaced
        tiles = read_tiles() | fresh
    text = json.dumps({"version": VERSION, "tiles": tiles}, indent=1, sort_keys=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise BackendError(
            f"the measured tiles cannot be written to {path} ({error.strerror or error}): set XDG_CACHE_HOME to a "
            "folder that can"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def key_of(gpu: str, kernel: Any) -> str:
    """What a tile is measured for: the GPU, the kernel, the shapes, the types."""
    dtype = str(kernel.weight.dtype).removeprefix("torch.")
    return f"{gpu} | {type(kernel).__name__.lower()} | {kernel.reads} | {dtype} {kernel.precision}"


def tuned(kernel: Any, device: torch.device) -> Any:
    """What is `Tiled`, a convolution or a pair, with the tile that was measured for it on this device, if one was."""
    gpu = gpu_name(device)
    if gpu is None:
        return kernel
    found = read_tiles().get(key_of(gpu, kernel))
    fitting = (tile for tile in kernel.candidates if list(tile.numbers) == found)  # the file may be another's
    return kernel.with_tile(next(fitting, kernel.tile))


def tune(
    network: Network,
    precision: str,
    device: torch.device,
    differentiable: bool = False,
    timer: Callable[[Any], float] | None = None,
) -> dict[str, list[int]]:
    """Measure the tiles of the network's convolutions and pairs, and of the ways back where it is a solver's edge.

    Args:
        timer: seconds of a launch; by default those it takes on the device.

    Returns:
        What was written to the file.

    Raises:
        BackendError: the file cannot be written.
    """
    from fastinv.backends.cuda_lowering import PRECISIONS, Lowering
    from fastinv.kernels.triton.convolution import Tiled

    gpu = gpu_name(device) or device.type
    to = Lowering(network, device, PRECISIONS[precision], differentiable=differentiable)
    kernels = [getattr(node, name, None) for node in to.nodes for name in ("kernel", "back")]
    timer = timer or (lambda launch: seconds(launch, device))
    found: dict[str, list[int]] = {}
    with on_device(device):
        for kernel in kernels:
            if isinstance(kernel, Tiled) and key_of(gpu, kernel) not in found:
                found[key_of(gpu, kernel)] = list(_fastest(kernel, device, timer).numbers)
    write_tiles(found)
    return found


def _fastest(kernel: Any, device: torch.device, timer: Callable[[Any], float]) -> Any:
    import torch
    from triton.runtime.errors import OutOfResources

    from fastinv.kernels.triton.epilogue import Epilogue

    dtype, sizes = kernel.weight.dtype, (kernel.input_shape, kernel.output_shape)
    largest = max(h * w * c * dtype.itemsize for h, w, c in sizes)
    images = min(TUNED_IMAGES, max(1, TUNED_BYTES // largest)) if device.type == "cuda" else 1
    x, out = (torch.randn(images, *size, device=device).to(dtype) for size in sizes)

    def measured(tile: Any) -> float:
        try:
            return timer(kernel.with_tile(tile).launch(x, out, Epilogue()))
        except OutOfResources:
            return float("inf")

    return min(kernel.candidates, key=measured)
