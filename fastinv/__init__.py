"""fastinv recovers inputs from the features that a split neural network sends, at the speed of the hardware.

Everything a user needs is here. Importing it does not load torch: names that need it are loaded when they are first
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    from fastinv import _core as _core
except ImportError as error:
    raise ImportError(
        f"fastinv's compiled core is missing or broken ({error}). Build it with `pip install .` in the source tree, "
        "which needs a C++17 compiler such as g++; and run Python outside the source tree, whose folder fastinv/ has "
        "no core, or install with `pip install -e .` to work inside it"
    ) from error

from fastinv.backends.base import Report
from fastinv.engine import Engine, Solver, compile
from fastinv.errors import (
    BackendError,
    DataError,
    FastinvError,
    FeatureError,
    FormatError,
    Interrupted,
    NetworkError,
    SplitError,
    TrainingError,
    UnsupportedOp,
)

# The functions `export` and `invert` have the names of their modules: imported here, before anyone can ask for the
# modules, the names stand for the functions.
from fastinv.export import export
from fastinv.invert import invert, use
from fastinv.inverters import RMLE, InverseNetwork, Inverter, load
from fastinv.network import Network, Step

if TYPE_CHECKING:
    from fastinv.attacks.inverse_network import train_inverse_network
    from fastinv.attacks.shadow import fit_shadow, train_shadow
    from fastinv.auditing.run import audit
    from fastinv.auditing.runner import AuditReport
    from fastinv.bulk.log import LogReport, invert_log
    from fastinv.data import knowledge
    from fastinv.metrics import psnr, ssim
    from fastinv.models import make_decoder
    from fastinv.split import Split, split_points

__version__ = "0.1.0"

_LAZY = {
    "AuditReport": "fastinv.auditing.runner",
    "audit": "fastinv.auditing.run",
    "LogReport": "fastinv.bulk.log",
    "Split": "fastinv.split",
    "fit_shadow": "fastinv.attacks.shadow",
    "invert_log": "fastinv.bulk.log",
    "knowledge": "fastinv.data",
    "make_decoder": "fastinv.models",
    "psnr": "fastinv.metrics",
    "split_points": "fastinv.split",
    "ssim": "fastinv.metrics",
    "train_inverse_network": "fastinv.attacks.inverse_network",
    "train_shadow": "fastinv.attacks.shadow",
}

__all__ = [
    "RMLE",
    "AuditReport",
    "BackendError",
    "DataError",
    "Engine",
    "FastinvError",
    "FeatureError",
    "FormatError",
    "Interrupted",
    "InverseNetwork",
    "Inverter",
    "LogReport",
    "Network",
    "NetworkError",
    "Report",
    "Solver",
    "Split",
    "SplitError",
    "Step",
    "TrainingError",
    "UnsupportedOp",
    "audit",
    "compile",
    "export",
    "fit_shadow",
    "invert",
    "invert_log",
    "knowledge",
    "load",
    "make_decoder",
    "psnr",
    "split_points",
    "ssim",
    "train_inverse_network",
    "train_shadow",
    "use",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastinv' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
