"""Every op on the Triton path, forward and gradient, against the torch reference; without a GPU in the interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from checks import ACTIVATIONS, CASES, network_of, randn, reference, reference_gradient, relative, steep_examples

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton import pool, softmax
from fastinv.kernels.triton.epilogue import Epilogue
from interpreter import DEVICE, forward, gradient, rounded

from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.ops import LOWERINGS
from fastinv.errors import BackendError
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import STEEP, Activation
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.base import Case
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.linear import Linear
from fastinv.ops.matmul import Matmul
from fastinv.ops.mul import Mul
from fastinv.ops.permute import Permute
from fastinv.ops.softmax import Softmax
from fastinv.ops.upsample import Upsample

# Relative, of one op; the promise for float32 is 1e-4. The interpreter computes bfloat16 wrongly.
TOLERANCES = {"float32": 1e-5, "float16": 5e-3} | ({} if DEVICE == "cpu" else {"tf32": 5e-3, "bfloat16": 2e-2})
GRADIENT_TOLERANCES = {name: (1 if name == "float32" else 2) * within for name, within in TOLERANCES.items()}


def check_gradient(network: Network, precision: str = "float32") -> None:
    z = rounded(randn(2, *network.input_shape, seed=1), precision)
    features = (reference(network, z) + randn(2, *network.output_shape, seed=2)).astype(np.float32)
    expected = reference_gradient(network, z, features)
    found = gradient(network, z, features, precision)
    within = GRADIENT_TOLERANCES[precision]
    assert np.linalg.norm(found - expected) <= within * np.linalg.norm(expected) + 0.1 * within * np.linalg.norm(z)


def test_table_covers_every_op() -> None:
    assert set(LOWERINGS) == set(OPS)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_forward(case, precision: str) -> None:
    network = network_of(case)
    x = randn(3, *network.input_shape)
    assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", GRADIENT_TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_gradient(case, precision: str) -> None:
    check_gradient(network_of(case), precision)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bound", [0.7, 0.9, 1.0])  # bfloat16 rounds the first two to less, float16 the second
def test_no_gradient_beyond_the_bounds_of_hardtanh(bound: float, precision: str) -> None:
    same = {"scale": np.ones((1, 1, 1), np.float32), "shift": np.zeros((1, 1, 1), np.float32)}
    network = Network((1, 1, 4), (Step(Affine(), (0,), same, Activation("hardtanh", -bound, bound)),))
    z = np.array([-3, -0.5, 0.5, 3], np.float32).reshape(1, 1, 1, 4)
    np.testing.assert_array_equal(gradient(network, z, 0 * z, precision).ravel(), [0, -1, 1, 0])


@pytest.mark.parametrize(
    "op", [Conv2d((3, 3), (1, 1, 1, 1)), ConvTranspose2d((3, 3), (1, 1), (2, 2))], ids=["convolution", "transposed"]
)
def test_products_of_nothing_at_all(op: Conv2d | ConvTranspose2d) -> None:
    """No input counts for any output, or no output for any input."""
    side = 2 if isinstance(op, Conv2d) else 1
    shape = (32, 16, 1, 1) if isinstance(op, Conv2d) else (16, 32, 1, 1)
    network = Network((16, side, side), (Step(op, (0,), {"weight": randn(*shape), "bias": randn(32)}),))
    x = randn(2, 16, side, side)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, Activation("leaky_relu", -0.5)], ids=lambda a: f"{a.kind}-{a.a}")
@pytest.mark.parametrize("op", ["conv2d", "concat", "permute"])
def test_fused_activation(op: str, activation: Activation) -> None:
    """Also one whose slope cannot be told from its result."""
    case = next(c for c in OPS[op].cases() if math.prod(c.inputs[0]) < 2000)
    network = network_of(case, activation=activation)
    x = randn(2, *network.input_shape)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


@pytest.mark.parametrize("kind", STEEP)
def test_steep_activation(kind: str) -> None:
    for network in steep_examples(kind).values():
        x = randn(2, *network.input_shape)
        assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
        check_gradient(network)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *map(Activation, STEEP)], ids=lambda a: a.kind)
def test_activation_over_its_whole_range(activation: Activation) -> None:
    x = np.concatenate([np.linspace(-100, 100, 4001), np.linspace(-1, 1, 4001), [0.0, -0.0, 1e-30]])
    x = x.astype(np.float32)[None]
    if activation.kind == "exp":
        x = x.clip(-87, 87)
    if activation.kind == "reciprocal":  # the sign of a zero is lost on the way, and numpy warns
        x = x[x != 0][None]
    network = Network(x.shape[1:], (Step(activation, (0,)),))
    np.testing.assert_allclose(forward(network, x, "float32"), reference(network, x), rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("kind", ["tanh", "gelu_tanh", "silu", "elu"])
def test_small_results_keep_their_digits(kind: str) -> None:
    x = np.concatenate([sign * np.logspace(-6, 0, 500) for sign in (-1, 1)]).astype(np.float32)[None]
    network = Network(x.shape[1:], (Step(Activation(kind, *(1.0, 1.0) if kind == "elu" else ()), (0,)),))
    np.testing.assert_allclose(forward(network, x, "float32"), reference(network, x), rtol=1e-6)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("tokens", "heads", "channels", "values"), [(130, 2, 20, 12), (65, 1, 9, 40)])
def test_attention_over_several_tiles(tokens: int, heads: int, channels: int, values: int, precision: str) -> None:
    """Larger scores after smaller ones: what was summed is scaled anew."""
    steps = [linear(0, heads * size, 16, seed) for seed, size in enumerate((channels, channels, values))]
    attention = Step(Attention(heads, 3 / math.sqrt(channels)), (1, 2, 3))  # scores of some 3
    network = Network((tokens, 16), (*steps, attention))
    x = rounded(randn(2, *network.input_shape), precision)
    assert relative(forward(network, x, precision), reference(network, x)) < 2 * TOLERANCES[precision]
    check_gradient(network, precision)


@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (66, 3)])
def test_attention_to_as_many_other_tokens(queries: int, keys: int) -> None:
    network = network_of(Case("", Attention(1, 1.0), ((queries, 4), (keys, 4), (keys, 3))))
    x = randn(2, *network.input_shape)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_biases_and_windows_over_several_tiles(precision: str) -> None:
    """A bias for each head, whichever window; masked are whole tiles of keys, the first of some queries among them."""
    steps = [linear(0, 24, 16, seed) for seed in range(3)]
    bias = randn(2, 70, 70)
    bias[0, :30, :64] = bias[1, 40:, 64:] = -1e30
    attention = Step(Attention(2, 0.5, windows=3), (1, 2, 3), {"bias": bias})
    network = Network((210, 16), (*steps, attention))
    x = rounded(randn(2, *network.input_shape), precision)
    assert relative(forward(network, x, precision), reference(network, x)) < 2 * TOLERANCES[precision]
    check_gradient(network, precision)


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_over_several_tiles(transposed: bool) -> None:
    steps = linear(0, 40 if transposed else 130, 16, 0), linear(0, 40 if transposed else 70, 16, 1)
    network = Network((260, 16), (*steps, Step(Matmul(2, transposed), (1, 2))))
    x = randn(2, *network.input_shape)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


def test_softmax_over_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "interpreted", lambda device: 1)
    network = Network((3, 16), (linear(0, 2 * softmax.TILE + 5, 16, 0), Step(Softmax(), (1,))))
    x = 5 * randn(2, *network.input_shape)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


def linear(value: int, outputs: int, inputs: int, seed: int) -> Step:
    weight = randn(outputs, inputs, seed=seed) / np.float32(math.sqrt(inputs))
    return Step(Linear(), (value,), {"weight": weight, "bias": randn(outputs, seed=seed + 9)})


def test_heads_of_too_many_channels_for_a_tile() -> None:
    shapes = ((3, 1100),) * 3
    network = network_of(Case("", Attention(2, 0.1), shapes))
    with pytest.raises(BackendError, match="550 channels a head, expected at most 512"):
        Lowering(network, DEVICE, PRECISIONS["float32"])


def conv(inputs: tuple[int, ...], o: int, c: int, k: int = 3, seed: int = 0, kind: str = "identity") -> Step:
    weights = {
        "weight": randn(o, c, k, k, seed=seed) / np.float32(math.sqrt(c * k * k)),
        "bias": randn(o, seed=seed + 1),
    }
    return Step(Conv2d(padding=(k // 2,) * 4), inputs, weights, Activation(kind))


def test_a_value_that_several_steps_read() -> None:
    """Gradients add up, and only the sum goes through the activation's slope."""
    network = Network(
        (4, 5, 6),
        (
            conv((0,), 8, 4, seed=1, kind="relu"),
            conv((1,), 8, 8, seed=2),
            Step(Add(), (2, 1), activation=Activation("tanh")),  # done by the convolution before
            Step(Mul(), (3, 3)),
            conv((4,), 8, 8, seed=3, kind="sigmoid"),
            Step(Add(), (5, 1)),
        ),
    )
    x = randn(2, 4, 5, 6)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)
    assert len(Lowering(network, "cpu", PRECISIONS["float32"]).nodes) == 5


