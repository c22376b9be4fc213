"""Inverters: what `invert` needs to recover inputs. A network plus its recipe, frozen."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastinv import strict_json, tensors
from fastinv.errors import FeatureError, FormatError, NetworkError
from fastinv.network import Network
from fastinv.ops.activation import IDENTITY
from fastinv.ops.base import Shape, expect

METHODS = ("adam", "amsgrad", "sgd", "lbfgs", "exact")
OPTIMIZERS = (*METHODS, "auto")
KEEP = ("last", "best")
SCHEDULES = ("constant", "cosine")
MAX_ITERATIONS = 10_000_000
MAX_PROVENANCE = 2**20  # characters of JSON
MAX_PROVENANCE_DEPTH = 16


@dataclass(frozen=True, eq=False, repr=False)
class Inverter:
    """Base of all inverters: what they share. Inverters of the same content are equal, and hash alike.

    `mean` and `std` are the target's input normalisation, z = (x − mean) / std, one entry for all channels or
    one for each. `provenance` says where the inverter comes from (target, split point, training data, seed).
    """

    kind: ClassVar[str]
    network_field: ClassVar[str]  # the field that holds the network
    provenance: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def feature_shape(self) -> Shape:
        """Shape of one feature tensor, without the batch axis."""
        raise NotImplementedError

    @property
    def image_shape(self) -> Shape:
        """Shape of one recovered image, [C, H, W]."""
        raise NotImplementedError

    def recipe(self) -> dict[str, Any]:
        """The fields by name, without the network and the provenance."""
        names = (f.name for f in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in (self.network_field, "provenance")}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over kind, recipe, network and provenance: equal inverters, equal fingerprints."""
        content = {field.name: _hashable(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return hashlib.sha256(strict_json.dumps([self.kind, content]).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.fingerprint == other.fingerprint if isinstance(other, Inverter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        network: Network = getattr(self, self.network_field)
        shapes = f"{list(self.feature_shape)} -> {list(self.image_shape)}"
        return f"{type(self).__name__}({shapes}, {self._summary()}{network.parameters:,} parameters)"

    def _summary(self) -> str:
        """What a repr tells of the recipe."""
        return ""

    def save(self, path: str | Path) -> None:
        """Write the inverter to a `.finv` file, whole or not at all: a file already there survives a failed write.

        Raises:
            FormatError: the path cannot be written, or the graph or the weights are too large for a file.
        """
        from fastinv.finv import write

        write(self, path)


@dataclass(frozen=True, eq=False, repr=False)
class InverseNetwork(Inverter):
    """Recover inputs with one forward pass of an inverse network g: features -> z (paper, Algorithm 2).

    Args:
        network: g, exported: [C, H, W] or [D] features to normalised images [C, H, W].
        mean, std: the target's input normalisation.
        provenance: free JSON values that say where the network comes from.

    Raises:
        NetworkError: an argument of a wrong type, shape or range.
    """

    kind: ClassVar[str] = "inverse_network"
    network_field: ClassVar[str] = "network"
    network: Network
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        _freeze_common(self)

    @property
    def feature_shape(self) -> Shape:
        return self.network.input_shape

    @property
    def image_shape(self) -> Shape:
        return self.network.output_shape


@dataclass(frozen=True, eq=False, repr=False)
class RMLE(Inverter):
    """Recover inputs by optimisation through the edge (paper, Algorithm 1; query-free: through a shadow).

    x* = argmin Σ(edge(z) − v)² + tv_weight · TV_β(z), over z = (x − mean) / std.

    Args:
        edge: the edge (or shadow), exported: normalised images [C, H, W] to features.
        input_shape: shape of one image; None takes the edge's input shape, which any other has to equal.
        mean, std: the target's input normalisation.
        steps: optimizer steps, at most.
        lr: step size, in normalised units.
        tv_weight: λ, weight of the total variation; 0 switches it off.
        tv_beta: β >= 1, exponent of the total variation.
        optimizer: "adam", "amsgrad", "sgd"; "lbfgs", quasi-Newton steps that always make the objective fall, and need
            no lr; "exact", the minimum itself where the objective is quadratic (an affine edge, β 2 or λ 0, no clamp),
            by conjugate gradients or, for small images, an inverse matrix; "auto": "exact" where it can be had, else
            "lbfgs".
        init: the start in pixels: a number, an array [C, H, W], or an `InverseNetwork` for the same features, whose
            images are refined.
        clamp: pixel bounds kept after every step, or None for free iterates.
        keep: "last" returns the last iterate, "best" the one of lowest objective.
        tolerance: an image stops when its objective changes by no more than this, relatively; 0: never.
        patience: consecutive steps for which that must hold.
        betas, eps: of Adam and AMSGrad.
        momentum: of SGD.
        schedule: "constant", or "cosine": step k of n, from 0, has size lr · (1 + cos(π·k/n)) / 2, so that the last
            steps settle what the first ones stir up.
        provenance: free JSON values that say where the edge comes from.

    Raises:
        NetworkError: an argument of a wrong type, shape or range.
    """

    kind: ClassVar[str] = "rmle"
    network_field: ClassVar[str] = "edge"
    edge: Network
    input_shape: Shape = None  # type: ignore[assignment]  # None becomes the edge's own
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    steps: int = 500
    lr: float = 1e-2
    tv_weight: float = 0.1
    tv_beta: float = 2.0
    optimizer: str = "adam"
    init: float | npt.NDArray[np.float32] | InverseNetwork = 0.5
    clamp: tuple[float, float] | None = (0.0, 1.0)
    keep: str = "last"
    tolerance: float = 0.0
    patience: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        _freeze_common(self)
        expected = self.edge.input_shape
        shape: Any = expected if self.input_shape is None else self.input_shape
        given = shape if isinstance(shape, (tuple, list)) else ()
        expect(
            tuple(given) == expected and all(isinstance(n, int) for n in given),
            f"input_shape {self.input_shape!r:.80}, but the edge takes {list(expected)}",
        )
        object.__setattr__(self, "input_shape", expected)
        for name, value in solver_options(**{name: getattr(self, name) for name in SOLVER_OPTIONS}).items():
            object.__setattr__(self, name, value)
        obstacle = self._obstacle() if self.optimizer == "exact" else None
        expect(obstacle is None, f"optimizer 'exact' needs a quadratic objective, but {obstacle}: take 'adam'")
        object.__setattr__(self, "init", _start(self.init, self.feature_shape, self.input_shape))

    def _summary(self) -> str:
        return f"{self.steps:,} steps of {self.optimizer}, an edge of "

    @property
    def method(self) -> str:
        """The optimizer; what "auto" stands for."""
        if self.optimizer != "auto":
            return self.optimizer
        return "exact" if self._obstacle() is None else "lbfgs"

    @property
    def bounds(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
        """`clamp` as the lowest and the highest z of every channel, [C] each; None where iterates are free."""
        if self.clamp is None:
            return None
        mean, std = (channelwise(values, self.input_shape).ravel() for values in (self.mean, self.std))
        low, high = ((np.float32(bound) - mean) / std for bound in self.clamp)
        return low, high

    def _obstacle(self) -> str | None:
        """Why the objective is not quadratic; None where it is."""
        for index, step in enumerate(self.edge.steps):
            if not step.op.affine or step.activation != IDENTITY:
                kind = step.op.name if not step.op.affine else step.activation.kind
                return f"step {index} of the edge is no affine map ({kind})"
        if self.clamp is not None:
            return f"clamp is {self.clamp}, not None"
        return f"tv_beta is {self.tv_beta}, not 2" if self.tv_weight > 0 and self.tv_beta != 2 else None

    @property
    def feature_shape(self) -> Shape:
        return self.edge.output_shape

    @property
    def image_shape(self) -> Shape:
        return self.edge.input_shape


INVERTERS: dict[str, type[Inverter]] = {cls.kind: cls for cls in (InverseNetwork, RMLE)}


def load(path: str | Path) -> Inverter:
    """Read an inverter from a `.finv` file.

    Raises:
        FormatError: the file is missing, damaged or hostile; the message names what is wrong.
    """
    from fastinv.finv import read

    return read(path)


def load_start(path: str | Path) -> InverseNetwork:
    """The inverse network in a `.finv` file, for rMLE to start from.

    Raises:
        FormatError: as `load`, or another inverter is there.
    """
    found = load(path)
    if not isinstance(found, InverseNetwork):
        raise FormatError(f"{path}: holds an {found.kind}, expected an inverse network to start rMLE from")
    return found


def channelwise(values: tuple[float, ...], shape: Shape) -> npt.NDArray[np.float32]:
    """`mean` or `std` as an array [C, 1, 1] that broadcasts over one image of this shape."""
    return np.broadcast_to(np.asarray(values, np.float32), shape[:1]).reshape(-1, *[1] * (len(shape) - 1))


def start_pixels(init: Any, shape: Shape) -> npt.NDArray[np.float64]:
    """A start for images [C, H, W], as of `tensors`, but for NetworkError."""
    try:
        return tensors.start_pixels(init, shape)
    except FeatureError as error:
        raise NetworkError(str(error)) from None


WHOLE = {"steps": 0, "patience": 1}  # the least of each
BOUNDS = {
    "lr": (0.0, 1e6),
    "tv_weight": (0.0, tensors.MAX_FLOAT),
    "tv_beta": (1.0, 10.0),
    "tolerance": (0.0, tensors.MAX_FLOAT),
    "eps": (0.0, 1.0),
    "momentum": (0.0, 1.0),
}
CHOICES = {"optimizer": OPTIMIZERS, "keep": KEEP, "schedule": SCHEDULES}
SOLVER_OPTIONS = (*WHOLE, *BOUNDS, *CHOICES, "betas", "clamp")


def solver_options(**options: Any) -> dict[str, Any]:
    """rMLE's `SOLVER_OPTIONS` in plain types.

    Raises:
        NetworkError: one of a wrong type or out of range.
    """
    found: dict[str, Any] = {}
    for name, least in WHOLE.items():
        value = options[name]
        fits = tensors.is_whole(value) and least <= value <= MAX_ITERATIONS
        expect(fits, f"{name} {value!r:.80}, expected an integer from {least} to {MAX_ITERATIONS:g}")
        found[name] = int(value)
    for name, (low, high) in BOUNDS.items():
        value = options[name]
        fits = tensors.is_number(value) and bool(low <= float(value) <= high)  # false for NaN
        expect(fits, f"{name} {value!r:.80}, expected a number from {low:g} to {high:g}")
        found[name] = float(value)
    for name, choices in CHOICES.items():
        value = options[name]
        known = isinstance(value, str) and value in choices
        expect(known, f"{name} {value!r:.80}, expected one of {', '.join(choices)}")
        found[name] = value
    betas = found["betas"] = tensors.floats(options["betas"])
    fits = len(betas) == 2 and all(0 <= b < 1 for b in betas)
    expect(fits, f"betas {options['betas']!r:.80}, expected two numbers in [0, 1)")
    clamp = found["clamp"] = None if options["clamp"] is None else tensors.floats(options["clamp"])
    fits = clamp is None or (len(clamp) == 2 and clamp[0] <= clamp[1])
    expect(fits, f"clamp {options['clamp']!r:.80}, expected None or two numbers (low, high) with low <= high")
    return found


def _freeze_common(inverter: Any) -> None:
    network = getattr(inverter, inverter.network_field)
    expect(
        isinstance(network, Network),
        f"{inverter.network_field} is a {type(network).__name__}, expected a Network: "
        "export a module first, with fastinv.export(module, example)",
    )
    shape = inverter.image_shape
    expect(len(shape) == 3, f"images of shape {list(shape)}, expected [C, H, W]")
    numbers = tensors.normalisation(inverter.mean, inverter.std, shape[0], NetworkError)
    for name, values in zip(("mean", "std"), numbers, strict=True):
        object.__setattr__(inverter, name, values)
    object.__setattr__(inverter, "provenance", _provenance(inverter.provenance))


def _hashable(value: Any) -> Any:
    """A field as a JSON value; networks and arrays by their content."""
    if isinstance(value, Network):
        return value.fingerprint
    if isinstance(value, Inverter):
        return value.fingerprint
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.data).hexdigest()
    return dict(value) if isinstance(value, Mapping) else value


def _provenance(value: Any) -> Mapping[str, Any]:
    """A deep, read-only copy of JSON values."""
    expect(
        isinstance(value, Mapping),
        f"provenance is a {type(value).__name__}, expected a mapping of JSON values",
    )
    try:
        text = strict_json.dumps(dict(value))
        expect(len(text) <= MAX_PROVENANCE, f"provenance: {len(text)} characters, at most {MAX_PROVENANCE} fit")
        return MappingProxyType(strict_json.loads(text.encode(), "provenance", MAX_PROVENANCE_DEPTH))
    except FormatError as error:
        raise NetworkError(f"provenance: {error}; expected names with plain JSON values") from None


def _start(value: Any, features: Shape, shape: Shape) -> float | npt.NDArray[np.float32] | InverseNetwork:
    """rMLE's start in pixels: a number, a read-only copy [C, H, W], or what gives one for each image."""
    if isinstance(value, InverseNetwork):
        found = f"{list(value.feature_shape)} to {list(value.image_shape)}"
        fits = (value.feature_shape, value.image_shape) == (features, shape)
        expect(fits, f"init takes features {found}, expected {list(features)} to {list(shape)}")
        return value
    expect(
        tensors.is_number(value) or hasattr(value, "dtype"),
        f"init: a {type(value).__name__}, expected a number, an image {list(shape)} as an array or a tensor, or an "
        "InverseNetwork, such as fastinv.load(path) gives",
    )
    start = start_pixels(value, shape).astype(np.float32, order="C")
    if tensors.is_number(value):
        return float(value)
    start.setflags(write=False)
    return start
