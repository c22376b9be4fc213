"""What models of other people's write beside layers: each becomes steps that compute the same, forward and back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import check_gradient, relative
from torch import nn

import fastinv
from fastinv.backends.torch import as_module
from fastinv.network import Network

CONSTANT = torch.linspace(-1, 1, 42)


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        F.hardswish(y, inplace=True)
        return F.mish(y, inplace=True) + x


class Prelu(nn.Module):
    """A slope for each of 6 channels, or of several."""

    def __init__(self, *slopes: float) -> None:
        super().__init__()
        self.prelu = nn.PReLU(len(slopes))
        self.prelu.weight.data = torch.tensor(slopes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(x)


def each(text: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of x that is written there."""
    return lambda x: eval(text, {"torch": torch, "F": F, "c": CONSTANT.to(x.dtype), "x": x})


# Of x [N, 6, 8, 10].
FUNCTIONS = (
    "x[:, :, :, :]",
    "x[:]",
    "x[:, :4]",
    "x[:, -2:]",
    "x[:, 1::2]",
    "x[:, 2]",
    "x[..., 3]",
    "x[:, :, 1:-1, 2:-3]",
    "x[..., ::2, 1::3]",
    "x[:, [5, 0, 3, 3]]",
    "x[..., [2, 1]]",
    "x.index_select(2, torch.tensor([1, 1, 0]))",
    "x.narrow(2, 3, 4)",
    "torch.cat(x.chunk(4, 1)[::-1], 1)",
    "torch.cat([F.relu(part) for part in x.split([1, 2, 3], 1)], 1)",
    "torch.cat(x.tensor_split(3, 2)[1:], 2)",
    "torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)",
    "x.unbind(1)[2] * x.unbind(1)[4]",
    "torch.stack([x, x * 2], 2).flatten(1, 2)",
    "torch.stack([x, x * 2], -1)",
    "x.flip(1)",
    "x.flip(2, 3)",
    "x.roll((1, -3), (3, 1))",
    "x.repeat(1, 2, 1, 3)",
    "x.repeat_interleave(2, 2)",
    "x.repeat_interleave(3, dim=1)",
    "x[:, :1].expand(-1, 5, -1, -1)",
    "x.movedim(1, 3).swapaxes(1, 2)",
    "F.channel_shuffle(x, 3)",
    "F.pixel_unshuffle(x, 2)",
    "F.unfold(x, (3, 2), padding=1, stride=2)",
    "F.pad(x, (1, 2, 3, 0), mode='reflect')",
    "F.pad(x, (1, 2, 3, 0), mode='replicate')",
    "F.pad(x, (1, 2, 3, 0), mode='circular')",
    "F.pad(x, (0, 4, 2, 0), mode='circular')",
    "F.pad(x, (-1, 2, 3, -4))",
    "F.pad(x, (0, 0, 0, 0, 2, 3))",
    "F.pad(x, (1, 0, 2, 1), value=0.7)",
    "F.pad(x.flatten(1), (2, 1))",
    "x.flatten(1)[:, 100:300:7]",
    "x.flatten(2)[:, :, 3:50]",
    "x.flatten(2)[:, :, 40:60]",
    "x.flatten(1)[:, 320:]",
    "x.flatten(1).unflatten(1, (2, 240)).flip(1)",
    "x.flatten(2)[:, 1:5]",
    "x.view(-1, 2, 3, 8, 10)[:, 1]",
    "x.view(-1, 2, 3, 8, 10)[:, :, 1:]",
    "x.mean(-1).mean(-1)",
    "x.flatten(2).mean(2)",
    "x.flatten(2).mean(1)",
    "x.mean(1, keepdim=True)",
    "x.mean((1, 2))",
    "x.sum((2, 3))",
    "x.sum(1)",
    "x.sum(-1, keepdim=True)",
    "x.amax(1, keepdim=True)",
    "x.amax((2, 3))",
    "x.amax((1, 3), keepdim=True)",
    "x.amax(3)",
    "x.flatten(2).amax(2)",
    "x.max(2)[0] + x.max(dim=2).values",
    "F.adaptive_max_pool2d(x, 1)",
    "F.adaptive_max_pool2d(x, (4, 5))",
    "F.max_pool2d(x, 3, 2, return_indices=True)[0]",
    "x @ c[:40].reshape(10, 4)",
    "c[:16].reshape(2, 8) @ x",
    "x.flatten(1) @ c.repeat(80)[:960].reshape(480, 2)",
    "torch.addmm(c[:4], x.flatten(2)[:, 0, :3], c[:12].reshape(3, 4), beta=2, alpha=0.5)",
    "torch.einsum('nchw,oc->nohw', x, c.reshape(7, 6))",
    "torch.einsum('co,nchw->nhwo', c.reshape(6, 7), x)",
    "torch.einsum('bchw,hk->bckw', x, c[:24].reshape(8, 3))",
    "torch.einsum('nchw,ckw->nchk', x, c.repeat(5)[:180].reshape(6, 3, 10))",
    "torch.einsum('hk,nchw->nckw', c[:24].reshape(8, 3), x)",
    "torch.einsum('nchw,cw->nhc', x, c.repeat(2)[:60].reshape(6, 10))",
    "torch.einsum('nchw,ch->nwch', x, c.repeat(2)[:48].reshape(6, 8))",
    "torch.einsum('nchw,nkhw->nck', x, x.flip(3))",
    "torch.einsum('bhij,bhjd->bhid', torch.einsum('bhid,bhjd->bhij', x, x).mul(0.2).softmax(-1), x)",
    "F.conv1d(x.flatten(2), c[:36].reshape(4, 3, 3), stride=2, padding=1, dilation=2, groups=2)",
    "F.conv1d(x[:, 0], c[:24].reshape(1, 8, 3), c[:1], padding='same')",
    "F.conv_transpose1d(x.flatten(2), c.repeat(3)[:120].reshape(6, 5, 4), c[:5], stride=3, output_padding=2)",
    "F.max_pool1d(x.flatten(2), 3, 2, 1) + F.avg_pool1d(x.flatten(2), 3, 2, 1)",
    "F.avg_pool1d(x.flatten(2), 4, ceil_mode=True, count_include_pad=False) + F.max_pool1d(x[:, :, 0], 4, 7)[:, :, :1]",
    "F.adaptive_avg_pool1d(x.flatten(2), 7)",
    "F.interpolate(x, scale_factor=2, mode='nearest-exact')",
    "F.interpolate(x, size=(5, 23), mode='nearest-exact')",
    "F.interpolate(x, scale_factor=(1.7, 0.6), mode='bicubic')",
    "F.interpolate(x, size=(5, 17), mode='bicubic', align_corners=True)",
    "F.interpolate(x, size=(3, 4), mode='bilinear', antialias=True)",
    "F.interpolate(x, scale_factor=0.4, mode='bicubic', antialias=True)",
    "F.hardswish(4 * x)",
    "F.hardsigmoid(4 * x)",
    "F.mish(x)",
    "F.logsigmoid(9 * x)",
    "F.elu(3 * x, 0.7)",
    "F.elu(3 * x, 0.0)",
    "F.selu(3 * x)",
    "F.celu(3 * x, 0.4)",
    "F.softshrink(x, 0.3)",
    "F.tanhshrink(x)",
    "F.rrelu(x)",
    "F.glu(x, 1)",
    "F.glu(x)",
    "F.glu(x.flatten(1))",
    "x.abs()",
    "x**2 + x**3 - x.pow(4) + x.square() + x**1",
    "F.group_norm(x, 3, c[:6], c[6:12])",
    "F.group_norm(x.flatten(2), 2)",
    "F.group_norm(x.flatten(1), 5, weight=c.repeat(12)[:480])",
    "F.group_norm(x.view(-1, 6, 2, 4, 10), 2, eps=0.1)",
    "F.instance_norm(x)",
    "F.instance_norm(x.flatten(2), weight=c[:6], bias=c[6:12])",
    "F.layer_norm(x, (10,), c[:10], c[10:20])",
    "F.layer_norm(x, (8, 10))",
    "F.layer_norm(x, (6, 8, 10), bias=c[:10].expand(6, 8, 10))",
    "F.layer_norm(x.movedim(1, 3), (6,), c[:6], eps=0.01).movedim(3, 1)",
    "F.layer_norm(x.flatten(2), (80,))",
    "F.layer_norm(x.flatten(1), (480,))",
    "F.layer_norm(x.view(-1, 2, 3, 8, 10), (8, 10))",
    "F.rms_norm(x, (10,), c[:10])",
    "F.rms_norm(x, (6, 8, 10), eps=0.1)",
    "F.scaled_dot_product_attention(x, x.flip(2), x[..., 3:])",
    "F.scaled_dot_product_attention(x[:, 0], x[:, 1], x[:, 2], scale=-0.7)",
    "F.scaled_dot_product_attention(x.flatten(2)[:, :2], x.flatten(2), x.flatten(2)[:, :, :3])",
    "F.scaled_dot_product_attention(x, x, x, is_causal=True)",
    "F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5], c[:40].reshape(5, 8).T > -0.5)",
    "F.scaled_dot_product_attention(x, x, x, c.repeat(10)[:384].reshape(1, 6, 8, 8), scale=0.1)",
    "F.scaled_dot_product_attention(*[x.view(-1, 6, 2, 4, 10)] * 3)",
    "F.scaled_dot_product_attention(*[x.reshape(-1, 2, 4, 10)] * 3, c[:16].reshape(4, 4)).view_as(x)",
    "F.scaled_dot_product_attention(*[x[:, 0].repeat(1, 70, 1).mT] * 3)",  # heads too wide for the op
    "(x @ x.mT * c[:6].reshape(6, 1, 1) + c[:8]).softmax(-1) @ x",
    "(x @ x.mT).masked_fill(c.repeat(2)[:64].reshape(8, 8).T > 0, -torch.inf).softmax(-1) @ x",
    "(x @ x.mT + x @ x.mT).softmax(-1) @ x",
    "((x @ x.mT) * x[..., :8]).softmax(2) @ x",
    "(x.transpose(2, 3) @ x).softmax(-1) / (x.flatten(2).transpose(1, 2).reshape(-1, 6, 8, 10).mT @ x).square().add(1)",
    "torch.bmm(x.flatten(2), x.flatten(2).mT).softmax(1).mean(2)",
    "x.view(-1, 2, 3, 80).softmax(1).flatten(1)",
    "F.softmax(x, 3) + x.softmax(1)",
    "F.normalize(x, dim=-1) + F.normalize(x.flatten(2), dim=1, eps=0.1).view_as(x)",
    "x.exp() + 2**x + torch.exp2(-x) + (x / 9).exp_()",
    "(x.abs() + 0.2).sqrt() + (x.square() + 1).rsqrt()",
    "1 / (x.abs() + 0.5) + x / (x.square() + 1) + c[:10] / x.exp()",
    "(x.abs() + 0.1) ** 0.5 + (x.abs() + 0.1) ** -1.25 + (x.abs() + 0.1).pow(2.75) + x**-2 * x.pow(4)",
    "x.var(1) + x.std((2, 3), correction=0, keepdim=True)[:, :, :, 0].mean(1, keepdim=True)",
    "torch.linalg.vector_norm(x, 1, (1, 2)) + x.flatten(2).norm(dim=(1, 2)).unsqueeze(1)",
    "torch.where(c[:10] > 0.1, x, 0.5) + torch.where(c[:8].reshape(8, 1) > 0, x.relu(), x.exp())",
    "x.masked_fill(c[:10] > -0.9, 3.0) + torch.zeros_like(x) + torch.ones(x.shape[0], 1, 8, 10) * x.type_as(x)",
    "x.unfold(2, 3, 2).flatten(3) + x[:, :, :3, :1]",
    # Columns of a linear layer, each computed by itself.
    "torch.cat(F.linear(x[:, 0], c[:40].reshape(4, 10)).split([1, 3], 2)[::-1], 2)",
    "F.linear(x, c[:40].reshape(4, 10)).view(-1, 48, 2, 2).permute(2, 0, 3, 1)[1].mT",
    # Windows of 4×5 merged into the batch axis, and taken apart again.
    "F.linear(x.permute(0, 2, 3, 1).reshape(-1, 20, 6), c[:18].reshape(3, 6)).view(-1, 8, 10, 3)",
    "F.layer_norm(x.reshape(-1, 2, 240), (240,)).reshape(-1, 6, 80).softmax(1) - c[:6].reshape(1, 6, 1)",
    "F.batch_norm(x.flatten(2).mT.reshape(-1, 6), c[:6], c[6:12].exp(), c[:6]).view(-1, 80, 6)",
    "F.conv2d(x.view(-1, 2, 8, 10), c[:36].reshape(2, 2, 3, 3), c[:2], stride=2, padding=1).reshape(-1, 24, 5)",
    "F.max_pool2d(x.view(-1, 3, 8, 10), 3, 2, 1).view(-1, 120) + F.avg_pool2d(x.view(-1, 2, 8, 10), 2).view(-1, 120)",
    "F.pad(F.adaptive_avg_pool2d(x.view(-1, 3, 8, 10), (4, 5)), (1, 2, 0, 1), value=0.5).view(-1, 30, 8)",
    "x[:, 0, 0].repeat_interleave(3, 0).mul(2).view(-1, 3, 10) + x[:, 1, 1:4]",
    "torch.addcmul(c[:10], x, x.flip(1), value=0.3) + torch.addcmul(x, c[:10], c[10:20])",
    "x.clone().addcmul_(x, c[:10])",
    "torch.stack([x.mean(1), x.amax(1)]).mean(0) + torch.stack([x[:, 0], x[:, 1]], 0).sum(0, keepdim=True)[0]",
    "(0.3 * x.transpose(2, 3) @ x / 2).softmax(-1) @ x.transpose(2, 3)",
    "(x @ x.mT).mul(0.2).softmax(3).clone() @ x",
    "x.permute(1, 0, 3, 2)[2].mT + x.permute(2, 1, 0, 3).unbind(1)[0].movedim(1, 0)",
    "torch.cat([c[:6].reshape(1, 6, 1, 1).expand(x.shape[0], -1, 3, 10), x], 2)",
    "torch.cat([c[:6].repeat(x.shape[0], 1).view(x.shape[0], 6, 1, 1).expand(-1, -1, 8, 2), x], 3)",
    "torch.cat([x.flatten(2), c[:20].reshape(1, 1, 20).repeat(x.shape[0], 6, 1)], 2)",
    "torch.maximum(x, x.flip(3)) - torch.min(x, 0.5 * x)",
    "torch.maximum(x, torch.tensor(0.3)) + torch.minimum(c[:10], x)",
)


