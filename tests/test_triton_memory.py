"""Memory of the GPU: what is kept, what makes room, and what happens where there is not enough."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import DEVICE

from fastinv.backends.cuda import batch as cuda_batch
from fastinv.backends.cuda import device as cuda_device
from fastinv.backends.cuda import host as cuda_host
from fastinv.backends.cuda import solver as cuda_solver
from fastinv.backends.cuda import stream as cuda_stream
from fastinv.backends.cuda.batch import Batch
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.backends.cuda.plan import MOST_BYTES, Arena, bucket
from fastinv.backends.cuda.solver import CudaSolver
from fastinv.benchmark import decoders, solvers
from fastinv.errors import BackendError
from fastinv.inverters import RMLE

NETWORK = exported((4, 3, 4), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Tanh())
EDGE = exported((2, 6, 8), nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
RECIPE = RMLE(EDGE, (2, 6, 8), mean=(0.5, 0.4), std=(0.3, 0.2), steps=4, lr=0.05)


def test_what_is_kept_makes_room_for_others() -> None:
    """Before a batch is halved, what does not run gives back its memory; its next call takes it again."""
    device = torch.empty(0, device=DEVICE).device
    network = CudaNetwork(NETWORK, "float32", device)
    solver = CudaSolver(RECIPE, "float32", device, most=4)
    x = randn(3, 4, 3, 4)
    init = np.zeros(RECIPE.image_shape, np.float32)

    def run() -> list[np.ndarray]:
        out = np.zeros((3, *RECIPE.image_shape), np.float32)
        network.run(x, out)
        return [out, solver.solve(x, init)[0]]

    calls: list[int] = []

    other = SimpleNamespace(release=lambda: None, most=8)

    def work() -> int:
        calls.append(other.most)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return other.most

    before = run()
    assert cuda_device.halving(work, other, device) == 8
    assert calls == [8, 8]
    for keeper in (network, solver):
        assert not keeper.release()
    for found, expected in zip(run(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def graphs_of_few_images(module: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """There is memory for CUDA graphs of so many images from now on; those that were made."""
    made: list[int] = []
    images = [0]
    bind = Arena.bind

    def noted(arena: Arena, count: int, *arguments: Any) -> Any:
        images[0] = count
        return bind(arena, count, *arguments)

    def repeatable(launches: Any, device: torch.device) -> Any:
        if images[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made.append(images[0])
        return cuda_device.repeatable(launches, device)

    monkeypatch.setattr(Arena, "bind", noted)
    monkeypatch.setattr(module, "repeatable", repeatable)
    return made


@pytest.mark.filterwarnings("ignore:the GPU has no room:RuntimeWarning")
def test_graphs_without_memory_halve_a_network_s_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    network, device = NETWORK, torch.device(DEVICE)
    x = randn(5, 4, 3, 4)
    expected = np.empty((5, *network.output_shape), np.float32)
    CudaNetwork(network, "float32", device).run(x, expected)
    made = graphs_of_few_images(cuda_stream, 2, monkeypatch)
    compiled = CudaNetwork(network, "float32", device, most=8)
    out = np.empty_like(expected)
    with pytest.warns(RuntimeWarning, match="no room for 4 images at once: going on with 2"):
        compiled.run(x, out)
    np.testing.assert_array_equal(out, expected)
    assert made == [2, 2, 1]  # in either slot, and the last
    there = torch.from_numpy(x).to(DEVICE)
    for most in (8, 2):
        compiled.most = most
        np.testing.assert_array_equal(compiled.run_there(there, "float32").cpu().numpy(), expected)
    assert compiled.most == 2


@pytest.mark.filterwarnings("ignore:the GPU has no room:RuntimeWarning")
@pytest.mark.parametrize("where", ["host", "device"])
def test_graphs_without_memory_halve_a_solver_s_batch(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, device = dataclasses.replace(RECIPE, steps=2), torch.device(DEVICE)
    x, start = randn(3, *recipe.feature_shape), np.zeros(recipe.image_shape, np.float32)
    given, init = (torch.from_numpy(values).to(DEVICE) for values in (x, start))

    def solve() -> Any:
        solver = CudaSolver(recipe, "float32", device, most=4)
        return solver.solve(x, start) if where == "host" else solver.solve_there(given, init, "float32")

    expected, told, _ = solve()
    made = graphs_of_few_images(cuda_batch, 1, monkeypatch)
    with pytest.warns(RuntimeWarning, match="no room for 4 images at once: going on with 2"):
        images, report, finished = solve()
    assert finished
    np.testing.assert_array_equal(report.steps, told.steps)
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-6)
    assert relative(np.array(images.tolist()), np.array(expected.tolist())) < 1e-6
    assert set(made) == {1}


def test_what_was_solved_before_memory_ran_out_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, device = dataclasses.replace(RECIPE, steps=1), torch.device(DEVICE)
    solver = CudaSolver(recipe, "float32", device, most=4)
    x, start = randn(4, *recipe.feature_shape), np.zeros(recipe.image_shape, np.float32)
    expected, told, _ = solver.solve(x, start)
    begun: list[int] = []
    solve = Batch.solve

    def scarce(batch: Batch, progress: Any, done: int, *arguments: Any) -> bool:
        begun.append(done)
        if begun == [0, 2]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(batch, progress, done, *arguments)

    monkeypatch.setattr(Batch, "solve", scarce)
    cuda_device._release_idle()
    with pytest.warns(RuntimeWarning, match="no room for 4 images at once: going on with 2"):
        images, report, finished = solver.solve(x, start)
    assert finished
    assert begun == [0, 2, 2, 3]
    assert relative(images, expected) < 1e-6
    np.testing.assert_array_equal(report.steps, told.steps)


def test_no_pinned_memory_is_told_before_batches_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would not help, and end in what is not so: that the GPU has no room."""
    device, x = torch.device(DEVICE), randn(3, *RECIPE.feature_shape)
    network, solver = CudaNetwork(NETWORK, "float32", device, most=4), CudaSolver(RECIPE, "float32", device, most=4)

    def scarce(*arguments: Any) -> None:
        with cuda_host.room_for_pinned_pieces():
            raise RuntimeError("CUDA error: out of memory")

    for module in (cuda_stream, cuda_solver):
        monkeypatch.setattr(module, "Upload", scarce)
    said = r"no room for pinned memory.*: free memory on the host"
    with pytest.raises(BackendError, match=said):
        network.run(x, np.empty((3, *NETWORK.output_shape), np.float32))
    with pytest.raises(BackendError, match=said):
        solver.solve(x, np.zeros(RECIPE.image_shape, np.float32))
    assert network.most == solver.most == 4


