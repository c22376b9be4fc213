"""Attention as other people write it, in vision transformers and their kin: random weights, small sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """As vision transformers have it: one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(n, t, d))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class AttentionByHand(SelfAttention):
    """Written before PyTorch had a function for it."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return F.dropout(weights, 0.1, self.training) @ v


class AttentionOfChunks(SelfAttention):
    """Thirds of the channels, and a softmax that is a module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t = x.shape[:2]
        q, k, v = (part.view(n, t, self.heads, -1).permute(0, 2, 1, 3) for part in self.qkv(x).chunk(3, dim=-1))
        scores = torch.matmul(q, k.transpose(-1, -2)) / 2.5
        return self.out(torch.matmul(nn.Softmax(dim=-1)(scores), v).permute(0, 2, 1, 3).contiguous().flatten(2))


class AttentionOfThree(nn.Module):
    """A linear layer for each of queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.4).permute(0, 2, 1, 3).flatten(2)


class AttentionOfPyTorch(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, and blocks of width and heads: what an edge has of a ViT."""

    def __init__(self, image: int, patch: int, width: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) / 5)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.blocks(x + self.positions)


def vision_transformer(attention: Callable[[int, int], nn.Module]) -> nn.Module:
    return VisionTransformer(16, 4, 24, *(TransformerBlock(24, 3, attention) for _ in range(2)))


def torch_transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    return VisionTransformer(16, 4, 24, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


# ---- windows of tokens, merged into the batch axis, and positions relative to each other ----------------------------


class WindowAttention(SelfAttention):
    """Swin's: a bias by how far apart two tokens of a window are, and, of shifted windows, a mask for each of them."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None]) + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        rows, t, d = x.shape
        q, k, v = self.qkv(x).reshape(rows, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(q, k) + self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            scores = scores.view(-1, windows, self.heads, t, t) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, t, t)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, t, d))

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)


class CosineAttention(WindowAttention):
    """Swin V2's: queries and keys of length 1, and a scale for each head."""

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scale = torch.clamp(torch.linspace(0, 5, self.heads).view(-1, 1, 1), max=4).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale


class SwinBlock(nn.Module):
    """On [N, H, W, D]."""

    def __init__(self, side: int, width: int, heads: int, window: int, shift: int, attention: type = WindowAttention):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention(width, heads, window)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        parts = torch.zeros(1, side, side, 1)
        for number, rows in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
            for other, columns in enumerate((slice(-window), slice(-window, -shift), slice(-shift, None))):
                parts[:, rows, columns] = 3 * number + other
        parts = self.cut(parts).squeeze(-1)
        mask = (parts[:, None] != parts[:, :, None]) * -100.0
        self.register_buffer("mask", mask if shift else None)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, d = x.shape
        x = x.view(n, h // self.window, self.window, w // self.window, self.window, d)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window**2, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, h, w, d = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        y = self.attention(self.cut(y), self.mask)
        y = y.view(-1, h // self.window, w // self.window, self.window, self.window, d)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, d)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Swin's way to half of the rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, d = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduce(self.norm(x))


class Swin(nn.Module):
    def __init__(self, attention: type) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2, 2)
        blocks = [SwinBlock(8, 24, 3, 4, shift, attention) for shift in (0, 2)]
        self.blocks = nn.Sequential(*blocks, PatchMerging(24), SwinBlock(4, 48, 3, 4, 0, attention))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.patches(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---- what is not softmax(q · kᵀ) · v --------------------------------------------------------------------------------


class TalkingHeads(SelfAttention):
    """CaiT's: linear layers across heads before and after the softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = self.before((q @ k.transpose(-2, -1) / 3).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        return self.after(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class CrossCovariance(SelfAttention):
    """XCiT's: between channels, with a temperature for each head."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(-2, -1) for x in (q, k, v))
        temperature = torch.linspace(0.5, 2, self.heads).view(-1, 1, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature
        return (scores.softmax(dim=-1) @ v).transpose(-2, -1)


class LinearAttention(SelfAttention):
    """EfficientViT's: the products the other way round, divided by their sum."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = q.relu() @ (k.relu().transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
        return y[..., :-1] / (y[..., -1:] + 1e-5)


class GatedAttention(SelfAttention):
    """ConViT's: by content and by position, mixed."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = q.shape[2]
        near = -(torch.arange(tokens)[:, None] - torch.arange(tokens)).abs().float().expand(q.shape[0], 1, -1, -1)
        gate = torch.sigmoid(torch.linspace(-1, 1, self.heads)).view(1, -1, 1, 1)
        weights = (1 - gate) * (q @ k.transpose(-2, -1)).softmax(-1) + gate * near.softmax(-1)
        return weights / weights.sum(-1, keepdim=True) @ v


class RotaryAttention(SelfAttention):
    """Positions as rotations of queries and keys, and only tokens before one's own."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
        q, k = (x * angles.cos().type_as(x) + self.turned(x) * angles.sin().type_as(x) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)


class ConvolutionalAttention(nn.Module):
    """LeViT's: batch norms of all tokens at once, biases by position, and queries of every other token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.kv, self.q, self.heads = nn.Linear(width, 2 * width), nn.Linear(width, width), heads
        self.norm = nn.BatchNorm1d(2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        y = self.kv(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y)
        k, v = y.view(n, t, self.heads, -1).split([d // self.heads] * 2, dim=3)
        k, v = k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        q = self.q(x[:, ::2]).view(n, -1, self.heads, d // self.heads).permute(0, 2, 1, 3)
        scores = q @ k / 3 + torch.linspace(-1, 1, self.heads).view(-1, 1, 1) * torch.arange(t)
        return F.hardswish((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, -1, d))


class ResponseNormBlock(nn.Module):
    """ConvNeXt V2's: each channel by its norm over the image, relative to that of the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand, self.project = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.weight, self.bias = (nn.Parameter(torch.randn(3 * channels)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(self.expand(self.norm(x.permute(0, 2, 3, 1))))
        norms = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = y + torch.addcmul(self.bias, self.weight, y * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)))
        return x + self.project(y).permute(0, 3, 1, 2)


ATTENTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "one-layer": SelfAttention,
    "by-hand": AttentionByHand,
    "chunks": AttentionOfChunks,
    "three-layers": AttentionOfThree,
    "of-pytorch": AttentionOfPyTorch,
}
KINDRED: dict[str, Callable[[int, int], nn.Module]] = {
    "talking-heads": TalkingHeads,
    "cross-covariance": CrossCovariance,
    "linear": LinearAttention,
    "gated": GatedAttention,
    "rotary": RotaryAttention,
}


def _of(attention: Callable[[int, int], nn.Module]) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    return lambda: vision_transformer(attention), (3, 16, 16)


# name -> (model, input shape)
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"vision-transformer-{name}": _of(attention) for name, attention in ATTENTIONS.items()},
    "torch-transformer": (torch_transformer, (3, 16, 16)),
    **{f"{name}-attention": _of(attention) for name, attention in KINDRED.items()},
    "convolutional-attention": (
        lambda: VisionTransformer(16, 4, 24, ConvolutionalAttention(24, 3), ConvolutionalAttention(24, 2)),
        (3, 16, 16),
    ),
    "swin": (lambda: Swin(WindowAttention), (3, 16, 16)),
    "swin-v2": (lambda: Swin(CosineAttention), (3, 16, 16)),
    "response-norm": (lambda: nn.Sequential(nn.Conv2d(3, 12, 2, 2), ResponseNormBlock(12)), (3, 14, 12)),
}
