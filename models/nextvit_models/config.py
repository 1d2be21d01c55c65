"""The Next-ViT variants as data.

Paper, section 3.5 and table 3: a stage is the pattern (NCB x N + NTB x 1) x L, the Next Hybrid Strategy. Stage 1
has no NTB. Small, base and large differ only in how often stage 3 repeats its pattern (L = 2, 4, 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

BlockKind = Literal["ncb", "ntb"]


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """One block: its kind and the channels it puts out."""

    kind: BlockKind
    channels: int


Stage = tuple[BlockConfig, ...]


@dataclass(frozen=True, slots=True)
class NextViTConfig:
    """Everything that decides the shape of a Next-ViT, except the number of classes.

    ``stem`` holds the widths of the stem (its fourth convolution repeats the last one), ``stages`` the blocks of
    the four stages, ``sr_ratios`` the token reduction of E-MHSA per stage (sr² consecutive tokens become one),
    ``image_size`` the side in pixels the variant is usually run at.
    """

    name: str
    stem: tuple[int, int, int]
    stages: tuple[Stage, Stage, Stage, Stage]
    drop_path_rate: float
    image_size: int = 224
    in_channels: int = 3
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    head_dim: int = 32
    ncb_mlp_ratio: int = 3
    ntb_mlp_ratio: int = 2
    mix_ratio: float = 0.75

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return tuple(len(stage) for stage in self.stages)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Channels each stage puts out, at strides 4, 8, 16 and 32."""
        return tuple(stage[-1].channels for stage in self.stages)

    def dropped_tokens(self, height: int, width: int) -> dict[int, int]:
        """Tokens E-MHSA leaves unread at this input size: stage number (1-4) to tokens dropped.

        AvgPool1d over sr² tokens ignores a remainder, so at a size where H·W of a stage is not a multiple of
        sr² the last tokens have no key and no value. Empty at every size the variants were trained at.
        """
        dropped: dict[int, int] = {}
        side = [_half(_half(height)), _half(_half(width))]
        for number, (stage, stride, ratio) in enumerate(zip(self.stages, self.strides, self.sr_ratios, strict=True), 1):
            side = [_half(s) if stride == 2 else s for s in side]
            if any(block.kind == "ntb" for block in stage) and (rest := side[0] * side[1] % ratio**2):
                dropped[number] = rest
        return dropped


def _half(side: int) -> int:
    """Side after a stride-2 stem convolution, or after AvgPool2d(2, ceil_mode=True): both round up."""
    return -(-side // 2)


def _stage(inner: int, outer: int, blocks: int) -> Stage:
    """(NCB x N + NTB) once: ``blocks - 1`` NCBs of width ``inner``, then an NTB of width ``outer``."""
    return (*(BlockConfig("ncb", inner),) * (blocks - 1), BlockConfig("ntb", outer))


def _published(name: str, stage3_repeats: int, drop_path_rate: float) -> NextViTConfig:
    return NextViTConfig(
        name=name,
        stem=(64, 32, 64),
        stages=(
            (BlockConfig("ncb", 96),) * 3,
            _stage(192, 256, 4),
            _stage(384, 512, 5) * stage3_repeats,
            _stage(768, 1024, 3),
        ),
        drop_path_rate=drop_path_rate,
    )


_NANO = NextViTConfig(
    name="nextvit_nano",
    stem=(24, 16, 24),
    stages=((BlockConfig("ncb", 32),), _stage(64, 128, 2), _stage(96, 128, 2), _stage(128, 160, 2)),
    drop_path_rate=0.05,
    image_size=64,
)

VARIANTS: Final[Mapping[str, NextViTConfig]] = MappingProxyType(
    {
        config.name: config
        for config in (
            _NANO,
            _published("nextvit_small", 2, 0.1),
            _published("nextvit_base", 4, 0.2),
            _published("nextvit_large", 6, 0.2),
        )
    }
)
