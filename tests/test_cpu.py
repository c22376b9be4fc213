"""The compiled CPU backend against the torch reference: every op, forward and gradient, on every instruction set."""

from __future__ import annotations

import _thread
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks import (
    ACTIVATIONS,
    CASES,
    InterruptAt,
    check_gradient,
    exported,
    gradient,
    gradient_solver,
    network_of,
    randn,
    reference,
    relative,
    run,
    steep_examples,
)
from torch import nn

import fastinv
from fastinv import _core, tensors
from fastinv.attacks.rmle import rmle, total_variation
from fastinv.backends.cpu import CpuBackend, CpuSolver
from fastinv.backends.cpu_lowering import ACTIVATION_CODES, LOWERINGS
from fastinv.backends.torch import as_module
from fastinv.errors import BackendError
from fastinv.inverters import RMLE
from fastinv.models import cifar_net, lenet5, shadow_edge
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import KINDS, STEEP, Activation
from fastinv.ops.conv2d import Conv2d

FORWARD_TOLERANCE = 1e-5  # relative; the promise is 1e-4


def test_tables_cover_every_op_and_activation() -> None:
    assert set(LOWERINGS) == set(OPS)
    assert list(ACTIVATION_CODES) == list(KINDS)


@pytest.mark.parametrize("case", CASES)
def test_forward(case, isa: str) -> None:
    network = network_of(case)
    for batch in (0, 1, 3):
        x = randn(batch, *network.input_shape)
        y = run(network, x)
        assert y.shape == (batch, *network.output_shape)
        assert relative(y, reference(network, x)) < FORWARD_TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_gradient(case, isa: str) -> None:
    check_gradient(network_of(case))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("op", sorted(set(OPS) - {"activation"}))
def test_fused_activation(op: str, activation: Activation, isa: str) -> None:
    network = network_of(OPS[op].cases()[0], activation=activation)
    x = randn(2, *network.input_shape)
    assert relative(run(network, x), reference(network, x)) < FORWARD_TOLERANCE
    check_gradient(network)


@pytest.mark.parametrize("kind", STEEP)
def test_steep_activation(kind: str, isa: str) -> None:
    for network in steep_examples(kind).values():
        x = randn(2, *network.input_shape)
        assert relative(run(network, x), reference(network, x)) < FORWARD_TOLERANCE
        check_gradient(network)


def test_a_root_s_gradient_at_zero_is_zero(isa: str) -> None:
    """As that of PyTorch's norms: no constant start is lost in NaN."""
    network = Network((1, 1, 5), (Step(Activation("sqrt"), (0,)),))
    z = np.array([0, 0, -0.0, 1, 4], np.float32).reshape(1, 1, 1, 5)
    np.testing.assert_array_equal(gradient(gradient_solver(network), z, 0 * z).ravel(), [0, 0, 0, 1, 1])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *map(Activation, STEEP)], ids=lambda a: a.kind)
def test_activation_over_its_whole_range(activation: Activation, isa: str) -> None:
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-1, 1, 4001), [0.0, -0.0, 1e-30, 1e30, -1e30]])
    x = x.astype(np.float32)[None]
    if activation.kind == "exp":  # which is e^±87 beyond
        x = x.clip(-87, 87)
    network = Network(x.shape[1:], (Step(activation, (0,)),))
    y, expected = run(network, x), reference(network, x)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=3e-7)


def test_forced_isa_runs(isa: str) -> None:
    network = network_of(OPS["conv2d"].cases()[0])
    engine = fastinv.compile(network, backend="cpu")
    assert (engine.backend, engine.isa) == ("cpu", isa)


def test_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINV_ISA", "avx9000")
    with pytest.raises(BackendError, match=r"unknown instruction set 'avx9000'; this machine can run .*portable"):
        fastinv.compile(network_of(OPS["conv2d"].cases()[0]), backend="cpu")


