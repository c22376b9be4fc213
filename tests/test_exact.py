"""rMLE's minimum itself, where the objective is quadratic: against a direct solution in float64, and Adam."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checks import ISAS, exported, randn
from torch import Tensor, nn

import fastinv
from fastinv.attacks.rmle import rmle, total_variation
from fastinv.backends.cpu import CpuSolver
from fastinv.errors import NetworkError
from fastinv.inverters import RMLE


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


EDGES: dict[str, Any] = {
    "conv": lambda: nn.Conv2d(2, 24, 3, padding=1),
    "valid": lambda: nn.Conv2d(2, 24, 5),
    "column": lambda: nn.Conv2d(2, 24, (3, 1)),
    "few results": lambda: nn.Conv2d(2, 1, 3),
    "stride 2": lambda: nn.Conv2d(2, 24, 3, stride=2),
    "two": lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1)),
    "pool": lambda: nn.Sequential(nn.Conv2d(2, 16, 3), nn.AvgPool2d(2)),
    "residual": Residual,
    "to a vector": lambda: nn.Sequential(nn.Flatten(), nn.Linear(180, 60)),
}
SHAPE = (2, 9, 10)


def edge_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return EDGES[name]().eval()  # type: ignore[no-any-return]


def minimum(edge: nn.Module, v: np.ndarray, weight: float) -> np.ndarray:
    """The objective's minimum, from its matrix: rows of A, then of what the total variation squares."""
    edge = edge.double()
    eye = torch.eye(180, dtype=torch.float64).reshape(180, *SHAPE)
    with torch.no_grad():
        zero = edge(torch.zeros(1, *SHAPE, dtype=torch.float64)).flatten()
        matrix = edge(eye).flatten(1).T - zero[:, None]
        dy, dx = (np.sqrt(weight) * eye.diff(dim=axis).flatten(1).T for axis in (2, 3))
        rows = torch.cat([matrix, dy, dx]).numpy()
    right = np.concatenate([v.ravel() - zero.numpy(), np.zeros(len(rows) - len(zero))])
    return np.linalg.lstsq(rows, right, rcond=None)[0].reshape(SHAPE)


def objective(edge: nn.Module, z: np.ndarray, v: np.ndarray, weight: float) -> float:
    x = torch.from_numpy(np.asarray(z, np.float64))[None]
    with torch.no_grad():
        return float((edge.double()(x) - torch.from_numpy(v)).square().sum() + weight * total_variation(x, 2.0))


@pytest.mark.parametrize("name", list(EDGES))
@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_minimum(name: str, weight: float, backend: str) -> None:
    edge = edge_of(name)
    network = exported(SHAPE, edge)
    v = randn(3, *network.output_shape)
    recipe = RMLE(network, SHAPE, optimizer="exact", clamp=None, tv_weight=weight, steps=2000)
    z, report, _ = fastinv.compile(recipe, backend)._compiled.solve(v, np.zeros(SHAPE, np.float32))
    assert report.converged.all() or weight == 0  # there the minimum may be no point, and rounding leads astray
    assert (report.steps > 0).all()
    for i in range(3):
        least = objective(edge, minimum(edge, v[i], weight), v[i].astype(np.float64), weight)
        found = objective(edge, z[i], v[i].astype(np.float64), weight)
        scale = float((v[i].astype(np.float64) ** 2).sum())
        assert found <= least + 1e-6 * scale
        assert abs(report.objective[i] - found) <= 1e-5 * scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["conv", "valid", "column", "stride 2"])
