"""rMLE, the definition: against loops by hand, image by image, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import checks
import numpy as np
import pytest
import torch
from architectures import make
from checks import relative
from torch import nn

import fastinv
from fastinv.attacks.rmle import PAPER_PRESETS, rmle, total_variation
from fastinv.errors import FeatureError, NetworkError
from fastinv.models import lenet5

NORM = {"mean": (0.5,), "std": (0.5,)}
IMAGES = np.random.default_rng(0).random((4, 1, 28, 28)).astype(np.float32)


@pytest.fixture(scope="module")
def split() -> fastinv.Split:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fastinv.Split(lenet5(), at="ReLU2", **NORM)


def test_total_variation_by_hand() -> None:
    z = torch.tensor([[[[0.0, 3.0], [4.0, 4.0]]]], dtype=torch.float64)
    # (dy, dx) are (4, 3), (1, 0), (0, 0), (0, 0)
    assert float(total_variation(z, 2.0)) == 25 + 1
    assert float(total_variation(z, 1.0)) == pytest.approx(5 + 1 + 2 * 1e-6)
    assert float(total_variation(z, 4.0)) == 625 + 1


def test_rmle_against_a_loop_by_hand() -> None:
    edge = nn.Conv2d(1, 2, 3).double().eval()
    features = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    start = torch.randn(1, 8, 8, dtype=torch.float64)
    found, report = rmle(edge, features, (1, 8, 8), steps=3, lr=0.1, tv_weight=0.5, start=start, clamp=(0, 0.9))
    z, m, v = start[None].clone(), 0.0, 0.0
    for step in (1, 2, 3):
        z.requires_grad_(True)
        dy, dx = z[:, :, 1:] - z[:, :, :-1], z[..., 1:] - z[..., :-1]
        f = (edge(z) - features).square().sum() + 0.5 * (dy.square().sum() + dx.square().sum())
        (g,) = torch.autograd.grad(f, z)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        z = z.detach() - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        z = z.clamp(0, 0.9)
    torch.testing.assert_close(found, z)
    assert list(report.steps) == [3]


def test_rmle_images_are_independent(split: fastinv.Split) -> None:
    features = torch.from_numpy(split.features(IMAGES))
    options = {"steps": 60, "tolerance": 3e-3, "keep": "best", **NORM}
    together, report = rmle(split.edge, features, (1, 28, 28), **options)
    assert len(set(report.steps)) > 1  # images stop at their own time
    for i in range(4):
        alone, one = rmle(split.edge, features[i : i + 1], (1, 28, 28), **options)
        assert one.steps[0] == report.steps[i]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


def test_rmle_recovers_through_an_invertible_edge() -> None:
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    z, report = rmle(nn.Identity(), x, (1, 6, 6), steps=400, lr=1e-2, tv_weight=0.0)
    assert float((z - x).abs().max()) < 1e-3
    assert report.objective[0] < 1e-6


def reference(edge, features, start, steps: int, beta: float, weight: float, make) -> tuple[list, list]:
    """Iterates and objectives of one image, by hand but for torch's optimizer."""
    z = start.clone().requires_grad_(True)
    optimizer = make([z])
    iterates, objectives = [], []
    for step in range(steps + 1):
        padded = nn.functional.pad(z, (0, 1, 0, 1), mode="replicate")
        dy, dx = padded[..., 1:, :-1] - z, padded[..., :-1, 1:] - z
        small = 1e-12 if beta < 2 else 0
        f = (edge(z) - features).pow(2).sum() + weight * (dy**2 + dx**2 + small).pow(beta / 2).sum()
        iterates.append(z.detach().clone())
        objectives.append(float(f.detach()))
        if step < steps:
            optimizer.zero_grad()
            f.backward()
            optimizer.step()
    return iterates, objectives