def test_missing_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name, runnable in _core.isas() if not runnable]
    if not missing:
        pytest.skip("this machine runs every instruction set of the build")
    monkeypatch.setenv("FASTINV_ISA", missing[0])
    with pytest.raises(BackendError, match="not available on this machine"):
        fastinv.compile(network_of(OPS["conv2d"].cases()[0]), backend="cpu")


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "linear"])
def test_an_image_has_one_answer(name: str, isa: str) -> None:
    """Bit for bit, whatever the batch, the place in it, its cut and the number of threads."""
    for case in OPS[name].cases():
        network = network_of(case)
        x = randn(29, *network.input_shape)
        whole = run(network, x, threads=2)
        np.testing.assert_array_equal(whole, run(network, x, threads=1))
        np.testing.assert_array_equal(whole[3:20], run(network, x[3:20], threads=2))
        np.testing.assert_array_equal(whole[::-1], run(network, np.ascontiguousarray(x[::-1]), threads=1))
        np.testing.assert_array_equal(whole[7:8], run(network, x[7:8], threads=2))


# ---- the solver ----------------------------------------------------------------------------------------------------


def edge_of(target: torch.nn.Module, at: str, shape: tuple[int, ...]) -> Network:
    return exported(shape, fastinv.Split(target, at=at).edge)


@functools.cache
def make_edge(name: str) -> Network:
    torch.manual_seed(3)
    if name in ("conv1", "ReLU2", "fc1act"):
        return edge_of(lenet5(), name, (1, 28, 28))
    if name.startswith("shadow-"):
        split = name.removeprefix("shadow-")
        shape = (1, 28, 28) if split in ("conv1", "ReLU2") else (3, 32, 32)
        return exported(shape, shadow_edge(split))
    return edge_of(cifar_net(), name, (3, 32, 32))


def recipe_for(edge: Network, **options) -> RMLE:
    return RMLE(edge, edge.input_shape, mean=(0.5,), std=(0.5,), **options)


def solve_both(recipe: RMLE, start: np.ndarray, images: int = 2):
    """(z, report) of the compiled float32 solver and of the float64 definition, from the same start."""
    x = np.random.default_rng(5).random((images, *recipe.input_shape)).astype(np.float32)
    features = reference(recipe.edge, (x - 0.5) / 0.5).astype(np.float32)
    z, report, _ = CpuBackend().compile_solver(recipe, "float32", 2).solve(features, start)
    options = {
        f.name: getattr(recipe, f.name)
        for f in dataclasses.fields(recipe)
        if f.name not in ("edge", "input_shape", "provenance")
    }
    expected, expected_report = rmle(
        as_module(recipe.edge, torch.float64),
        torch.from_numpy(features).double(),
        recipe.input_shape,
        start=torch.from_numpy(start).double(),
        **options,
    )
    return (z, report), (expected.detach().numpy(), expected_report)


@pytest.mark.parametrize("edge", ["conv1", "ReLU2", "fc1act", "conv11", "ReLU22", "shadow-ReLU32"])
def test_trajectory_follows_the_definition(edge: str, isa: str) -> None:
    """Adam, 50 steps, β 2, from a random start."""
    recipe = recipe_for(make_edge(edge), steps=50)
    (z, report), (expected, expected_report) = solve_both(recipe, randn(2, *recipe.input_shape))
    assert relative(z, expected) < 1e-3
    np.testing.assert_allclose(report.objective, expected_report.objective, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"tv_beta": 1.0},
        {"tv_beta": 1.5},
        {"tv_beta": 3.0},
        {"optimizer": "amsgrad"},
        {"optimizer": "sgd", "lr": 1e-4},
        {"optimizer": "sgd", "lr": 1e-4, "momentum": 0.9},
        {"schedule": "cosine"},
        {"schedule": "cosine", "optimizer": "sgd", "lr": 1e-4},
        {"clamp": None},
        {"clamp": (0.2, 0.7)},
        {"betas": (0.5, 0.9), "eps": 1e-3},
        {"tv_weight": 0.0},
        {"steps": 0},
        {"steps": 1},
        {"keep": "best", "lr": 0.5},
        {"tolerance": 1e-2, "steps": 300},
        {"tolerance": 2e-2, "patience": 4, "steps": 300, "keep": "best"},
        {"optimizer": "lbfgs", "steps": 15},
        {"optimizer": "lbfgs", "steps": 10, "tv_beta": 1.5},
        {"optimizer": "lbfgs", "steps": 15, "clamp": None},
        {"optimizer": "lbfgs", "steps": 0},
        {"optimizer": "lbfgs", "tolerance": 3e-2, "patience": 2, "clamp": (0.2, 0.7)},
    ],
    ids=str,
)
def test_every_option_means_what_the_definition_says(options: dict, isa: str) -> None:
    recipe = recipe_for(make_edge("conv1"), **{"steps": 30, **options})
    (z, report), (expected, expected_report) = solve_both(recipe, randn(3, 1, 28, 28) * 0.3, images=3)
    assert relative(z, expected) < 1e-3
    np.testing.assert_array_equal(report.steps, expected_report.steps)
    np.testing.assert_array_equal(report.converged, expected_report.converged)
    np.testing.assert_allclose(report.objective, expected_report.objective, rtol=1e-3, atol=1e-6)


