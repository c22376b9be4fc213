"""Every op says the truth of itself: shapes, attributes, costs, and the forms that backends take it in."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinv.errors import NetworkError
from fastinv.ops import OPS
from fastinv.ops.activation import Activation
from fastinv.ops.adaptive_avg_pool2d import AdaptiveAvgPool2d
from fastinv.ops.attention import Attention
from fastinv.ops.avg_pool2d import AvgPool2d
from fastinv.ops.base import Case
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.normalize import Normalize
from fastinv.ops.permute import Permute
from fastinv.ops.pixel_shuffle import PixelShuffle
from fastinv.ops.rearrange import Rearrange
from fastinv.ops.resample import Resample
from fastinv.ops.reshape import Reshape
from fastinv.ops.separable import Separable
from fastinv.ops.upsample import Upsample

CASES = [pytest.param(case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in op.cases()]


def tensors(case: Case, batch: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in case.inputs]
    weights = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in case.weights.items()}
    return inputs, weights


@pytest.mark.parametrize("case", CASES)
def test_shape_is_the_reference_s(case: Case) -> None:
    for batch in (0, 1, 3) if case.op.name != "activation" else (1, 3):
        inputs, weights = tensors(case, batch)
        result = case.op.reference(inputs, weights)
        assert tuple(result.shape) == (batch, *case.op.shape(case.inputs, case.weights))


@pytest.mark.parametrize("case", CASES)
def test_attributes_survive_json(case: Case) -> None:
    assert type(case.op).from_attributes(case.op.attributes()) == case.op


@pytest.mark.parametrize("case", CASES)
def test_cost_counts_what_moves(case: Case) -> None:
    cost = case.op.cost(case.inputs, case.weights)
    output = math.prod(case.op.shape(case.inputs, case.weights))
    assert cost.bytes >= 4 * (output + sum(map(math.prod, case.inputs)))
    assert cost.flops >= 0


def test_flops_of_a_known_layer() -> None:
    """CIFAR's ReLU22 decoder: 128→64 at stride 2 from 16×16 and 64→3 at 32×32 are 41 MFLOP."""
    first = ConvTranspose2d((2, 2), (1, 1), (1, 1)).flops([(128, 16, 16)], {"weight": (128, 64, 3, 3), "bias": (64,)})
    second = ConvTranspose2d(padding=(1, 1)).flops([(64, 32, 32)], {"weight": (64, 3, 3, 3), "bias": (3,)})
    assert (first, second) == (2 * 9 * 128 * 64 * 256, 2 * 9 * 64 * 3 * 1024)
    assert round((first + second) / 1e6) == 41


