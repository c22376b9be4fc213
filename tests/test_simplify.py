"""Simplified networks compute the same with fewer steps."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinv.backends.torch import as_module
from fastinv.errors import NetworkError
from fastinv.network import MAX_STEPS, Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.linear import Linear
from fastinv.ops.normalize import Normalize
from fastinv.ops.permute import Permute
from fastinv.ops.reshape import Reshape
from fastinv.ops.roll import Roll
from fastinv.ops.separable import Separable
from fastinv.simplify import simplify, with_denormalisation

RNG = np.random.default_rng(0)


def affine(*shape: int) -> tuple[Affine, dict[str, np.ndarray]]:
    return Affine(), {"scale": RNG.standard_normal(shape), "shift": RNG.standard_normal(shape)}


def conv(out: int, inputs: int, k: int, **options) -> tuple[Conv2d, dict[str, np.ndarray]]:
    op = Conv2d(**options)
    weight = RNG.standard_normal((out, inputs // op.groups, k, k))
    return op, {"weight": weight, "bias": RNG.standard_normal(out)}


def chain(input_shape: tuple[int, ...], *layers) -> Network:
    steps = [
        Step(*((layer, (k,)) if not isinstance(layer, tuple) else (layer[0], (k,), layer[1])), source=f"s{k}")
        for k, layer in enumerate(layers)
    ]
    return Network(input_shape, tuple(steps))


def check(network: Network, *ops: str) -> Network:
    simpler = simplify(network)
    assert [step.op.name for step in simpler.steps] == list(ops)
    assert simpler.output_shape == network.output_shape
    x = torch.from_numpy(RNG.standard_normal((3, *network.input_shape)))
    before, after = (as_module(n, torch.float64)(x) for n in (network, simpler))
    assert float((before - after).norm() / before.norm()) < 1e-6
    return simpler


def test_affine_folds_into_convolution() -> None:
    network = check(chain((4, 6, 6), conv(5, 4, 3), affine(5, 1, 1), Activation("relu")), "conv2d")
    assert network.steps[0].activation == Activation("relu")
    assert network.steps[0].source == "s0 + s1 + s2"


def test_affine_folds_into_grouped_transposed_convolution() -> None:
    weights = {"weight": RNG.standard_normal((6, 2, 3, 3)), "bias": RNG.standard_normal(6)}
    layer = (ConvTranspose2d((2, 2), groups=3), weights)
    check(chain((6, 4, 4), layer, affine(6, 1, 1)), "conv_transpose2d")


def test_affine_folds_into_linear() -> None:
    layer = (Linear(), {"weight": RNG.standard_normal((7, 5)), "bias": RNG.standard_normal(7)})
    check(chain((5,), layer, affine(7)), "linear")
    check(chain((2, 5), layer, affine(1, 7)), "linear")


def test_affine_folds_into_a_norm() -> None:
    """Its channels are an image's first axis, and the last of any other value."""
    norm = {"weight": RNG.standard_normal(6), "bias": RNG.standard_normal(6)}
    check(chain((6, 4, 5), (Normalize(3, spatial=True), norm), affine(6, 1, 1), Activation("relu")), "normalize")
    check(chain((5, 6), (Normalize(), norm), affine(1, 6)), "normalize")
    check(chain((5, 6), (Normalize(), norm), affine(5, 1)), "normalize", "affine")


def test_affine_that_differs_over_pixels_stays() -> None:
    check(chain((4, 6, 6), conv(5, 4, 3), affine(1, 4, 4)), "conv2d", "affine")


def test_affines_merge() -> None:
    check(chain((4, 6, 6), affine(4, 1, 1), affine(1, 6, 6), affine(1, 1, 1)), "affine")


def test_padding_folds() -> None:
    ones = {"weight": np.ones((4, 1, 1, 1)), "bias": np.zeros(4)}
    pad = (Conv2d(padding=(1, 2, 0, 3), groups=4), ones)
    network = check(chain((4, 6, 6), pad, conv(5, 4, 3, padding=(1, 0, 0, 0))), "conv2d")
    assert network.steps[0].op == Conv2d(padding=(2, 2, 0, 3))
    scaled = (pad[0], {**ones, "bias": np.full(4, 0.5)})
    check(chain((4, 6, 6), scaled, conv(5, 4, 3)), "conv2d", "conv2d")


def test_rearrangements_compose_and_vanish() -> None:
    check(chain((4, 6, 5), Permute((1, 2, 0)), Permute((2, 0, 1)), Activation("tanh")), "activation")
    check(chain((4, 6, 5), Reshape((24, 5)), Reshape((120,)), Reshape((4, 30))), "reshape")
    check(chain((4, 6, 5), Reshape((120,)), Reshape((4, 6, 5))))


def test_activations_do_not_fuse_twice() -> None:
    network = check(chain((4, 6, 6), conv(5, 4, 3), Activation("relu"), Activation("tanh")), "conv2d", "activation")
    assert network.steps[0].activation == Activation("relu")