def falling(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with PyTorch's cosine schedule over 12 steps."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


RECIPES = {
    "adam": ({"lr": 0.05}, lambda p: torch.optim.Adam(p, lr=0.05)),
    "amsgrad": (
        {"lr": 0.5, "optimizer": "amsgrad", "betas": (0.8, 0.9), "eps": 1e-3},
        lambda p: torch.optim.Adam(p, lr=0.5, betas=(0.8, 0.9), eps=1e-3, amsgrad=True),
    ),
    "sgd": (
        {"lr": 0.1, "optimizer": "sgd", "momentum": 0.9},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ),
    "cosine": ({"lr": 0.2, "schedule": "cosine"}, lambda p: falling(torch.optim.Adam(p, lr=0.2))),
}


@pytest.mark.parametrize("keep", ["last", "best"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("name", RECIPES)
def test_rmle_in_every_mode(name: str, beta: float, keep: str) -> None:
    options, make = RECIPES[name]
    edge = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()).double().eval()
    start = torch.randn(2, 6, 5, dtype=torch.float64)
    features = torch.randn(3, 3, 4, 3, dtype=torch.float64)
    kept = {"steps": 12, "tv_weight": 0.3, "tv_beta": beta, "clamp": None, "keep": keep}
    found, report = rmle(edge, features, (2, 6, 5), start=start, **kept, **options)
    assert all(p.grad is None for p in edge.parameters())
    for index, v in enumerate(features):
        iterates, objectives = reference(edge, v[None], start[None], 12, beta, 0.3, make)
        chosen = 12 if keep == "last" else int(np.argmin(objectives))
        torch.testing.assert_close(found[index : index + 1], iterates[chosen], rtol=1e-9, atol=1e-9)
        assert report.objective[index] == pytest.approx(objectives[chosen], rel=1e-9)


def test_rmle_stops_when_the_objective_is_calm() -> None:
    edge = nn.Conv2d(1, 2, 3).double().eval()
    features = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    start = torch.zeros(1, 6, 6, dtype=torch.float64)
    limit, patience = 0.02, 3
    iterates, f = reference(edge, features, start[None], 200, 2.0, 0.1, lambda p: torch.optim.Adam(p, lr=0.1))
    calm = [abs(b - a) <= limit * abs(a) for a, b in pairwise(f)]
    stop = next(k for k in range(200) if k >= patience and all(calm[k - patience : k]))
    options = {"lr": 0.1, "steps": 200, "start": start, "clamp": None, "tolerance": limit, "patience": patience}
    found, report = rmle(edge, features, (1, 6, 6), **options)
    assert (report.steps[0], report.converged[0]) == (stop, True)
    torch.testing.assert_close(found, iterates[stop])
    assert report.objective[0] == pytest.approx(f[stop])
    _, cut = rmle(edge, features, (1, 6, 6), **(options | {"steps": stop - 1}))
    assert (cut.steps[0], cut.converged[0]) == (stop - 1, False)


def test_rmle_of_nothing_and_without_steps() -> None:
    edge = nn.Conv2d(1, 2, 3).eval()
    none, report = rmle(edge, torch.zeros(0, 2, 4, 4), (1, 6, 6))
    assert none.shape == (0, 1, 6, 6)
    assert report.steps.shape == (0,)
    z, report = rmle(edge, torch.zeros(2, 2, 4, 4), (1, 6, 6), steps=0, mean=(0.25,), std=(0.5,))
    assert bool((z == 0.5).all())  # pixel 0.5
    assert list(report.steps) == [0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "newton"}, NetworkError, "optimizer 'newton'"),
        ({"schedule": "linear"}, NetworkError, "schedule 'linear'"),
        ({"keep": "first"}, NetworkError, "keep 'first'"),
        ({"steps": -1}, NetworkError, "steps -1"),
        ({"lr": -1.0}, NetworkError, "lr -1"),
        ({"tv_beta": 0.5}, NetworkError, r"tv_beta 0\.5"),
        ({"patience": 0}, NetworkError, "patience"),
        ({"start": torch.zeros(1, 4, 4)}, NetworkError, "the start does not fit"),
        ({"init": np.zeros((1, 4, 4))}, NetworkError, r"init of shape \[1, 4, 4\]"),
        ({"init": "x"}, NetworkError, "init: a str"),
        ({"init": float("nan")}, NetworkError, "init holds NaN or Inf"),
        ({"init": np.full((1, 3, 3), np.inf)}, NetworkError, "init holds NaN or Inf"),
        ({"std": 0}, NetworkError, r"std 0, expected 1 finite number\(s\), above 0"),
        ({"mean": "a"}, NetworkError, "mean 'a'"),
        ({"clamp": (1, 0)}, NetworkError, r"clamp \(1, 0\)"),
        ({"tv_weight": float("nan")}, NetworkError, "tv_weight nan"),
        ({"lr": float("nan")}, NetworkError, "lr nan"),
        ({"steps": 1.5}, NetworkError, r"steps 1\.5"),
        ({"betas": (2, 2)}, NetworkError, r"betas \(2, 2\)"),
        ({"input_shape": 9}, NetworkError, "input_shape 9"),
        ({"features": torch.full((1, 1, 3, 3), torch.nan)}, FeatureError, "NaN or Inf"),
        ({"features": np.zeros((1, 1, 3, 3))}, FeatureError, "expected a float tensor"),
    ],
)
def test_rmle_refuses_what_makes_no_sense(options: dict, error: type, message: str) -> None:
    arguments = {"edge": nn.Identity(), "features": torch.zeros(1, 1, 3, 3), "input_shape": (1, 3, 3)}
    with pytest.raises(error, match=message):
        rmle(**(arguments | options))


