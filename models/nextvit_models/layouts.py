"""The two layouts Next-ViT weights come in, and what tensor names and shapes tell about a model.

Official and timm checkpoints hold the same tensors under different names::

    official                       timm
    features.5.e_mhsa.q.weight     stages.1.blocks.2.e_mhsa.q.weight
    features.5.mlp.conv1.weight    stages.1.blocks.2.mlp.fc1.weight
    proj_head.0.weight             head.fc.weight

Names are mapped by this table, never by position. Everything else is spelled the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final, Literal

import torch

from nextvit_models.config import VARIANTS, NextViTConfig
from nextvit_models.nextvit import NextViT
from nextvit_models.norms import foldable_norms

Layout = Literal["official", "timm"]
Shape = tuple[int, ...]

COUNTER: Final = ".num_batches_tracked"
"""How the name of BatchNorm's count of training steps ends; the count is no part of the function."""

_OFFICIAL_BLOCK: Final = re.compile(r"features\.(\d+)\.")
_TO_TIMM: Final[Mapping[str, str]] = MappingProxyType(
    {"mlp.conv1.": "mlp.fc1.", "mlp.conv2.": "mlp.fc2.", "proj_head.0.": "head.fc."}
)
_LAYOUT_MARKS: Final[tuple[tuple[re.Pattern[str], Layout], ...]] = (
    (re.compile(r"features\.\d+\.mhca\."), "official"),
    (re.compile(r"stages\.\d\.blocks\.\d+\.mhca\."), "timm"),
)
# A tensor that only this family has, and the family; read in order.
_OTHER_MODELS: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (re.compile(r"layer1\.0\.conv1\.weight"), "a ResNet"),
    (re.compile(r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table"), "a Swin transformer"),
    (re.compile(r"blocks\.0\.attn\.qkv\.weight"), "a ViT"),
    (re.compile(r"encoder\.layers\.encoder_layer_0\."), "a ViT of torchvision"),
    (re.compile(r"stages\.0\.blocks\.0\.(conv_dw|gamma)"), "a ConvNeXt"),
    (re.compile(r"conv_stem\.weight"), "an EfficientNet or MobileNet of timm"),
    (re.compile(r"features\.\d+\.0\.weight"), "a MobileNet or EfficientNet of torchvision"),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """How the tensors of a file compare with those of one variant.

    ``names`` maps the official name of every tensor of the variant to its name in the file's layout. The other names
    are those of the file; ``wrong_shape`` adds both shapes.
    """

    config: NextViTConfig
    names: Mapping[str, str]
    matching: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    norms_merged: bool

    @property
    def exact(self) -> bool:
        """Every tensor of the variant is there in its shape, and no other."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    @property
    def share(self) -> float:
        """Tensors that match, over tensors that either side has."""
        return self.matching / (self.matching + len(self.missing) + len(self.unexpected) + len(self.wrong_shape))


def layout_of(names: Iterable[str]) -> Layout | None:
    """The layout tensor names are written in, or None where they are not a Next-ViT's."""
    for name in names:
        for mark, layout in _LAYOUT_MARKS:
            if mark.match(name):
                return layout
    return None


def other_model(names: Iterable[str]) -> str | None:
    """Another well-known architecture that these tensor names belong to, with the name that shows it."""
    known = list(names)
    for pattern, family in _OTHER_MODELS:
        for name in known:
            if pattern.match(name):
                return f"{family} ({name})"
    return None


def timm_name(official_name: str, depths: Sequence[int]) -> str:
    """What timm calls a tensor, for a model with ``depths`` blocks in its stages.

    Names that the two layouts share are returned as they are.
    """
    block = _OFFICIAL_BLOCK.match(official_name)
    if block is None:
        return _renamed(official_name)
    stage, index = 0, int(block[1])
    while stage < len(depths) - 1 and index >= depths[stage]:
        index -= depths[stage]
        stage += 1
    return f"stages.{stage}.blocks.{index}.{_renamed(official_name[block.end() :])}"


def closest_variant(shapes: Mapping[str, Shape], layout: Layout) -> Fit:
    """The variant whose tensors agree best, by name and shape, with those of a file in ``layout``.

    The head counts with whatever number of classes it has; step counters of BatchNorm need not be there.
    """
    return max((_fit(config, shapes, layout) for config in VARIANTS.values()), key=lambda fit: fit.share)


def _fit(config: NextViTConfig, shapes: Mapping[str, Shape], layout: Layout) -> Fit:
    names = {
        name: timm_name(name, config.depths) if layout == "timm" else name for name in expected_shapes(config.name)
    }
    norms = tuple(f"{norm}." for norm in foldable_norms(config))
    merged = not any(file_name in shapes for name, file_name in names.items() if name.startswith(norms))
    if merged:
        names = {name: file_name for name, file_name in names.items() if not name.startswith(norms)}
    classes = _classes(shapes.get(names["proj_head.0.weight"], ()))
    expected = {
        file_name: (classes, *shape[1:]) if name.startswith("proj_head.") else shape
        for name, file_name in names.items()
        for shape in [expected_shapes(config.name)[name]]
    }
    shared = [name for name in expected if name in shapes]
    wrong = tuple(f"{name} {shapes[name]}, not {expected[name]}" for name in shared if shapes[name] != expected[name])
    return Fit(
        config=config,
        names=MappingProxyType(names),
        matching=len(shared) - len(wrong),
        missing=tuple(name for name in expected if name not in shapes and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in shapes if name not in expected),
        wrong_shape=wrong,
        norms_merged=merged,
    )


@cache
def expected_shapes(variant: str) -> Mapping[str, Shape]:
    """Shapes of all tensors of a variant with 1000 classes, by official name."""
    with torch.device("meta"):
        model = NextViT(VARIANTS[variant])
    return MappingProxyType({name: tuple(value.shape) for name, value in model.state_dict().items()})


def _classes(head: Shape) -> int:
    return head[0] if len(head) == 2 and head[0] > 0 else 1


def _renamed(name: str) -> str:
    for official, timm in _TO_TIMM.items():
        if name.startswith(official):
            return timm + name[len(official) :]
    return name