@pytest.mark.parametrize("repeats", [(2, 2), (3, 1), (4, 3)])
def test_upsampling_goes_into_the_convolution(repeats: tuple[int, int]) -> None:
    size = (4 * repeats[0], 6 * repeats[1])
    network = Network((5, 4, 6), (Step(Upsample(size), (0,)), conv((1,), 7, 5, kind="relu")))
    assert len(Lowering(network, "cpu", PRECISIONS["float32"]).nodes) == 1
    x = randn(2, 5, 4, 6)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    check_gradient(network)


def test_steps_that_nothing_reads() -> None:
    network = Network((4, 3, 3), (conv((0,), 4, 4, kind="relu"), conv((0,), 2, 4), conv((1,), 3, 4, seed=5)))
    check_gradient(network)


def test_an_order_that_stays_is_no_launch() -> None:
    network = Network((4, 1, 3), (Step(Permute((1, 2, 0)), (0,)), Step(Permute((2, 0, 1)), (1,))))
    x = randn(2, 4, 1, 3)
    np.testing.assert_array_equal(forward(network, x, "float32"), x)
    assert len(Lowering(network, "cpu", PRECISIONS["float32"]).nodes) < 2


def test_max_pool_of_many_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a place that 16 bits do not hold: a global max pool of 224 × 224 has 50,176."""
    if DEVICE == "cpu":  # all but the last taps see padding, and the interpreter takes a minute for them
        monkeypatch.setattr(pool, "range", lambda start, stop: range(stop - 2, stop), raising=False)
    taps = 2**15 + 1
    kernel = pool.MaxPool((1, 2), (1, 1), 1, (1, taps), (1, 1), (0, taps - 2), (1, 1))
    x, out, back = (torch.tensor([row], device=DEVICE) for row in ([1.0, 2.0], [0.0], [0.0, 0.0]))
    place = torch.zeros(1, 1, dtype=getattr(torch, kernel.tap_dtype), device=DEVICE)
    kernel.launch(x, out, place, Epilogue())()
    kernel.launch_backward(torch.full_like(out, 3.0), place, back, Epilogue())()
    assert (out.item(), place.item(), back.tolist()) == (2.0, taps - 1, [[0.0, 3.0]])
    assert pool.MaxPool((8, 8), (1, 1), 1, (8, 8), (1, 1), (0, 0), (1, 1)).tap_dtype == "int16"


def test_softplus_and_gelu_however_small_they_are() -> None:
    """Relative to float64, also where what is added to 1 would be lost."""
    x = np.concatenate([np.linspace(-30, 30, 6001), -np.geomspace(1e-6, 1, 500)]).astype(np.float32)[None]
    wide = torch.from_numpy(x).double()
    for activation, least, expected in (
        (Activation("softplus", 0.5, 20.0), -30, 2 * torch.logaddexp(torch.zeros_like(wide), wide / 2)),
        (Activation("gelu"), -3, wide * torch.special.ndtr(wide)),
    ):
        found = forward(Network(x.shape[1:], (Step(activation, (0,)),)), x, "float32")
        there = x >= least
        np.testing.assert_allclose(found[there], expected.numpy()[there], rtol=2e-6, atol=0)
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6, atol=1e-8)