def test_constant_start_reaches_the_objective_of_the_definition() -> None:
    """From a constant start whole pool windows tie and trajectories part; the objective reached is the same."""
    recipe = recipe_for(make_edge("ReLU2"), steps=500)
    start = np.zeros((1, 28, 28), np.float32)
    (_, report), (_, expected) = solve_both(recipe, start, images=8)
    assert abs(report.objective.mean() / expected.objective.mean() - 1) < 0.01


@pytest.mark.parametrize("optimizer", ["adam", "amsgrad", "sgd", "lbfgs", "exact"])
@pytest.mark.parametrize("edge", ["conv1", "ReLU2", "conv11", "shadow-ReLU22"])
def test_solver_gives_an_image_one_answer(edge: str, optimizer: str, isa: str) -> None:
    """Whatever the batch, its order, the number of threads, and who else is in flight when images stop early."""
    if optimizer == "exact" and edge not in ("conv1", "conv11"):
        pytest.skip("needs an affine edge")
    stopping = {"tolerance": 2e-2, "patience": 2, "keep": "best"} if optimizer != "exact" else {}
    lr = 1e-3 if optimizer == "sgd" else 3e-2
    steps = 12 if edge == "shadow-ReLU22" else 40  # the former takes as long
    recipe = recipe_for(make_edge(edge), steps=steps, optimizer=optimizer, lr=lr, clamp=None, **stopping)
    start = randn(7, *recipe.input_shape, seed=1)
    targets = randn(7, *recipe.input_shape, seed=2) * np.linspace(0.01, 3, 7, dtype=np.float32)[:, None, None, None]
    features = reference(recipe.edge, targets).astype(np.float32)
    whole, report, finished = CpuSolver(recipe, 1, block=1).solve(features, start)
    assert finished
    if stopping and edge == "ReLU2" and optimizer != "sgd":
        assert len(set(report.steps)) > 2
    order = np.array([5, 2, 6, 0, 3, 1, 4])
    for threads, block in ((1, 3), (2, 0), (2, 2), (1, 16)):
        z, again, _ = CpuSolver(recipe, threads, block).solve(features[order], start[order])
        np.testing.assert_array_equal(z, whole[order])
        for name in ("objective", "steps", "converged"):
            np.testing.assert_array_equal(getattr(again, name), getattr(report, name)[order])
    alone = CpuSolver(recipe, 2)
    for i in (0, 3, 6):
        z, one, _ = alone.solve(features[i : i + 1], start[i])
        np.testing.assert_array_equal(z[0], whole[i])
        assert one.objective[0] == report.objective[i]