@pytest.mark.parametrize("case", [p for p in CASES if isinstance(p.values[0].op, Resample)])
def test_resampling_is_two_matrices(case: Case) -> None:
    assert isinstance(case.op, Resample)
    (x,), weights = tensors(case, 2)
    matrices = case.op.matrices(case.inputs[0], {key: w.float().numpy() for key, w in weights.items()})
    rows, columns = map(torch.from_numpy, matrices)
    torch.testing.assert_close(
        torch.einsum("ih,nchw,jw->ncij", rows, x, columns), case.op.reference([x], weights), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("case", [p for p in CASES if isinstance(p.values[0].op, Rearrange)])
def test_rearranging_is_a_permutation(case: Case) -> None:
    assert isinstance(case.op, Rearrange)
    (x,), _ = tensors(case, 2)
    index = case.op.source_index(case.inputs[0])
    assert index.shape == case.op.shape(case.inputs, {})
    np.testing.assert_array_equal(np.sort(index.ravel()), np.arange(index.size))
    expected = case.op.reference([x], {})
    np.testing.assert_array_equal(x.reshape(2, -1).numpy()[:, index.ravel()].reshape(expected.shape), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv2d(stride=(0, 1)), "expected >= 1"),
        (lambda: Conv2d(padding=(-1, 0, 0, 0)), "expected >= 0"),
        (lambda: Conv2d(stride=(1,)), "expected 2 entries"),
        (lambda: Conv2d(stride=1), "expected a list"),
        (lambda: Conv2d(groups=True), "expected int"),
        (lambda: Conv2d(groups=2**40), "out of range"),
        (lambda: ConvTranspose2d(output_padding=(1, 0)), "less than stride or dilation"),
        (lambda: MaxPool2d((2, 2), padding=(2, 0)), "half of the kernel"),
        (lambda: AvgPool2d(divisor=0), "divisor 0"),
        (lambda: AdaptiveAvgPool2d((0, 1)), "expected >= 1"),
        (lambda: Upsample((4, 4), "cubic"), "mode 'cubic'"),
        (lambda: Upsample((4, 4), "nearest", True), "align_corners"),
        (lambda: Upsample((4, 4), scales=(0.0, 1.0)), "positive factors"),
        (lambda: PixelShuffle(0), "factor 0"),
        (lambda: Reshape((4, -1)), "positive sizes"),
        (lambda: Permute((0, 0, 1)), "each of 0 to 2 once"),
        (lambda: Attention(0), "0 heads, expected >= 1"),
        (lambda: Normalize(0), "0 groups, expected >= 1"),
        (lambda: Normalize(eps=-1.0), "eps -1.0, expected >= 0"),
        (lambda: Concat(9), "axis 9"),
        (lambda: Activation("swish"), "kind 'swish'"),
        (lambda: Activation("clamp", 1.0, 0.0), "above"),
        (lambda: Activation("leaky_relu", float("nan")), "finite"),
        (lambda: Activation("softplus", 0.0), "beta"),
        (lambda: Activation("elu", 1.0), "alpha 1.0 and rate 0.0, expected > 0"),
    ],
)
def test_wrong_attributes(make, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "inputs", "weights", "message"),
    [
        ("conv2d", [(3, 8, 8)], {"weight": (4, 3, 9, 9), "bias": (4,)}, "does not fit"),
        ("conv2d", [(3, 8, 8)], {"weight": (4, 2, 3, 3), "bias": (4,)}, "expected"),
        ("conv2d", [(3, 8, 8)], {"weight": (4, 3, 3, 3)}, "weights"),
        ("conv2d", [(3, 8)], {"weight": (4, 3, 3, 3), "bias": (4,)}, "rank 3"),
        ("conv2d", [(3, 8, 8)] * 2, {"weight": (4, 3, 3, 3), "bias": (4,)}, "2 inputs, expected 1"),
        ("conv_transpose2d", [(3, 8, 8)], {"weight": (4, 3, 3, 3), "bias": (3,)}, "expected"),
        ("linear", [(7,)], {"weight": (4, 6), "bias": (4,)}, "expected"),
        ("max_pool2d", [(3, 1, 1)], {}, "does not fit"),
        ("pixel_shuffle", [(3, 4, 4)], {}, "multiple of 4"),
        ("add", [(3, 4, 4), (3, 4, 2)], {}, "do not broadcast"),
        ("mul", [(3, 4, 4), (3,)], {}, "do not broadcast"),
        ("concat", [(3, 4, 4), (3, 4, 2)], {}, "differ"),
        ("concat", [(3, 4, 4)], {}, "two or more"),
        ("affine", [(3, 4, 4)], {"scale": (4, 1, 1), "shift": (4, 1, 1)}, "does not broadcast"),
        ("affine", [(3, 4, 4)], {"scale": (3, 1, 1), "shift": (1, 1, 1)}, "shift"),
        ("normalize", [(3, 4, 5)], {"weight": (5,), "bias": (5,)}, r"weight has shape \[5\], expected \[3\]"),
        ("normalize", [()], {}, "a scalar"),
        ("attention", [(3, 4), (5, 6), (5, 2)], {}, "keys of 6 channels, expected 4"),
        ("attention", [(3, 4), (5, 4), (6, 2)], {}, "6 values, expected 5"),
        ("attention", [(3, 4), (5, 4)], {}, "2 inputs, expected 3"),
        ("attention", [(2, 3, 4)] * 3, {}, "expected rank 2"),
        ("separable", [(3, 4, 5)], {}, "no weights"),
        ("separable", [(3, 4, 5)], {"rows": (4,)}, "expected rank 2"),
        ("separable", [(3, 4, 5)], {"rows": (2, 5)}, r"rows has shape \[2, 5\], expected \[2, 4\]"),
        ("separable", [(3, 4, 5)], {"columns": (2, 5), "bias": (3,)}, "weights"),
        ("activation", [(3,)], {"weight": (3,)}, "weights"),
    ],
)
def test_wrong_shapes(name: str, inputs, weights, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        OPS[name]().shape(inputs, weights)


def test_unknown_attributes_are_refused() -> None:
    with pytest.raises(NetworkError, match="attributes"):
        Conv2d.from_attributes({**Conv2d().attributes(), "colour": 3})


def test_ops_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Conv2d().groups = 3  # type: ignore[misc]


# ---- PyTorch's rules, over sizes that the cases do not have ----------------------------------------------------------

SIDES = st.integers(1, 40)
SCALES = st.floats(0.3, 4).map(lambda s: round(s, 2))


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.tuples(SCALES, SCALES), st.tuples(st.integers(1, 90), st.integers(1, 90)), st.booleans())
def test_nearest_copies_what_torch_copies(h: int, w: int, scales, size, scaled: bool) -> None:
    if scaled:
        size = (max(1, int(h * scales[0])), max(1, int(w * scales[1])))
    op = Upsample(size, scales=scales if scaled else None)
    x = torch.arange(2.0 * h * w).reshape(1, 2, h, w)
    expected = torch.ops.aten.upsample_nearest2d(x, size, *(scales if scaled else (None, None)))
    assert torch.equal(op.reference([x], {}), expected)
    rows, columns = (torch.from_numpy(op.weights_along(axis, n)).float() for axis, n in ((0, h), (1, w)))
    assert torch.equal(rows @ x @ columns.T, expected)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(SIDES, SIDES),
    *(st.tuples(st.integers(1, 5), st.integers(1, 5)) for _ in range(2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
)
def test_pools_have_torch_s_windows(size, kernel, stride, padding, ceil_mode: bool, count_include_pad: bool) -> None:
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    for op in (
        AvgPool2d(kernel, stride, padding, ceil_mode, count_include_pad),
        MaxPool2d(kernel, stride, padding, (1, 1), ceil_mode),
    ):
        try:
            expected = op.reference([x], {})
        except RuntimeError:  # torch finds no room for a window
            with pytest.raises(NetworkError, match="does not fit"):
                op.shape([(2, *size)], {})
            continue
        assert op.shape([(2, *size)], {}) == tuple(expected.shape[1:])
        if isinstance(op, AvgPool2d):
            rows, columns = (torch.from_numpy(op.weights_along(axis, n)) for axis, n in enumerate(size))
            torch.testing.assert_close(rows @ x @ columns.T, expected)


@pytest.mark.parametrize("case", [p for p in CASES if math.prod(p.values[0].inputs[0]) <= 128])
def test_gradients_are_derivatives(case: Case) -> None:
    inputs, weights = tensors(case, 1)
    inputs = [x.requires_grad_(True) for x in inputs]
    assert torch.autograd.gradcheck(lambda *xs: case.op.reference(xs, weights), inputs)


def test_huge_attributes_allocate_nothing() -> None:
    with pytest.raises(NetworkError, match="too large"):
        Upsample((2**16, 1)).shape([(1, 2**16, 1)], {})
    with pytest.raises(NetworkError, match="too large"):
        Conv2d((2**16, 2**16), (2**16,) * 4).shape([(1, 1, 1)], {"weight": (1, 1, 1, 1), "bias": (1,)})
    with pytest.raises(NetworkError, match="too large"):
        Separable().shape([(1, 1, 2**16)], {"rows": (1, 1)})


def test_windows_of_nothing_but_padding_are_refused() -> None:
    assert torch.isinf(torch.nn.functional.max_pool2d(torch.ones(1, 1, 2, 2), 2, 1, 1, 3)).all()
    with pytest.raises(NetworkError, match="nothing but padding"):
        MaxPool2d((2, 2), (1, 1), (1, 1), (3, 3)).shape([(1, 2, 2)], {})
