"""What the peers harness compares: fastinv, and other ways to do the same on this processor.

All have the same job: float32 features [N, C, H, W], as a torch tensor or as the numpy array over the same memory,
whichever they take. What they convert first is part of their time; the result may be of any layout and type. Each
is built for the one shape that is timed, with the same number of threads, and otherwise set up for single calls as
its own documentation recommends. Build and call them within `torch_threads` and `torch.no_grad`.

`PEERS` run a network; `SOLVER_PEERS` optimise through one, and their calls take a number of steps.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastinv.benchmark import CHECKED, SOLVER_TOLERANCE, Subject
from fastinv.engine import Solver, compile
from fastinv.inverters import RMLE

Call = Callable[..., Any]
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}  # relative, against float64
COMPARED = 16  # images of a batch, at most


@dataclass(frozen=True)
class Contender:
    """One way to run a subject.

    Attributes:
        build: takes a subject, its inputs and a number of threads; gives what runs it on these inputs.
        packages: what it imports, beside fastinv's own requirements.
    """

    name: str
    build: Callable[[Subject, torch.Tensor, int], Call]
    precision: str = "float32"
    packages: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.startswith("fastinv")

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"needs {', '.join(absent)}: pip install '.[peers]'" if absent else None


def fastinv(precision: str) -> Contender:
    """The cpu backend in this precision."""

    def build(subject: Subject, x: torch.Tensor, threads: int) -> Call:
        return partial(compile(subject.network, "cpu", precision, threads), x.numpy())

    return Contender(_ours(precision), build, precision)


def _ours(precision: str) -> str:
    return "fastinv" if precision == "float32" else f"fastinv {precision}"


def _eager(subject: Subject, x: torch.Tensor, threads: int) -> Call:
    return partial(subject.eager, x)


def _channels_last(dtype: torch.dtype, subject: Subject, x: torch.Tensor, threads: int) -> Call:
    module = copy.deepcopy(subject.eager).to(dtype)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda: module(x.to(dtype, memory_format=torch.channels_last))


def _compiled(freeze: bool, dtype: torch.dtype, subject: Subject, x: torch.Tensor, threads: int) -> Call:
    import torch._inductor.config as settings

    original = copy.deepcopy(subject.eager).to(dtype)
    with _quiet(), settings.patch(freezing=freeze):  # not among the options: Dynamo reads it, too
        module = torch.compile(original, dynamic=False, mode="max-autotune" if freeze else "default")
        module(x.to(dtype))
    return lambda: module(x.to(dtype))


def _onnx_runtime(subject: Subject, x: torch.Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = _onnx(subject, x)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)[0]


def _openvino(precision: str, subject: Subject, x: torch.Tensor, threads: int) -> Call:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(io.BytesIO(_onnx(subject, x))), "CPU", settings).create_infer_request()
    array = x.numpy()
    return lambda: request.infer(array, share_inputs=True, share_outputs=True)[0]


def _onnx(subject: Subject, x: torch.Tensor) -> bytes:
    """The module as an ONNX model for inputs of exactly this shape."""
    with _quiet():
        program = torch.onnx.export(subject.eager, (x,), dynamo=True, verbose=False)
    assert program is not None
    model: bytes = program.model_proto.SerializeToString()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch says of its own parts."""
    logging.getLogger("torch.onnx._internal.exporter._registration").disabled = True  # torchvision is not installed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


OPENVINO = "openvino", "onnx", "onnxscript"
PEERS = [
    Contender("eager", _eager),
    Contender("eager channels-last", partial(_channels_last, torch.float32)),
    Contender("eager bfloat16", partial(_channels_last, torch.bfloat16), "bfloat16"),
    Contender("torch.compile", partial(_compiled, False, torch.float32)),
    Contender("torch.compile max", partial(_compiled, True, torch.float32)),
    Contender("torch.compile bfloat16", partial(_compiled, True, torch.bfloat16), "bfloat16"),
    Contender("ONNX Runtime", _onnx_runtime, packages=("onnxruntime", "onnx", "onnxscript")),
    Contender("OpenVINO", partial(_openvino, "f32"), packages=OPENVINO),
    Contender("OpenVINO bfloat16", partial(_openvino, "bf16"), "bfloat16", OPENVINO),
]


# ---- rMLE by Adam, for an image whose normalised values are its pixels, and β 2 ------------------------------------


def fastinv_solver(precision: str) -> Contender:
    """The solver of the cpu backend in this precision."""

    def build(subject: Subject, x: torch.Tensor, threads: int) -> Call:
        recipe = _recipe(subject)

        @functools.cache
        def solver(steps: int) -> Solver:
            return compile(dataclasses.replace(recipe, steps=steps), "cpu", precision, threads)

        return lambda steps=recipe.steps: solver(steps).solve(x.numpy())[0]

    return Contender(_ours(precision), build, precision)


