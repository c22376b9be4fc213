"""Networks as data, and the torch backend that defines what they compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import network_of, relative

import fastinv
from fastinv.backends import torch as torch_backend
from fastinv.backends.torch import TorchBackend, as_module
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.base import Case

CASES = [pytest.param(case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in op.cases()]


def weights_of(network: Network) -> dict[tuple[int, str], np.ndarray]:
    return {(index, key): value for index, step in enumerate(network.steps) for key, value in step.weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_graph_and_weights_make_the_network_again(case: Case) -> None:
    network = network_of(case)
    again = Network.from_graph(network.graph(), weights_of(network))
    assert again == network
    assert hash(again) == hash(network)


def test_other_weights_make_another_network() -> None:
    case = OPS["linear"].cases()[0]
    assert network_of(case, seed=0) != network_of(case, seed=1)


def test_weights_are_copied_and_frozen() -> None:
    weight = np.ones((1, 1, 1), np.float32)
    step = Step(OPS["affine"](), (0,), {"scale": weight, "shift": weight})
    weight[:] = 5
    assert step.weights["scale"].item() == 1
    with pytest.raises(ValueError, match="read-only"):
        step.weights["scale"][:] = 2


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_torch_backend_keeps_its_bounds(precision: str, tolerance: float) -> None:
    network = network_of(OPS["conv2d"].cases()[0])
    x = np.random.default_rng(0).standard_normal((5, *network.input_shape)).astype(np.float32)
    expected = as_module(network, torch.float64)(torch.from_numpy(x).double()).numpy()
    found = fastinv.compile(network, backend="torch", precision=precision)(x)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_torch_backend_runs_large_networks_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(OPS["conv2d"].cases()[0])
    x = np.random.default_rng(0).standard_normal((7, *network.input_shape)).astype(np.float32)
    whole = fastinv.compile(network, backend="torch")(x)
    for limit in (1, 3 * sum(int(np.prod(shape)) for shape in network.shapes)):
        monkeypatch.setattr(torch_backend, "MAX_VALUES", limit)
        # PyTorch may sum in another order.
        assert relative(fastinv.compile(network, backend="torch")(x), whole) < 1e-6


def test_torch_backend_puts_the_number_of_threads_back() -> None:
    before = torch.get_num_threads()
    network = network_of(OPS["linear"].cases()[0])
    compiled = TorchBackend().compile(network, "float32", before + 1)
    compiled.run(np.zeros((2, *network.input_shape), np.float32), np.zeros((2, *network.output_shape), np.float32))
    assert torch.get_num_threads() == before


def test_torch_backend_describes_every_step() -> None:
    network = network_of(OPS["add"].cases()[0])
    plan = TorchBackend().compile(network, "float32", None).describe()
    assert [entry["step"] for entry in plan] == list(range(len(network.steps)))
    assert sum(entry["flops"] for entry in plan) == network.flops


def test_module_holds_its_weights_as_buffers() -> None:
    network = network_of(OPS["conv2d"].cases()[0])
    module = as_module(network, torch.float32)
    assert sum(buffer.numel() for buffer in module.buffers()) == network.parameters
    assert not list(module.parameters())
    x = torch.zeros(1, *network.input_shape, dtype=torch.float64, requires_grad=True)
    y = module.double()(x)
    assert y.dtype is torch.float64
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
