"""Features as users hold them: numpy arrays and torch tensors of many types, read as float32 chunks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv.errors import FastinvError, FeatureError
from fastinv.ops.base import Shape

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[np.float32]

FLOAT32 = np.dtype(np.float32)
FLOATS = ("float32", "float16", "bfloat16", "float64")
QUANTISED = ("uint8", "int8")
MAX_FLOAT = float(np.finfo(np.float32).max)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or numpy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number, Python's or numpy's."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_shape(value: Any, *ranks: int) -> bool:
    """Whether it is a sequence of whole numbers >= 1, as many as one of `ranks`."""
    return isinstance(value, Sequence) and len(value) in ranks and all(is_whole(n) and n >= 1 for n in value)


def finite(values: Array) -> bool:
    """Whether no value is NaN or Inf."""
    return bool(np.isfinite(values).all())


def floats(value: Any) -> tuple[float, ...]:
    """A number, or a sequence, array or tensor of them, that float32 can hold; empty where it is anything else.

    In an array or tensor they may stand in columns or planes of their own, as in [C, 1, 1].
    """
    try:
        if hasattr(value, "shape") and math.prod(value.shape[1:]) == 1:
            value = value.reshape(-1)
        given = value.tolist() if hasattr(value, "tolist") else value
        entries = [
            e.tolist() if hasattr(e, "tolist") else e for e in (given if isinstance(given, Sequence) else [given])
        ]
    except (TypeError, ValueError, RuntimeError):  # of tensors without values
        return ()
    return tuple(map(float, entries)) if all(is_number(e) and abs(e) <= MAX_FLOAT for e in entries) else ()


def normalisation(
    mean: Any, std: Any, channels: int | None = None, error: type[FastinvError] = FeatureError
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A mean and a std, each one number for all channels or one for each.

    Args:
        channels: of the images; None where they are not known yet.
        error: what to raise where they are no finite numbers, as many as do not fit the channels, or a std is not
            above 0.
    """
    means, stds = floats(mean), floats(std)
    for name, value, numbers in (("mean", mean, means), ("std", std, stds)):
        fits = len(numbers) in (1, channels) if channels is not None else numbers
        if not fits or (name == "std" and not (np.asarray(numbers, np.float32) > 0).all()):
            wanted = "one finite number for all channels, or one for each"
            if channels is not None:
                wanted = f"{' or '.join(map(str, sorted({1, channels})))} finite number(s)"
            raise error(f"{name} {value!r:.80}, expected {wanted}{', above 0' if name == 'std' else ''}")
    return means, stds


def start_pixels(init: Any, *shapes: Shape) -> npt.NDArray[np.float64]:
    """rMLE's start in pixels: a number, for an image of the first of these shapes, or an array of one of them.

    Raises:
        FeatureError: it is neither, or holds NaN or Inf, or what is that in float32.
    """
    if is_number(init):
        pixels = np.full(shapes[0], (floats(init) or (np.nan,))[0], np.float64)
    else:
        data, dtype, _ = as_numpy(init, "init", also="a number, ")
        if dtype not in FLOATS or data.shape not in shapes:
            raise FeatureError(
                f"init of shape {list(data.shape)} and dtype {dtype}, expected a number or float pixels "
                f"{' or '.join(str(list(shape)) for shape in shapes)}"
            )
        pixels = as_float32(data, dtype).astype(np.float64) if dtype == "bfloat16" else data.astype(np.float64)
    if not (np.abs(pixels) <= MAX_FLOAT).all():
        raise FeatureError("init holds NaN or Inf (as float32); expected pixels")
    return pixels


def as_float32(data: npt.NDArray[Any], dtype: str = "") -> Array:
    """What `as_numpy` gives of any real type as C-contiguous float32: the same memory where it is that already.

    What overflows becomes Inf.

    Args:
        dtype: "bfloat16" where the data are the bits of these.
    """
    with np.errstate(over="ignore"):
        if dtype == "bfloat16":
            return (data.astype(np.uint32, order="C") << 16).view(np.float32)
        return np.require(data, np.float32, ["C", "A"])


