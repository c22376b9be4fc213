"""What moves elements: any chain of it is one launch, in the form that its order allows, or none at all."""

from __future__ import annotations

import math

import numpy as np
import pytest
from checks import check_gradient, kernels, randn, reference, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.add import Add
from fastinv.ops.base import Op, Shape
from fastinv.ops.permute import Permute
from fastinv.ops.reshape import Reshape
from fastinv.ops.roll import Roll


def chain(shape: Shape, *ops: Op, activation: Activation = IDENTITY) -> Network:
    steps = [Step(op, (index,)) for index, op in enumerate(ops)]
    steps[-1] = Step(ops[-1], (len(ops) - 1,), activation=activation)
    return Network(shape, tuple(steps))


@st.composite
def chains(draw: st.DrawFn) -> Network:
    shape = first = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 8, 17, 32]), min_size=1, max_size=4)))
    ops: list[Op] = []
    for kind in draw(st.lists(st.sampled_from("prs"), min_size=1, max_size=4)):
        if kind == "p":
            ops.append(Permute(tuple(draw(st.permutations(range(len(shape)))))))
        elif kind == "r":
            ops.append(Roll(tuple(draw(st.integers(-3, 3)) for _ in shape)))
        else:
            cut = draw(st.integers(0, len(shape)))
            ops.append(Reshape((math.prod(shape[:cut]), *shape[cut:])))
        shape = ops[-1].shape([shape], {})
    return chain(first, *ops, activation=Activation(draw(st.sampled_from(["identity", "silu"]))))


@settings(max_examples=150, deadline=None)
@given(chains())
def test_any_chain(network: Network) -> None:
    x = randn(2, *network.input_shape)
    found = run(network, x)
    np.testing.assert_allclose(found, reference(network, x), rtol=2e-6, atol=3e-7)
    assert np.array_equal(found, np.concatenate([run(network, row[None], threads=3) for row in x]))
    assert sum(name.startswith("gather") for name in kernels(network)) <= 1


WINDOWS = Reshape((4, 7, 4, 7, 24)), Permute((0, 2, 1, 3, 4)), Reshape((784, 24))


@pytest.mark.parametrize(
    ("network", "kernel"),
    [
        (chain((28, 28, 24), Roll((2, -3, 0)), *WINDOWS), "gather"),  # an image of 28 channels lies otherwise
        (chain((24, 28, 28), Permute((1, 2, 0)), Roll((2, -3, 0)), *WINDOWS), "gather runs"),
        (chain((35, 66), Permute((1, 0))), "gather turned"),
        (chain((6, 35, 66), Reshape((2, 3, 35, 66)), Permute((1, 0, 3, 2)), Reshape((99, 140))), "gather"),
        (chain((5, 4, 33, 3), Permute((0, 1, 3, 2))), "gather turned"),
        (chain((24, 28, 28), Permute((1, 2, 0)), Reshape((784, 24)), Reshape((28, 28, 24)), Permute((2, 0, 1))), ""),
    ],
    ids=["roll-and-windows", "windows-of-channels", "matrix", "mixed", "matrices", "and-back"],
)
def test_each_form(isa: str, network: Network, kernel: str) -> None:
    launched = [name for name in kernels(network) if name not in ("layout", "copy")]
    assert launched == ([kernel] if kernel else [])
    x = randn(3, *network.input_shape)
    assert np.array_equal(run(network, x, threads=2), reference(network, x).astype(np.float32))
    check_gradient(network)


def test_gradients_of_what_is_moved_twice_add_up(isa: str) -> None:
    """One is written, the other added: in every form."""
    for axes in ((1, 0), (0, 1)):
        moves = Step(Permute(axes), (0,)), Step(Roll((8, 0)), (0,))
        check_gradient(Network((32, 32), (*moves, Step(Add(), (1, 2)))))
    runs = Step(Reshape((4, 4, 16)), (0,)), Step(Permute((1, 0, 2)), (1,)), Step(Reshape((16, 16)), (2,))
    check_gradient(Network((16, 16), (*runs, Step(Add(), (0, 3)))))


def test_what_others_read_is_there_too(isa: str) -> None:
    """A value between two rearrangements that something else reads."""
    steps = (
        Step(Permute((1, 0)), (0,)),
        Step(Reshape((5, 3, 4)), (1,)),
        Step(Activation("tanh"), (2,)),
        Step(Permute((2, 0, 1)), (2,)),
        Step(Reshape((60,)), (4,)),
        Step(Reshape((60,)), (3,)),
        Step(Add(), (5, 6)),
    )
    network = Network((12, 5), steps)
    x = randn(2, 12, 5)
    np.testing.assert_allclose(run(network, x), reference(network, x), rtol=1e-5, atol=1e-6)
    check_gradient(network)