def _recipe(subject: Subject) -> RMLE:
    assert subject.recipe is not None
    assert subject.recipe.tv_beta == 2.0
    return subject.recipe


def _problem(
    subject: Subject, x: torch.Tensor, layout: torch.memory_format, dtype: torch.dtype
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The objective, summed over the images, and where they start. The edge alone is of this type."""
    recipe = _recipe(subject)
    edge = copy.deepcopy(subject.eager).requires_grad_(False).to(dtype)
    edge.to(memory_format=layout)  # type: ignore[call-overload]
    features = x.contiguous(memory_format=layout) if x.ndim == 4 else x  # tokens have no channels to be last

    def objective(z: torch.Tensor) -> torch.Tensor:
        residual = (edge(z.to(dtype)).float() - features).square().sum()
        down, right = z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]
        return residual + recipe.tv_weight * (down.square().sum() + right.square().sum())

    start = torch.tensor(recipe.init).expand(len(x), *recipe.image_shape)
    return objective, start.contiguous(memory_format=layout)


def _adam(layout: torch.memory_format, dtype: torch.dtype, subject: Subject, x: torch.Tensor, threads: int) -> Call:
    recipe = _recipe(subject)
    objective, start = _problem(subject, x, layout, dtype)

    def call(steps: int = recipe.steps) -> torch.Tensor:
        z = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                objective(z).backward()
                optimizer.step()
        return z.detach().clamp(0, 1)

    return call


def _compiled_adam(
    layout: torch.memory_format, freeze: bool, dtype: torch.dtype, subject: Subject, x: torch.Tensor, threads: int
) -> Call:
    """The whole step in one graph. Within no_grad it holds no call of autograd, so that weights can be frozen in."""
    import torch._inductor.config as settings

    recipe = _recipe(subject)
    objective, start = _problem(subject, x, layout, dtype)
    beta1, beta2 = recipe.betas

    def step(
        z: torch.Tensor, first: torch.Tensor, second: torch.Tensor, size: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = torch.func.grad(objective)(z)
        first = torch.lerp(first, gradient, 1 - beta1)
        second = beta2 * second + (1 - beta2) * gradient.square()
        return z - size * first / (second.sqrt() * scale + recipe.eps), first, second

    compiled = torch.compile(step, dynamic=False, mode="max-autotune" if freeze else "default")

    def call(steps: int = recipe.steps) -> torch.Tensor:
        z, first, second = start, torch.zeros_like(start), torch.zeros_like(start)
        for t in range(1, steps + 1):
            size, scale = recipe.lr / (1 - beta1**t), (1 - beta2**t) ** -0.5
            z, first, second = compiled(z, first, second, torch.tensor(size), torch.tensor(scale))
        return z.clamp(0, 1)

    with _quiet(), settings.patch(freezing=freeze):
        call(1)
    return call


ROWS, LAST = torch.contiguous_format, torch.channels_last
SOLVER_PEERS = [
    Contender("eager", partial(_adam, ROWS, torch.float32)),
    Contender("eager channels-last", partial(_adam, LAST, torch.float32)),
    Contender("eager bfloat16", partial(_adam, LAST, torch.bfloat16), "bfloat16"),
    Contender("torch.compile", partial(_compiled_adam, ROWS, False, torch.float32)),
    Contender("torch.compile channels-last", partial(_compiled_adam, LAST, False, torch.float32)),
    Contender("torch.compile max", partial(_compiled_adam, LAST, True, torch.float32)),
    Contender("torch.compile bfloat16", partial(_compiled_adam, LAST, True, torch.bfloat16), "bfloat16"),
]


# ---- for both ------------------------------------------------------------------------------------------------------


def prepared(contender: Contender, subject: Subject, x: torch.Tensor, threads: int) -> tuple[float, Call]:
    """The contender's error (of all steps of rMLE, on a few images), and what is timed."""
    if subject.recipe is None:
        call = contender.build(subject, x, threads)
        return error(subject, x, call()), call
    few = x[:CHECKED]
    wrong = error(subject, few, contender.build(subject, few, threads)())
    return wrong, contender.build(subject, x, threads)


def tolerance(contender: Contender, subject: Subject) -> float:
    """The error that it may have."""
    return max(TOLERANCES[contender.precision], 0.0 if subject.recipe is None else SOLVER_TOLERANCE)


def spread(count: int) -> torch.Tensor:
    """Which images of so many are compared: some from the first to the last."""
    return torch.linspace(0, count - 1, min(COMPARED, count)).long()


def error(subject: Subject, x: torch.Tensor, result: Any) -> float:
    """Relative difference from float64, on images from the first to the last."""
    chosen = spread(len(x))
    return difference(torch.as_tensor(result)[chosen], subject.run_eager(x[chosen], torch.float64))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, from what is float64."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def forget() -> None:
    """Drop what torch.compile keeps: it holds few shapes of one kind of module, and runs more in eager mode."""
    torch._dynamo.reset()
