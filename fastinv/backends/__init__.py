"""The ways to run a network. `BACKENDS` is the one list of them, best first.

Listing a backend does not load torch: that one loads it when it is asked to.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from fastinv.backends.base import Backend
from fastinv.backends.cpu import CpuBackend
from fastinv.backends.cuda import CudaBackend
from fastinv.backends.torch import TorchBackend
from fastinv.errors import BackendError
from fastinv.network import Step

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "tf32", "float64")

BACKENDS: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TorchBackend())


def select(
    name: str | None, precision: str, steps: Sequence[Step], solver: bool = False, method: str = "adam"
) -> tuple[Backend, str]:
    """The backend to run `steps` on, and the precision to run them in.

    Args:
        name: a backend, which then runs or is refused; "cuda:1" is the second GPU; None or "auto": the one that the
            environment variable FASTINV_BACKEND names, else the first that can run the steps.
        precision: a name of `PRECISIONS`; "auto": the fastest that keeps the bounds.
        steps: what has to run.
        solver: whether as the edge of an rMLE solver.
        method: the solver's optimizer.

    Raises:
        BackendError: nothing can run the steps so; the message says what lacks and what the alternatives are.
    """
    if precision not in PRECISIONS:
        raise BackendError(f"precision {precision!r:.40}, expected one of {', '.join(PRECISIONS)}")
    name = canonical(name)
    backends = _numbered(name)
    for backend in backends:  # the later ones are not asked: that would load torch
        if name in ("auto", backend.name) and _lacks(backend, precision, steps, solver, method) is None:
            if name == "auto" and backend.name == "torch" and precision not in ("auto", "float32", "float64"):
                _warn_of_slowness(precision, steps, solver, method)
            return backend, backend.precisions(solver, method)[0] if precision == "auto" else precision
    lacks = {backend.name: _lacks(backend, precision, steps, solver, method) for backend in backends}
    able = ", ".join(n for n, reason in lacks.items() if reason is None) or "none"
    if name in lacks:
        raise BackendError(f"backend {name!r}: {lacks[name]}. Backends that can run this here: {able}")
    if name == "auto":
        raise BackendError("no backend can run this: " + "; ".join(f"{n}: {reason}" for n, reason in lacks.items()))
    raise BackendError(f"backend {name!r:.40} is unknown. Backends that can run this here: {able}")


def _warn_of_slowness(precision: str, steps: Sequence[Step], solver: bool, method: str) -> None:
    """Who asks for a short type wants speed: tell where a compiled backend has more of it without."""
    for backend in BACKENDS:
        if backend.name != "torch" and _lacks(backend, "float32", steps, solver, method) is None:
            why = _lacks(backend, precision, steps, solver, method)
            warnings.warn(
                f"precision {precision!r} runs on the slow torch backend ({backend.name}: {why}): 'float32' on the "
                f"{backend.name} backend is faster",
                UserWarning,
                stacklevel=3,
            )
            return


def canonical(name: str | None) -> str:
    """A backend's own name: for None and "auto" what the environment says, for the first GPU's number "cuda"."""
    if name is None or name == "auto":
        name = os.environ.get("FASTINV_BACKEND") or "auto"
    return "cuda" if name == "cuda:0" else name


def _numbered(name: str) -> tuple[Backend, ...]:
    """The backends; with a name as "cuda:1", that GPU in place of the first."""
    kind, _, number = str(name).partition(":")
    if kind != "cuda" or not (number.isascii() and number.isdigit() and len(number) < 4):
        return BACKENDS
    return tuple(b.on(int(number)) if isinstance(b, CudaBackend) else b for b in BACKENDS)


def _lacks(backend: Backend, precision: str, steps: Sequence[Step], solver: bool, method: str) -> str | None:
    """Why `backend` cannot run `steps` in `precision`; None when it can."""
    reason = backend.available()
    if reason is not None:
        return reason
    if solver and method not in backend.methods:
        return f"it has no optimizer {method}, only {', '.join(backend.methods)}"
    known = backend.precisions(solver, method)
    if precision not in ("auto", *known):
        what = f" for solvers by {method}" if solver else ""
        return f"it has no precision {precision}{what} here, only {', '.join(known)}"
    unsupported = [step for step in steps if not backend.supports(step)]
    if unsupported:
        names = ", ".join(dict.fromkeys(f"{s.op.name} ({s.source})" if s.source else s.op.name for s in unsupported))
        return f"it has no kernel for {names:.300}"
    return None