# Unpadded convolutions behind the first go back in the adjoint form; pools overlap, and tile.
POOLED = (
    nn.Sequential(nn.Conv2d(3, 24, 5), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(24, 32, 3), nn.MaxPool2d(2)),
    nn.Sequential(nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), nn.LeakyReLU(), nn.Conv2d(8, 16, 5), nn.MaxPool2d((2, 3))),
    nn.Sequential(nn.Conv2d(1, 16, 5), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16 * 23 * 14, 70), nn.Linear(70, 9)),
)


@pytest.mark.parametrize("edge", POOLED, ids=["three channels", "one channel", "linear"])
def test_threads_share_an_image(edge: nn.Module, isa: str) -> None:
    """Large images, of which there are fewer than threads: bit for bit as one thread alone."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for layer in edge:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.reset_parameters()
    channels = edge[0].in_channels
    recipe = recipe_for(exported((channels, 99, 61), edge), steps=6)
    (z, _), (expected, _) = solve_both(recipe, randn(*recipe.input_shape, seed=6), images=1)
    assert relative(z, expected) < 1e-3
    features = reference(recipe.edge, randn(3, *recipe.input_shape, seed=7)).astype(np.float32)
    start = randn(*recipe.input_shape, seed=6)
    one, _, _ = CpuSolver(recipe, 1).solve(features, start)
    for threads in (2, 3, 7):
        for images in (1, 3):
            z, _, _ = CpuSolver(recipe, threads).solve(features[:images], start)
            np.testing.assert_array_equal(z, one[:images])
    adjoint = any("winograd adjoint" in kernel for kernel in CpuSolver(recipe, 1).kernels)
    assert adjoint == (sum(isinstance(layer, nn.Conv2d) for layer in edge) > 1)


# ---- features whose channels come last -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 9), (16, 8, 8), (33, 13, 6), (64, 32, 32)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8"])
def test_features_channels_last(shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read where they lie, by a thread of its own or several to an image, to what those in the usual layout give."""
    layers = (nn.Conv2d(shape[0], 8, 1), nn.ReLU())  # of the last shape enough that threads share an image
    engine = {threads: CpuBackend().compile(exported(shape, *layers), "float32", threads) for threads in (1, 3)}
    scale = {"scale": 0.02, "zero_point": 3.0} if dtype in ("uint8", "int8") else {}
    monkeypatch.setattr(tensors.Source, "chunk", None)
    for count in (0, 1, 5):
        x = torch.from_numpy(50 * randn(count, *shape)).to(getattr(torch, dtype))
        turned = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for threads in engine:
            results = [np.empty((count, 8, *shape[1:]), np.float32) for _ in "ab"]
            for features, out in zip((x, turned), results, strict=True):
                assert engine[threads].run_raw(tensors.source(features, shape, **scale), out)
            np.testing.assert_array_equal(*results)
    if not scale:
        turned[-1, -1, -1, -1] = torch.nan
        assert not engine[3].run_raw(tensors.source(turned, shape), results[0])


def test_what_channels_last_leaves_to_others() -> None:
    """Scales that differ by channel, and layouts that are neither."""
    engine = CpuBackend().compile(exported((4, 6, 5), nn.Conv2d(4, 2, 1)), "float32", 1)
    out = np.empty((3, 2, 6, 5), np.float32)
    q = np.zeros((3, 6, 5, 4), np.uint8).transpose(0, 3, 1, 2)
    assert not engine.run_raw(tensors.source(q, (4, 6, 5), scale=np.linspace(0.1, 0.2, 4)), out)
    assert not engine.run_raw(tensors.source(np.asfortranarray(randn(3, 4, 6, 5)), (4, 6, 5)), out)


