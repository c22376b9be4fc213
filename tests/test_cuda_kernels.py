"""The kernels in CUDA C++: a thread block's stand-in on the host against the definition; what nvcc made of them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from checks import exported, randn, relative
from machine_code import dump, kernels, touched_in_flight
from torch import nn

pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")
pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton import launch
from interpreter import DEVICE, check_solver, recipe_for, solve_by_definition, solver_on

from fastinv import _cuda
from fastinv.backends.cuda import methods as cuda_methods
from fastinv.backends.cuda import native as cuda_native
from fastinv.network import Network


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU())


EDGES: dict[str, Any] = {
    "MNIST conv1": (lambda: nn.Conv2d(1, 8, 5), (1, 28, 28)),
    "CIFAR conv11": (lambda: nn.Conv2d(3, 64, 3, padding=1), (3, 32, 32)),
    "one channel": (lambda: nn.Conv2d(1, 16, 3, padding=2), (1, 9, 13)),
    "MNIST ReLU2": (lambda: two_layers(), (1, 28, 28)),
    "two layers": (lambda: two_layers(), (1, 16, 24)),
    "two larger layers": (lambda: two_layers(), (1, 28, 36)),
    "few rows": (lambda: nn.Conv2d(3, 16, 3), (3, 3, 21)),
    "odd columns": (lambda: nn.Conv2d(1, 8, 5, padding=1), (1, 20, 25)),
    "few pixels": (lambda: nn.Conv2d(1, 8, 5, padding=2), (1, 5, 6)),
    "three channels": (lambda: nn.Conv2d(3, 64, 3, padding=1), (3, 21, 13)),
    "few lines": (lambda: nn.Conv2d(3, 64, 3, padding=1), (3, 3, 32)),
}


def edge_of(name: str) -> Network:
    torch.manual_seed(0)
    module, shape = EDGES[name]
    return exported(shape, module())


def kernel_for(recipe: Any, images: int) -> str:
    _, problem = chip_of(recipe)._filled({}, None, images)
    return type(problem).__name__


def chip_of(recipe: Any) -> cuda_native.OnChipDescent:
    objective = cuda_methods.Objective(recipe, "float32", torch.device(DEVICE))
    found = cuda_methods.on_chip(objective, cuda_methods.descent_rule(objective))
    assert found is not None
    return found[0]


def is_on_chip(recipe: Any) -> bool:
    method = solver_on(recipe)._method
    return method.other is None and len(method.turn) == 1


OPTIONS: list[dict[str, Any]] = [
    {},
    {"steps": 0},
    {"tv_weight": 0.0, "optimizer": "amsgrad", "betas": (0.5, 0.6), "eps": 1e-3},
    {"tv_beta": 1.0, "tv_weight": 0.3},
    {"tv_beta": 1.5, "optimizer": "sgd", "lr": 1e-3, "momentum": 0.9},
    {"tv_beta": 3.0, "schedule": "cosine"},
    {"clamp": (0.2, 0.7), "mean": 0.5, "std": 0.3, "optimizer": "sgd", "lr": 1e-3, "schedule": "cosine"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "name", ["MNIST conv1", "CIFAR conv11", "one channel", "MNIST ReLU2", "two layers", "few rows"]
)
def test_descent_on_chip(name: str, options: dict[str, Any]) -> None:
    steps = 3 if "ReLU2" in name else 20  # later a pool's largest value is another one than in float64
    recipe = recipe_for(edge_of(name), **{"steps": steps, "lr": 0.02} | options)
    assert is_on_chip(recipe)
    check_solver(recipe, count=3, most=2)


# Edges of which a block can have several images, on tensor cores: sixteen of one channel, four of three.
BANDED = ["MNIST conv1", "one channel", "odd columns", "few pixels", "CIFAR conv11", "three channels", "few lines"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BANDED)
def test_several_images_together(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(edge_of(name), **{"steps": 4, "lr": 0.02} | options)
    together = options.get("optimizer", "adam") == "adam" and options.get("tv_beta", 2.0) == 2.0
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    many = 132 * (4 if recipe.input_shape[0] == 3 else 8)
    assert kernel_for(recipe, many) == ("BandedForm" if together else "QuadraticForm")
    assert kernel_for(recipe, many - 1) == "QuadraticForm"
    monkeypatch.setattr(launch, "processors", lambda device: 1)
    check_solver(recipe, count=7 if recipe.input_shape[0] == 3 else 21, most=20)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the stand-in")
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_the_order_of_threads_changes_nothing(name: str, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two barriers, nor what memory holds at first: what races gives two results."""
    monkeypatch.setattr(launch, "processors", lambda device: 0 if several else 132)
    recipe = recipe_for(edge_of(name), steps=3, lr=0.02)
    start, features = randn(7, *recipe.input_shape), randn(7, *recipe.edge.output_shape)
    forward, _, _ = solver_on(recipe).solve(features, start)
    monkeypatch.setattr(cuda_native, "HOST", -2)
    backward, _, _ = solver_on(recipe).solve(features, start)
    np.testing.assert_array_equal(forward, backward)
    assert np.isfinite(forward).all()