def test_nothing_fuses_into_a_value_that_others_read() -> None:
    op, weights = conv(4, 4, 1)
    steps = (
        Step(op, (0,), weights),
        Step(Activation("relu"), (1,)),
        Step(Add(), (1, 2)),
    )
    network = check(Network((4, 5, 5), steps), "conv2d", "activation", "add")
    assert network.steps[0].activation == IDENTITY


def test_dead_steps_go() -> None:
    op, weights = conv(4, 4, 1)
    steps = (Step(op, (0,), weights), Step(op, (0,), weights), Step(Activation("relu"), (1,)))
    check(Network((4, 5, 5), steps), "conv2d")


def test_an_identity_at_the_end_after_dead_steps() -> None:
    op, weights = conv(4, 4, 1)
    steps = (Step(op, (0,), weights), Step(Activation("tanh"), (0,)), Step(Activation(), (1,)))
    check(Network((4, 5, 5), steps), "conv2d")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["conv", "affine", "relu", "tanh", "permute", "reshape"]), max_size=7))
def test_any_chain_keeps_its_meaning(kinds: list[str]) -> None:
    layers = {
        "conv": conv(4, 4, 1),
        "affine": affine(4, 1, 1),
        "relu": Activation("relu"),
        "tanh": Activation("tanh"),
        "permute": Permute((0, 2, 1)),
        "reshape": Reshape((4, 3, 3)),
    }
    network = chain((4, 3, 3), *(layers[kind] for kind in kinds))
    simpler = simplify(network)
    assert len(simpler.steps) <= len(network.steps)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 3, 3)))
    before, after = (as_module(n, torch.float64)(x) for n in (network, simpler))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_denormalisation_ends_a_network_in_pixels() -> None:
    network = with_denormalisation(chain((4, 6, 6), conv(3, 4, 3)), (0.4, 0.5, 0.6), (0.2,))
    assert [step.op.name for step in network.steps] == ["conv2d"]
    x = torch.from_numpy(RNG.standard_normal((2, 4, 6, 6)))
    y = as_module(network, torch.float64)(x)
    assert 0 <= float(y.min()) < float(y.max()) <= 1


def test_networks_refuse_what_does_not_fit() -> None:
    with pytest.raises(NetworkError, match=r"step 1 \(conv2d, s1\): .*expected"):
        chain((4, 6, 6), conv(5, 4, 3), conv(5, 4, 3))
    with pytest.raises(NetworkError, match=r"inputs \[2\], expected values 0 to 0"):
        Network((3,), (Step(Activation("relu"), (2,)),))
    with pytest.raises(NetworkError, match="NaN or Inf"):
        chain((3,), (Affine(), {"scale": [np.nan] * 3, "shift": [0.0] * 3}))
    with pytest.raises(NetworkError, match="positive sizes"):
        Network((0, 3))


def test_the_longest_chain_takes_no_time() -> None:
    ones = {"scale": np.ones((1, 1, 1)), "shift": np.full((1, 1, 1), 0.5)}
    network = chain((1, 2, 2), *[(Affine(), ones)] * MAX_STEPS)
    begin = time.monotonic()
    simpler = simplify(network)
    assert time.monotonic() - begin < 10  # a quadratic pass takes minutes
    assert len(simpler.steps) == 1
    assert simpler.steps[0].weights["shift"].item() == MAX_STEPS / 2


def separable(**shapes: tuple[int, int]) -> tuple[Separable, dict[str, np.ndarray]]:
    return Separable(), {key: RNG.standard_normal(shape) for key, shape in shapes.items()}


def picking(inputs: int, *channels: int) -> tuple[Conv2d, dict[str, np.ndarray]]:
    return Conv2d(), {"weight": np.eye(inputs)[[*channels]][:, :, None, None], "bias": np.zeros(len(channels))}


def linear(out: int, inputs: int) -> tuple[Linear, dict[str, np.ndarray]]:
    return Linear(), {"weight": RNG.standard_normal((out, inputs)), "bias": RNG.standard_normal(out)}


def test_separable_maps_compose() -> None:
    layers = separable(rows=(4, 6)), separable(columns=(2, 5)), separable(rows=(7, 4), columns=(3, 2))
    network = check(chain((3, 6, 5), *layers, Activation("relu")), "separable")
    assert {key: w.shape for key, w in network.steps[0].weights.items()} == {"rows": (7, 6), "columns": (3, 5)}
    check(chain((3, 6, 5), layers[0], Activation("relu"), layers[1]), "separable", "separable")


def test_linear_layers_between_permutations_are_convolutions() -> None:
    last, first = Permute((1, 2, 0)), Permute((2, 0, 1))
    layers = last, linear(8, 3), Activation("gelu"), linear(3, 8), affine(1, 1, 3), first
    network = check(chain((3, 5, 4), *layers), "conv2d", "conv2d")
    assert network.steps[0].activation == Activation("gelu")
    # Whichever way round rows and columns are; a permutation that nothing undoes stays, behind.
    check(chain((3, 5, 4), Permute((2, 1, 0)), linear(4, 3), affine(4, 5, 1), Permute((2, 1, 0))), "conv2d", "affine")
    check(chain((3, 5, 4), last, linear(4, 3), Reshape((80,))), "conv2d", "permute", "reshape")
    # Not where the linear layer is over rows.
    check(chain((3, 5, 4), Permute((0, 2, 1)), linear(4, 5)), "permute", "linear")
    # Where another step reads the permuted image, and adds it, all of it is done on images.
    shared = Network((3, 3, 3), (Step(last, (0,)), Step(linear(3, 3)[0], (1,), linear(3, 3)[1]), Step(Add(), (1, 2))))
    check(shared, "conv2d", "add", "permute")


