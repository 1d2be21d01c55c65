"""The building blocks of Next-ViT: NCB, NTB and what they are made of.

Source: arXiv 2207.05501, sections 3.2 (NCB) and 3.3 (NTB). Attribute names are those of the official weights.
Shapes: B batch, C channels, H and W height and width, N = H·W tokens, h heads, d = 32 channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_divisible(value: float, divisor: int = 32) -> int:
    """``value`` rounded to a multiple of ``divisor``, never more than a tenth below ``value``."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class DropPath(nn.Module):
    """Stochastic depth: while training, zero a residual branch per sample with probability ``rate``.

    The survivors are divided by 1 - rate, so the expectation is unchanged; in eval mode it is the identity.
    Source: Huang et al., "Deep Networks with Stochastic Depth", arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.full((x.shape[0],) + (1,) * (x.ndim - 1), 1.0 - self.rate, dtype=x.dtype, device=x.device)
        return x * torch.bernoulli(keep) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class ConvBNReLU(nn.Module):
    """3x3 convolution without bias, BatchNorm, ReLU: one layer of the stem."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class PatchEmbed(nn.Module):
    """Change of resolution (2x2 average) and of width (1x1 convolution, BatchNorm), each where needed."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        changes = stride == 2 or in_channels != out_channels
        self.avgpool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False) if changes else nn.Identity()
        self.norm = nn.BatchNorm2d(out_channels) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(self.avgpool(x)))
        return out


class MHCA(nn.Module):
    """Multi-Head Convolutional Attention: a 3x3 convolution per head, then a 1x1 across heads (eq. 4-5)."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.group_conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels // head_dim, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(self.act(self.norm(self.group_conv3x3(x))))
        return out


class Mlp(nn.Module):
    """Two 1x1 convolutions with a ReLU between them."""

    def __init__(self, channels: int, ratio: int, drop: float = 0.0) -> None:
        super().__init__()
        hidden = make_divisible(channels * ratio)
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, channels, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.conv2(self.drop(self.act(self.conv1(x)))))
        return out


class EMHSA(nn.Module):
    """Efficient Multi-Head Self-Attention (eq. 7-8): keys and values from averaged tokens.

    The average runs over sr² *consecutive tokens of the flattened map* (AvgPool1d), not over sr x sr patches,
    and drops a remainder; the trained weights depend on that.
    """

    def __init__(self, dim: int, head_dim: int, sr_ratio: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads = dim // head_dim
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.AvgPool1d(sr_ratio**2, sr_ratio**2)
            self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self._split_heads(self.q(x))  # (B, N, C) -> (B, h, N, d)
        if self.sr_ratio > 1:
            x = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)  # (B, N, C) -> (B, N / sr², C)
        k = self._split_heads(self.k(x))
        v = self._split_heads(self.v(x))
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, N, N / sr²)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))  # (B, h, N, d) -> (B, N, C)
        dropped: Tensor = self.proj_drop(out)
        return dropped

    def _split_heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.heads, self.head_dim))  # type: ignore[no-untyped-call]  # torch's own gap
        return heads.transpose(1, 2)


class NCB(nn.Module):
    """Next Convolution Block (section 3.2): MHCA and an MLP, each on a residual branch."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, head_dim: int, mlp_ratio: int, drop_path: float
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, out_channels, stride)
        self.mhca = MHCA(out_channels, head_dim)
        self.attention_path_dropout = DropPath(drop_path)
        self.norm = nn.BatchNorm2d(out_channels)
        self.mlp = Mlp(out_channels, mlp_ratio)
        self.mlp_path_dropout = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.attention_path_dropout(self.mhca(x))
        out: Tensor = x + self.mlp_path_dropout(self.mlp(self.norm(x)))
        return out


class NTB(nn.Module):
    """Next Transformer Block (section 3.3): E-MHSA on three quarters of the width, MHCA on the rest, an MLP."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        sr_ratio: int,
        head_dim: int,
        mlp_ratio: int,
        mix_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        attention_channels = make_divisible(int(out_channels * mix_ratio))
        conv_channels = out_channels - attention_channels
        self.patch_embed = PatchEmbed(in_channels, attention_channels, stride)
        self.norm1 = nn.BatchNorm2d(attention_channels)
        self.e_mhsa = EMHSA(attention_channels, head_dim, sr_ratio)
        self.mhsa_path_dropout = DropPath(drop_path * mix_ratio)
        self.projection = PatchEmbed(attention_channels, conv_channels)
        self.mhca = MHCA(conv_channels, head_dim)
        self.mhca_path_dropout = DropPath(drop_path * (1 - mix_ratio))
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.mlp = Mlp(out_channels, mlp_ratio)
        self.mlp_path_dropout = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        tokens = self.norm1(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)
        tokens = self.mhsa_path_dropout(self.e_mhsa(tokens))
        x = x + tokens.transpose(1, 2).reshape(x.shape)  # (B, N, C) -> (B, C, H, W)
        local = self.projection(x)
        local = local + self.mhca_path_dropout(self.mhca(local))
        x = torch.cat([x, local], dim=1)
        out: Tensor = x + self.mlp_path_dropout(self.mlp(self.norm2(x)))
        return out
