"""Say what a .finv file holds: kind, shapes, ops, parameters, FLOPs, provenance and the kernel plan."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np

import fastinv
from fastinv.backends import select
from fastinv.backends.cuda import CudaBackend
from fastinv.cli.arguments import plural, shapes, table
from fastinv.errors import BackendError
from fastinv.inverters import RMLE, Inverter
from fastinv.network import Network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .finv file")
    parser.add_argument("--backend", default="auto", help="whose kernel plan to show")
    parser.add_argument("--precision", default="float32", help="what the plan computes in")
    parser.add_argument(
        "--tune", action="store_true", help="first measure the tiles of a GPU's matrix products, and keep them"
    )
    parser.add_argument("--measure", action="store_true", help="time every launch of the plan, on one thread")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    found = describe(args.file, args.backend, args.measure, args.precision, args.tune)
    print(json.dumps(found, indent=2) if args.json else as_text(found))


def _as_json(value: Any) -> Any:
    """A value of a recipe; large ones by their kind."""
    if isinstance(value, np.ndarray):
        return f"array {list(value.shape)}"
    return f"{value.kind} {value.fingerprint[:16]}" if isinstance(value, Inverter) else value


def describe(
    path: str, backend: str = "auto", measure: bool = False, precision: str = "float32", tune: bool = False
) -> dict[str, Any]:
    """What `path` holds, as JSON values."""
    inverter = fastinv.load(path)
    network: Network = getattr(inverter, inverter.network_field)
    if tune:
        _tune(network, backend, precision, isinstance(inverter, RMLE))
    engine = fastinv.compile(network, backend, precision)
    assert isinstance(engine, fastinv.Engine)
    plan = engine.describe(measure)
    if measure and any("seconds" not in entry for entry in plan):
        raise BackendError(f"--measure: backend {engine.backend!r} does not time its steps, expected cpu or cuda")
    recipe = inverter.recipe()
    return {
        "kind": inverter.kind,
        "shapes": shapes(inverter),
        "feature_shape": list(inverter.feature_shape),
        "image_shape": list(inverter.image_shape),
        "recipe": {name: _as_json(value) for name, value in recipe.items()},
        "ops": dict(Counter(step.op.name for step in network.steps)),
        "parameters": network.parameters,
        "flops": network.flops,
        "fingerprint": inverter.fingerprint,
        "provenance": dict(inverter.provenance),
        "backend": engine.backend,
        "isa": engine.isa,
        "plan": plan,
    }


def _tune(network: Network, backend: str, precision: str, solver: bool) -> None:
    found, precision = select(backend, precision, network.steps, solver)
    if not isinstance(found, CudaBackend):
        raise BackendError(f"--tune: backend {found.name!r} has no tiles to measure, expected cuda")
    found.tune(network, precision, solver)


def as_text(found: dict[str, Any]) -> str:
    """The description for people."""
    per = "image" if found["kind"] == "inverse_network" else "image and forward pass of the edge"
    lines = [
        f"{found['kind']}: {found['shapes']}",
        f"ops         {', '.join(f'{count} {name}' for name, count in found['ops'].items())}",
        f"parameters  {found['parameters']:,}",
        f"FLOPs       {found['flops']:,} an {per}",
        f"recipe      {_pairs(found['recipe'])}",
        f"provenance  {_pairs(found['provenance']) or 'none'}",
        f"plan        {', '.join([found['backend'], found['isa'], *_unit(found['plan'])])}",
    ]
    header = ["step", "op", "kernel", "activation", "output", "FLOPs"]
    measured = found["plan"] and "seconds" in found["plan"][0]
    header += ["µs an image", "GFLOP/s"] if measured else []
    rows = []
    for e in found["plan"]:
        rows.append([str(e["step"]), e["op"], e["kernel"], e["activation"], _shape(e["output"]), f"{e['flops']:,}"])
        if measured:
            rows[-1] += [f"{e['seconds'] * 1e6:.1f}", f"{e['gflops']:.0f}" if e["flops"] else ""]
    return "\n".join([*lines, table(header, rows)])


def _unit(plan: list[dict[str, Any]]) -> list[str]:
    """What goes through all layers at once, where the backend says it."""
    if not plan or "images" not in plan[0]:
        return []
    first = plan[0]
    return (
        [f"{first['strips']} strips an image"]
        if first["strips"] > 1
        else [f"{plural(first['images'], 'image')} at once"]
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items())


def _shape(shape: list[int]) -> str:
    return "×".join(map(str, shape))
