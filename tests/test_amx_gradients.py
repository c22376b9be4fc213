"""Gradients on tiles of bfloat16 numbers, and rMLE by them: with AMX where there is that, and in portable kernels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from amx import BOUND, layer, rounded, with_rounded_weights
from checks import (
    exported,
    gradient,
    gradient_solver,
    kernels,
    randn,
    reference,
    reference_gradient,
    relative,
)
from torch import nn

import fastinv
from fastinv.backends.cpu import CpuSolver
from fastinv.inverters import RMLE
from fastinv.network import Network


def solver(recipe: RMLE, threads: int = 1, block: int = 0) -> CpuSolver:
    return CpuSolver(recipe, threads, block, "bfloat16")


def check_gradient(network: Network, bound: float) -> list[str]:
    """Against float64; images alone and several at once, to the bit. What ran."""
    z = randn(3, *network.input_shape, seed=1)
    features = randn(3, *network.output_shape, seed=2)  # far from the results, which have to be off by less than that
    alone, together = (gradient_solver(network, block, "bfloat16") for block in (1, 3))
    found = gradient(alone, z, features)
    np.testing.assert_array_equal(gradient(together, z, features), found)
    error = relative(found, reference_gradient(network, z, features))
    assert error < bound, f"relative error {error:.2g}"
    return alone.kernels


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [
    (1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (4, 2, 1, 1), (3, 1, 2, 2), (3, 1, 0, 1), ((3, 5), (1, 2), (0, 2), 1),
])  # fmt: skip
def test_gradients_of_geometries(tiles: str, transposed: bool, kernel, stride, padding, dilation) -> None:
    """Of the factors as they are rounded: the image, the weights, and the gradient of the result."""
    torch.manual_seed(0)
    ran = []
    for shape in ((64, 8, 8), (40, 7, 33), (33, 12, 16)):
        made = layer(transposed, shape[0], 48, kernel, stride, padding, dilation=dilation)
        network = exported(shape, made)
        kernels = check_gradient(network, 2 * BOUND)
        ran += kernels
        if kernels != ["amx, bfloat16; back amx, bfloat16"]:
            continue
        z, features = randn(2, *shape, seed=1), randn(2, *network.output_shape, seed=2)
        (step,) = network.steps
        same = Network(shape, (with_rounded_weights(step),))
        residual = rounded(2 * (reference(same, rounded(z)) - features).astype(np.float32))
        weight = step.weights | {"bias": np.zeros(48, np.float32)}
        linear = Network(shape, (with_rounded_weights(dataclasses.replace(step, weights=weight)),))
        expected = reference_gradient(linear, np.zeros_like(z), -residual / 2)
        # Where a residual lies between two numbers, float64's may be rounded to the other one.
        assert relative(gradient(gradient_solver(network, 1, "bfloat16"), z, features), expected) < 3e-4
    assert any("amx" in name and "back amx" in name for name in ran), ran


@pytest.mark.parametrize("channels", [(32, 16), (32, 17), (31, 33), (64, 49), (130, 70), (3, 64), (40, 3)])
def test_gradients_of_channels(tiles: str, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    check_gradient(exported((channels[0], 9, 17), nn.Conv2d(*channels, 3, padding=1), nn.Tanh()), 2 * BOUND)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(5, 64, 48), (24, 64, 48), (16, 40, 33), (65, 64, 3), (40, 3, 64)]
)
def test_gradients_of_linear_layers_of_rows(tiles: str, rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    ran = []
    for after in (nn.Tanh(), nn.Identity()):
        ran += check_gradient(exported((1, rows, inputs), nn.Linear(inputs, outputs), after), 2 * BOUND)
    assert rows < 16 or inputs * outputs < 3000 or any("back amx" in name for name in ran), ran


class TwoWays(nn.Module):
    """A block whose gradients join those of a shortcut, and go on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(40, 40, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.third(torch.tanh(self.second(y) + y))


def test_gradients_that_are_added_to_others(tiles: str) -> None:
    torch.manual_seed(0)
    ran = check_gradient(exported((40, 11, 13), TwoWays()), 4 * BOUND)
    assert sum("amx" in name for name in ran) == 3


CHAIN = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU())


def recipe_of(size: tuple[int, int], **options) -> RMLE:
    torch.manual_seed(0)
    for made in CHAIN:
        if isinstance(made, nn.Conv2d):
            made.reset_parameters()
    network = exported((3, *size), *CHAIN)
    return RMLE(network, network.input_shape, clamp=None, tv_weight=1e-3, **options)


@pytest.mark.parametrize("optimizer", ["adam", "amsgrad", "sgd"])
def test_a_solver_gives_an_image_one_answer(tiles: str, optimizer: str) -> None:
    recipe = recipe_of((12, 18), steps=6, optimizer=optimizer, lr=1e-2)
    start = randn(5, *recipe.input_shape, seed=1)
    features = reference(recipe.edge, randn(5, *recipe.input_shape, seed=2)).astype(np.float32)
    whole, report, _ = solver(recipe, block=1).solve(features, start)
    order = np.array([4, 2, 0, 3, 1])
    for threads, block in ((1, 3), (2, 0), (3, 2)):
        z, again, _ = solver(recipe, threads, block).solve(features[order], start[order])
        np.testing.assert_array_equal(z, whole[order])
        np.testing.assert_array_equal(again.objective, report.objective[order])


def test_threads_share_an_image_on_both_ways(tiles: str) -> None:
    recipe = recipe_of((71, 94), steps=3)
    start = randn(*recipe.input_shape, seed=1)
    features = reference(recipe.edge, randn(1, *recipe.input_shape, seed=2)).astype(np.float32)
    one, _, _ = solver(recipe).solve(features, start)
    for threads in (2, 5):
        np.testing.assert_array_equal(solver(recipe, threads).solve(features, start)[0], one)


def test_a_solver_recovers_as_well_as_in_float32(tiles: str) -> None:
    recipe = recipe_of((12, 16), steps=80, lr=5e-2)
    x = np.random.default_rng(0).random((64, *recipe.input_shape), np.float32).repeat(2, 2).repeat(2, 3)[..., :12, :16]
    features = reference(recipe.edge, x).astype(np.float32)
    start = np.random.default_rng(1).random(recipe.input_shape, np.float32)
    made = [solver(recipe, 2), CpuSolver(recipe, 2)]
    assert [s.precision for s in made] == ["bfloat16", "float32"]
    psnr = [float(fastinv.psnr(x, s.solve(features, start)[0].clip(0, 1)).mean()) for s in made]
    assert psnr[0] > psnr[1] - 0.1, psnr  # of 16 images it is off by up to 0.16 dB either way, by none on average


def test_what_has_a_quadratic_form_stays_exact(tiles: str) -> None:
    network = exported((32, 8, 8), nn.Conv2d(32, 256, 1))  # which on tiles would be faster
    assert any(name.startswith("amx") for name in kernels(network, "bfloat16"))
    made = solver(RMLE(network, network.input_shape, steps=1, clamp=None))
    assert made.precision == "float32"
    assert made._solver.quadratic
