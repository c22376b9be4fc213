"""Check, then time: fastinv beside PyTorch eager, on the paper's decoders, on every op, and on rMLE.

`fastinv bench` and the suites in `bench/` read their subjects from here. A timing is a ratio of two things
measured in one run, in turns, with equal numbers of threads, each checked against PyTorch in float64 before.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fastinv.attacks.rmle import rmle
from fastinv.backends import BACKENDS
from fastinv.backends.torch import as_module, torch_threads
from fastinv.engine import Engine, Solver, compile
from fastinv.errors import BackendError
from fastinv.export import export
from fastinv.inverters import RMLE
from fastinv.models import cifar_net, lenet5, make_decoder, resnet_decoder, resnet_edge, transformer_edge
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.base import Case, Shape
from fastinv.ops.linear import Linear
from fastinv.ops.reshape import Reshape
from fastinv.split import Split

TOLERANCE = 1e-4  # relative, of float32 results against float64
SOLVER_TOLERANCE = 1e-3  # after `SOLVER_STEPS` steps from a random start
CHECKED = 4  # images of a batch that are compared
SAMPLE = 0.005  # seconds that one sample lasts at least, for the clock's sake
MAX_ELEMENTS = 2**26  # in the largest value of a batch: what does not fit is timed with fewer images
MAX_FLOPS = 2**37  # likewise of one call: a second or so of PyTorch on two cores

SOLVER_STEPS = 50
DECODERS: dict[str, tuple[Shape, Shape]] = {
    "MNIST conv1": ((8, 24, 24), (1, 28, 28)),
    "MNIST ReLU2": ((16, 8, 8), (1, 28, 28)),
    "CIFAR conv11": ((64, 32, 32), (3, 32, 32)),
    "CIFAR ReLU22": ((128, 16, 16), (3, 32, 32)),
    "CIFAR ReLU32": ((128, 8, 8), (3, 32, 32)),
}
RESIDUAL_DECODERS: dict[str, tuple[Shape, Shape]] = {
    "residual 64x64": ((128, 16, 16), (3, 64, 64)),
    "residual 32x32": ((256, 8, 8), (3, 32, 32)),
}


@dataclass(frozen=True)
class Subject:
    """One thing to time: a network, and the same in PyTorch, in float32 and in float64."""

    name: str
    network: Network
    eager: torch.nn.Module
    exact: torch.nn.Module
    recipe: RMLE | None = None  # for rMLE through the network, instead of the network itself

    @property
    def flops(self) -> int:
        """Of one image, direct form: of a run, or of all steps of rMLE, each forward and back to the image."""
        return self.network.flops * (1 if self.recipe is None else 2 * self.recipe.steps)

    def batch(self, wanted: int) -> int:
        """As many images as wanted, or as fit."""
        by_work = MAX_FLOPS // max(1, self.flops)
        return max(1, min(wanted, MAX_ELEMENTS // max(map(math.prod, self.network.shapes)), by_work))

    def inputs(self, count: int) -> torch.Tensor:
        """What it is timed on: `count` inputs of the network, or for rMLE the features of `count` images."""
        x = torch.randn(count, *self.network.input_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return x if self.recipe is None else self.eager(x)

    def run_eager(self, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What PyTorch makes of `x`, float32 or float64."""
        module = self.exact if dtype is torch.float64 else self.eager
        if self.recipe is None:
            with torch.no_grad():
                result: torch.Tensor = module(x.to(dtype))
                return result
        return rmle(module, x.to(dtype), **self.recipe.recipe())[0].clamp(0, 1)


@dataclass(frozen=True)
class Timing:
    """What one measurement found. Times are medians, for one call on the whole batch."""

    name: str
    backend: str
    isa: str
    threads: int
    batch: int
    error: float  # relative, against PyTorch in float64
    seconds: float
    eager_seconds: float

    @property
    def ratio(self) -> float:
        """How many times as fast as PyTorch eager."""
        return self.eager_seconds / self.seconds


def decoders() -> Iterator[Subject]:
    """The paper's decoders, residual ones, and a larger one in the style of ResNet-18."""
    for name, (features, image) in DECODERS.items():
        yield _subject(name, make_decoder(features, image), features)
    for name, (features, image) in RESIDUAL_DECODERS.items():
        yield _subject(name, make_decoder(features, image, "residual", width=64, depth=4, final="sigmoid"), features)
    yield _subject("ResNet-18 style", resnet_decoder(), (64, 56, 56))


def ops() -> Iterator[Subject]:
    """Every case of every op."""
    for op in OPS.values():
        for case in op.cases():
            network = network_of(case)
            eager, exact = (as_module(network, dtype) for dtype in (torch.float32, torch.float64))
            yield Subject(f"{op.name} {case.name}", network, eager, exact)