# ---- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "exact"])
def test_an_interrupted_solver_gives_what_it_has(optimizer: str, threads: int) -> None:
    edge = make_edge("conv1" if optimizer == "exact" else "ReLU2")
    recipe = recipe_for(edge, steps=10_000_000, optimizer=optimizer, clamp=None)
    features = np.tile(randn(100, *recipe.feature_shape), (300, 1, 1, 1))  # more than there is time for
    start = randn(1, 28, 28)
    tell = InterruptAt(2)
    begin = time.monotonic()
    z, report, finished = CpuSolver(recipe, threads, block=3).solve(features, start, tell)
    assert not finished
    assert time.monotonic() - begin < 5
    assert len(tell.told) == 2
    begun = int((~np.isnan(report.objective)).sum())
    assert 0 < begun < len(z)
    assert tell.told[-1][0] <= begun
    assert report.steps.sum() >= tell.told[-1][1] > 0
    np.testing.assert_array_equal(report.steps[begun:], 0)
    np.testing.assert_array_equal(z[begun:], np.broadcast_to(start, z[begun:].shape))
    module = as_module(edge, torch.float64)
    for i in {0, begun // 2, begun - 1}:  # the objectives are those of the images
        image = torch.from_numpy(z[i : i + 1]).double()
        residual = module(image) - torch.from_numpy(features[i : i + 1]).double()
        objective = residual.square().sum() + recipe.tv_weight * total_variation(image, recipe.tv_beta).sum()
        np.testing.assert_allclose(report.objective[i], float(objective), rtol=1e-4)


def test_solver_can_be_interrupted() -> None:
    solver = CpuBackend().compile_solver(recipe_for(make_edge("ReLU2"), steps=10_000_000), "float32", 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    told = []

    def tell(images: int, steps: int) -> None:
        """Ctrl-C shortly after the first time: by then the solver is at it, however busy the machine."""
        told.append(time.monotonic())
        if len(told) == 1:
            threading.Timer(0.05, _thread.interrupt_main).start()

    features, start = randn(4, *make_edge("ReLU2").output_shape), np.zeros((1, 28, 28), np.float32)
    *_, finished = solver.solve(features, start, tell)
    assert not finished
    assert time.monotonic() - told[0] < 2


def test_an_error_of_the_progress_function_comes_through() -> None:
    def fail(images: int, steps: int) -> None:
        raise ZeroDivisionError

    solver = CpuBackend().compile_solver(recipe_for(make_edge("ReLU2"), steps=10_000_000), "float32", 2)
    with pytest.raises(ZeroDivisionError):
        solver.solve(randn(4, *make_edge("ReLU2").output_shape), np.zeros((1, 28, 28), np.float32), fail)


# ---- the engine as a resident of a process -------------------------------------------------------------------------


def test_several_threads_at_once() -> None:
    network = make_edge("ReLU22")
    engine = fastinv.compile(network, backend="cpu", threads=2)
    inputs = [randn(9, *network.input_shape, seed=s) for s in range(6)]
    alone = [engine(x) for x in inputs]
    results: list[np.ndarray | None] = [None] * len(inputs)

    def work(k: int) -> None:
        for _ in range(5):
            results[k] = engine(inputs[k])

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, expected in zip(results, alone, strict=True):
        np.testing.assert_array_equal(result, expected)


def in_a_child(check: Callable[[], bool]) -> None:
    """Assert in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)  # or pytest would go on twice
    deadline = time.monotonic() + 20
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise AssertionError("the child hangs")
        time.sleep(0.001)
    assert os.waitstatus_to_exitcode(done[1]) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # 3.12 warns of fork beside threads
def test_works_after_fork() -> None:
    network = make_edge("conv11")
    engine = fastinv.compile(network, backend="cpu", threads=2)
    x = randn(8, *network.input_shape)
    expected = engine(x)  # the pool now has threads, which a fork does not take along
    in_a_child(lambda: np.array_equal(engine(x), expected))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_works_after_a_fork_amid_the_calls_of_other_threads() -> None:
    """Whose memory the child finds as between two calls: of 115 forks 3 hung when it could be amid a change."""
    network = exported((1, 2, 2), nn.Conv2d(1, 1, 1))
    engine, x = fastinv.compile(network, backend="cpu", threads=1), randn(1, 1, 2, 2)
    expected, stop = engine(x), threading.Event()

    def work() -> None:
        while not stop.is_set():
            engine(x)

    others = [threading.Thread(target=work) for _ in range(3)]
    for thread in others:
        thread.start()
    try:
        for _ in range(100):
            in_a_child(lambda: np.array_equal(engine(x), expected))
    finally:
        stop.set()
        for thread in others:
            thread.join()


def test_threads_that_cannot_be_started_are_done_without() -> None:
    """Now, and where they can be later."""
    code = """
import os
import resource
import numpy as np
import fastinv
from fastinv.network import Network, Step
from fastinv.ops.conv2d import Conv2d

weights = {"weight": np.ones((4, 4, 3, 3), np.float32), "bias": np.zeros(4, np.float32)}
engine = fastinv.compile(Network((4, 32, 32), (Step(Conv2d(), (0,), weights),)), backend="cpu", threads=64)
x = np.ones((256, 4, 32, 32), np.float32)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_STACK, (8 * 2**20, -1))
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, before[1]))  # room for some ten stacks
first = engine(x)
few = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_AS, before)
assert (first == 36).all() and (engine(x) == 36).all()
assert few < len(os.listdir("/proc/self/task"))
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_callbacks_keep_denormal_numbers() -> None:
    """The solver flushes them to zero; what it calls is not its own."""
    halves = []
    solver = CpuBackend().compile_solver(recipe_for(make_edge("conv1"), steps=200_000, optimizer="sgd"), "float32", 1)
    tiny = float(np.finfo(np.float64).tiny)

    def tell(images: int, steps: int) -> None:
        halves.append(tiny * float(np.float64(0.5)))
        if len(halves) == 2:
            raise KeyboardInterrupt

    solver.solve(randn(64, *make_edge("conv1").output_shape), np.zeros((1, 28, 28), np.float32), tell)
    assert halves
    assert all(half > 0 for half in halves)


