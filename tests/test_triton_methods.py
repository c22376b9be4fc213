"""rMLE's methods on the GPU beside plain steps: AᵀA, L-BFGS, the exact minimum; without a GPU in the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checks import InterruptAt, exported, randn, reference, reference_gradient, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import check_solver, recipe_for, solve_by_definition, solver_on

from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda.quadratic import quadratic_form
from fastinv.backends.torch import as_module
from fastinv.network import Network

SHAPE = (2, 7, 6)
EDGES: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(2, 24, 3, padding=1),
    "valid": lambda: nn.Conv2d(2, 24, 5),
    "full": lambda: nn.Conv2d(2, 24, 4, padding=3),
    "column": lambda: nn.Conv2d(2, 24, (3, 1)),
    "few results": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "stride 2": lambda: nn.Conv2d(2, 24, 3, stride=2, padding=1),
    "two": lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1)),
    "tanh": lambda: nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.Tanh()),
    "relu, pool": lambda: nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
}
QUADRATIC = ("conv", "valid", "full", "column")


def edge_of(name: str) -> Network:
    torch.manual_seed(0)
    return exported(SHAPE, EDGES[name]())


def times_matrix(form: Any, z: np.ndarray) -> np.ndarray:
    """H·z for images [N, C, H, W], entry by entry."""
    height, width, _ = form.shape
    taps_y, taps_x = form.weight.shape[2:4]
    around = [(0, 0), (taps_y // 2,) * 2, (taps_x // 2,) * 2, (0, 0)]
    padded = np.pad(z.transpose(0, 2, 3, 1).astype(np.float64), around)
    out = np.empty((len(z), height, width, z.shape[1]))
    for y in range(height):
        for x in range(width):
            weight = form.weight[form.row_kind[y], form.column_kind[x]]
            out[:, y, x] = np.einsum("abkc,nabk->nc", weight, padded[:, y : y + taps_y, x : x + taps_x])
    return out.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("name", EDGES)
def test_the_matrix(name: str) -> None:
    network = edge_of(name)
    form = quadratic_form(recipe_for(network, tv_weight=0.0))
    if name not in QUADRATIC:
        assert form is None
        return
    z, zero = randn(2, *SHAPE), np.zeros((2, *SHAPE), np.float32)
    expected = reference_gradient(network, z, reference(network, zero))
    assert relative(times_matrix(form, z), expected) < 1e-6


def test_the_matrix_has_the_total_variation() -> None:
    network, z = edge_of("conv"), randn(2, *SHAPE)
    plain, smooth = (quadratic_form(recipe_for(network, tv_weight=weight)) for weight in (0.0, 0.5))
    assert (plain.smooth, smooth.smooth) == (False, True)
    start = torch.from_numpy(z).double().requires_grad_(True)
    squares = sum(start.diff(dim=axis).square().sum() for axis in (2, 3))
    (expected,) = torch.autograd.grad(0.5 * squares, start)
    assert relative(times_matrix(smooth, z) - times_matrix(plain, z), expected.numpy()) < 1e-5
    assert not quadratic_form(recipe_for(network, tv_beta=1.5)).smooth


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in QUADRATIC),
        ("conv", {"tv_weight": 0.0}),
        ("full", {"lr": 0.5, "clamp": (0.1, 0.8), "mean": (0.5, 0.4), "std": (0.5, 0.3)}),
        ("column", {"tv_beta": 1.0, "steps": 4}),
        ("valid", {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.5, "schedule": "cosine"}),
        ("conv", {"lr": 0.3, "steps": 12, "tolerance": 0.2, "patience": 2}),
        ("conv", {"lr": 1.5, "keep": "best"}),
        ("conv", {"steps": 0}),
    ],
    ids=str,
)
def test_steps_by_the_matrix(name: str, options: dict[str, Any]) -> None:
    check_solver(recipe_for(edge_of(name), **{"steps": 5} | options), count=3, most=2)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("conv", 0.0), *((name, 3.0) for name in ("conv", "full", "column", "few results", "stride 2", "two"))],
)
def test_exact(name: str, weight: float) -> None:
    network = edge_of(name)
    recipe = recipe_for(network, optimizer="exact", tv_weight=weight, steps=400)
    start, features = randn(2, *SHAPE), randn(2, *network.output_shape, seed=1)
    expected, told = solve_by_definition(recipe, features, start)
    z, report, finished = solver_on(recipe).solve(features, start)
    assert finished
    assert report.converged.all()
    scale = np.square(features).sum(axis=(1, 2, 3))
    assert (np.abs(report.objective - told.objective) <= 1e-5 * scale).all()
    assert (report.steps > 0).all()
    if weight > 0:
        assert relative(z, expected) < 1e-3


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["conv", "two"])
def test_exact_steps_are_a_limit(name: str, steps: int) -> None:
    check_solver(recipe_for(edge_of(name), optimizer="exact", steps=steps))


def test_exact_where_the_start_explains_the_features() -> None:
    network = edge_of("stride 2")
    zero = np.zeros((1, *SHAPE), np.float32)
    features = reference(network, zero).astype(np.float32)
    z, report, _ = solver_on(recipe_for(network, optimizer="exact", steps=10)).solve(features, zero)
    assert np.abs(z).max() < 1e-5
    assert report.objective[0] < 1e-8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tanh", {}),
        ("tanh", {"clamp": (0.2, 0.7), "mean": (0.5, 0.4), "std": (0.5, 0.3)}),
        ("tanh", {"tv_beta": 1.5, "tv_weight": 0.3}),
        ("tanh", {"steps": 0}),
        ("tanh", {"steps": 30, "tolerance": 0.05, "patience": 2}),
        ("conv", {"tv_weight": 0.0}),
        ("conv", {"clamp": (0.3, 0.6), "tv_beta": 1.0, "steps": 5}),
        ("relu, pool", {"steps": 3}),
    ],
    ids=str,
)
def test_lbfgs(name: str, options: dict[str, Any]) -> None:
    recipe = recipe_for(edge_of(name), **{"optimizer": "lbfgs", "steps": 6} | options)
    check_solver(recipe, within=1e-3)


def test_lbfgs_goes_on_until_nothing_is_left() -> None:
    network = edge_of("conv")
    recipe = recipe_for(network, optimizer="lbfgs", steps=300, tolerance=1e-5, patience=2, clamp=(0.0, 1.0))
    start, features = randn(2, *SHAPE), randn(2, *network.output_shape, seed=1)
    _, told = solve_by_definition(recipe, features, start)
    z, report, _ = solver_on(recipe).solve(features, start)
    assert report.converged.all()
    assert (report.steps < 300).all()
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-3)
    assert z.min() >= 0
    assert z.max() <= 1


def test_lbfgs_at_a_minimum() -> None:
    """There is no direction downhill: the start is returned, after no step."""
    network = edge_of("conv")
    start = np.full((1, *SHAPE), 0.5, np.float32)
    features = 100 * reference(network, np.ones((1, *SHAPE), np.float32)).astype(np.float32)
    pinned = recipe_for(network, optimizer="lbfgs", steps=5, clamp=(0.5, 0.5))
    z, report, _ = solver_on(pinned).solve(features, start)
    np.testing.assert_array_equal(z, start)
    assert (report.steps[0], report.converged[0]) == (0, True)


@pytest.fixture
def exact_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in the interpreter whose rows do not depend on where they lie, as on a GPU.

    OpenBLAS, which it takes them from, rounds a row in another way elsewhere in a matrix on some processors.
    """

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        return np.einsum("...ik,...kj->...ij", a, b, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize("method", ["adam", "lbfgs", "exact"])
@pytest.mark.parametrize("name", ["conv", "stride 2"])
def test_an_image_has_one_answer_in_any_batch(method: str, name: str) -> None:
    network = edge_of(name)
    recipe = recipe_for(network, optimizer=method, steps=5, tolerance=0.01 if method == "lbfgs" else 0.0)
    start, features = randn(3, *SHAPE), randn(3, *network.output_shape, seed=1)
    whole, told, _ = solver_on(recipe).solve(features, start)
    z, report, _ = solver_on(recipe, most=2).solve(features[::-1].copy(), start[::-1].copy())
    np.testing.assert_array_equal(z[::-1], whole)
    np.testing.assert_array_equal(report.objective[::-1], told.objective)
    np.testing.assert_array_equal(report.steps[::-1], told.steps)


@pytest.mark.usefixtures("exact_rows")
@pytest.mark.parametrize("method", ["lbfgs", "exact"])
def test_what_ctrl_c_leaves(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastinv.backends.cuda.batch.LOOK_SOON", 4)
    network = edge_of("stride 2")
    start, features = randn(5, *SHAPE), randn(5, *network.output_shape, seed=1)
    recipe = recipe_for(network, optimizer=method, steps=40)
    z, report, finished = solver_on(recipe, most=4).solve(features, start, InterruptAt(1))
    assert not finished
    assert (report.steps[:2] > 0).all()
    assert (report.steps[:2] <= 4).all()
    assert (report.steps[2:] == 0).all()
    assert np.isnan(report.objective[2:]).all()
    module = as_module(network, torch.float64)
    for i in range(2):
        shorter = recipe_for(network, optimizer=method, steps=int(report.steps[i]))
        expected, told, _ = solver_on(shorter).solve(features[i : i + 1], start[i : i + 1])
        np.testing.assert_array_equal(z[i], expected[0])
        assert report.objective[i] == told.objective[0]
        image = torch.from_numpy(z[i : i + 1]).double()
        residual = module(image) - torch.from_numpy(features[i : i + 1]).double()
        squares = sum(image.diff(dim=axis).square().sum() for axis in (2, 3))
        assert report.objective[i] == pytest.approx(float(residual.square().sum() + 0.1 * squares), rel=1e-5)


def test_methods_that_rounding_would_lead_astray() -> None:
    for method in ("lbfgs", "exact"):
        assert CudaBackend().precisions(True, method) == ("float32", "tf32")
        assert solver_on(recipe_for(edge_of("conv"), optimizer=method), "tf32").precision == "tf32"


def test_the_lbfgs_history_counts_as_memory() -> None:
    recipe = recipe_for(edge_of("conv"), optimizer="lbfgs")
    solver = solver_on(recipe, most=2**30)
    held = sum(buffer.elements * 4 for buffer in solver._outside)
    assert held > 20 * 4 * int(np.prod(SHAPE))
    assert solver.most * held <= 2**32
