"""rMLE through an edge that is one convolution of stride 1: steps by AᵀA, formed once, instead of A and Aᵀ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checks import check_gradient, exported, randn, relative
from torch import nn

import fastinv
from fastinv.attacks.rmle import rmle
from fastinv.inverters import RMLE


def network_of(module: nn.Module, shape: tuple[int, ...]) -> fastinv.Network:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.reset_parameters()
    return exported(shape, module)


def is_quadratic(network: fastinv.Network, **options: Any) -> bool:
    recipe = RMLE(network, network.input_shape, **options)  # type: ignore[arg-type]
    return bool(fastinv.compile(recipe, backend="cpu")._compiled._solver.quadratic)


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 7, (3, 5), (5, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_gradient(isa: str, kernel: Any, padding: int, channels: int) -> None:
    for h, w in ((7, 9), (20, 17), (33, 40)):
        network = network_of(nn.Conv2d(channels, 32, kernel, padding=padding), (channels, h, w))
        assert is_quadratic(network) or kernel == 7  # many weights, and few results to each pixel
        check_gradient(network)


@pytest.mark.parametrize("size", [(5, 5), (5, 30), (6, 5), (8, 64), (30, 5)])
def test_images_hardly_larger_than_the_kernel(isa: str, size: tuple[int, int]) -> None:
    network = network_of(nn.Conv2d(3, 64, 5), (3, *size))
    check_gradient(network)
    check_gradient(network_of(nn.Conv2d(3, 64, 5, padding=4), (3, *size)))


@pytest.mark.parametrize(
    ("edge", "shape"),
    [
        (nn.Conv2d(1, 8, 5), (1, 28, 28)),
        (nn.Conv2d(3, 64, 3, padding=1), (3, 32, 32)),
        (nn.Conv2d(2, 9, (3, 1)), (2, 12, 9)),
    ],
    ids=["MNIST conv1", "CIFAR conv11", "column"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"tv_weight": 0.0},
        {},
        {"tv_weight": 3.0, "clamp": None},
        {"tv_beta": 1.0},
        {"tv_beta": 1.5, "optimizer": "amsgrad"},
        {"tv_beta": 3.0},
        {"optimizer": "sgd", "lr": 1e-4, "momentum": 0.5},
        {"tolerance": 1e-3, "patience": 2},
        {"keep": "best"},
    ],
    ids=str,
)
def test_trajectories(isa: str, edge: nn.Module, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    network = network_of(edge, shape)
    options = {"steps": 50, "lr": 2e-2} | options
    start, truth = randn(3, *shape), randn(3, *shape, seed=1)
    with torch.no_grad():
        features = edge(torch.from_numpy(truth)).numpy()
    assert is_quadratic(network, **options)
    images, report = fastinv.compile(RMLE(network, shape, **options), backend="cpu").solve(features, init=start)
    for i in range(3):
        x, v = torch.from_numpy(start[i]).double(), torch.from_numpy(features[i : i + 1]).double()
        expected, found = rmle(edge.double(), v, shape, start=x, **options)
        edge.float()
        assert relative(images[i], expected[0].clamp(0, 1).numpy()) < 1e-3
        assert abs(report.objective[i] - found.objective[0]) <= 1e-3 * found.objective[0]
        assert report.steps[i] == found.steps[0]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 64, 3, stride=2),
        nn.Conv2d(3, 64, 3, dilation=2),
        nn.Conv2d(3, 3, 3),
        nn.Conv2d(3, 64, 1),
        nn.Conv2d(2, 64, 3, groups=2),
        nn.ConvTranspose2d(3, 64, 3),
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.MaxPool2d(2)),
    ],
    ids=str,
)
def test_other_edges(module: nn.Module) -> None:
    channels = 2 if "groups=2" in str(module) else 3
    network = network_of(module, (channels, 12, 13))
    if "kernel_size=(1, 1)" not in str(module):
        assert not is_quadratic(network)
    check_gradient(network)


@pytest.mark.parametrize("optimizer", ["adam", "exact", "lbfgs"])
@pytest.mark.parametrize("tv_weight", [1.0, 1e-3])  # objectives above and below 1% of that of an image of zeros
@pytest.mark.parametrize("channels", [1, 3])
def test_objective(isa: str, channels: int, tv_weight: float, optimizer: str) -> None:
    shape = (channels, 20, 24)
    edge = nn.Conv2d(channels, 40, 3, padding=1)
    network = network_of(edge, shape)
    with torch.no_grad():
        features = edge(torch.from_numpy(randn(4, *shape))).numpy()
    recipe = RMLE(network, shape, steps=300, lr=5e-2, tv_weight=tv_weight, optimizer=optimizer, clamp=None)
    solver = fastinv.compile(recipe, backend="cpu")._compiled
    z, report, _ = solver.solve(features, np.zeros(shape, np.float32))
    edge.double()
    for i in range(4):
        v = torch.from_numpy(features[i : i + 1]).double()

        def objective(x: torch.Tensor, v: torch.Tensor = v) -> float:
            return float(
                rmle(edge, v, shape, start=x.double(), tv_weight=tv_weight, clamp=None, steps=0)[1].objective[0]
            )

        found, at_zero = objective(torch.from_numpy(z[i])), objective(torch.zeros(shape))
        assert (found > 1e-2 * at_zero) == (tv_weight == 1.0)
        assert report.objective[i] == pytest.approx(found, rel=2e-5)


def test_results_depend_on_the_image_alone() -> None:
    network = network_of(nn.Conv2d(3, 64, 3, padding=1), (3, 32, 32))
    recipe = RMLE(network, (3, 32, 32), steps=30)
    features = randn(9, 64, 32, 32)
    alone, shared = (fastinv.compile(recipe, backend="cpu", threads=n) for n in (1, 2))
    images, report = alone.solve(features)
    others, _ = shared.solve(features[::-1].copy())
    assert np.array_equal(images, others[::-1])
    one, single = shared.solve(features[4:5])
    assert np.array_equal(images[4:5], one)
    assert report.objective[4] == single.objective[0]