def test_what_is_not_used_any_more_gives_back_its_memory_at_once() -> None:
    """Without the garbage collector, which may come late."""
    device = torch.empty(0, device=DEVICE).device
    gc.collect()
    gc.disable()
    try:
        x, out = randn(3, 4, 3, 4), np.zeros((3, *RECIPE.image_shape), np.float32)
        kept: list[weakref.ref] = []
        # The first reads features where they are, and writes images where they are to be; the other does neither.
        for compiled, values, results in ((NETWORK, x, out), (RECIPE.edge, out, np.zeros_like(x))):
            network = CudaNetwork(compiled, "float32", device)
            network.run(values, results)
            for _ in range(2):  # the second is a graph
                network.run_there(torch.from_numpy(values).to(device), "float32")
            kept += map(weakref.ref, (network, network._memory, network._stream._slots[0].features))
            del network
        for optimizer in ("adam", "lbfgs"):
            recipe = dataclasses.replace(RECIPE, steps=2, optimizer=optimizer)
            solver = CudaSolver(recipe, "float32", device, most=4)
            solver.solve(x, np.zeros(RECIPE.image_shape, np.float32))
            kept += map(weakref.ref, (solver, solver._batch, solver._batch._memory))
            del solver
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_batches_of_about_the_same_size_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    network = CudaNetwork(NETWORK, "float32", device, most=8)
    made = graphs_of_few_images(cuda_stream, 8, monkeypatch)
    for count in (5, 8, 7, 1):
        x = randn(count, 4, 3, 4)
        out = np.empty((count, *NETWORK.output_shape), np.float32)
        network.run(x, out)
        assert relative(out, reference(NETWORK, x)) < 1e-5
    assert made == [8, 1]
    solver = CudaSolver(dataclasses.replace(RECIPE, steps=1), "float32", device, most=8)
    start = torch.zeros(RECIPE.image_shape, device=DEVICE)
    made = graphs_of_few_images(cuda_batch, 8, monkeypatch)
    for count in (3, 4):
        solver.solve_there(torch.from_numpy(randn(count, *EDGE.output_shape)).to(DEVICE), start, "float32")
    assert set(made) == {4}
    assert len(made) == len(solver._arenas)


def test_a_call_from_the_host_is_some_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each a graph's: of a power of two, or the largest there is."""
    monkeypatch.setattr(cuda_stream, "LEAST", 2**11)
    image = 2**8 * -(-4 * int(np.prod(NETWORK.output_shape)) // 2**8)
    monkeypatch.setattr(cuda_stream, "MOST_RESULTS", 11 * image)
    network = CudaNetwork(NETWORK, "float32", torch.device(DEVICE))
    least = network._stream._least
    assert 1 < least < 8
    assert network._stream.most == 11
    sizes = [network._stream.size_of(count, 100) for count in (0, 1, 8 * 4, 8 * 4 + 1, 8 * 8 + 1, 10**6)]
    assert sizes == [bucket(least, 11), bucket(least, 11), 4, 8, 11, 11]
    made = graphs_of_few_images(cuda_stream, 11, monkeypatch)
    for count in (0, 1, 35, 100):
        x = randn(count, 4, 3, 4)
        out = np.empty((count, *NETWORK.output_shape), np.float32)
        network.run(x, out)
        assert relative(out, reference(NETWORK, x)) < 1e-5 or count == 0
    assert set(made) == {1, 4, 8, 11}
    for slot in network._stream._slots:
        assert slot.host.nbytes <= 11 * image


def test_what_a_call_takes_stays_under_the_cap() -> None:
    """Of the benchmarks' networks and solvers: the arena, and all else that grows with the batch."""
    held = []
    for subject in (*decoders(), *solvers()):
        if subject.recipe is None:
            network = CudaNetwork(subject.network, "bfloat16", torch.device(DEVICE))
            doors = sum(int(np.prod(shape)) for shape in (subject.network.input_shape, subject.network.output_shape))
            held.append(network._arena.bytes(network.most) + 2 * 4 * doors * network.most)
        else:
            solver = CudaSolver(subject.recipe, "float32", torch.device(DEVICE))
            arena = max(arena.bytes(solver.most) for arena in solver._arenas.values())
            outside = sum(buffer.bytes(solver.most) for buffer in solver._outside)
            held.append(arena + outside + 4 * solver._features * -(-solver.most // 2))
    assert max(held) <= MOST_BYTES
    assert max(held) > 0.9 * MOST_BYTES  # the largest are held down by it
