"""What fastinv raises. Every message says what was found, what was expected and what to do."""

from __future__ import annotations


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
