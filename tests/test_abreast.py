"""Small images that go through the layers, or through all steps of rMLE, one in each lane of a vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import InterruptAt, exported, randn, reference, relative, run
from torch import nn

import fastinv
from fastinv import _core
from fastinv.backends.cpu import CpuSolver
from fastinv.inverters import RMLE
from fastinv.models import make_decoder

TOLERANCE = 1e-5


CHAINS = {
    "MNIST conv1": (make_decoder((8, 24, 24), (1, 28, 28)), (8, 24, 24)),
    "MNIST ReLU2": (make_decoder((16, 8, 8), (1, 28, 28)), (16, 8, 8)),
    "strides": (nn.Sequential(nn.ConvTranspose2d(3, 2, 3, (2, 1), 1), nn.Tanh(), nn.Conv2d(2, 3, (2, 5))), (3, 5, 9)),
    "odd": (nn.Sequential(nn.ConvTranspose2d(5, 3, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(3, 1, 5, 2, 2)), (5, 3, 5)),
    "wide kernel": (nn.Sequential(nn.Conv2d(2, 5, (9, 7), padding=(4, 6)), nn.Sigmoid()), (2, 6, 4)),
    "groups": (nn.ConvTranspose2d(4, 2, 5, 2, output_padding=1, groups=2), (4, 7, 6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_abreast_gives_what_one_at_a_time_gives(isa: str, name: str) -> None:
    torch.manual_seed(0)
    module, shape = CHAINS[name]
    network = exported(shape, module)
    width = _core.vector_width(isa)
    x = randn(2 * width + 3, *shape)
    single = np.concatenate([run(network, row[None]) for row in x])
    assert relative(single, reference(network, x)) < TOLERANCE
    for count in (width - 1, width, width + 1, 2 * width, 2 * width + 3):
        for threads in (1, 2):
            np.testing.assert_array_equal(run(network, x[:count], threads=threads), single[:count])


def test_other_types_go_abreast_too() -> None:
    module, shape = CHAINS["MNIST ReLU2"]
    network = exported(shape, module)
    engine = fastinv.compile(network, backend="cpu")
    x = randn(37, *shape).astype(np.float16)
    np.testing.assert_array_equal(engine(x), engine(x.astype(np.float32)))
    inverter = fastinv.InverseNetwork(network, (0.5,), (0.5,))
    images = fastinv.invert(x, inverter)
    np.testing.assert_array_equal(fastinv.invert(x, inverter, dtype="uint8"), np.rint(images * np.float32(255)))


EDGES = {
    "MNIST ReLU2": (
        (1, 28, 28),
        [nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 5), nn.ReLU()],
    ),
    "colours": ((3, 13, 11), [nn.Conv2d(3, 5, 5, padding=2), nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Conv2d(5, 24, 3)]),
    "ragged pools": (
        (2, 9, 15),
        [nn.Conv2d(2, 4, 2), nn.Tanh(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 20, 3), nn.SiLU()],
    ),
    "odd pools": ((1, 12, 10), [nn.Conv2d(1, 3, 2), nn.MaxPool2d(2), nn.Sigmoid()]),
    "strides": ((4, 9, 8), [nn.Conv2d(4, 20, 3, stride=2, padding=1), nn.Hardtanh(-0.5, 0.5), nn.Conv2d(20, 17, 1)]),
    "up": ((2, 5, 6), [nn.ConvTranspose2d(2, 6, 4), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")]),
}
RECIPES = {
    "adam": {"clamp": (0.0, 1.0)},
    "amsgrad, beta 1.5": {"optimizer": "amsgrad", "tv_beta": 1.5, "clamp": None, "schedule": "cosine"},
    "sgd, beta 1": {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.9, "tv_beta": 1.0, "clamp": None},
}


def recipe_of(edge: str, **options) -> RMLE:
    torch.manual_seed(0)
    shape, layers = EDGES[edge]
    return RMLE(exported(shape, *layers), shape, mean=(0.5,), std=(0.5,), **options)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("edge", EDGES)
def test_solving_abreast_gives_what_one_at_a_time_gives(isa: str, edge: str, recipe: str) -> None:
    solved = recipe_of(edge, **{"steps": 7, "lr": 3e-2, **RECIPES[recipe]})
    alone = CpuSolver(solved, 1, block=1)
    assert alone.images_abreast == 0
    width = _core.vector_width(isa)
    features = randn(3 * width + 2, *solved.feature_shape)
    start = randn(len(features), *solved.input_shape, seed=1)
    expected, report, _ = alone.solve(features, start)
    assert (report.steps == 7).all()
    for threads in (1, 2):
        together = CpuSolver(solved, threads)
        assert together.images_abreast == width
        for count in (width - 1, width, 2 * width, 2 * width + 1, 3 * width + 2):
            found, again, finished = together.solve(features[:count], start[:count])
            assert finished
            np.testing.assert_array_equal(found, expected[:count])
            np.testing.assert_array_equal(again.objective, report.objective[:count])
            np.testing.assert_array_equal(again.steps, report.steps[:count])


def test_one_start_serves_all_that_go_abreast() -> None:
    features, start = randn(40, 16, 8, 8), randn(1, 28, 28)
    together, alone = (CpuSolver(recipe_of("MNIST ReLU2", steps=3), 1, block) for block in (0, 1))
    np.testing.assert_array_equal(together.solve(features, start)[0], alone.solve(features, start)[0])


@pytest.mark.parametrize("options", [{"tolerance": 1e-3}, {"keep": "best"}, {"optimizer": "lbfgs"}])
def test_images_that_stop_by_themselves_go_one_by_one(options: dict) -> None:
    assert CpuSolver(recipe_of("MNIST ReLU2", **options), 1).images_abreast == 0


def test_large_images_go_one_by_one() -> None:
    network = exported((3, 64, 64), nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    assert CpuSolver(RMLE(network, (3, 64, 64)), 1).images_abreast == 0


def test_steps_of_an_interrupted_group_are_told() -> None:
    solver = CpuSolver(recipe_of("MNIST ReLU2", steps=1_000_000, clamp=None), 2)
    features, tell = randn(200, 16, 8, 8), InterruptAt(2)
    z, report, finished = solver.solve(features, randn(1, 28, 28), tell)
    assert not finished
    begun = ~np.isnan(report.objective)
    assert begun.sum() == 2 * solver.images_abreast  # a group for each thread
    assert report.steps[begun].min() > 0
    assert report.steps.sum() >= tell.told[-1][1] > 0
    alone = CpuSolver(recipe_of("MNIST ReLU2", steps=int(report.steps[0]), clamp=None), 1, block=1)
    np.testing.assert_array_equal(alone.solve(features[:1], randn(1, 28, 28))[0], z[:1])
