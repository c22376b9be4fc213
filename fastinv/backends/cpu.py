"""The compiled CPU backend: lowers networks to kernel launches of `fastinv._core`.

`LOWERINGS` is the one table that says how each op becomes launches. A program takes and gives images as [C, H, W];
between its nodes they lie so or channels last, [H, W, C], as the core chooses (`csrc/program.h`). Of the order of
elements in a `gather` it is told as if all lay channels last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastinv import _core
from fastinv.backends.base import Array, Progress, Report, Start
from fastinv.backends.compiled import EXACT_METHODS, RAW_DTYPES, channels_last, timed
from fastinv.backends.fusion import chain_of_small_convolutions, fused
from fastinv.errors import BackendError
from fastinv.inverters import METHODS
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Shape
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.matmul import Matmul
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.normalize import Normalize
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.resample import Resample
from fastinv.tensors import Source

if TYPE_CHECKING:
    from fastinv.inverters import RMLE

ACTIVATION_CODES = {  # the order of ActivationKind in csrc/kernels.h
    kind: code
    for code, kind in enumerate(
        (
            "identity",
            "relu",
            "leaky_relu",
            "sigmoid",
            "tanh",
            "silu",
            "gelu",
            "gelu_tanh",
            "softplus",
            "hardtanh",
            "clamp",
            "elu",
            "exp",
            "sqrt",
            "reciprocal",
        )
    )
}


class CpuBackend:
    """C++ kernels for AVX-512, AVX2 and any other processor; see `fastinv.backends.base.Backend`."""

    name = "cpu"
    methods: tuple[str, ...] = METHODS

    def precisions(self, solver: bool, method: str = "adam") -> tuple[str, ...]:
        if not _core.has_bfloat16(_isa()) or (solver and method in EXACT_METHODS):
            return ("float32",)
        # A solver's first is not the fastest, but what is known to be exact.
        return ("float32", "bfloat16") if solver else ("bfloat16", "float32")

    def available(self) -> str | None:
        return None  # without the core the package itself does not load

    def supports(self, step: Step) -> bool:
        return step.op.name in LOWERINGS

    def compile(self, network: Network, precision: str, threads: int | None) -> CpuNetwork:
        return CpuNetwork(network, precision, threads)

    def compile_solver(self, recipe: RMLE, precision: str, threads: int | None) -> CpuSolver:
        return CpuSolver(recipe, threads, precision=precision)


NO_SCALE: Array = np.zeros(0, np.float32)  # of features that are not quantised
NO_BIAS: Array = np.zeros(0, np.float32)  # of attention by the scores alone


class CpuNetwork:
    """A network compiled for this machine's instruction set, or the one FASTINV_ISA names."""

    batch_size: int | None = None

    def __init__(self, network: Network, precision: str, threads: int | None) -> None:
        lowering = Lowering(network, bfloat16=precision == "bfloat16")
        self.precision = "bfloat16" if lowering.program.rounds else "float32"
        self._engine = _core.Engine(lowering.program, network.flops, _thread_count(threads))
        self._network = network
        self._launches = lowering.launches
        self.isa = self._engine.isa
        self.run_plain = self._engine.run_plain

    def run(self, x: Array, out: Array) -> None:
        self._engine.run(x, out)

    def run_raw(self, rows: Source, out: npt.NDArray[Any]) -> bool:
        data, scale, zero_point = rows.data, NO_SCALE, NO_SCALE
        if rows.scale is not None and rows.zero_point is not None:
            scale, zero_point = rows.scale.ravel(), rows.zero_point.ravel()
        plain = _plain(data)
        turned = not plain and data.ndim == 4 and max(len(scale), len(zero_point)) <= 1
        if turned:  # perhaps they lie channels last
            data = data.transpose(0, 2, 3, 1)
            plain = _plain(data)
        if rows.dtype not in RAW_DTYPES or not (plain and _plain(out)):
            return False
        return self._engine.run(data, out, scale, zero_point, turned)

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        plan = _describe(self._network, self._launches, self._engine)
        return timed(plan, self._engine.profile(PROFILE_SECONDS)) if measure else plan


