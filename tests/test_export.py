"""Exported networks compute what their modules do, forward and backward; what cannot be exported says so."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, make
from checks import ISAS, check_gradient, relative
from torch import nn

import fastinv
from fastinv.backends.torch import as_module
from fastinv.errors import NetworkError, UnsupportedOp
from fastinv.models import make_decoder, resnet_decoder
from fastinv.network import Network


def ops(network: Network) -> list[str]:
    return [f"{s.op.name}+{s.activation.kind}" if s.activation.kind != "identity" else s.op.name for s in network.steps]


@pytest.fixture(scope="module")
def exported() -> dict[str, Network]:
    networks = {}
    for name in ARCHITECTURES:
        model, shape = make(name)
        networks[name] = fastinv.export(model, torch.randn(2, *shape))
    return networks


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reference_equals_module(name: str, exported: dict[str, Network]) -> None:
    model, shape = make(name)
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    expected = copy.deepcopy(model).double()(x)
    found = as_module(exported[name], torch.float64)(x)
    # Weights were folded in float64 and rounded once to float32.
    assert relative(found.detach().numpy(), expected.detach().numpy()) < 1e-5
    direction = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, direction)
    (grad,) = torch.autograd.grad(found, x, direction)
    assert relative(grad.numpy(), expected_grad.numpy()) < 1e-4


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_equals_module(name: str, isa: str, exported: dict[str, Network], monkeypatch) -> None:
    monkeypatch.setenv("FASTINV_ISA", isa)
    model, shape = make(name)
    engine = fastinv.compile(exported[name], backend="cpu", threads=2)
    assert engine.isa == isa
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double()).numpy()
    assert relative(engine(x).numpy(), expected) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        "resnet18-prefix",
        "mobilenet-v2-prefix",
        "shuffle-net-v2-units",
        "mobile-net-v3-unit",
        "u-net",
        "squeeze-excite",
        "mlp-decoder",
    ],
)
def test_compiled_gradient(name: str, exported: dict[str, Network]) -> None:
    check_gradient(exported[name])


def test_norms_fold_and_activations_fuse(exported: dict[str, Network]) -> None:
    assert ops(exported["vgg16-bn-prefix"]).count("conv2d+relu") == 6
    assert len(exported["vgg16-bn-prefix"].steps) == 8
    assert "affine" not in "".join(ops(exported["resnet18"]))
    assert ops(exported["mobilenet-v2-prefix"])[:3] == ["conv2d+hardtanh", "conv2d+hardtanh", "conv2d"]
    assert ops(exported["mlp-decoder"]) == ["linear+hardtanh", "reshape", "conv_transpose2d+tanh", "upsample"]
    assert ops(exported["pixel-shuffle-decoder"])[:2] == ["conv2d+relu", "pixel_shuffle"]
    assert ops(exported["pre-activation"])[0] == "affine+relu"


def test_steps_know_their_modules(exported: dict[str, Network]) -> None:
    assert exported["resnet18"].steps[0].source == "conv1 + bn1 + relu"


@pytest.mark.parametrize(
    ("decoder", "shape"),
    [(resnet_decoder(), (64, 20, 24)), (make_decoder((128, 16, 16), (3, 32, 32), "residual"), (128, 16, 16))],
    ids=["resnet", "residual"],
)
def test_decoders(decoder: nn.Module, shape: tuple[int, ...]) -> None:
    decoder = decoder.eval()
    network = fastinv.export(decoder, torch.randn(2, *shape))
    assert {s.op.name for s in network.steps} == {"conv2d", "add", "upsample"}
    x = torch.randn(2, *shape)
    with torch.no_grad():
        expected = decoder(x).numpy()
    assert relative(fastinv.compile(network)(x.numpy()), expected) < 1e-5


def test_batch_size_stays_free() -> None:
    engine = fastinv.compile(fastinv.export(nn.Conv2d(2, 3, 3).eval(), torch.randn(2, 2, 5, 5)))
    for n in (0, 1, 2, 17):
        assert engine(np.zeros((n, 2, 5, 5), np.float32)).shape == (n, 3, 3, 3)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 2 - x,
        lambda x: (x * torch.arange(3.0).reshape(3, 1, 1)).add(x, alpha=0.5),
        lambda x: -x.sub(1.5) / 4 + torch.full((1, 1, 4, 4), 0.1),
        lambda x: torch.cat([x, x.clamp(min=0), x.clamp(max=0.3), x.clamp(-1, 1)], 1),
        lambda x: x.transpose(2, 3).contiguous().view(x.shape[0], -1),
        lambda x: x.flatten(2).unsqueeze(1).squeeze(1),
        lambda x: F.interpolate(x, size=(7, 3), mode="nearest") * F.interpolate(x, size=(7, 3), mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest"),
        lambda x: F.gelu(x, approximate="tanh") + F.softplus(x, beta=2.0) + F.relu6(x * 8),
        lambda x: x.relu_() + x,  # x itself was changed
        lambda x: x,
        lambda x: x.mean((2, 3)),
        lambda x: F.max_pool2d(F.pad(x, (1, 0, 0, 2)), 3, stride=1, padding=1, dilation=1),
        lambda x: x + x * x,
    ],
)
def test_functions(function) -> None:
    x = torch.randn(3, 3, 4, 4)
    network = fastinv.export(Function(function).eval(), torch.randn(2, 3, 4, 4))
    expected = function(x.clone()).numpy()
    np.testing.assert_allclose(fastinv.compile(network, backend="cpu")(x.numpy()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Hardshrink(), "aten.hardshrink.default"),
        (nn.AdaptiveMaxPool2d(3), "do not divide evenly"),
        (nn.ConstantPad2d(1, -torch.inf), "padding with an infinite constant"),
        (nn.LPPool2d(2, 2), "aten.sign"),
        (nn.BatchNorm2d(3, track_running_stats=False), "a batch norm without running statistics"),
        (Function(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), "the positions of maxima"),
        (Function(lambda x: x[:, :0]), "leaves nothing"),
        (Function(lambda x: x[:, torch.tensor([True, False, True])]), "not one list of positions"),
        (Function(lambda x: x.repeat(1, 500, 30, 1).flatten(1)[:, ::2]), "which lie in no order"),
        (Function(lambda x: x.roll(1)), "flattened"),
        (Function(lambda x: x.repeat(2, 1, 1, 1)), "repetition of the batch"),
        (Function(lambda x: x @ x[:, :1]), r"a product of computed values of shapes \[3, 4, 4\] and \[1, 4, 4\]"),
        (Function(lambda x: torch.ones(3, 4, 4) @ (x @ x)), "a product with anything but a matrix"),
        (Function(lambda x: F.scaled_dot_product_attention(x, x, x, x)), "attention with a computed mask"),
        (Function(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)), "attention with dropout"),
        (
            Function(lambda x: F.scaled_dot_product_attention(x, torch.eye(4).expand(*x.shape[:2], 4, 4), x)),
            "attention to constants",
        ),
        (Function(lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1])), "attention of shapes"),
        (Function(lambda x: F.group_norm(x.view(-1, 1, 4, 4), 1).view(-1, 3, 4, 4)), "merged into the batch axis"),
        (Function(lambda x: torch.einsum("nchw,ndhw->nc", x, x)), "sums over an axis of one value alone"),
        (Function(lambda x: x + torch.ones(1).expand(3, x.shape[0]).T[:, :, None, None]), "on the batch size"),
        (Function(lambda x: x.permute(1, 0, 2, 3)), "moves the batch axis"),
        (Function(lambda x: x.permute(1, 0, 2, 3) + 1), "moves the batch axis"),
        (Function(lambda x: torch.cat([x.permute(1, 0, 2, 3)] * 2, 2)), "moves the batch axis"),
        (Function(lambda x: torch.einsum("nchw,nchw", x, x)), "the einsum"),
        (Function(lambda x: torch.einsum("nchw,nchw->chw", x, x)), "the einsum"),
        (Function(lambda x: x.reshape(-1, 4)), "the result of parts of images, merged into the batch axis"),
        (Function(lambda x: x**0.3), "a power other than"),
        (Function(lambda x: torch.where(x > 0, x, 0.5)), "aten.gt.Scalar"),
        (Function(lambda x: x.norm(3, 1)), "a norm of order 3"),
        (Function(lambda x: x - x.mean(0)), "batch axis"),
    ],
    ids=str,
)
def test_unsupported_operations_are_named(module: nn.Module, named: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(module)).eval()
    with pytest.raises(UnsupportedOp, match=named) as caught:
        fastinv.export(model, torch.randn(2, 3, 4, 4))
    assert "in module '1.0" in str(caught.value)
    if isinstance(module, Function):
        line = Function.forward.__code__.co_firstlineno + 1
        assert f"test_export.py:{line})" in str(caught.value)
    assert len(str(caught.value)) < 400


def broken() -> nn.Module:
    model = nn.Conv2d(3, 3, 1).eval()
    model.bias.data[1] = torch.nan
    return model


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        ("conv", torch.randn(2, 3, 4, 4), "a str, expected a torch.nn.Module"),
        (nn.Conv2d(3, 3, 1).eval(), np.zeros((2, 3, 4, 4)), "ndarray, expected a float tensor"),
        (nn.Conv2d(3, 3, 1).eval(), torch.zeros(2, 3, 4, 4, dtype=torch.int64), "int64, expected a float tensor"),
        (nn.Conv2d(3, 3, 1).eval(), torch.randn(1, 3, 4, 4), "N >= 2"),
        (nn.Conv2d(3, 3, 1).eval(), torch.full((2, 3, 4, 4), torch.nan), "the example holds NaN or Inf"),
        (nn.Conv2d(3, 3, 1).eval(), torch.zeros(2, 3, 4, 4, device="meta"), "on meta, expected a dense one on cpu"),
        (nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4), r"training mode; call module.eval\(\)"),
        (broken(), torch.randn(2, 3, 4, 4), "bias holds NaN or Inf"),
        (Function(lambda x: x.reshape(1, -1)).eval(), torch.randn(2, 3, 4, 4), "reshapes the batch axis away"),
        (Function(lambda x: x if x.sum() > 0 else -x).eval(), torch.randn(2, 3, 4, 4), "cannot trace"),
        (Function(lambda x: (x, x)).eval(), torch.randn(2, 3, 4, 4), "several outputs"),
        (Function(lambda x: torch.zeros(3)).eval(), torch.randn(2, 3, 4, 4), "does not depend on the input"),
        (nn.Conv2d(3, 3, 1).eval(), torch.randn(2, 4, 4, 4), "cannot trace"),
    ],
)
def test_wrong_arguments(module, example, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        fastinv.export(module, example)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compile", [torch.jit.script, lambda module: torch.jit.trace(module, torch.zeros(2, 3, 4, 4))])
def test_torchscript_is_refused(compile) -> None:
    with pytest.raises(NetworkError, match=r"TorchScript module cannot be exported; pass the nn\.Module"):
        fastinv.export(compile(nn.Conv2d(3, 3, 1).eval()), torch.zeros(2, 3, 4, 4))


def test_nothing_but_the_error_is_said(capfd) -> None:
    with pytest.raises(NetworkError, match="must not branch on values"):
        fastinv.export(Function(lambda x: x if x.sum() > 0 else -x).eval(), torch.randn(2, 3, 4, 4))
    assert capfd.readouterr() == ("", "")


def test_what_a_forward_says_is_kept(capsys) -> None:
    fastinv.export(Function(lambda x: (print("tracing", file=sys.stderr), x)[1]).eval(), torch.randn(2, 3, 4, 4))
    assert "tracing\n" in capsys.readouterr().err


def test_randomness_is_found_out() -> None:
    with pytest.raises((NetworkError, UnsupportedOp)):
        fastinv.export(Function(lambda x: x + torch.rand(3, 4, 4)).eval(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.shape[0], lambda x: x / x.shape[0], lambda x: x + torch.full((3, 1, 1), x.shape[0])],
    ids=["scaled", "divided", "filled"],
)
def test_the_batch_size_must_not_enter_the_result(function) -> None:
    with pytest.raises(UnsupportedOp, match="on the batch size"):
        fastinv.export(Function(function).eval(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
        lambda x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
        lambda x: x.mean(-1) + x.mean(2),
        lambda x: torch.ops.aten.upsample_bilinear2d(x, [7, 5], False) + torch.ops.aten.upsample_nearest2d(x, [7, 5]),
        lambda x: F.max_pool2d(x, 5, 2, ceil_mode=True) + F.avg_pool2d(x, 5, 2, ceil_mode=True),
        lambda x: F.interpolate(x, size=(63, 49)),
        lambda x: F.alpha_dropout(x, 0.5).double().float(),
    ],
    ids=["flat", "expand-as", "expand", "one-axis-means", "plain-upsamples", "ceil-mode", "nearest-rounding", "same"],
)
def test_functions_of_other_people(function) -> None:
    x = torch.randn(3, 3, 4, 4)
    network = fastinv.export(Function(function).eval(), torch.randn(2, 3, 4, 4))
    np.testing.assert_allclose(fastinv.compile(network, backend="cpu")(x.numpy()), function(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_casts_that_round_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedOp, match=f"a cast to {dtype}"):
        fastinv.export(Function(lambda x: x.to(dtype).float()).eval(), torch.randn(2, 3, 4, 4))


class Sum(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Function(lambda x: {"y": 2 * x}), "gives a dict, expected one tensor"),
        (Function(lambda x: (2 * x,)), "gives a tuple, expected one tensor"),
        (Sum(), "takes a, b, expected one tensor"),
        (nn.Conv2d(3, 3, 1).double(), r"float64, expected float32; call module.float\(\)"),
    ],
    ids=["dict", "tuple", "two-inputs", "double"],
)
def test_wrong_modules(module: nn.Module, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        fastinv.export(module.eval(), torch.randn(2, 3, 4, 4))