@pytest.mark.parametrize("features", [(2, 1, 1, 1), (2, 1, 4, 4), (2, 9)])
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "exact"])
def test_rmle_refuses_features_of_another_shape(optimizer: str, features: tuple[int, ...]) -> None:
    """Those, too, that would broadcast over what the edge gives."""
    with pytest.raises(FeatureError, match=r"but the edge gives \[1, 3, 3\]"):
        rmle(nn.Identity(), torch.zeros(features), (1, 3, 3), optimizer=optimizer, clamp=None)


@pytest.mark.parametrize("clamp", [None, (0.0, 1.0)])
@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_lbfgs(split: fastinv.Split, beta: float, clamp: tuple[float, float] | None, backend: str) -> None:
    """Its objective falls at every step, and below Adam's in half as many."""
    edge = fastinv.export(split.edge, torch.zeros(2, 1, 28, 28))
    features = split.features(IMAGES)

    def solved(**options: Any) -> tuple[np.ndarray, fastinv.Report]:
        recipe = fastinv.RMLE(edge, (1, 28, 28), **NORM, clamp=clamp, tv_beta=beta, **options)
        return fastinv.compile(recipe, backend).solve(features)

    objectives = [solved(optimizer="lbfgs", steps=steps)[1].objective for steps in range(12)]
    assert all((after < before).all() for before, after in pairwise(objectives))
    _, adam = solved(steps=200)
    images, report = solved(optimizer="lbfgs", steps=100)
    assert (report.objective < adam.objective).all()
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_lbfgs_within_bounds_ends_at_the_minimum(backend: str) -> None:
    """A convex problem: where it ends no element can do better but by leaving its bounds."""
    torch.manual_seed(0)
    edge = nn.Conv2d(2, 3, 3, padding=1).eval()
    network = fastinv.export(edge, torch.zeros(2, 2, 9, 7))
    v = torch.randn(2, 3, 9, 7)
    recipe = fastinv.RMLE(network, (2, 9, 7), clamp=(0.3, 0.6), optimizer="lbfgs", steps=1000)
    images, report = fastinv.compile(recipe, backend).solve(v.numpy())
    assert report.converged.all()
    assert (report.steps < 1000).all()
    z = torch.from_numpy(images).double().requires_grad_(True)
    f = (edge.double()(z) - v.double()).square().sum() + 0.1 * total_variation(z, 2.0).sum()
    (g,) = torch.autograd.grad(f, z)
    inner = (images > 0.3 + 1e-6) & (images < 0.6 - 1e-6)
    assert 0.1 < inner.mean() < 0.9
    assert np.abs(g.numpy()[inner]).max() < 0.02 * g.abs().max()
    assert (g.numpy()[images <= 0.3] >= 0).all()
    assert (g.numpy()[images >= 0.6] <= 0).all()
    assert report.objective.sum() == pytest.approx(float(f.detach()), rel=1e-5)


def test_presets_make_recipes(split: fastinv.Split) -> None:
    edge = fastinv.export(split.edge, torch.zeros(2, 1, 28, 28))
    recipe = fastinv.RMLE(edge, (1, 28, 28), **NORM, **PAPER_PRESETS["ReLU2"])
    assert (recipe.steps, recipe.lr, recipe.clamp) == (5000, 1e-3, None)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize(
    "name", ["group-norm-blocks", "convnext-prefix", "mixer-prefix", "vision-transformer-one-layer"]
)
def test_rmle_through_edges_of_other_people(name: str, optimizer: str) -> None:
    """The compiled solver's objective is that of the definition, in float64, however many threads share an image."""
    module, shape = make(name)
    edge = fastinv.export(module, torch.zeros(2, *shape))
    images = np.random.default_rng(0).uniform(0, 1, (3, *shape)).astype(np.float32)
    features = checks.reference(edge, images).astype(np.float32)
    start = np.random.default_rng(1).uniform(0.3, 0.7, shape).astype(np.float32)
    recipe = fastinv.RMLE(edge, shape, steps=20, lr=0.05, optimizer=optimizer, init=start, tv_weight=1e-3)
    recovered, report = fastinv.invert(features, recipe, backend="cpu", return_report=True)
    expected, told = fastinv.invert(features, recipe, backend="torch", return_report=True)
    within = 1e-3 if optimizer == "adam" else 2e-2  # line searches go apart where rounding decides
    np.testing.assert_allclose(report.objective, told.objective, rtol=within)
    if optimizer == "adam":
        assert relative(recovered, expected) < 1e-3
    one = fastinv.invert(features[1:2], recipe, backend="cpu", threads=2)
    np.testing.assert_array_equal(one, recovered[1:2])
