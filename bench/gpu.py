"""The one script for a machine with an NVIDIA GPU: check the kernels, measure the ceilings, time fastinv and its peers.

    python bench/gpu.py --json bench/results/gpu.json

Everything that is timed is first compared with PyTorch in float64. What does not fit into --minutes is named and left
out. Inputs are random, and rotate through more memory than the L2 cache has; times are medians of event timings.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_checks import TESTS, build_fastinv, run_tests
from gpu_contenders import DTYPES, NETWORK_CONTENDERS, SOLVER_CONTENDERS, Call

from fastinv import benchmark
from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda_native import usable_on
from fastinv.backends.cuda_tuning import tune
from fastinv.benchmark import CHECKED, SOLVER_TOLERANCE, Subject
from fastinv.cli.arguments import positive, table
from fastinv.cli.files import expect_place, replacing
from fastinv.engine import Engine, compile

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
TOLERANCES = {"bfloat16": 2e-2, "float16": 2e-2, "tf32": 5e-3, "float32": 1e-4}  # relative, against float64
ROTATED = 2**28  # bytes of inputs that are taken in turns: five times the L2 of an H200
LARGE = 2**30  # bytes of the copy that measures the memory, and sides of the product
SIDE = 8192
BATCH = 4096
HOSTED = 65536  # images of a call from host to host, at most
HOSTED_BYTES = 2**30  # of their features, at most
REPEATED = 256  # random images that these are made of
STEPS = (20, 200)  # of rMLE, at least and at most: of those the most that fit into
SOLVER_FLOPS = 2e13  # of a batch, in direct form
SLOW = 0.3  # seconds of a call that is warmed up once and sampled three times
MEMORY = 2**34  # bytes of all float32 values of a batch, at most


@dataclass(frozen=True)
class Row:
    """What one contender did with one case. Seconds are of one call on the whole batch."""

    case: str
    batch: int
    contender: str
    precision: str
    error: float
    seconds: float
    images_per_second: float  # of rMLE: image-steps
    tflops: float  # of the direct form
    gbytes_per_second: float  # of features in and results out
    percent_of_roofline: float
    ratio: float | None = None  # to the best peer of this precision


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches here: bytes a second in a copy, FLOPs a second in a large product, by precision, and bytes a
    second from pinned memory of the host."""

    memory: float
    products: dict[str, float]
    host: float

    def floor(self, flops: float, bytes_moved: float, precision: str) -> float:
        """Seconds that no implementation of the direct form can be faster than."""
        return max(flops / self.products[precision], bytes_moved / self.memory)


def seconds_of(call: Call, inputs: Sequence[torch.Tensor], repeat: int) -> float:
    """Median seconds of one call."""
    begun = time.perf_counter()
    call(inputs[0])
    torch.cuda.synchronize()
    if time.perf_counter() - begun > SLOW:
        repeat = min(repeat, 3)
    else:
        for x in inputs[:2]:
            call(x)
    samples = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for x in inputs:
            call(x)
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3 / len(inputs))
    return statistics.median(samples)