def test_steps_that_nothing_depends_on_change_nothing(isa: str) -> None:
    unread, read = (
        Step(Conv2d(), (0,), {"weight": randn(4, 3, 3, 3, seed=seed), "bias": np.zeros(4, np.float32)})
        for seed in (1, 2)
    )
    network = Network((3, 8, 8), (unread, read))
    x = randn(3, 3, 8, 8)
    np.testing.assert_array_equal(run(network, x), run(Network((3, 8, 8), (read,)), x))
    assert [row["step"] for row in fastinv.compile(network, backend="cpu").describe() if row["op"] == "conv2d"] == [1]
    check_gradient(network)


@pytest.mark.parametrize("shape", [(5, 8, 16), (19, 16, 24), (128, 3, 5), (256, 7, 9), (131, 12, 32)])
@pytest.mark.parametrize("images", [1, 4])
def test_any_size_is_turned_to_channels_last_and_back(shape: tuple[int, ...], images: int, isa: str) -> None:
    pool = nn.MaxPool2d(3, 1, 1).eval()
    x = randn(images, *shape)
    found = fastinv.compile(exported(shape, pool), backend="cpu", threads=2)
    assert [row["op"] for row in found.describe()] == ["layout", "max_pool2d", "layout"]
    np.testing.assert_array_equal(found(x), pool(torch.from_numpy(x)).numpy())


def test_describe_names_a_kernel_for_every_step() -> None:
    plan = fastinv.compile(make_edge("ReLU22"), backend="cpu").describe()
    layers = [row for row in plan if row["op"] != "layout"]
    assert [row["op"] for row in layers] == ["conv2d", "conv2d", "max_pool2d", "conv2d", "conv2d"]
    assert all(row["kernel"] and row["bytes"] > 0 for row in layers)
    assert layers[0]["flops"] == 2 * 27 * 64 * 32 * 32
    assert plan[0]["op"] == plan[-1]["op"] == "layout"
    assert {row["split"] for row in layers} == {"images", "images, and within one"}
    assert "seconds" not in plan[0]


def test_describe_measures_on_request() -> None:
    plan = fastinv.compile(make_edge("conv11"), backend="cpu").describe(measure=True)
    assert all(row["seconds"] > 0 for row in plan)
    assert all((row["gflops"] > 0) == (row["flops"] > 0) for row in plan)
