"""Inverters: frozen, compared by content, and every wrong option refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fastinv import RMLE, InverseNetwork, Network, NetworkError, Step
from fastinv.inverters import channelwise
from fastinv.ops import OPS
from fastinv.ops.activation import Activation

SHAPE = (3, 4, 5)
EDGE = Network(SHAPE, (Step(Activation("relu"), (0,)),))


def rmle(**changes: Any) -> RMLE:
    return RMLE(**({"edge": EDGE, "input_shape": SHAPE} | changes))


def test_shapes() -> None:
    flat = Network((4, 4, 5), ())
    assert InverseNetwork(flat).feature_shape == InverseNetwork(flat).image_shape == (4, 4, 5)
    assert rmle().feature_shape == rmle().image_shape == SHAPE


def test_the_input_shape_may_be_left_out() -> None:
    assert RMLE(EDGE).input_shape == RMLE(EDGE, None).input_shape == SHAPE
    assert RMLE(EDGE, mean=(0.1, 0.2, 0.3)) == rmle(mean=(0.1, 0.2, 0.3))


def test_a_repr_is_one_line_without_weights() -> None:
    start = InverseNetwork(Network(SHAPE, (Step(Activation("relu"), (0,)),)))
    assert repr(EDGE) == "Network([3, 4, 5] -> [3, 4, 5], 1 step, 0 parameters)"
    assert repr(start) == "InverseNetwork([3, 4, 5] -> [3, 4, 5], 0 parameters)"
    found = repr(rmle(init=np.zeros(SHAPE), steps=1000, optimizer="lbfgs"))
    assert found == "RMLE([3, 4, 5] -> [3, 4, 5], 1,000 steps of lbfgs, an edge of 0 parameters)"
    weights = {key: np.zeros((3, 1, 1), np.float32) for key in ("scale", "shift")}
    assert "array" not in repr(Step(OPS["affine"](), (0,), weights))


def test_arguments_become_plain_and_frozen() -> None:
    start = np.zeros(SHAPE)
    inverter = rmle(
        mean=[0.5, np.float32(0.25), 1],
        std=2,
        steps=np.int64(3),
        lr=1,
        betas=np.array([0.5, 0.5]),
        init=start,
        input_shape=list(SHAPE),
        clamp=[0, 1],
        provenance={"a": (1, 2)},
    )
    assert inverter.mean == (0.5, 0.25, 1.0)
    assert inverter.std == (2.0,)
    assert type(inverter.steps) is int
    assert type(inverter.lr) is float
    assert inverter.betas == (0.5, 0.5)
    assert inverter.clamp == (0.0, 1.0)
    assert inverter.input_shape == SHAPE
    assert inverter.provenance == {"a": [1, 2]}
    start[:] = 1
    assert isinstance(inverter.init, np.ndarray)
    assert inverter.init.dtype == np.float32
    assert not inverter.init.any()
    with pytest.raises(ValueError, match="read-only"):
        inverter.init[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        inverter.steps = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        inverter.provenance["a"] = 1  # type: ignore[index]


def test_a_start_of_torch_is_taken() -> None:
    for zeros in (torch.zeros(SHAPE, dtype=torch.bfloat16), np.zeros(SHAPE, np.float16), np.zeros(SHAPE, ">f8")):
        assert rmle(init=zeros) == rmle(init=torch.zeros(SHAPE))
    assert rmle(init=np.float16(0.5)) == rmle(init=0.5)


def test_a_mean_may_stand_in_planes() -> None:
    assert rmle(mean=np.ones((3, 1, 1))) == rmle(mean=torch.ones(3, 1, 1)) == rmle(mean=(1, 1, 1))


def test_equal_content_is_equal() -> None:
    a, b = rmle(init=np.zeros(SHAPE)), rmle(init=np.zeros(SHAPE, np.float32), edge=Network(SHAPE, EDGE.steps))
    assert a == b
    assert hash(a) == hash(b)
    assert a.fingerprint == b.fingerprint
    assert len({a, b}) == 1
    assert a != "a"
    assert EDGE != "a"


CHANGES: list[dict[str, Any]] = [
    {"edge": Network(SHAPE, (Step(Activation("tanh"), (0,)),))},
    {"mean": 0.5},
    {"std": 0.5},
    {"steps": 1},
    {"lr": 1.0},
    {"tv_weight": 1.0},
    {"tv_beta": 1.0},
    {"optimizer": "sgd"},
    {"init": 0.25},
    {"init": np.zeros(SHAPE)},
    {"clamp": None},
    {"keep": "best"},
    {"tolerance": 0.1},
    {"patience": 2},
    {"betas": (0.5, 0.5)},
    {"eps": 1e-3},
    {"momentum": 0.5},
    {"schedule": "cosine"},
    {"provenance": {"seed": 1}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_every_field_counts(change: dict[str, Any]) -> None:
    assert rmle(**change) != rmle()
    assert rmle(**change).fingerprint == rmle(**change).fingerprint


def test_kinds_differ() -> None:
    assert InverseNetwork(EDGE) != rmle()
    assert InverseNetwork(EDGE) == InverseNetwork(EDGE)


def test_the_values_of_a_start_count() -> None:
    one, two = np.zeros(SHAPE), np.zeros(SHAPE)
    two[1, 2, 3] = 1
    assert rmle(init=one) != rmle(init=two)


loop: list[Any] = []
loop.append(loop)

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"edge": None}, "edge is a NoneType, expected a Network: export"),
    ({"edge": Network((12,), ())}, r"images of shape \[12\], expected \[C, H, W\]"),
    ({"input_shape": (3, 4, 4)}, "input_shape .* but the edge takes"),
    ({"input_shape": (3.0, 4.0, 5.0)}, "input_shape"),
    ({"input_shape": ()}, r"input_shape \(\), but the edge takes \[3, 4, 5\]"),
    ({"mean": (0.5, 0.5)}, "mean .* expected 1 or 3 finite"),
    ({"mean": "abc"}, "mean 'abc'"),
    ({"mean": None}, "mean None"),
    ({"mean": (0.5, True, 0.5)}, "mean"),
    ({"mean": float("nan")}, "mean nan"),
    ({"mean": 1e39}, "mean 1e"),
    ({"mean": 10**400}, "mean 1000"),
    ({"std": 0.0}, "std .* above 0"),
    ({"std": (1.0, -1.0, 1.0)}, "std .* above 0"),
    ({"std": 1e-60}, "std .* above 0"),
    ({"steps": -1}, "steps -1, expected an integer from 0 to"),
    ({"steps": 1.5}, "steps 1.5"),
    ({"steps": True}, "steps True"),
    ({"steps": "7"}, "steps '7'"),
    ({"patience": 0}, "patience 0, expected an integer from 1 to"),
    ({"lr": -1.0}, "lr -1.0, expected a number from 0 to"),
    ({"lr": float("inf")}, "lr inf"),
    ({"lr": float("nan")}, "lr nan"),
    ({"lr": None}, "lr None"),
    ({"tv_weight": -0.1}, "tv_weight"),
    ({"tv_beta": 0.5}, "tv_beta 0.5, expected a number from 1 to 10"),
    ({"tolerance": -1}, "tolerance -1"),
    ({"eps": 2}, "eps 2"),
    ({"momentum": 1.5}, "momentum 1.5"),
    ({"optimizer": "lion"}, "optimizer 'lion', expected one of adam, amsgrad, sgd"),
    ({"optimizer": None}, "optimizer None"),
    ({"schedule": "linear"}, "schedule 'linear', expected one of constant, cosine"),
    ({"keep": "first"}, "keep 'first', expected one of last, best"),
    ({"betas": (0.9, 1.0)}, "betas .* in"),
    ({"betas": 0.9}, "betas 0.9, expected two"),
    ({"clamp": (1, 0)}, "clamp .* low <= high"),
    ({"clamp": 1}, "clamp 1, expected None or two"),
    ({"init": True}, "init: a bool"),
    ({"init": float("inf")}, "init holds NaN or Inf"),
    ({"mean": torch.zeros(3, device="meta")}, "mean tensor"),
    ({"init": 10**400}, "init holds NaN or Inf"),
    ({"init": None}, "init"),
    ({"init": "grey"}, r"init: a str, expected a number, .* such as fastinv.load\(path\) gives"),
    ({"init": np.zeros((4, 5))}, r"init of shape \[4, 5\] .* expected a number or float pixels \[3, 4, 5\]"),
    ({"init": [[1, 2], [3]]}, "init: "),
    ({"init": np.full(SHAPE, np.nan)}, "init holds NaN or Inf"),
    ({"init": np.full(SHAPE, 1e300)}, "init holds NaN or Inf"),
    ({"init": np.zeros(SHAPE, complex)}, "dtype complex128, expected"),
    ({"init": np.full(SHAPE, "1")}, "dtype str32, expected"),
    ({"init": np.ma.masked_array(np.zeros(SHAPE), True)}, "init: a masked array"),
    ({"init": InverseNetwork(Network((4, 4, 5), ()))}, r"init takes features .* expected"),
    ({"init": EDGE}, "init: "),
    ({"provenance": None}, "provenance is a NoneType"),
    ({"provenance": {"a": np.float32(1)}}, "provenance: .*float32"),
    ({"provenance": {"a": float("nan")}}, "provenance: "),
    ({"provenance": {"a": loop}}, "provenance: "),
    ({"provenance": {"a": 10**50}}, "provenance: .* digits"),
    ({"provenance": {"a": "\ud800"}}, "provenance: "),
    ({"provenance": {"a": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}}, "deeper"),
    ({"provenance": {"a": "x" * 2**21}}, "at most 1048576"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:24] for _, message in WRONG])
def test_wrong_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        rmle(**change)


def test_wrong_inverse_networks() -> None:
    with pytest.raises(NetworkError, match="network is a str, expected a Network"):
        InverseNetwork("relu22.pt")  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=r"images of shape \[12\]"):
        InverseNetwork(Network((12,), ()))
    with pytest.raises(NetworkError, match="std"):
        InverseNetwork(EDGE, std=(0.0,))


def test_a_network_of_too_much_work_is_refused() -> None:
    big = Step(Activation("relu"), (0,))
    with pytest.raises(NetworkError, match="elements in all values"):
        Network((2**10, 2**9, 2**9), (big,) * 4)


def test_the_source_of_a_step_is_kept_short_and_printable() -> None:
    step = Step(Activation("relu"), (0,), source="layer\x1b[31m\n" + "x" * 1000)
    assert step.source.startswith("layer?[31m?x")
    assert len(step.source) == 256


def test_channelwise() -> None:
    assert channelwise((0.5,), SHAPE).tolist() == [[[0.5]]] * 3
    assert channelwise((1.0, 2.0, 3.0), SHAPE).shape == (3, 1, 1)
    assert channelwise((1.0, 2.0, 3.0), SHAPE).dtype == np.float32