def ceilings() -> Ceilings:
    source = torch.randn(LARGE // 4, device="cuda")
    target = torch.empty_like(source)
    memory = 2 * LARGE / seconds_of(target.copy_, [source], 7)
    products = {}
    for precision in PRECISIONS:
        with matmul(precision):
            a = torch.randn(SIDE, SIDE, device="cuda", dtype=DTYPES.get(precision, torch.float32))
            products[precision] = 2 * SIDE**3 / seconds_of(a.matmul, [a.T.contiguous()], 5)
    pinned = torch.empty(LARGE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LARGE, dtype=torch.uint8, device="cuda")
    host = LARGE / seconds_of(lambda x: there.copy_(x, non_blocking=True), [pinned], 5)
    return Ceilings(memory, products, host)


class matmul:
    """Within, PyTorch's float32 products are computed in this precision."""

    def __init__(self, precision: str) -> None:
        self._allowed = precision == "tf32"

    def __enter__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._allowed
        torch.backends.cudnn.benchmark = True

    def __exit__(self, *reason: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def inputs_of(subject: Subject, batch: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """So many batches of inputs, or for rMLE of features, on the GPU, that they do not stay in its cache."""
    size = batch * math.prod(subject.network.input_shape) * dtype.itemsize
    count = 1 if subject.recipe is not None else max(1, min(16, ROTATED // size))
    generator = torch.Generator("cuda").manual_seed(0)
    found = [torch.randn(batch, *subject.network.input_shape, generator=generator, device="cuda") for _ in range(count)]
    if subject.recipe is not None:
        edge = copy.deepcopy(subject.eager).cuda()
        with torch.no_grad():
            found = [torch.cat([edge(part) for part in x.split(256)]) for x in found]
    return [x.to(dtype) for x in found]


def batch_of(subject: Subject) -> int:
    return max(1, min(BATCH, MEMORY // (4 * sum(map(math.prod, subject.network.shapes)))))


def measure(subject: Subject, precision: str, top: Ceilings, repeat: int) -> Iterator[Row | str]:
    """A row for every contender that is right, a line for every other."""
    solves, batch = subject.recipe is not None, batch_of(subject)
    inputs = inputs_of(subject, batch, torch.float32 if solves else DTYPES.get(precision, torch.float32))
    expected = subject.run_eager(inputs[0][:CHECKED].cpu().float(), torch.float64)
    rows: list[Row] = []
    for name, build in (SOLVER_CONTENDERS if solves else NETWORK_CONTENDERS).items():
        try:
            with torch.set_grad_enabled(solves), matmul(precision):
                call = build(subject, inputs[0], precision)
                found = call(inputs[0])[:CHECKED].cpu().double()
                error = float((found - expected).norm() / expected.norm())
                if not error <= max(TOLERANCES[precision], SOLVER_TOLERANCE if solves else 0):
                    yield f"{subject.name}, {precision}: {name} is wrong by {error:.1g}, and not timed"
                    continue
                taken = seconds_of(call, inputs, repeat)
        except Exception as reason:  # of a peer, or of ours: the others are to be timed all the same
            yield f"{subject.name}, {precision}: {name} cannot run it: {type(reason).__name__}: {reason!s:.200}"
            continue
        steps = subject.recipe.steps if subject.recipe else 1
        flops = batch * subject.flops
        moved = batch * (math.prod(inputs[0].shape[1:]) * inputs[0].element_size() + 4 * expected[0].numel())
        share = 100 * top.floor(flops, moved, precision) / taken
        rates = batch * steps / taken, 1e-12 * flops / taken, 1e-9 * moved / taken, share
        rows.append(Row(subject.name, batch, name, precision, error, taken, *rates))
    best = min((row.seconds for row in rows if row.contender != "fastinv"), default=None)
    for row in rows:
        yield dataclasses.replace(row, ratio=None if best is None else best / row.seconds)
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def host_to_host(subject: Subject, precision: str, top: Ceilings, repeat: int) -> Row | str:
    """fastinv with features and results on the host, float32 both: the roofline is then the way there."""
    try:
        engine = compile(subject.network, "cuda", precision)
        shape = subject.network.input_shape
        some = torch.randn(REPEATED, *shape, generator=torch.Generator().manual_seed(0)).numpy()
        count = min(HOSTED, HOSTED_BYTES // some[0].nbytes)
        x = np.tile(some, (-(-count // REPEATED), *[1] * len(shape)))[:count]
        expected = subject.run_eager(torch.from_numpy(x[:CHECKED]), torch.float64).numpy()
        found = engine(x)
        error = float(np.linalg.norm(found[:CHECKED] - expected) / np.linalg.norm(expected))
        if not error <= TOLERANCES[precision]:
            return f"{subject.name}, {precision}: fastinv, host to host, is wrong by {error:.1g}, and not timed"
        samples = []
        for _ in range(repeat):
            begin = time.perf_counter()
            engine(x)
            samples.append(time.perf_counter() - begin)
    except Exception as reason:  # the others are to be timed all the same
        return f"{subject.name}, {precision}: fastinv, host to host: {type(reason).__name__}: {reason!s:.200}"
    taken, flops, moved = statistics.median(samples), count * subject.flops, x.nbytes + found.nbytes
    floor = max(top.floor(flops, moved, precision), x.nbytes / top.host)
    rates = count / taken, 1e-12 * flops / taken, 1e-9 * moved / taken, 100 * floor / taken
    return Row(subject.name, count, "fastinv, host to host", precision, error, taken, *rates)


def launches(subject: Subject, precision: str) -> str:
    """What each launch of a network takes on the device, for float32 features, without what a call adds."""
    try:
        engine = compile(subject.network, "cuda", precision)
        assert isinstance(engine, Engine)
        plan = engine.describe(measure=True)
    except Exception as reason:  # the others are to be timed all the same
        return f"{subject.name}, {precision}: launches: {type(reason).__name__}: {reason!s:.200}"
    total = sum(row["seconds"] for row in plan)
    each = ", ".join(f"{row['kernel']} {1e9 * row['seconds']:.1f}" for row in plan)
    return f"{subject.name}, {precision}: launches, ns an image: {1e9 * total:.1f} = {each}"


def as_table(rows: Sequence[Row]) -> str:
    header = ["", "precision", "batch", "error", "images/s", "TFLOP/s", "GB/s", "% of roofline", "to best peer"]
    return table(
        header,
        [
            [
                f"{row.case}: {row.contender}", row.precision, f"{row.batch:,}", f"{row.error:.0e}",
                f"{row.images_per_second:,.0f}", f"{row.tflops:.1f}", f"{row.gbytes_per_second:,.0f}",
                f"{row.percent_of_roofline:.1f}", "" if row.ratio is None else f"{row.ratio:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def runs(precisions: Sequence[str]) -> Iterator[tuple[Subject, str]]:
    """What is measured, the most telling first: every case in one precision, networks in the first and solvers in the
    last, before any is in another; of networks the paper's decoders first."""
    for of_networks, of_solvers in zip(precisions, reversed(precisions), strict=True):
        networks = list(benchmark.decoders())
        yield from ((subject, of_networks) for subject in networks if subject.name in benchmark.DECODERS)
        if of_solvers != "float16":  # gradients leave its range
            yield from ((subject, of_solvers) for subject in solvers())
        yield from ((subject, of_networks) for subject in networks if subject.name not in benchmark.DECODERS)


def solvers() -> Iterator[Subject]:
    """rMLE through each edge: with many steps, as in use, where they are quick: what is done once counts little."""
    for few, many in zip(*map(benchmark.solvers, STEPS), strict=True):
        yield many if many.flops * batch_of(many) <= SOLVER_FLOPS else few


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    result.add_argument("--minutes", type=float, default=9, help="when no more is begun; what is left out is named")
    result.add_argument("--case", nargs="+", default=[], metavar="NAME", help="parts of names; all where left out")
    result.add_argument("--precision", default=",".join(PRECISIONS), help="as in bfloat16,float32")
    result.add_argument("--repeat", type=positive, default=7, help="samples; medians count")
    result.add_argument("--no-build", action="store_true", help="take fastinv as it is, do not build it first")
    result.add_argument("--no-tests", action="store_true", help="do not run the tests of the kernels first")
    result.add_argument("--tune", action="store_true", help="first measure the tiles, and keep them for later runs")
    result.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too, after every case")
    return result


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    end = time.monotonic() + 60 * args.minutes
    precisions = args.precision.split(",")
    if unknown := set(precisions) - set(PRECISIONS):
        arguments.error(f"--precision {', '.join(sorted(unknown))}, expected some of {', '.join(PRECISIONS)}")
    if (reason := CudaBackend().available()) is not None:
        print(f"bench/gpu.py needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 1
    if args.json is not None:
        expect_place(args.json)
    if not args.no_build:
        if (failure := build_fastinv()) is not None:
            print(f"fastinv cannot be built (--no-build takes it as it is):\n{failure}", file=sys.stderr)
            return 1
        # What has been built is found by a new process only.
        os.execv(
            sys.executable, [sys.executable, *sys.argv, "--no-build", "--minutes", str((end - time.monotonic()) / 60)]
        )
    facts: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": []}
    facts["CUDA C++"] = "built" if usable_on(torch.device("cuda", 0)) else "NOT BUILT"
    if not args.no_tests:
        facts["tests"] = run_tests(TESTS, 30 * args.minutes)
    top = ceilings()
    facts["ceilings"] = dataclasses.asdict(top)
    products = ", ".join(f"{name} {1e-12 * flops:.0f}" for name, flops in top.products.items())
    print(f"kernels in CUDA C++: {facts['CUDA C++']}")
    print(f"{facts['gpu']}: copy {1e-12 * top.memory:.2f} TB/s; products, TFLOP/s: {products}")
    print(f"from the host: {1e-9 * top.host:.0f} GB/s")
    rows: list[Row] = []
    for subject, precision in runs(precisions):
        if args.case and not any(part.lower() in subject.name.lower() for part in args.case):
            continue
        if time.monotonic() > end:
            print(f"{subject.name}, {precision}: left out, the time is over")
            continue
        if args.tune:
            tune(subject.network, precision, torch.device("cuda"), differentiable=subject.recipe is not None)
        # This first: for a while after it, what torch.compile has started takes the host's cores.
        hosted: list[Row | str] = []
        if subject.recipe is None:
            hosted = [host_to_host(subject, precision, top, args.repeat), launches(subject, precision)]
        found = [*measure(subject, precision, top, args.repeat), *hosted]
        fresh = [row for row in found if isinstance(row, Row)]
        rows += fresh
        print("\n".join([*(note for note in found if isinstance(note, str)), as_table(fresh)]), flush=True)
        if args.json is not None:
            facts["rows"] = [dataclasses.asdict(row) for row in rows]
            with replacing(args.json) as temporary:
                temporary.write_text(json.dumps(facts, indent=2) + "\n")
    print(as_table(rows))
    return int(facts.get("tests", "").startswith("FAILED"))


if __name__ == "__main__":
    sys.exit(main())