class CpuSolver:
    """The rMLE loop, compiled: it returns to Python only when all images are done."""

    batch_size: int | None = None
    stops_within = True

    def __init__(self, recipe: RMLE, threads: int | None, block: int = 0, precision: str = "float32") -> None:
        lowering = Lowering(recipe.edge, differentiable=True, bfloat16=precision == "bfloat16")
        self.precision = "bfloat16" if lowering.program.rounds else "float32"
        low, high = ([], []) if recipe.bounds is None else (bound.tolist() for bound in recipe.bounds)
        self._solver = _core.Solver(
            lowering.program,
            optimizer=recipe.method,
            steps=recipe.steps,
            lr=recipe.lr,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
            momentum=recipe.momentum,
            cosine=recipe.schedule == "cosine",
            tv_weight=recipe.tv_weight,
            tv_beta=recipe.tv_beta,
            tolerance=recipe.tolerance,
            patience=recipe.patience,
            keep_best=recipe.keep == "best",
            low=low,
            high=high,
            threads=_thread_count(threads),
            block=block,
        )
        matrix = self._solver.hessian()
        if matrix.size > 0 and (inverse := _inverse(matrix)) is not None:
            self._solver.take_inverse(inverse)
        self.isa = self._solver.isa
        self.finite = self._solver.finite
        self.kernels = [kernel for kernel, _ in self._solver.describe()]
        self.images_abreast = self._solver.images_abreast  # that a thread takes through all steps together, or 0

    def solve(self, features: Array, init: Array, progress: Progress | None = None) -> tuple[Array, Report, bool]:
        z, objective, steps, converged, finished = self._solver.solve(features, init, progress)
        return z, Report(objective, steps, converged, CpuBackend.name, self.isa), finished

    def solve_raw(
        self, rows: Source, init: Array | Start, out: npt.NDArray[Any], progress: Progress | None = None
    ) -> tuple[Report, bool] | None:
        return None