def test_every_instruction_set(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINV_ISA", isa)
    edge = edge_of(name)
    network = exported(SHAPE, edge)
    v, start = randn(2, *network.output_shape), randn(2, *SHAPE, seed=1)
    recipe = RMLE(network, SHAPE, optimizer="exact", clamp=None, steps=2000)
    z, *_ = fastinv.compile(recipe, "cpu")._compiled.solve(v, start)
    for i in range(2):
        assert np.abs(z[i] - minimum(edge, v[i], 0.1)).max() < 1e-3
    alone, *_ = fastinv.compile(recipe, "cpu", threads=2)._compiled.solve(v[1:], start[1:])
    assert np.array_equal(alone, z[1:])


def test_no_adam_gets_lower(backend: str) -> None:
    edge = edge_of("valid")
    network = exported(SHAPE, edge)
    v = randn(4, *network.output_shape)
    options = {"clamp": None, "steps": 300, "lr": 0.05}
    _, exact = fastinv.compile(RMLE(network, SHAPE, optimizer="exact", **options), backend).solve(v)
    _, adam = fastinv.compile(RMLE(network, SHAPE, **options), backend).solve(v)
    assert (exact.objective <= adam.objective * (1 + 1e-6)).all()
    assert (exact.steps < 300).all()


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_large_images(weight: float) -> None:
    """Too large for the inverse of their matrix: conjugate gradients, by the quadratic form."""
    shape = (2, 33, 18)
    edge = edge_of("conv")
    network = exported(shape, edge)
    v = randn(3, *network.output_shape)
    recipe = RMLE(network, shape, optimizer="exact", clamp=None, tv_weight=weight, steps=2000)
    z, report, _ = CpuSolver(recipe, 2).solve(v, randn(*shape, seed=1))
    assert report.converged.all()
    assert (report.steps > 3).all()

    def slope(images: np.ndarray) -> float:
        x = torch.from_numpy(images.astype(np.float64)).requires_grad_()
        value = (edge.double()(x) - torch.from_numpy(v)).square().sum() + weight * total_variation(x, 2.0).sum()
        return float(torch.autograd.grad(value, x)[0].norm())

    assert slope(z) < 1e-5 * slope(np.zeros_like(z))


@pytest.mark.parametrize("isa", ISAS)
def test_small_images_take_a_step_or_two(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the inverse of their matrix; the same for an image alone and in any company."""
    monkeypatch.setenv("FASTINV_ISA", isa)
    network = exported(SHAPE, edge_of("conv"))
    v, start = randn(45, *network.output_shape), randn(*SHAPE, seed=1)
    v[5] *= 1e3
    recipe = RMLE(network, SHAPE, optimizer="exact", clamp=None)
    z, report, finished = CpuSolver(recipe, 1).solve(v, start)
    assert finished
    assert report.converged.all()
    assert (report.steps <= 2).all()
    for threads, images in ((2, slice(None)), (2, slice(0, 1)), (3, slice(5, 24)), (1, slice(44, 3, -2))):
        some, again, _ = CpuSolver(recipe, threads).solve(np.ascontiguousarray(v[images]), start)
        np.testing.assert_array_equal(some, z[images])
        np.testing.assert_array_equal(again.objective, report.objective[images])
        np.testing.assert_array_equal(again.steps, report.steps[images])
    v[7] = 3e38  # more than float32 can square
    _, report, _ = CpuSolver(recipe, 2).solve(v, start)
    assert report.converged.sum() == 44
    assert not report.converged[7]


def test_steps_are_a_limit(backend: str) -> None:
    network = exported(SHAPE, edge_of("stride 2"))
    v, start = randn(2, *network.output_shape), np.full(SHAPE, 0.25, np.float32)
    recipe = RMLE(network, SHAPE, optimizer="exact", clamp=None, steps=3, init=start)
    _, report = fastinv.compile(recipe, backend).solve(v)
    assert report.steps.tolist() == [3, 3]
    assert not report.converged.any()


@pytest.mark.parametrize("name", ["conv", "stride 2"])
def test_no_steps(name: str, backend: str) -> None:
    network = exported(SHAPE, edge_of(name))
    v, start = randn(2, *network.output_shape), np.full(SHAPE, 0.25, np.float32)
    images, report = fastinv.compile(RMLE(network, SHAPE, optimizer="exact", clamp=None, steps=0), backend).solve(
        v, init=start
    )
    np.testing.assert_allclose(images, np.broadcast_to(start, images.shape), atol=1e-6)
    assert report.steps.tolist() == [0, 0]


def test_features_that_the_start_explains(backend: str) -> None:
    edge = edge_of("conv")
    network = exported(SHAPE, edge)
    v = fastinv.compile(network, backend)(np.zeros((1, *SHAPE), np.float32))
    recipe = RMLE(network, SHAPE, optimizer="exact", clamp=None, init=0.0)
    images, report = fastinv.compile(recipe, backend).solve(v)
    assert np.abs(images).max() < 1e-5
    assert report.objective[0] < 1e-8


def test_auto() -> None:
    affine = exported(SHAPE, edge_of("two"))
    other = exported(SHAPE, nn.Conv2d(2, 4, 3), nn.ReLU())
    for network, options, method in (
        (affine, {"clamp": None}, "exact"),
        (affine, {"clamp": None, "tv_beta": 1.0, "tv_weight": 0.0}, "exact"),
        (affine, {"clamp": None, "tv_beta": 1.0}, "lbfgs"),
        (affine, {}, "lbfgs"),
        (other, {"clamp": None}, "lbfgs"),
    ):
        recipe = RMLE(network, SHAPE, optimizer="auto", **options)  # type: ignore[arg-type]
        assert recipe.method == method
        named = RMLE(network, SHAPE, optimizer=method, **options)  # type: ignore[arg-type]
        v = randn(1, *network.output_shape)
        images, _ = fastinv.compile(recipe).solve(v)
        assert np.array_equal(images, fastinv.compile(named).solve(v)[0])
    assert RMLE(affine, SHAPE, clamp=None).method == "adam"  # the default stays


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([nn.Conv2d(2, 4, 3), nn.ReLU()], {"clamp": None}, r"step 0 of the edge is no affine map \(relu\)"),
        ([nn.Conv2d(2, 4, 3), nn.MaxPool2d(2)], {"clamp": None}, r"step 1 .* \(max_pool2d\): take 'adam'"),
        ([nn.Conv2d(2, 4, 3)], {}, r"clamp is \(0.0, 1.0\), not None"),
        ([nn.Conv2d(2, 4, 3)], {"clamp": None, "tv_beta": 1.5}, "tv_beta is 1.5, not 2"),
    ],
)
def test_what_is_not_quadratic(layers: list[nn.Module], options: dict[str, Any], message: str) -> None:
    network = exported(SHAPE, *layers)
    with pytest.raises(NetworkError, match=message):
        RMLE(network, SHAPE, optimizer="exact", **options)


def test_the_definition_refuses_what_is_not_quadratic() -> None:
    edge, v = nn.Conv2d(2, 4, 3), torch.zeros(1, 4, 7, 8)
    for options in ({}, {"clamp": None, "tv_beta": 1.0}):
        with pytest.raises(NetworkError, match="'exact' needs None and 2"):
            rmle(edge, v, SHAPE, optimizer="exact", **options)
    with pytest.raises(NetworkError, match="optimizer 'auto'"):
        rmle(edge, v, SHAPE, optimizer="auto")
