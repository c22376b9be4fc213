"""`invert`, the main job: features in, images out, through an inverter that is compiled once and kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends import canonical
from fastinv.backends.base import Progress
from fastinv.engine import Engine, Solver, compile, expect_choice, sweep
from fastinv.errors import BackendError, FeatureError, NetworkError
from fastinv.inverters import RMLE, InverseNetwork, Inverter, load
from fastinv.ops.base import Shape
from fastinv.simplify import with_denormalisation

DTYPES = ("float32", "uint8")

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """The `size` values used last, by key. Safe from several threads and after a fork."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._aside: list[Value] = []
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._renew)  # another thread may hold the lock while this one forks

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value kept for `key`, made by `make` the first time."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
            return self._values[key]

    def set_aside(self, which: Callable[[Value], bool]) -> None:
        """Those are not found any more, but kept, for what would end with them."""
        self._aside += [value for value in self._values.values() if which(value)]
        self._values = OrderedDict((key, value) for key, value in self._values.items() if not which(value))

    def _renew(self) -> None:
        self._lock = threading.Lock()


_machines: Cache[Engine | Solver] = Cache(8)
# CUDA does not outlive a fork: there nothing can run on a GPU, nor can its memory be freed.
os.register_at_fork(after_in_child=lambda: _machines.set_aside(lambda machine: machine.backend.startswith("cuda")))
_files: Cache[Inverter] = Cache(8)
_default: Inverter | None = None


def use(inverter: str | Path | Inverter | None) -> None:
    """Make an inverter (or the one in a `.finv` file) the default of `invert`; None forgets it.

    Raises:
        FormatError: the file is missing, damaged or hostile.
        NetworkError: neither a path nor an inverter.
    """
    global _default
    _default = None if inverter is None else resolve(inverter)


def invert(
    features: Any,
    inverter: str | Path | Inverter | None = None,
    *,
    return_report: bool = False,
    backend: str | None = "auto",
    precision: str = "float32",
    threads: int | None = None,
    batch_size: int | None = None,
    progress: bool | Progress = False,
    out: Any = None,
    device: str | None = None,
    dtype: Any = "float32",
    scale: Any = None,
    zero_point: Any = None,
) -> Any:
    """Recover the images [N, C, H, W], pixels in [0, 1], from features [N, *feature_shape], any N >= 0.

    The compiled inverter is kept: the next call with an inverter of the same content costs no compilation.

    Args:
        features: a numpy array or a torch tensor (the images are of the same kind): float32, float16, bfloat16,
            float64, or uint8 or int8 with `scale`, in any layout. What is on a GPU is inverted there, on the current
            stream, and the images stay there; threads, batch_size and progress then have no meaning.
        inverter: an inverter or the path of a `.finv` file; None: the one given to `use`, else the file that
            the environment variable FASTINV_INVERTER names.
        return_report: whether to return (images, report) with objective, steps and convergence of each image.
        backend, precision, threads: as of `fastinv.compile`.
        batch_size: images that are converted and run at once; None chooses. It does not change the result.
        progress: whether to show a progress bar; or a function that is called after every chunk, in rMLE ten times a
            second, with the images done and the optimizer steps of all images so far.
        out: where to write the images, [N, C, H, W] of type `dtype`; it is returned. After an error its
            content is undefined, after `Interrupted` it is not.
        device: what computes: "cpu", "cuda" or as in "cuda:1"; None: what `backend` says, or where the features are.
        dtype: "float32", or "uint8" for round(255 · x); or numpy's or torch's dtype of this name.
        scale, zero_point: a quantised q stands for (q - zero_point) * scale; numbers, or one a channel.

    Raises:
        FeatureError: features, `out`, `dtype` or `batch_size` that do not fit, or NaN or Inf in the features.
        FormatError: the inverter's file is missing, damaged or hostile.
        NetworkError: there is no inverter, or it is none.
        BackendError: the backend, precision, device or number of threads cannot be had here.
        Interrupted: Ctrl-C; with what was done by then.
    """
    expect_choice(backend, precision, threads)
    backend = _backend(backend, device, features)
    given, dtype = dtype, name_of(dtype)
    if dtype not in DTYPES:
        raise FeatureError(f"dtype {given!r:.40}, expected one of {', '.join(DTYPES)}")
    if batch_size is not None and (not tensors.is_whole(batch_size) or batch_size < 1):
        raise FeatureError(f"batch_size {batch_size!r:.40}, expected an integer of at least 1, or None")
    found = resolve(inverter)
    if tensors.on_gpu(features):
        batch = tensors.features_there(features, found.feature_shape, scale=scale, zero_point=zero_point)
        images, report = _machine(found, backend, precision, threads).run_there(batch, dtype)
        if out is not None:
            images = _copied(images, out)
        return (images, report) if return_report else images
    source = tensors.source(features, found.feature_shape, scale=scale, zero_point=zero_point)
    shape = (len(source), *found.image_shape)
    if out is None:
        images, view = tensors.allocate(shape, dtype, source.torch)
    else:
        images, view = out, _writable(out, shape, dtype, source)
    machine = _machine(found, backend, precision, threads)
    chunk = int(batch_size or 0) or machine.batch_size
    report = sweep(machine.run, machine.empty_report, source, images, view, chunk, progress)
    return (images, report) if return_report else images