# Not frozen, with slots, and looked at once: on a small network these microseconds are a good part of a call.
@dataclass(slots=True)
class Source:
    """A batch as the user gave it, checked but for its content, which `chunk` converts and checks.

    Attributes:
        data: [N, ...] on the CPU, in any layout; bfloat16 is held as its bits, uint16.
        dtype: one of `FLOATS` and `QUANTISED`.
        torch: whether it came as a torch tensor, and results go back as one.
        scale, zero_point: of quantised data, broadcastable over one image.
    """

    data: npt.NDArray[Any]
    dtype: str
    torch: bool
    scale: Array | None = None
    zero_point: Array | None = None

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, start: int, stop: int) -> Source:
        """Rows start to stop, as they are."""
        whole = start == 0 and stop == len(self.data)
        return self if whole else replace(self, data=self.data[start:stop])

    def chunk(self, start: int, stop: int, finite: Callable[[Array], bool] = finite) -> Array:
        """Rows start to stop as C-contiguous float32: in place where they are that already, else a copy.

        Args:
            finite: tells whether they hold neither NaN nor Inf.

        Raises:
            FeatureError: the rows hold NaN or Inf.
        """
        values: Array = self.data[start:stop]
        if values.dtype is not FLOAT32 or not values.flags.c_contiguous or not values.flags.aligned:
            values = self._converted(values)
        if not finite(values):
            bad = ~np.isfinite(values)
            first = start + int(bad.reshape(len(values), -1).any(axis=1).argmax())
            raise FeatureError(
                f"features hold {np.count_nonzero(bad)} values that are NaN or Inf (as float32), "
                f"first in image {first}: drop or mend these images"
            )
        return values

    def _converted(self, rows: npt.NDArray[Any]) -> Array:
        values = as_float32(rows, self.dtype)
        if self.scale is not None and self.zero_point is not None:
            with np.errstate(over="ignore"):  # what overflows is found as Inf
                values = (values - self.zero_point) * self.scale
        return values


def source(x: Any, shape: Shape, *, scale: Any = None, zero_point: Any = None) -> Source:
    """Check a batch of features [N, *shape].

    Args:
        x: a numpy array or a torch tensor on the CPU: float32, float16, bfloat16 or float64 (rounded to
            float32), or uint8 or int8 with `scale`. Any layout, any N >= 0.
        shape: of one feature tensor.
        scale, zero_point: a quantised q stands for (q - zero_point) * scale; numbers, or one a channel.

    Raises:
        FeatureError: a wrong kind, dtype, device or shape, or a scale that does not go with the dtype.
    """
    data, dtype, torch = as_numpy(x, "features")
    if dtype not in FLOATS + QUANTISED:
        raise FeatureError(f"features of dtype {dtype}, expected {', '.join(FLOATS)}, or uint8 or int8 with scale=")
    if data.ndim != len(shape) + 1 or data.shape[1:] != shape:
        raise FeatureError(_wrong_shape(data.shape, shape))
    if dtype in FLOATS:
        if scale is not None or zero_point is not None:
            raise FeatureError(
                f"scale and zero_point are for uint8 and int8 features; these are {dtype}: leave them out"
            )
        return Source(data, dtype, torch)
    if scale is None:
        raise FeatureError(f"{dtype} features need the scale (and zero_point) they were quantised with: pass scale=")
    scales = _per_channel("scale", scale, shape)
    if not (scales > 0).all():
        raise FeatureError(f"scale {scale!r:.80}, expected numbers above 0")
    zeros = _per_channel("zero_point", 0 if zero_point is None else zero_point, shape)
    return Source(data, dtype, torch, scales, zeros)


def on_gpu(x: Any) -> bool:
    """Whether this is a torch tensor on a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and x.device.type == "cuda"


def features_there(x: torch.Tensor, shape: Shape, *, scale: Any = None, zero_point: Any = None) -> torch.Tensor:
    """A batch on a GPU as the backend takes it, [N, *shape] of float32, float16 or bfloat16, contiguous, on that GPU.

    Raises:
        FeatureError: as of `source`, but for the device.
    """
    import torch

    if scale is None and zero_point is None and tuple(x.shape[1:]) == shape and _as_it_is(x):
        return x
    checked = source(
        torch.empty((), dtype=x.dtype, device="cpu").expand(x.shape), shape, scale=scale, zero_point=zero_point
    )
    if checked.scale is not None and checked.zero_point is not None:
        scales, zeros = (torch.from_numpy(v.copy()).to(x.device) for v in (checked.scale, checked.zero_point))
        x = (x.float() - zeros) * scales
    return (x.float() if x.dtype is torch.float64 else x).detach().contiguous()


def _as_it_is(x: torch.Tensor) -> bool:
    """Whether a tensor's memory can be taken for what it stands for."""
    import torch

    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and x.layout is torch.strided
        and x.is_contiguous()
        and not (x.requires_grad or x.is_neg())
    )


