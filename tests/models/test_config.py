from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from nextvit_models.blocks import EMHSA
from nextvit_models.config import VARIANTS, NextViTConfig
from nextvit_models.nextvit import NextViT


@pytest.mark.parametrize(
    ("variant", "depths"),
    [
        ("nextvit_nano", (1, 2, 2, 2)),
        ("nextvit_small", (3, 4, 10, 3)),
        ("nextvit_base", (3, 4, 20, 3)),
        ("nextvit_large", (3, 4, 30, 3)),
    ],
)
def test_depths(variant: str, depths: tuple[int, ...]) -> None:
    assert VARIANTS[variant].depths == depths


def test_published_variants_differ_only_in_stage_3() -> None:
    small, base, large = (VARIANTS[f"nextvit_{size}"] for size in ("small", "base", "large"))
    pattern = ("ncb",) * 4 + ("ntb",)
    for config, repeats in ((small, 2), (base, 4), (large, 6)):
        assert tuple(block.kind for block in config.stages[2]) == pattern * repeats
        assert tuple(block.channels for block in config.stages[2]) == (384, 384, 384, 384, 512) * repeats
        assert config.stage_channels == (96, 256, 512, 1024)
        assert config.stages[:2] == small.stages[:2]
        assert config.stages[3] == small.stages[3]


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["nextvit_small"].drop_path_rate = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("side", [224, 384])
def test_no_tokens_dropped_at_published_sizes(side: int) -> None:
    assert VARIANTS["nextvit_small"].dropped_tokens(side, side) == {}


def pooling_remainders(config: NextViTConfig, height: int, width: int) -> dict[int, int]:
    """What AvgPool1d really leaves unread, seen from the sizes of its input and output."""
    with torch.device("meta"):
        model = NextViT(config).eval()
    unread: dict[int, int] = {}

    def watch(stage: int, attention: EMHSA) -> None:
        def record(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            if rest := inputs[0].shape[-1] - output.shape[-1] * attention.sr_ratio**2:
                unread[stage] = rest

        attention.sr.register_forward_hook(record)

    starts = [sum(config.depths[:stage]) for stage in range(4)]
    for name, module in model.features.named_modules():
        if isinstance(module, EMHSA) and module.sr_ratio > 1:
            index = int(name.split(".")[0])
            watch(sum(index >= start for start in starts), module)
    model(torch.empty(1, 3, height, width, device="meta"))
    return unread


@pytest.mark.parametrize(
    ("size", "expected"),
    [((224, 224), {}), ((225, 225), {2: 9, 3: 1}), ((225, 200), {2: 5, 3: 3}), ((200, 200), {2: 1, 3: 1})],
)
def test_dropped_tokens_are_those_the_model_drops(size: tuple[int, int], expected: dict[int, int]) -> None:
    config = VARIANTS["nextvit_small"]
    assert config.dropped_tokens(*size) == expected
    assert pooling_remainders(config, *size) == expected


def test_dropped_tokens_of_nano_over_many_sizes() -> None:
    config = VARIANTS["nextvit_nano"]
    for size in ((64, 64), (65, 64), (97, 33), (33, 130), (128, 96)):
        assert config.dropped_tokens(*size) == pooling_remainders(config, *size)