def name_of(dtype: Any) -> str:
    """A dtype's name, where it is given as numpy's or torch's."""
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    return name.removeprefix("torch.")


def _backend(backend: str | None, device: Any, features: Any) -> str | None:
    """The backend that these arguments of `invert` ask for together."""
    other = str(backend).partition(":")[2]
    free = backend in (None, "auto")
    if tensors.on_gpu(features):
        index = features.device.index
        there = canonical(f"cuda:{index or 0}")
        if (free or canonical(backend) == there) and str(device) in ("None", "cuda", f"cuda:{index}"):
            return there
        raise FeatureError(
            f"features on {features.device}, but backend {backend!r:.40} and device {str(device)!r:.40}: leave both "
            "out to invert them there, or move them with .cpu()"
        )
    if device is None:
        return backend
    kind, _, number = str(device).partition(":")
    if kind not in ("cpu", "cuda") or not (number == "" or number.isdigit()):
        raise BackendError(f"device {device!r:.40}, expected None, 'cpu', 'cuda' or as in 'cuda:1'")
    if not free and str(backend).startswith("cuda") != (kind == "cuda"):
        raise BackendError(f"device {device!r:.40} does not go with backend {backend!r:.40}: leave one of them out")
    if kind == "cuda":
        if "" not in (number, other) and number != other:
            raise BackendError(f"device {device!r:.40} does not go with backend {backend!r:.40}: leave one of them out")
        return f"cuda:{int(number or other or 0)}"
    return "cpu" if free else backend


def _copied(images: Any, out: Any) -> Any:
    """`out`, a tensor on the images' GPU, with the images."""
    like = [getattr(out, name, None) for name in ("shape", "dtype", "device")]
    if like != [images.shape, images.dtype, images.device]:
        raise FeatureError(f"out does not fit: expected a tensor {list(images.shape)}, {images.dtype}, {images.device}")
    return out.copy_(images)


def resolve(inverter: Any) -> Inverter:
    """The inverter that this argument of `invert` stands for."""
    inverter = _default if inverter is None else inverter
    inverter = os.environ.get("FASTINV_INVERTER") or None if inverter is None else inverter
    if isinstance(inverter, Inverter):
        return inverter
    if isinstance(inverter, (str, os.PathLike)):
        return _load(Path(inverter))
    if inverter is None:
        raise NetworkError(
            "no inverter: pass one (or the path of a .finv file), call fastinv.use, or set FASTINV_INVERTER"
        )
    raise NetworkError(
        f"inverter: a {type(inverter).__name__}, expected an InverseNetwork, an RMLE or a .finv file's path"
    )


def _load(path: Path) -> Inverter:
    """The inverter in a file, read again only when the file has changed."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return load(path)  # says what is wrong
    key = (os.path.realpath(path), found.st_mtime_ns, found.st_size)
    return _files.get(key, lambda: load(path))


def _machine(inverter: Inverter, backend: str | None, precision: str, threads: int | None) -> Engine | Solver:
    """The inverter compiled, from features to pixels, kept by content and by all that decides what runs."""
    key = (inverter.fingerprint, canonical(backend), precision, threads, os.environ.get("FASTINV_ISA"))
    return _machines.get(key, lambda: _compile(inverter, backend, precision, threads))


def _compile(inverter: Inverter, backend: str | None, precision: str, threads: int | None) -> Engine | Solver:
    assert isinstance(inverter, (InverseNetwork, RMLE))
    if isinstance(inverter, RMLE):
        return compile(inverter, backend, precision, threads)
    network = with_denormalisation(inverter.network, inverter.mean, inverter.std)
    return compile(network, backend, precision, threads)


def _overlaps_itself(view: npt.NDArray[Any]) -> bool:
    """Whether elements may share memory: where a step is shorter than all that the axes of shorter ones span."""
    span = view.itemsize
    for step, size in sorted((abs(step), size) for step, size in zip(view.strides, view.shape, strict=True)):
        if size > 1 and step < span:
            return True
        span += step * (size - 1)
    return False


def _writable(out: Any, shape: Shape, dtype: str, source: tensors.Source) -> npt.NDArray[Any]:
    """`out` as an array that images can be written to."""
    view, found, torch = tensors.as_numpy(out, "out")
    if view.shape != shape or found != dtype:
        raise FeatureError(f"out of shape {list(view.shape)} and dtype {found}, expected {list(shape)} and {dtype}")
    if torch and out.is_neg():
        raise FeatureError("out stands for the negative of its memory, as .conj().imag does: pass another tensor")
    if not view.dtype.isnative:
        raise FeatureError("out is of another byte order than this machine's: pass an array of its own")
    if not view.flags.writeable:
        raise FeatureError("out is read-only: pass an array that can be written")
    if _overlaps_itself(view):
        raise FeatureError("out has several images in the same memory: pass another array")
    if np.may_share_memory(view, source.data):
        raise FeatureError("out shares memory with the features: pass another array")
    return view