@dataclass(frozen=True)
class Bits:
    """bfloat16 numbers of a file, for which numpy has no type, as their bits: uint16."""

    data: npt.NDArray[np.uint16]


def as_numpy(x: Any, what: str, also: str = "") -> tuple[npt.NDArray[Any], str, bool]:
    """`x` as an array of the same memory (bfloat16 as uint16), its dtype's name, and whether it is a torch tensor.

    Where a tensor stands for the negative or the conjugate of its memory, it is an array of its own.

    Args:
        what: the name of `x` in errors.
        also: what else could have been given, in errors.

    Raises:
        FeatureError: neither a numpy array nor a dense torch tensor on the CPU.
    """
    if type(x) is np.ndarray and x.dtype is FLOAT32:
        return x, "float32", False
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.device.type != "cpu":
            raise FeatureError(f"{what} on device {str(x.device)!r}, expected cpu: move them with .cpu()")
        if x.layout is not torch.strided or x.is_quantized:
            raise FeatureError(f"{what}: a sparse or quantised tensor type; expected a dense one: use .to_dense()")
        dtype = str(x.dtype).removeprefix("torch.")
        if x.is_nested or dtype.startswith("float8"):
            raise FeatureError(f"{what}: {'a nested tensor' if x.is_nested else dtype}, expected {', '.join(FLOATS)}")
        x = x.detach().resolve_neg().resolve_conj()
        bits = x.view(torch.uint16) if x.dtype is torch.bfloat16 else x
        return bits.numpy(), dtype, True
    if isinstance(x, Bits):
        return x.data, "bfloat16", False
    if isinstance(x, np.ma.MaskedArray):
        raise FeatureError(f"{what}: a masked array, expected a plain one: pass x.filled(number)")
    if isinstance(x, np.ndarray):
        dtype = x.dtype.name
        return np.asarray(x.view(np.uint16) if dtype == "bfloat16" else x), dtype, False
    raise FeatureError(f"{what}: a {type(x).__name__}, expected {also}a numpy array or a torch tensor")


def allocate(shape: Shape, dtype: str, torch: bool) -> tuple[Any, npt.NDArray[Any]]:
    """A new array or tensor of this shape, of zeros, and the same memory as an array."""
    array: npt.NDArray[Any] = np.zeros(shape, dtype)
    if not torch:
        return array, array
    from torch import from_numpy

    return from_numpy(array), array


@contextmanager
def staged(out: npt.NDArray[Any]) -> Iterator[Array]:
    """Float32 memory for what is to stand in `out`: `out` itself, or a copy that is converted to it at the end.

    A uint8 `out` gets 255 times the values, rounded; NaN becomes 0.
    """
    if out.dtype == np.float32 and out.flags.c_contiguous and out.flags.aligned:
        yield out
        return
    part = np.empty(out.shape, np.float32)
    yield part
    out[...] = np.nan_to_num(np.rint(part * np.float32(255)), copy=False) if out.dtype == np.uint8 else part


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks of `size` rows."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _per_channel(name: str, value: Any, shape: Shape) -> Array:
    """A number or one number a channel, broadcastable over one image."""
    try:
        with np.errstate(over="ignore"):  # what overflows is found as Inf
            numbers: Array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError):
        numbers = np.array(np.nan, np.float32)
    if numbers.shape not in ((), (1,), shape[:1]) or not np.isfinite(numbers).all():
        raise FeatureError(f"{name} {value!r:.80}, expected a finite number or {shape[0]} of them, one a channel")
    return numbers.reshape(-1, *[1] * (len(shape) - 1)) if numbers.ndim else numbers


def _wrong_shape(found: Shape, shape: Shape) -> str:
    """What a user most likely did who passes `found` where [N, *shape] is expected."""
    message = f"features of shape {list(found)}, expected [N, {', '.join(map(str, shape))}]"
    if found == shape:
        return f"{message}: this is one image without the batch axis; pass features[None]"
    if len(shape) == 3 and found[1:] == (*shape[1:], shape[0]):
        return f"{message}: the channels come last; pass np.transpose(features, (0, 3, 1, 2)), or .permute in torch"
    if len(found) > 1 and math.prod(found[1:]) == math.prod(shape):
        sizes = ", ".join(map(str, shape))
        return f"{message}: the sizes agree; pass features.reshape(-1, {sizes}) if the order does too"
    return f"{message}: are these the features of another split point or model?"
