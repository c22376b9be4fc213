"""What `gpu.py` compares: fastinv, and PyTorch at its best, on the GPU.

Each is built from a subject, an example of its inputs and a precision, and gives what is called with inputs [N, ...]
that are on the GPU. rMLE's peers have the whole step as one CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fastinv.benchmark import Subject
from fastinv.engine import Engine, compile

Call = Callable[[torch.Tensor], Any]
Build = Callable[[Subject, torch.Tensor, str], Call]
DEVICE = "cuda"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # of features and of peers; others: float32


def ours(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    machine = compile(subject.recipe or subject.network, "cuda", precision)
    if isinstance(machine, Engine):
        return machine
    return lambda features: machine.run_there(features, "float32")[0]


def eager(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    module = copy.deepcopy(subject.eager).to(DEVICE, x.dtype, memory_format=torch.channels_last)
    return lambda x: module(x.contiguous(memory_format=torch.channels_last))


def compiled(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    """As one CUDA graph, which copies its inputs to where they were at its capture."""
    return torch.compile(eager(subject, x, precision), options=options_of("max-autotune"), dynamic=False)


def compiled_plain(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    """Without a graph: it reads its inputs where they are, as fastinv does."""
    return torch.compile(eager(subject, x, precision), options=options_of("max-autotune-no-cudagraphs"), dynamic=False)


def options_of(mode: str, **more: Any) -> dict[str, Any]:
    """Those of torch.compile that a mode stands for, and some more where this PyTorch has them; it is not to print what
    it has tried."""
    import torch._inductor as inductor
    import torch._inductor.config as known

    found = inductor.list_mode_options(mode)
    return found | {
        name: value for name, value in {"autotune_num_choices_displayed": 0, **more}.items() if hasattr(known, name)
    }


def _step(subject: Subject, precision: str) -> tuple[Callable[..., Any], torch.Tensor]:
    """One step of Adam on Σ(edge(z) − v)² + λ·TV_2(z), as a function, and its start."""
    recipe = subject.recipe
    assert recipe is not None
    dtype = DTYPES.get(precision, torch.float32)
    edge = copy.deepcopy(subject.eager).requires_grad_(False).to(DEVICE, dtype, memory_format=torch.channels_last)
    beta1, beta2 = recipe.betas

    def objective(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        down, right = z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]
        variation = recipe.tv_weight * (down.square().sum() + right.square().sum())
        return (edge(z.to(dtype)).float() - v).square().sum() + variation

    def step(z: torch.Tensor, v: torch.Tensor, first: torch.Tensor, second: torch.Tensor, t: torch.Tensor) -> Any:
        gradient = torch.func.grad(objective)(z, v)
        first = torch.lerp(first, gradient, 1 - beta1)
        second = beta2 * second + (1 - beta2) * gradient.square()
        size = recipe.lr / (1 - beta1**t)
        return z - size * first / ((second / (1 - beta2**t)).sqrt() + recipe.eps), first, second

    return step, torch.tensor(recipe.init, device=DEVICE)


def captured(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    """The whole step as one CUDA graph of eager kernels."""
    return _loop(subject, x, precision, lambda step: step)


def compiled_step(subject: Subject, x: torch.Tensor, precision: str) -> Call:
    """The whole step compiled, then captured.

    With cuDNN's convolutions alone: trying out Triton's, too, took 17 to 61 s each through ReLU22, and not one was
    faster (1.5 to 5 times as slow).
    """
    options = options_of("max-autotune-no-cudagraphs", max_autotune_conv_backends="ATEN")
    return _loop(subject, x, precision, lambda step: torch.compile(step, dynamic=False, options=options))


def _loop(subject: Subject, x: torch.Tensor, precision: str, wrap: Callable[[Any], Any]) -> Call:
    plain, start = _step(subject, precision)
    step = wrap(plain)
    steps = subject.recipe.steps if subject.recipe else 0
    z = start.expand(len(x), *start.shape).contiguous(memory_format=torch.channels_last)
    first, second, t = torch.zeros_like(z), torch.zeros_like(z), torch.ones((), device=DEVICE)
    target, origin = x.float(), z.clone()

    def advance() -> None:
        after = step(z, target, first, second, t)
        for old, new in zip((z, first, second), after, strict=True):
            old.copy_(new)
        t.add_(1)

    replay = graph_of(advance)

    def call(features: torch.Tensor) -> torch.Tensor:
        target.copy_(features)
        z.copy_(origin)
        first.zero_()
        second.zero_()
        t.fill_(1)
        for _ in range(steps):
            replay()
        return z.clamp(0, 1)

    return call


def graph_of(advance: Callable[[], None]) -> Callable[[], None]:
    """It as a CUDA graph, captured after some runs on another stream, as PyTorch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            advance()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()
    return graph.replay


NETWORK_CONTENDERS = {
    "fastinv": ours, "eager": eager, "torch.compile": compiled, "torch.compile, no graphs": compiled_plain,
}  # fmt: skip
SOLVER_CONTENDERS = {"fastinv": ours, "eager, captured": captured, "torch.compile, captured": compiled_step}
