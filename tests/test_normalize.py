"""Norms on the statistics of the image itself: kernels over odd sizes, far from zero, shared by threads; decoders."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from checks import check_gradient, kernels, randn, reference, relative, run
from hypothesis import given, settings
from hypothesis import strategies as st

import fastinv
from fastinv.network import Network, Step
from fastinv.ops.activation import Activation
from fastinv.ops.base import Shape
from fastinv.ops.normalize import Normalize, channel_axis


def network_of(op: Normalize, shape: Shape, kind: str = "identity") -> Network:
    weights = {"weight": randn(shape[channel_axis(shape)], seed=3), "bias": randn(shape[channel_axis(shape)], seed=4)}
    return Network(shape, (Step(op, (0,), weights, Activation(kind)),))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    groups, width = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    sides = draw(st.sampled_from([(), (1,), (11,), (1, 1), (2, 3), (5, 7), (19, 17)]))
    spatial = len(sides) == 2 and draw(st.booleans())
    op = Normalize(groups, spatial, draw(st.booleans()), draw(st.sampled_from([1e-6, 1e-5, 0.1])))
    shape = (groups * width, *sides) if len(sides) == 2 else (*sides, groups * width)
    return network_of(op, shape, draw(st.sampled_from(["identity", "relu", "silu"])))


@settings(max_examples=150, deadline=None)
@given(networks())
def test_any_shape(network: Network) -> None:
    x = randn(3, *network.input_shape)
    expected = reference(network, x)
    found = run(network, x)
    # Of the one value of a group nothing is left but rounding.
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected) + 1e-4
    assert np.array_equal(found, np.concatenate([run(network, row[None], threads=3) for row in x]))


@pytest.mark.parametrize("kind", ["identity", "relu", "gelu"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        (Normalize(2, spatial=True), (6, 40, 31)),  # several stretches of a sum
        (Normalize(1, spatial=True), (150, 9, 9)),  # two vectors of channels at a time, and one
        (Normalize(16, spatial=True), (64, 24, 24)),
        (Normalize(7, spatial=True, centered=False), (7, 33, 20)),
        (Normalize(), (96, 12, 12)),
        (Normalize(5), (25, 3, 4)),
        (Normalize(eps=1e-6), (49, 130)),
        (Normalize(centered=False), (3, 2500)),
    ],
    ids=str,
)
def test_gradient(isa: str, op: Normalize, shape: Shape, kind: str) -> None:
    network = network_of(op, shape, kind)
    x = randn(2, *shape)
    assert relative(run(network, x), reference(network, x)) < 1e-5
    check_gradient(network)


@pytest.mark.parametrize("op", [Normalize(4, spatial=True), Normalize(4)], ids=["image", "pixels"])
def test_far_from_zero(isa: str, op: Normalize) -> None:
    """Squares of differences, not differences of squares: a mean of 1,000 deviations costs no more than x's rounding.

    float32 keeps 6e-5 of 1,000.
    """
    network = network_of(op, (32, 20, 20))
    x = randn(2, 32, 20, 20) + np.float32(1000)
    assert relative(run(network, x), reference(network, x)) < 1e-4


def test_a_constant_image_is_the_bias(isa: str) -> None:
    network = network_of(Normalize(2, spatial=True), (6, 5, 5))
    bias = network.steps[0].weights["bias"][None, :, None, None]
    np.testing.assert_array_equal(
        run(network, np.full((1, 6, 5, 5), 2.5, np.float32)), np.broadcast_to(bias, (1, 6, 5, 5))
    )


def test_no_image_is_an_image(isa: str) -> None:
    assert run(network_of(Normalize(3, spatial=True), (6, 5, 5)), randn(0, 6, 5, 5)).shape == (0, 6, 5, 5)


def test_kernels_have_names() -> None:
    assert kernels(network_of(Normalize(2, spatial=True), (6, 1, 1))) == ["normalize image"]
    assert kernels(network_of(Normalize(), (4, 6))) == ["normalize rows"]


def test_inverse_network_with_norms() -> None:
    """A decoder with group norm goes from PyTorch to pixels."""
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(
        *(torch.nn.Conv2d(8, 32, 3, padding=1), torch.nn.GroupNorm(8, 32), torch.nn.SiLU()),
        *(torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(32, 3, 3, padding=1), torch.nn.Sigmoid()),
    ).eval()
    features = randn(5, 8, 7, 9)
    inverter = fastinv.InverseNetwork(fastinv.export(decoder, torch.zeros(2, 8, 7, 9)), mean=(0.0,), std=(1.0,))
    with torch.no_grad():
        expected = copy.deepcopy(decoder).double()(torch.from_numpy(features).double()).numpy()
    assert relative(fastinv.invert(features, inverter, backend="cpu"), expected) < 1e-5
