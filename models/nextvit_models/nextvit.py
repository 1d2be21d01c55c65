"""Next-ViT: the classifier and the four-scale backbone.

Source: arXiv 2207.05501, section 3 and table 3. Attribute names (and so the state dict) are those of the
official weights: ``stem``, ``features``, ``norm``, ``proj_head``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nextvit_models.blocks import NCB, NTB, ConvBNReLU
from nextvit_models.config import NextViTConfig


class NextViT(nn.Module):
    """The classifier: (B, 3, H, W) float -> (B, num_classes) float logits.

    Any H and W from 32 pixels up are accepted; ``config.dropped_tokens`` tells where E-MHSA would leave tokens
    unread. The input is expected normalised with the checkpoint's mean and standard deviation.
    """

    def __init__(self, config: NextViTConfig, num_classes: int = 1000) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.stem = _stem(config)
        self.features = nn.Sequential(*_blocks(config))
        channels = config.stage_channels[-1]
        self.norm = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.proj_head = nn.Sequential(nn.Linear(channels, num_classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(self.stem(x)))
        x = torch.flatten(self.avgpool(x), 1)  # (B, C, H, W) -> (B, C)
        out: Tensor = self.proj_head(x)
        return out


class NextViTBackbone(nn.Module):
    """The four feature maps, for detection and segmentation: strides 4, 8, 16 and 32.

    (B, 3, H, W) float -> four float maps (B, C_i, H / s_i, W / s_i), C_i in ``config.stage_channels``.

    ``extra_norms`` adds a BatchNorm after each stage, *in the main path* (the next stage reads the normalised
    map), as the official dense-task backbones do for stages 1 to 3, with the classifier's ``norm`` after stage 4.
    """

    def __init__(self, config: NextViTConfig, *, extra_norms: bool) -> None:
        super().__init__()
        self.config = config
        self.stem = _stem(config)
        self.features = nn.Sequential(*_blocks(config))
        ends: list[int] = []
        for depth in config.depths:
            ends.append(depth - 1 + (ends[-1] + 1 if ends else 0))
        self.stage_ends = tuple(ends)
        *inner, last = config.stage_channels
        self.extra_norm_list = nn.ModuleList(nn.BatchNorm2d(c) for c in inner) if extra_norms else None
        self.norm = nn.BatchNorm2d(last) if extra_norms else None
        _initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        maps: list[Tensor] = []
        for index, block in enumerate(self.features):
            x = block(x)
            if index in self.stage_ends:
                x = self._norm_stage(x, len(maps))
                maps.append(x)
        return tuple(maps)

    def _norm_stage(self, x: Tensor, stage: int) -> Tensor:
        if self.extra_norm_list is None or self.norm is None:
            return x
        norm = self.extra_norm_list[stage] if stage < len(self.extra_norm_list) else self.norm
        out: Tensor = norm(x)
        return out


def backbone_of(model: NextViT) -> NextViTBackbone:
    """The classifier's own blocks as a backbone in eval mode: its four maps as each stage leaves them, unnormalised.

    The modules are shared with ``model``, not copied.
    """
    backbone = NextViTBackbone(model.config, extra_norms=False)
    backbone.stem, backbone.features = model.stem, model.features
    return backbone.eval()


def _stem(config: NextViTConfig) -> nn.Sequential:
    first, second, third = config.stem
    return nn.Sequential(
        ConvBNReLU(config.in_channels, first, stride=2),
        ConvBNReLU(first, second, stride=1),
        ConvBNReLU(second, third, stride=1),
        ConvBNReLU(third, third, stride=2),
    )


def _blocks(config: NextViTConfig) -> Iterator[nn.Module]:
    """All blocks in order; the stochastic depth rate grows linearly from 0 to its full value."""
    last = max(1, sum(config.depths) - 1)
    rates = (config.drop_path_rate * index / last for index in range(last + 1))
    channels = config.stem[-1]
    for stage, stride, sr_ratio in zip(config.stages, config.strides, config.sr_ratios, strict=True):
        for index, block in enumerate(stage):
            step = stride if index == 0 else 1
            if block.kind == "ncb":
                yield NCB(channels, block.channels, step, config.head_dim, config.ncb_mlp_ratio, next(rates))
            else:
                yield NTB(
                    channels,
                    block.channels,
                    step,
                    sr_ratio,
                    config.head_dim,
                    config.ntb_mlp_ratio,
                    config.mix_ratio,
                    next(rates),
                )
            channels = block.channels


def _initialise(model: nn.Module) -> None:
    """Truncated normal of deviation 0.02 for convolutions and linear maps, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
