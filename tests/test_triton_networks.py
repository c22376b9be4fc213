"""The GPU backend end to end: the paper's decoders and edges, and rMLE; without a GPU in the interpreter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from checks import InterruptAt, randn, reference, relative

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import network_on, solver_on

from fastinv import tensors
from fastinv.attacks.rmle import rmle
from fastinv.backends.torch import as_module
from fastinv.benchmark import DECODERS
from fastinv.export import export
from fastinv.inverters import RMLE
from fastinv.models import cifar_net, lenet5, make_decoder
from fastinv.network import Network
from fastinv.split import Split

TOLERANCES = {"float32": 1e-5, "float16": 5e-3}  # relative


@pytest.fixture(scope="module")
def edges() -> dict[str, Network]:
    """The paper's five edges."""
    torch.manual_seed(0)
    found = {}
    for target, image, splits in (
        (lenet5(), (1, 28, 28), ("conv1", "ReLU2")),
        (cifar_net(), (3, 32, 32), ("conv11", "ReLU22", "ReLU32")),
    ):
        for at in splits:
            found[at] = export(Split(target, at).edge.eval(), torch.zeros(2, *image))
    return found


def decoder(name: str) -> Network:
    torch.manual_seed(0)
    features, image = DECODERS[name]
    return export(make_decoder(features, image).eval(), torch.zeros(2, *features))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    network = decoder(name)
    x = randn(2, *network.input_shape)
    out = np.empty((2, *network.output_shape), np.float32)
    network_on(network).run(x, out)
    assert relative(out, reference(network, x)) < TOLERANCES["float32"]


def recipe_for(edge: Network, **options) -> RMLE:
    start = np.random.default_rng(0).random(edge.input_shape, np.float32)
    return RMLE(edge, edge.input_shape, **{"steps": 2, "init": start, "clamp": None, **options})


def solve_by_definition(recipe: RMLE, features: np.ndarray, start: np.ndarray):
    options = recipe.recipe()
    options["start"] = torch.from_numpy(start).double()
    module = as_module(recipe.edge, torch.float64)
    z, report = rmle(module, torch.from_numpy(features).double(), **options)
    return z.numpy(), report


def check_solver(recipe: RMLE, count: int = 2, most: int = 64, within: float = 1e-4) -> None:
    start = randn(count, *recipe.input_shape, seed=3)
    features = reference(recipe.edge, randn(count, *recipe.input_shape, seed=4)).astype(np.float32)
    expected, told = solve_by_definition(recipe, features, start)
    z, report, finished = solver_on(recipe, most=most).solve(features, start)
    assert finished
    assert relative(z, expected) < within
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-4)
    np.testing.assert_array_equal(report.steps, told.steps)
    np.testing.assert_array_equal(report.converged, told.converged)


@pytest.mark.parametrize("name", ["conv1", "ReLU2", "conv11", "ReLU22", "ReLU32"])
def test_rmle_through_the_paper_s_edges(name: str, edges: dict[str, Network]) -> None:
    check_solver(recipe_for(edges[name]), count=1)
