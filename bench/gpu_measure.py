"""What the worker of `gpu.py` does on the GPU: ceilings, then case after case. Each gives what it finds as it comes.

What fails is a line, and the rest is measured all the same; unless the GPU does not work any more, as after an illegal
address: that lasts as long as the process.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from contenders import difference, forget, spread
from gpu_contenders import DTYPES, NETWORK_CONTENDERS, SOLVER_CONTENDERS, Build, Call
from gpu_results import HOST_TO_HOST, Ceilings, Row

from fastinv import benchmark
from fastinv.backends.cuda.native import usable_on
from fastinv.backends.cuda.tuning import tune
from fastinv.benchmark import SOLVER_TOLERANCE, Subject
from fastinv.engine import Engine, compile

# Of peers that solve: PyTorch's convolutions in float32 are what cudnn.benchmark finds fastest, by transforms that
# round more, and Adam takes such noise for a gradient at pixels that have none: 4e-3 and 9e-3 were seen through ReLU2.
PEER_SOLVER_TOLERANCE = 5e-2
TOLERANCES = {"bfloat16": 2e-2, "float16": 2e-2, "tf32": 5e-3, "float32": 1e-4}  # relative, against float64
ROTATED = 2**28  # bytes of inputs that are taken in turns: five times the L2 of an H200
LARGE = 2**30  # bytes of the copy that measures the memory, and sides of the product
SIDE = 8192
BATCH = 4096
HOSTED = 65536  # images of a call from host to host, at most
HOSTED_BYTES = 2**30  # of their features, at most
REPEATED = 256  # random images that these are made of
LAST = 16  # images of a small last batch may go through another kernel, which rounds otherwise
STEPS = (20, 200)  # of rMLE, at least and at most: of those the most that fit into
SOLVER_FLOPS = 2e13  # of a batch, in direct form
# Of one step of a batch: 512 images of ReLU22, whose steps take 0.4 GFLOP an image. What torch.compile and
# cudnn.benchmark try out takes about a layer's time each: with 4096 images that went beyond the seconds of a case.
STEP_FLOPS = 2.5e11
SLOW = 0.3  # seconds of a call that is warmed up once and sampled three times
MEMORY = 2**34  # bytes of all float32 values of a batch, at most

Found = Iterator[Row | str]


class GpuLost(Exception):
    """The GPU does nothing more for this process."""


def surroundings() -> Iterator[dict[str, str]]:
    built = "built" if usable_on(torch.device("cuda", 0)) else "NOT BUILT"
    yield {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "CUDA C++": built}


def ceilings() -> Iterator[Ceilings]:
    source = torch.randn(LARGE // 4, device="cuda")
    target = torch.empty_like(source)
    memory = 2 * LARGE / seconds_of(target.copy_, [source], 7)
    products = {}
    for precision in TOLERANCES:
        with matmul(precision):
            a = torch.randn(SIDE, SIDE, device="cuda", dtype=DTYPES.get(precision, torch.float32))
            products[precision] = 2 * SIDE**3 / seconds_of(a.matmul, [a.T.contiguous()], 5)
    pinned = torch.empty(LARGE, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LARGE, dtype=torch.uint8, device="cuda")
    host = LARGE / seconds_of(lambda x: there.copy_(x, non_blocking=True), [pinned], 5)
    yield Ceilings(memory, products, host)


def cases(precisions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names and precisions of what is measured, the most telling first: every case in one precision, networks in
    the first and solvers in the last, before any is in another; of networks the paper's decoders first."""
    solvers = [subject.name for subject in subjects().values() if subject.recipe is not None]
    others = [name for name in subjects() if name not in (*solvers, *benchmark.DECODERS)]
    for of_networks, of_solvers in zip(precisions, reversed(precisions), strict=True):
        yield from ((name, of_networks) for name in benchmark.DECODERS)
        if of_solvers != "float16":  # gradients leave its range
            yield from ((name, of_solvers) for name in solvers)
        yield from ((name, of_networks) for name in others)


@functools.cache
def subjects() -> dict[str, Subject]:
    """Decoders, and rMLE through each edge: with many steps, as in use, where they are quick: what is done once counts
    little."""
    torch.manual_seed(0)
    found = list(benchmark.decoders())
    for few, many in zip(*map(benchmark.solvers, STEPS), strict=True):
        found.append(many if many.flops * batch_of(many) <= SOLVER_FLOPS else few)
    return {subject.name: subject for subject in found}


def case(name: str, precision: str, top: Ceilings, repeat: int, tuning: bool) -> Found:
    """All of one case: fastinv from host to host, its launches, and all contenders on the GPU."""
    forget()
    gc.collect()
    torch.cuda.empty_cache()
    logging.getLogger("torch._inductor").setLevel(logging.CRITICAL)  # it tells of every kernel that did not fit
    subject, label = subjects()[name], f"{name}, {precision}"
    if tuning:
        yield from attempt(f"{label}: tuning", tuned, subject, precision)
    # This first: for a while after it, what torch.compile has started takes the host's cores.
    if subject.recipe is None:
        yield from attempt(f"{label}: {HOST_TO_HOST}", host_to_host, subject, precision, top, repeat)
        yield from attempt(f"{label}: launches", launches, subject, precision)
    yield from attempt(label, on_gpu, subject, precision, top, repeat)


