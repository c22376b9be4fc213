"""Chains of convolutions on small images, which go through the layers one in each lane of a vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import randn, reference, relative, run
from torch import nn

import fastinv
from fastinv import _core
from fastinv.export import export
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
    network = export(module.eval(), torch.zeros(2, *shape))
    width = _core.vector_width(isa)
    x = randn(2 * width + 3, *shape)
    single = np.concatenate([run(network, row[None]) for row in x])
    assert relative(single, reference(network, x)) < TOLERANCE
    for count in (width - 1, width, width + 1, 2 * width, 2 * width + 3):
        for threads in (1, 2):
            np.testing.assert_array_equal(run(network, x[:count], threads=threads), single[:count])


def test_other_types_go_abreast_too() -> None:
    module, shape = CHAINS["MNIST ReLU2"]
    network = export(module.eval(), torch.zeros(2, *shape))
    engine = fastinv.compile(network, backend="cpu")
    x = randn(37, *shape).astype(np.float16)
    np.testing.assert_array_equal(engine(x), engine(x.astype(np.float32)))
    inverter = fastinv.InverseNetwork(network, (0.5,), (0.5,))
    images = fastinv.invert(x, inverter)
    np.testing.assert_array_equal(fastinv.invert(x, inverter, dtype="uint8"), np.rint(images * np.float32(255)))
