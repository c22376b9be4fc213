"""Attention: kernels over odd sizes, large scores, shared by threads; every way to write it becomes the one op."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make
from checks import check_gradient, kernels, network_of, randn, reference, relative, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastinv
from fastinv.errors import FastinvError
from fastinv.network import Network, Step
from fastinv.ops.activation import IDENTITY, Activation
from fastinv.ops.attention import Attention
from fastinv.ops.base import Case
from fastinv.ops.linear import Linear
from fastinv.ops.normalize import Normalize
from fastinv.ops.permute import Permute
from fastinv.ops.reshape import Reshape

TRANSFORMERS = [name for name in ARCHITECTURES if "transformer" in name]


def attention(
    queries: int,
    keys: int,
    heads: int,
    channels: int,
    values: int,
    scale: float,
    activation: Activation = IDENTITY,
    windows: int = 1,
    biases: int = 0,
) -> Network:
    """Of so many queries and keys in each window."""
    shapes = ((windows * n, heads * size) for n, size in ((queries, channels), (keys, channels), (keys, values)))
    weights = {"bias": (biases, queries, keys)} if biases else {}
    return network_of(Case("", Attention(heads, scale, windows), tuple(shapes), weights), activation)


@settings(max_examples=50, deadline=None)
@given(
    *(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 9), st.integers(1, 12)),
    *(st.integers(1, 20), st.integers(1, 3), st.sampled_from(["none", "one", "heads", "all"])),
)
def test_any_shape(
    queries: int, keys: int, heads: int, scale: int, channels: int, values: int, windows: int, bias: str
) -> None:
    biases = {"none": 0, "one": 1, "heads": heads, "all": windows * heads}[bias]
    network = attention(queries, keys, heads, channels, values, scale / 10, windows=windows, biases=biases)
    x = randn(2, *network.input_shape)
    found = run(network, x)
    assert relative(found, reference(network, x)) < 1e-5
    assert np.array_equal(found, np.concatenate([run(network, row[None], threads=3) for row in x]))


@pytest.mark.parametrize("kind", ["identity", "gelu"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "channels", "values"),
    [(49, 50, 2, 33, 16), (24, 24, 3, 8, 8), (25, 1, 1, 5, 70), (1, 31, 2, 16, 3), (73, 47, 1, 64, 65)],
)
def test_gradient(isa: str, queries: int, keys: int, heads: int, channels: int, values: int, kind: str) -> None:
    check_gradient(attention(queries, keys, heads, channels, values, 0.3, Activation(kind)))


@pytest.mark.parametrize("biases", [0, 1, 2, 6])
def test_gradient_of_windows(isa: str, biases: int) -> None:
    check_gradient(attention(25, 17, 2, 9, 20, 0.3, windows=3, biases=biases))


def test_masked_keys_count_for_nothing(isa: str) -> None:
    """Whatever they are: results for the others are the same, bit for bit."""
    layers = [Step(Linear(), (0,), {"weight": randn(16, 12, seed=k), "bias": randn(16)}) for k in range(3)]
    bias = np.zeros((1, 40, 40), np.float32)
    bias[:, :, 23:] = -1e30
    masked = Network((40, 12), (*layers, Step(Attention(2, 0.1), (1, 2, 3), {"bias": bias})))
    x = randn(2, 40, 12)
    found = run(masked, x)
    assert relative(found, reference(masked, x)) < 1e-5
    others = x.copy()
    others[:, 23:] *= 7
    assert np.array_equal(run(masked, others)[:, :23], found[:, :23])
    plain = Network((40, 12), (*layers, Step(Attention(2, 0.1), (1, 2, 3))))
    assert relative(run(plain, others)[:, :23], found[:, :23]) > 0.1


@pytest.mark.parametrize("scale", [100.0, -3.0, 0.0])
def test_scores_of_any_size(isa: str, scale: float) -> None:
    """The largest is taken from all before the exponential: none overflows. float32 keeps 1e-5 of scores of 100."""
    network = attention(20, 37, 2, 16, 9, scale)
    x = randn(2, *network.input_shape)
    assert relative(run(network, x), reference(network, x)) < 1e-4


def test_one_value_three_times(isa: str) -> None:
    """Queries, keys and values may be the same: three gradients add up."""
    step = attention(9, 9, 2, 4, 4, 0.5).steps[-1]
    network = Network((9, 8), (dataclasses.replace(step, inputs=(0, 0, 0)),))
    x = randn(3, 9, 8)
    assert relative(run(network, x), reference(network, x)) < 1e-5
    assert kernels(network) == ["attention"]
    check_gradient(network)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_no_element_moves(name: str) -> None:
    """Whatever a model does to have its heads apart: layers of tokens, attention of tokens, and nothing between."""
    module, shape = make(name)
    network = fastinv.export(module, torch.zeros(2, *shape))
    first = next(i for i, step in enumerate(network.steps) if step.op.name == "normalize" or step.op.name == "linear")
    blocks = network.steps[first:]
    assert sum(isinstance(step.op, Attention) for step in blocks) == 2
    assert not any(isinstance(step.op, (Permute, Reshape)) for step in blocks)
    for step in blocks:
        if isinstance(step.op, Attention):
            assert all(isinstance(network.steps[value - 1].op, Linear) for value in step.inputs)


@pytest.mark.parametrize("name", ["swin", "swin-v2"])
def test_windows_are_cut_and_joined_in_one_go_each(name: str) -> None:
    """Layers of tokens, norms of heads, attention: what else windows need is to go there and come back."""
    module, shape = make(name)
    network = fastinv.export(module, torch.zeros(2, *shape))
    attentions = [step for step in network.steps if isinstance(step.op, Attention)]
    assert [step.op.windows for step in attentions] == [4, 4, 1]  # type: ignore[attr-defined]
    assert all("bias" in step.weights for step in attentions)
    for step in attentions:
        assert all(isinstance(network.steps[value - 1].op, (Linear, Normalize)) for value in step.inputs)
    moves = [kernel for kernel in kernels(network) if kernel.startswith("gather")]
    assert len(moves) <= 15
    assert set(moves) == {"gather runs"}


def test_attention_across() -> None:
    """Queries from one place, keys and values, of other sizes, from another."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=10, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x[:, 0, :, :12], x[:, 1, :5, :8], x[:, 2, :5, :10], need_weights=False)[0]

    torch.manual_seed(0)
    module = Across().eval()
    x = torch.randn(3, 3, 7, 14)
    engine = fastinv.compile(fastinv.export(module, x), backend="cpu")
    with torch.no_grad():
        torch.testing.assert_close(engine(x), module(x), rtol=1e-5, atol=1e-5)


def test_pytorch_is_left_as_it_was() -> None:
    forward, fast = nn.MultiheadAttention.forward, torch.backends.mha.get_fastpath_enabled()
    fastinv.export(make("vision-transformer-of-pytorch")[0], torch.zeros(2, 3, 16, 16))
    with pytest.raises(FastinvError, match="batch axis"):
        fastinv.export(nn.TransformerEncoderLayer(8, 2, 8).eval(), torch.zeros(2, 5, 8))
    assert nn.MultiheadAttention.forward is forward
    assert torch.backends.mha.get_fastpath_enabled() == fast