def tracking() -> nn.Module:
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.uniform_(0.5, 2)
    return norm


MODULES = {
    "prelu": Prelu(0.3),
    "prelu-of-one-slope": Prelu(*[-0.4] * 6),
    "prelu-of-channels": Prelu(0.3, 0.0, 1.0, -0.5, 2.0, 0.25),
    "in-place": InPlace(),
    "instance-norm": tracking(),
    "reflecting": nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(6, 4, (3, 5), padding=(1, 2), padding_mode="circular"),
    "replicating": nn.Conv2d(6, 4, 5, padding=2, padding_mode="replicate"),
    "channel-shuffle": nn.Sequential(nn.Conv2d(6, 8, 1), nn.ChannelShuffle(4), nn.GLU(1)),
}
PATTERNS = {**{text: Function(each(text)) for text in FUNCTIONS}, **MODULES}
SHAPE = (6, 8, 10)


@pytest.fixture(scope="module")
def exported() -> Callable[[str], Network]:
    networks: dict[str, Network] = {}

    def export(name: str) -> Network:
        if name not in networks:
            networks[name] = fastinv.export(PATTERNS[name].eval(), torch.randn(2, *SHAPE))
        return networks[name]

    return export


@pytest.mark.parametrize("name", PATTERNS)
def test_reference_equals_module(name: str, exported: Callable[[str], Network]) -> None:
    x = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    module = copy.deepcopy(PATTERNS[name]).eval().double()
    expected = module(x)
    found = as_module(exported(name), torch.float64)(x)
    assert relative(found.detach().numpy(), expected.detach().numpy()) < 1e-6
    direction = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, direction)
    (gradient,) = torch.autograd.grad(found, x, direction)
    assert relative(gradient.numpy(), expected_gradient.numpy()) < 1e-6


def test_long_vectors_are_cut_into_blocks() -> None:
    network = fastinv.export(Function(each("F.glu(x)")).eval(), torch.randn(2, 20_000))
    assert network.parameters < 20
    x = torch.randn(3, 20_000)
    assert relative(fastinv.compile(network, backend="cpu")(x.numpy()), F.glu(x).numpy()) < 1e-6


def test_an_axis_before_large_planes() -> None:
    network = fastinv.export(Function(each("x[:, :, 1:]")).eval(), torch.randn(2, 2, 3, 80, 80))
    x = torch.randn(3, 2, 3, 80, 80)
    assert torch.equal(fastinv.compile(network, backend="cpu")(x), x[:, :, 1:])


@pytest.mark.parametrize("name", PATTERNS)
def test_compiled_equals_reference(name: str, exported: Callable[[str], Network]) -> None:
    network = exported(name)
    x = torch.randn(3, *SHAPE)
    expected = as_module(network, torch.float64)(x.double())
    assert relative(fastinv.compile(network, backend="cpu")(x.numpy()), expected.detach().numpy()) < 1e-5
    check_gradient(network)