def test_activations_and_factors_go_before_what_moves_elements() -> None:
    for move, last in ((Reshape((2, 3, 4)), 4), (Reshape((24,)), 24)):
        layers = linear(4, 5), move, Activation("gelu")
        assert check(chain((6, 5), *layers), "linear", "reshape").steps[0].activation == Activation("gelu")
        scaled = chain((6, 5), linear(4, 5), move, affine(*[1] * (len(move.target) - 1), last))
        check(scaled, *(("linear", "reshape") if last == 4 else ("linear", "reshape", "affine")))
    check(chain((6, 5), linear(4, 5), Permute((1, 0)), Activation("relu"), Permute((1, 0))), "linear")


def test_what_keeps_its_last_axis_together_is_added_as_images() -> None:
    """Tokens of windows, as [4, 6, 5], and an image whose channels were put last."""
    network = Network(
        (24, 5),
        (
            Step(Reshape((4, 6, 5)), (0,)),
            Step(Roll((1, 0, 0)), (1,)),
            Step(Add(), (1, 2)),
            Step(Reshape((24, 5)), (3,)),
        ),
    )
    simpler = check(network, "reshape", "roll", "permute", "permute", "add", "permute", "reshape")
    assert simpler.shapes[5] == (5, 4, 6)
    last, weights = linear(8, 5)
    shared = Network(
        (5, 4, 3), (Step(Permute((1, 2, 0)), (0,)), Step(last, (1,), weights), Step(Permute((2, 0, 1)), (2,)))
    )
    check(shared, "conv2d")


def picked(first: tuple[int, ...], second: tuple[int, ...], **producer) -> Network:
    op, weights = conv(6, 4, 3, **producer)
    picks = [picking(6, *channels) for channels in (first, second)]
    return Network(
        (4, 6, 5),
        (
            Step(op, (0,), weights, Activation("relu")),
            *(Step(op, (1,), weights) for op, weights in picks),
            Step(Concat(), (2, 3)),
        ),
    )


def test_channels_are_picked_early() -> None:
    network = check(picked((0, 3, 1), (5, 2)), "conv2d", "conv2d", "concat")
    assert [step.weights["bias"].shape for step in network.steps[:2]] == [(3,), (2,)]
    assert network.steps[0].activation == Activation("relu")
    check(
        picked((0, 3, 1, 4), (5, 2, 1)), "conv2d", "conv2d", "conv2d", "concat"
    )  # one of them would be computed twice
    check(picked((0, 1), (4, 5), groups=2), "conv2d", "conv2d", "conv2d", "concat")


@pytest.mark.parametrize(
    ("last", "clamp", "steps"),
    [
        (Activation("sigmoid"), Activation("clamp", 0.0, 1.0), 1),
        (Activation("sigmoid"), Activation("clamp", -1.0, 2.0), 1),
        (Activation("clamp", 0.25, 0.5), Activation("clamp", 0.0, 0.5), 1),
        (Activation("hardtanh", 0.0, 0.5), Activation("clamp", 0.0, 1.0), 1),
        (Activation("sigmoid"), Activation("clamp", 0.0, 0.9), 2),
        (Activation("sigmoid"), Activation("hardtanh", 0.0, 1.0), 2),  # whose gradient at the bounds is 0
        (Activation("relu"), Activation("clamp", 0.0, 1.0), 2),
        (Activation("tanh"), Activation("clamp", 0.0, 1.0), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True])
def test_a_clamp_of_what_lies_within(last: Activation, clamp: Activation, steps: int, own: bool) -> None:
    op, weights = conv(3, 2, 3)
    first = [Step(op, (0,), weights), Step(last, (1,))] if own else [Step(op, (0,), weights, last)]
    network = Network((2, 5, 4), (*first, Step(clamp, (len(first),))))
    found = simplify(network)
    assert len(found.steps) == steps
    x = torch.from_numpy(RNG.standard_normal((4, 2, 5, 4)))
    torch.testing.assert_close(as_module(found, torch.float64)(x), as_module(network, torch.float64)(x))


def test_pixels_of_a_sigmoid_need_nothing_more() -> None:
    op, weights = conv(3, 2, 3)
    network = Network((2, 5, 4), (Step(op, (0,), weights, Activation("sigmoid")),))
    assert len(with_denormalisation(network, (0.0,), (1.0,)).steps) == 1
    assert len(with_denormalisation(network, (0.1,), (1.0,)).steps) == 2
    assert len(with_denormalisation(network, (0.0,), (1.0, 1.0, 0.5)).steps) == 2
