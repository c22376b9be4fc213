"""What fastinv raises. Every message says what was found, what was expected and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastinv.backends.base import Report


class FastinvError(Exception):
    """Base class of all errors that fastinv raises on purpose."""


class NetworkError(FastinvError, ValueError):
    """A network, step or inverter is not well formed (shapes, references, weights, options)."""


class FormatError(FastinvError, ValueError):
    """A file is not what its name or content claims: a damaged or hostile `.finv`, a wrong data file."""


class UnsupportedOp(FastinvError, NotImplementedError):
    """A model uses an operation that fastinv cannot export."""


class FeatureError(FastinvError, ValueError):
    """Features or images have a wrong shape, dtype, device or content."""


class BackendError(FastinvError, RuntimeError):
    """A backend, instruction set or precision was asked for that this machine or build lacks."""


class SplitError(FastinvError, ValueError):
    """A model cannot be cut at the named split point."""


class DataError(FastinvError, ValueError):
    """A data set is missing, empty or not in a known layout."""


class TrainingError(FastinvError, RuntimeError):
    """Training cannot start or go on: options that do not fit, a checkpoint of another run, divergence."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended `invert` or `Solver.solve` early; what was done by then is here.

    Attributes:
        images: what would have been returned. The pixels of images not begun are 0, or what they were in an `out` of
            the caller's.
        begun: how many images there are; those of rMLE that were being solved are as far as they had come: they have
            taken fewer steps than the recipe has, and have not converged.
        report: on all images; those not begun have taken 0 steps, and have the objective NaN.
    """

    def __init__(self, images: Any, begun: int, report: Report) -> None:
        super().__init__(f"interrupted: the first {begun:,} of {len(report.steps):,} images are in this error's images")
        self.images = images
        self.begun = begun
        self.report = report