def test_halves_hold_what_float32_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large features, small ones, and weights of very different sizes."""
    monkeypatch.setattr(launch, "processors", lambda device: 0)  # no images are few
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 8, 5)
    with torch.no_grad():
        conv.weight *= torch.logspace(-4, 0, 25).reshape(5, 5)
    recipe = recipe_for(exported((1, 12, 17), conv), steps=10, tv_weight=0.0)
    start = randn(6, 1, 12, 17)
    for size in (1e-3, 1.0, 1e4):
        features = randn(6, *recipe.edge.output_shape) * np.float32(size)
        z, _, _ = solver_on(recipe).solve(features, start)
        expected, _ = solve_by_definition(recipe, features, start)
        assert relative(z - start, expected - start) < 1e-5


def test_many_steps_are_a_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(edge_of("one channel"), steps=10, optimizer="amsgrad")
    start, features = randn(2, 1, 9, 13), randn(2, *recipe.edge.output_shape)
    whole, told, _ = solver_on(recipe).solve(features, start)
    monkeypatch.setattr(cuda_native, "MOST_STEPS", 4)
    solver = solver_on(recipe)
    assert solver._method.turns == 3
    z, report, _ = solver.solve(features, start)
    np.testing.assert_array_equal(z, whole)
    assert report.steps.tolist() == told.steps.tolist() == [10, 10]


@pytest.mark.parametrize("name", ["few rows", "two layers"])
def test_it_gives_what_triton_s_kernels_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(edge_of(name), steps=3, tv_beta=1.5, clamp=(0.1, 0.9))
    start, features = randn(3, *recipe.input_shape), randn(3, *recipe.edge.output_shape)
    z, report, _ = solver_on(recipe).solve(features, start)
    monkeypatch.setattr(cuda_native, "extension", lambda: None)
    assert not is_on_chip(recipe)
    expected, told, _ = solver_on(recipe).solve(features, start)
    assert relative(z, expected) < 1e-5
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-5)


@pytest.mark.parametrize("tied", ["all", "rows", "columns"])
def test_of_equal_values_the_first_is_the_largest(tied: str) -> None:
    """A start that is constant, or so in all rows or columns, ties windows of the pool."""
    recipe = recipe_for(edge_of("MNIST ReLU2"), steps=1, optimizer="sgd", lr=0.1)
    start = {
        "all": np.full((1, 1, 28, 28), 0.3, np.float32),
        "rows": randn(1, 1, 28, 1).repeat(28, 3),
        "columns": randn(1, 1, 1, 28).repeat(28, 2),
    }[tied]
    features = randn(1, *recipe.edge.output_shape)
    assert is_on_chip(recipe)
    z, _, _ = solver_on(recipe).solve(features, start)
    expected, _ = solve_by_definition(recipe, features, start)
    assert relative(z - start, expected - start) < 1e-5


SIZES = [(1.0, 1e4), (1.0, 1e-4), (1.0, 0.0), (300.0, 1.0), (1e-3, 1.0)]  # of images and of features


@pytest.mark.parametrize(
    ("name", "images", "features"),
    [("MNIST ReLU2", *sizes) for sizes in SIZES] + [("two layers", 1.0, 1.0), ("two larger layers", 1.0, 1.0)],
)
def test_two_layers_of_any_size(name: str, images: float, features: float) -> None:
    """Products in float16, high and low: their range is no limit. Five images are more than a block has."""
    recipe = recipe_for(edge_of(name), steps=1, tv_weight=0.0, optimizer="sgd", lr=0.1)
    start = randn(5, *recipe.input_shape) * np.float32(images)
    target = randn(5, *recipe.edge.output_shape, seed=1) * np.float32(features)
    target[3] /= 100  # each image has its own range
    z, _, _ = solver_on(recipe).solve(target, start)
    expected, _ = solve_by_definition(recipe, target, start)
    precision = np.finfo(np.float32).eps * abs(start).max(axis=(1, 2, 3))  # of z: steps may be far smaller
    step = abs(expected - start).max(axis=(1, 2, 3))
    assert np.all(abs(z - expected).max(axis=(1, 2, 3)) < 1e-5 * step + precision)


@pytest.mark.parametrize(
    ("name", "processors"), [("MNIST ReLU2", 1), ("one channel", 0), ("one channel", 132), ("three channels", 1)]
)
def test_images_that_are_done_are_left_alone(name: str, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    recipe = recipe_for(edge_of(name))
    chip = chip_of(recipe)
    start = torch.from_numpy(randn(5, *recipe.input_shape)).reshape(5, -1).to(DEVICE)
    given = start if "ReLU2" not in name else torch.from_numpy(randn(5, *recipe.edge.output_shape)).to(DEVICE)

    def run(running: list[int]) -> tuple[torch.Tensor, list[int], list[int]]:
        z = start.clone()
        state = {key: torch.zeros_like(z) for key in ("first", "second", "third")}
        state["running"] = torch.tensor(running, dtype=torch.int32, device=DEVICE)
        state["taken"] = torch.zeros(5, dtype=torch.int32, device=DEVICE)
        chip.launch(z, given, state)()
        return z, state["running"].tolist(), state["taken"].tolist()

    whole, _, _ = run([1, 1, 1, 1, 1])
    z, running, taken = run([0, 1, 2, 2, 1])
    assert (running, taken) == ([0, 2, 2, 2, 2], [0, 2, 0, 0, 2])
    assert torch.equal(z[[1, 4]], whole[[1, 4]])
    assert torch.equal(z[[0, 2, 3]], start[[0, 2, 3]])
    assert not torch.equal(whole, start)


@pytest.mark.parametrize(
    ("module", "shape", "options"),
    [
        (nn.Conv2d(1, 8, 5), (1, 80, 80), {}),  # more pixels than threads
        (nn.Conv2d(2, 24, 3), (2, 9, 9), {}),
        (nn.Conv2d(1, 32, 7), (1, 20, 20), {}),
        (nn.Conv2d(1, 8, 5), (1, 28, 28), {"tolerance": 1e-3}),
        (nn.Conv2d(1, 8, 5), (1, 28, 28), {"keep": "best"}),
        (two_layers(), (1, 16, 16), {"lr": 2000.0}),
        (nn.Sequential(nn.Conv2d(1, 8, 5), nn.ReLU()), (1, 28, 28), {}),
        (two_layers(), (1, 30, 28), {}),
        (two_layers(), (1, 64, 64), {}),
        (nn.Sequential(*two_layers()[:4]), (1, 28, 28), {}),
        (nn.Sequential(*two_layers()[:3], nn.Conv2d(8, 24, 5), nn.ReLU()), (1, 28, 28), {}),
    ],
    ids=str,
)
def test_what_is_left_to_triton(module: nn.Module, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    assert not is_on_chip(recipe_for(exported(shape, module), **options))


def test_what_has_no_room_on_a_smaller_gpu_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shared memory a block can have 227 KiB on an H100, 99 on GPUs of compute capability 8.6, 8.9 and 12.0."""
    recipes = [recipe_for(exported((1, side, side), *two_layers())) for side in (28, 32, 40)]
    for kilobytes, expected in [(227, [True, True, True]), (99, [True, True, False]), (72, [True, False, False])]:
        monkeypatch.setattr(cuda_native, "shared_memory", lambda device, bytes=kilobytes * 1024: bytes)
        assert [is_on_chip(recipe) for recipe in recipes] == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_no_gpu_is_told() -> None:
    descent, problem = chip_of(recipe_for(edge_of("one channel")))._filled({}, None, 0)
    with pytest.raises(RuntimeError, match="the GPU cannot be used: "):
        problem.run(descent, 0, 0)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("gpu", [torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_a_driver_that_cannot_run_the_kernels_is_told(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then Triton's take their place."""
    monkeypatch.setattr(cuda_native, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.warns(RuntimeWarning, match=rf"not for the driver of {gpu} \(the GPU cannot be used: .* newer driver"):
        assert not cuda_native.usable_on(gpu)
    assert not cuda_native.usable_on(gpu)  # told once
    cuda_native._run_on_gpu.cache_clear()


def test_what_no_kernel_is_for_is_refused() -> None:
    for problem in (_cuda.QuadraticForm(), _cuda.BandedForm(), _cuda.PooledLayers()):
        assert not problem.fits(_cuda.Descent())
        with pytest.raises(ValueError, match="no kernel for this edge"):
            problem.run(_cuda.Descent(), -1, 0)


def test_the_import_needs_no_driver() -> None:
    code = "import fastinv._cuda; assert 'libcuda.so' not in open('/proc/self/maps').read()"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_nothing_spills() -> None:
    text = dump(_cuda.__file__, "--dump-resource-usage")
    assert {"sm_80", "sm_90a"} <= set(re.findall(r"arch = (\S+)", text))
    usage = [dict(re.findall(r"(\w+):(\d+)", line)) for line in text.splitlines() if "REG:" in line]
    assert len(usage) == 2 * (7 + 33)  # edges, and kinds of layers, for two architectures
    for row in usage:
        assert (row["STACK"], row["LOCAL"]) == ("0", "0")
        assert int(row["REG"]) <= 255
        assert int(row["SHARED"]) <= 1024  # static; what is asked for at the launch is checked by `fits`


def test_products_are_not_waited_for_one_by_one() -> None:
    """As a compiler makes them that cannot see that nothing comes between them; nor are their sums read too early."""
    found = [code for code in kernels(_cuda.__file__, "sm_90a") if any("HGMMA." in line for line in code)]
    assert len(found) == 30
    for code in found:
        products, waits = (sum(name in line for line in code) for name in ("HGMMA.", "WARPGROUP.DEPBAR"))
        assert waits <= 0.6 * products
        assert touched_in_flight(code) == []
        assert touched_in_flight(line for line in code if "WARPGROUP.DEPBAR" not in line) != []