def _inverse(matrix: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Of a symmetric matrix; None where there is none, or none that float32 could use."""
    most = 1e5  # a step by an inverse of this condition, rounded to float32, leaves less than 1% of the gradient
    matrix = matrix.astype(np.float64)
    try:
        inverse = np.linalg.inv((matrix + matrix.T) / 2)
    except np.linalg.LinAlgError:
        return None
    return inverse if np.linalg.norm(matrix, 1) * np.linalg.norm(inverse, 1) <= most else None


class Lowering:
    """A network turned into a program of the core, step by step."""

    def __init__(self, network: Network, *, differentiable: bool = False, bfloat16: bool = False) -> None:
        self.network = network
        isa = _isa()
        abreast = not differentiable and chain_of_small_convolutions(network, _core.vector_width(isa))
        self.program: _core.Program = _core.Program(isa, list(network.input_shape), differentiable, abreast, bfloat16)
        values = {0: 0}  # the program's value for values of the network
        self.launches: list[int] = []  # the step behind every launch
        # The gradient goes back through upsampling and convolution apart: both are fast that way, and stride 2 is not.
        for part in fused(network, upsampling=not differentiable):
            inputs = [values[i] for i in part.inputs]
            lower = LOWERINGS[part.step.op.name]
            value = lower(self, part.step, inputs, part.shapes, network.shapes[part.number + 1])
            values |= dict.fromkeys(part.results, value)
            self.launches += [part.number] * (value - len(self.launches))
        last = self.program.finish(values[len(network.steps)])
        self.launches += [len(network.steps) - 1] * (last - len(self.launches))

    def rearrange(self, value: int, index: npt.NDArray[np.int64], source: Shape, target: Shape, act: Activation) -> int:
        """Elements in a new order; `index` holds positions in the row-major input, shaped as the output.

        Nothing is launched where the order in memory stays the same.
        """
        position = np.empty(index.size, np.int64)  # where each element of the row-major input lies
        position[channels_last(np.arange(index.size).reshape(source)).ravel()] = np.arange(index.size)
        order = position[channels_last(index.reshape(target)).ravel()]
        if np.array_equal(order, np.arange(order.size)):
            if act is IDENTITY or act == IDENTITY:
                # The value keeps its own shape in the program; a later step may need the new one.
                return value if source == target else self._gather(value, order, target, act)
            if source == target:
                return self.program.activate(value, encode(act))
        return self._gather(value, order, target, act)

    def _gather(self, value: int, order: npt.NDArray[np.int64], target: Shape, act: Activation) -> int:
        return self.program.gather(value, order.astype(np.int32), list(target), encode(act))


def encode(activation: Activation) -> tuple[int, float, float]:
    """An activation as the core takes it."""
    return ACTIVATION_CODES[activation.kind], activation.a, activation.b


def _plain(array: npt.NDArray[Any]) -> bool:
    """Whether the core can read or write the array where it is."""
    flags = array.flags
    return flags.c_contiguous and flags.aligned and array.dtype.isnative


def _isa() -> str:
    try:
        return _core.resolve_isa(os.environ.get("FASTINV_ISA", ""))
    except ValueError as error:
        raise BackendError(f"FASTINV_ISA: {error}; unset it to take the best") from None


def _thread_count(threads: int | None) -> int:
    return _core.available_threads() if threads is None else threads


PROFILE_SECONDS = 0.1
LAYOUT_KERNELS = ("layout", "copy")  # launches that no step asked for


def _describe(network: Network, launches: Sequence[int], engine: _core.Engine) -> list[dict[str, Any]]:
    plan = []
    for index, (kernel, shares_image) in zip(launches, engine.describe(), strict=True):
        step, output = network.steps[index], network.shapes[index + 1]
        own = kernel not in LAYOUT_KERNELS
        row = {"step": index, "op": step.op.name if own else kernel, "kernel": kernel, "output": output}
        row["activation"] = step.activation.kind if own else "identity"
        row["split"] = "images, and within one" if shares_image else "images"
        row["images"] = engine.block
        row["strips"] = engine.strips
        row["flops"] = network.costs[index].flops if own else 0
        row["bytes"] = network.costs[index].bytes if own else 0
        plan.append(row | {"source": step.source})
    return plan


# ---- one function per op: (lowering, step, input values, input shapes, output shape) -> value ----------------------

Lower = Callable[[Lowering, Step, list[int], list[Shape], Shape], int]


def _convolution(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, (Conv2d, ConvTranspose2d))
    transposed = isinstance(op, ConvTranspose2d)
    return to.program.convolution(
        values[0],
        step.weights["weight"],
        step.weights["bias"],
        output=list(output),
        stride=op.stride,
        padding=op.padding if isinstance(op, ConvTranspose2d) else (op.padding[0], op.padding[2]),
        dilation=op.dilation,
        groups=op.groups,
        transposed=transposed,
        activation=encode(step.activation),
        addend=values[1] if len(values) > 1 else -1,
    )


def _linear(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    (value,), (shape,) = values, shapes
    weight, bias = step.weights["weight"], step.weights["bias"]
    if len(shape) != 3:
        return to.program.linear(value, weight, bias, list(output), encode(step.activation))
    # The last axis of an image is not contiguous in the core: work on it as a matrix.
    rows = shape[0] * shape[1]
    flat_in, flat_out = (rows, shape[2]), (rows, output[2])
    value = to.rearrange(value, np.arange(rows * shape[2]), shape, flat_in, IDENTITY)
    value = to.program.linear(value, weight, bias, list(flat_out), encode(step.activation))
    return to.rearrange(value, np.arange(rows * output[2]), flat_out, output, IDENTITY)


def _max_pool(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, MaxPool2d)
    return to.program.max_pool(
        values[0], list(output), op.kernel, op.stride, op.padding, op.dilation, encode(step.activation)
    )


def _resample(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Resample)
    rows, columns = (matrix.astype(np.float32) for matrix in op.matrices(shapes[0], step.weights))
    return to.program.resample(values[0], rows, columns, encode(step.activation))


def _rearrange(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Rearrange)
    return to.rearrange(values[0], step.op.source_index(shapes[0]), shapes[0], output, step.activation)


def _concat(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Concat)
    return to.program.concat(values, step.op.axis, list(output), encode(step.activation))


def _add(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    return to.program.add(values[0], values[1], list(output), encode(step.activation))


def _mul(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    return to.program.mul(values[0], values[1], list(output), encode(step.activation))


def _affine(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Affine)
    scale, shift = step.weights["scale"], step.weights["shift"]
    (shape,) = shapes
    per_channel = len(shape) == 3 and scale.shape[1:] == (1, 1)
    target = shape[:1] if per_channel else shape  # channels are innermost: one entry for each is enough
    arrays = (np.broadcast_to(w.reshape(-1) if per_channel else w, target) for w in (scale, shift))
    scale, shift = (np.ascontiguousarray(channels_last(w)).ravel() for w in arrays)
    return to.program.affine(values[0], scale, shift, encode(step.activation))


def _normalize(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Normalize)
    return to.program.normalize(
        values[0],
        step.weights["weight"],
        step.weights["bias"],
        groups=op.groups,
        spatial=op.spatial,
        centered=op.centered,
        eps=op.eps,
        activation=encode(step.activation),
    )


def _attention(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Attention)
    q, k, v = values
    return to.program.attention(
        q,
        k,
        v,
        step.weights.get("bias", NO_BIAS),
        windows=op.windows,
        heads=op.heads,
        scale=op.scale,
        activation=encode(step.activation),
    )


def _matmul(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    op = step.op
    assert isinstance(op, Matmul)
    a, b = values
    return to.program.matmul(a, b, groups=op.groups, transposed=op.transposed, activation=encode(step.activation))


def _softmax(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    value = to.program.softmax(values[0])
    return value if step.activation == IDENTITY else to.program.activate(value, encode(step.activation))


def _activation(to: Lowering, step: Step, values: list[int], shapes: list[Shape], output: Shape) -> int:
    assert isinstance(step.op, Activation)
    value = to.program.activate(values[0], encode(step.op))
    return value if step.activation == IDENTITY else to.program.activate(value, encode(step.activation))


LOWERINGS: dict[str, Lower] = {
    "conv2d": _convolution,
    "conv_transpose2d": _convolution,
    "linear": _linear,
    "max_pool2d": _max_pool,
    "avg_pool2d": _resample,
    "adaptive_avg_pool2d": _resample,
    "upsample": _resample,
    "separable": _resample,
    "pixel_shuffle": _rearrange,
    "reshape": _rearrange,
    "permute": _rearrange,
    "roll": _rearrange,
    "add": _add,
    "mul": _mul,
    "affine": _affine,
    "normalize": _normalize,
    "attention": _attention,
    "matmul": _matmul,
    "softmax": _softmax,
    "concat": _concat,
    "activation": _activation,
}