def attempt(label: str, function: Callable[..., Found], *args: object) -> Found:
    """What it gives; where it fails, a line that says so.

    Raises:
        GpuLost: it failed, and so will all that comes after it.
    """
    try:
        yield from function(*args)
    except GpuLost:
        raise
    except Exception as reason:  # of a peer, or of ours: the others are to be timed all the same
        yield f"{label}: {type(reason).__name__}: {reason!s:.200}"
        try:
            torch.cuda.synchronize()
        except Exception as lost:
            raise GpuLost(f"the GPU is lost ({lost!s:.100})") from None


def tuned(subject: Subject, precision: str) -> Found:
    """Nothing is told: what was measured is in a file."""
    tune(subject.network, precision, torch.device("cuda"), differentiable=subject.recipe is not None)
    yield from ()


def on_gpu(subject: Subject, precision: str, top: Ceilings, repeat: int) -> Found:
    """Features and results on the GPU: a row for every contender that is right, a line for every other."""
    solves, batch = subject.recipe is not None, batch_of(subject)
    inputs = inputs_of(subject, batch, torch.float32 if solves else DTYPES.get(precision, torch.float32))
    chosen = spread(batch)
    expected = subject.run_eager(inputs[0][chosen].cpu().float(), torch.float64)
    steps = subject.recipe.steps if subject.recipe else 1
    flops = batch * subject.flops
    moved = batch * (math.prod(inputs[0].shape[1:]) * inputs[0].element_size() + 4 * expected[0].numel())

    def timed(name: str, build: Build) -> Found:
        with torch.set_grad_enabled(solves), matmul(precision):
            call = build(subject, inputs[0], precision)
            error = difference(call(inputs[0])[chosen].cpu(), expected)
            if not error <= bound(name, precision, solves):
                yield f"{subject.name}, {precision}: {name} is wrong by {error:.1g}, and not timed"
                return
            taken = seconds_of(call, inputs, repeat)
        share = 100 * top.floor(flops, moved, precision) / taken
        rates = batch * steps / taken, 1e-12 * flops / taken, 1e-9 * moved / taken, share
        yield Row(subject.name, batch, name, precision, error, taken, *rates)

    for name, build in (SOLVER_CONTENDERS if solves else NETWORK_CONTENDERS).items():
        yield from attempt(f"{subject.name}, {precision}: {name}", timed, name, build)


def bound(contender: str, precision: str, solves: bool) -> float:
    """The error that a contender may have, relative."""
    of_solvers = SOLVER_TOLERANCE if contender == "fastinv" else PEER_SOLVER_TOLERANCE
    return max(TOLERANCES[precision], of_solvers if solves else 0)


def host_to_host(subject: Subject, precision: str, top: Ceilings, repeat: int) -> Found:
    """fastinv with features and results on the host, float32 both: the roofline is then the way there and back."""
    engine = compile(subject.network, "cuda", precision)
    shape = subject.network.input_shape
    some = torch.randn(REPEATED, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    count = min(HOSTED, HOSTED_BYTES // some[0].nbytes)
    x = np.tile(some, (-(-count // REPEATED), *[1] * len(shape)))[:count]
    chosen = spread(count)
    found = engine(x)
    error = difference(torch.from_numpy(found)[chosen], subject.run_eager(torch.from_numpy(x)[chosen], torch.float64))
    if not error <= TOLERANCES[precision]:
        yield f"{subject.name}, {precision}: {HOST_TO_HOST}, is wrong by {error:.1g}, and not timed"
        return
    if not np.array_equal(found[REPEATED:-LAST], found[: -REPEATED - LAST]):
        yield f"{subject.name}, {precision}: {HOST_TO_HOST}, differs where features are the same, and is not timed"
        return
    samples = []
    for _ in range(repeat):
        begin = time.perf_counter()
        engine(x)
        samples.append(time.perf_counter() - begin)
    taken, flops, moved = statistics.median(samples), count * subject.flops, x.nbytes + found.nbytes
    sent = x.nbytes // (2 if precision == "bfloat16" else 1)  # rounded on the host
    floor = max(top.floor(flops, sent + found.nbytes, precision), top.floor_from_host(sent, found.nbytes))
    rates = count / taken, 1e-12 * flops / taken, 1e-9 * moved / taken, 100 * floor / taken
    yield Row(subject.name, count, HOST_TO_HOST, precision, error, taken, *rates)


def launches(subject: Subject, precision: str) -> Found:
    """What each launch of a network takes on the device, without what a call adds: for features of the type that
    values are kept in, and in a batch as large as that which is timed."""
    engine = compile(subject.network, "cuda", precision)
    assert isinstance(engine, Engine)
    plan = engine.describe(measure=True)
    total = sum(row["seconds"] for row in plan)
    each = ", ".join(f"{row['kernel']} {1e9 * row['seconds']:.1f}" for row in plan)
    yield f"{subject.name}, {precision}: launches, ns an image: {1e9 * total:.1f} = {each}"


def batch_of(subject: Subject) -> int:
    """Of rMLE through a deep edge fewer images, a power of two, so that a case with its compilers is done in time."""
    batch = max(1, min(BATCH, MEMORY // (4 * sum(map(math.prod, subject.network.shapes)))))
    if subject.recipe is None:
        return batch
    step = 2 * subject.network.flops  # forward, and back to the image
    return min(batch, 2 ** max(0, int(math.log2(STEP_FLOPS / step))))


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


class matmul:
    """Within, PyTorch's float32 products are computed in this precision."""

    def __init__(self, precision: str) -> None:
        self._allowed = precision == "tf32"

    def __enter__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self._allowed
        torch.backends.cudnn.benchmark = True

    def __exit__(self, *reason: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