def solvers(steps: int = SOLVER_STEPS) -> Iterator[Subject]:
    """rMLE through the paper's edges, and the first layers of ResNet-18 and of a vision transformer; random starts."""
    torch.manual_seed(0)
    for target, image, splits in (
        (lenet5(), (1, 28, 28), ("conv1", "ReLU2")),
        (cifar_net(), (3, 32, 32), ("conv11", "ReLU22", "ReLU32")),
        (resnet_edge(), (3, 64, 64), ("layer1",)),
        (transformer_edge(), (3, 32, 32), ("blocks",)),
    ):
        start = np.random.default_rng(0).random(image, np.float32)
        for at in splits:
            subject = _subject(f"rMLE {at}, {steps} steps", Split(target, at).edge, image)
            recipe = RMLE(subject.network, image, steps=steps, init=start, clamp=None)
            yield dataclasses.replace(subject, recipe=recipe)


def network_of(case: Case, activation: Activation = IDENTITY, seed: int = 0) -> Network:
    """The case's op on random weights of unit gain.

    The network's input is the case's first input; a dense layer of the flat input makes each further one.
    """
    rng = np.random.default_rng(seed)
    size = math.prod(case.inputs[0])
    steps: list[Step] = []
    inputs = [0]
    for shape in case.inputs[1:]:
        dense = {"weight": (math.prod(shape), size), "bias": (math.prod(shape),)}
        steps.append(Step(Reshape((size,)), (0,)))
        steps.append(Step(Linear(), (len(steps),), {key: _draw(rng, value) for key, value in dense.items()}))
        steps.append(Step(Reshape(shape), (len(steps),)))
        inputs.append(len(steps))
    weights = {key: _draw(rng, shape) for key, shape in case.weights.items()}
    return Network(case.inputs[0], (*steps, Step(case.op, tuple(inputs), weights, activation)))


def _draw(rng: np.random.Generator, shape: Shape) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(max(1, math.prod(shape[1:]))))


def _subject(name: str, module: torch.nn.Module, shape: Shape) -> Subject:
    module = module.eval()
    network = export(module, torch.zeros(2, *shape))
    return Subject(name, network, module, copy.deepcopy(module).double())


def contenders() -> list[tuple[str, str]]:
    """(backend, instruction set) of everything that can run here; the set is "" where there is no choice."""
    found = []
    for backend in BACKENDS:
        if backend.available() is None:
            found += [(backend.name, isa) for isa in (_isas() if backend.name == "cpu" else [""])]
    return found


def _isas() -> list[str]:
    from fastinv import _core

    return [name for name, runnable in _core.isas() if runnable]


def compiled(subject: Subject, backend: str, threads: int) -> Engine | Solver:
    """The subject, compiled, after its results were checked.

    Raises:
        BackendError: the results differ from PyTorch's, or the backend cannot be had.
    """
    machine = compile(subject.recipe or subject.network, backend, threads=threads)
    error = check(subject, machine)
    bound = TOLERANCE if subject.recipe is None else SOLVER_TOLERANCE
    if not error <= bound:
        raise BackendError(
            f"{subject.name}: {machine.backend} ({machine.isa}) differs from PyTorch in float64 by "
            f"{error:.2g} (relative), expected at most {bound:g}: a bug; please report it"
        )
    return machine


def check(subject: Subject, machine: Engine | Solver) -> float:
    """Relative difference from PyTorch in float64, on a few images."""
    x = subject.inputs(CHECKED)
    expected = subject.run_eager(x, torch.float64)
    found = call(machine, x)
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def call(machine: Engine | Solver, x: torch.Tensor) -> torch.Tensor:
    """What an engine or a solver makes of `x`."""
    result: torch.Tensor = machine(x) if isinstance(machine, Engine) else machine.solve(x)[0]
    return result


def measure(subject: Subject, *, backend: str = "auto", batch: int = 256, threads: int = 1, repeat: int = 7) -> Timing:
    """Check the subject, then time it beside PyTorch eager with as many threads."""
    with torch_threads(threads):
        machine = compiled(subject, backend, threads)
        x = subject.inputs(subject.batch(batch))
        seconds, eager = interleaved([lambda: call(machine, x), lambda: subject.run_eager(x)], repeat)
        error = check(subject, machine)
    return Timing(subject.name, machine.backend, machine.isa, threads, len(x), error, seconds, eager)


def interleaved(contenders: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Median seconds of one call of each contender, timed in turns, after a call that warms up."""
    counts = []
    for contender in contenders:
        contender()
        begin = time.perf_counter()
        contender()
        counts.append(max(1, math.ceil(SAMPLE / (time.perf_counter() - begin))))
    samples: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeat):
        for contender, count, times in zip(contenders, counts, samples, strict=True):
            begin = time.perf_counter()
            for _ in range(count):
                contender()
            times.append((time.perf_counter() - begin) / count)
    return [statistics.median(times) for times in samples]
