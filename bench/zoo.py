"""Which of the models that people use can be exported, and how fast: `pip install timm`, `python bench/zoo.py`.

The smallest model of each of timm's families, whole, on images of its own size and with random weights: what cannot be
exported is named; what can is compared with PyTorch, then timed beside it in turns, with as many threads, batches of
`--images`. PyTorch runs eagerly, in the order of channels in which it is faster. Names of models, if any are given,
take the place of the families.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import fastinv
from fastinv import _core
from fastinv.errors import FastinvError

MOST_PARAMETERS = 60e6


def smallest() -> Iterator[str]:
    """Of each family: the model with the fewest parameters."""
    for family in timm.list_modules():
        counts = {}
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some need more than a name, or do not run without memory
                continue
        if counts and min(counts.values()) < MOST_PARAMETERS:
            yield min(counts, key=counts.__getitem__)


def scales_set(model: torch.nn.Module) -> torch.nn.Module:
    """What begins close to zero, so that a block does next to nothing, at 0.5; heads with random weights."""
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name.startswith("gamma"):
                torch.nn.init.constant_(parameter, 0.5)
            elif isinstance(part, torch.nn.Linear) and name == "weight" and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def measured(name: str, images: int, threads: int, repeat: int) -> dict[str, Any]:
    """One row: the error, relative, and images a second by both; or why there is none."""
    torch.manual_seed(0)
    model = scales_set(timm.create_model(name))
    shape = model.default_cfg["input_size"]
    row: dict[str, Any] = {"model": name, "input": list(shape)}
    try:
        network = fastinv.export(model, torch.zeros(2, *shape))
    except FastinvError as error:
        return row | {"error": str(error).split(", cannot be exported")[0].removeprefix("export: ")}
    engine = fastinv.compile(network, backend="cpu", threads=threads)
    x = torch.randn(images, *shape)
    last = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x).numpy()
        difference = np.linalg.norm(engine(x).numpy().reshape(expected.shape) - expected) / np.linalg.norm(expected)
        runs = [lambda: engine(x), lambda: model(x)]
        turns = [[seconds(run) for run in runs] for _ in range(repeat)]
        model = model.to(memory_format=torch.channels_last)
        model(last)
        other = [seconds(lambda: model(last)) for _ in range(repeat)]
    own, eager = (statistics.median(times) for times in zip(*turns, strict=True))
    best = min(eager, statistics.median(other))
    return row | {
        "difference": float(difference),
        "fastinv": images / own,
        "eager": images / best,
        "ratio": best / own,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of timm's models; left out, the smallest of each family")
    parser.add_argument("--images", type=int, default=8, help="in a call")
    parser.add_argument("--repeat", type=int, default=3, help="turns, of which the median counts")
    parser.add_argument("--threads", type=int, default=_core.available_threads(), help="of both")
    parser.add_argument("--json", type=Path, help="where rows go as well")
    arguments = parser.parse_args()
    if min(arguments.images, arguments.repeat, arguments.threads) < 1:
        parser.error("expected at least 1 image, 1 turn and 1 thread")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.models or smallest():
        try:
            rows.append(measured(name, arguments.images, arguments.threads, arguments.repeat))
        except Exception as error:  # of the model's own
            rows.append({"model": name, "error": f"{type(error).__name__}: {error}"})
        row = rows[-1]
        said = row.get("error") or (
            f"{row['difference']:8.1e}  {row['eager']:9.1f}  {row['fastinv']:9.1f}  {row['ratio']:5.2f}"
        )
        print(f"{name:36}  {said:.160}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    done = [row["ratio"] for row in rows if "ratio" in row]
    if done:
        print(f"{len(done)} of {len(rows)} exported; {statistics.median(done):.2f} times as fast as eager, the median")
    return 0


if __name__ == "__main__":
    sys.exit(main())
