from __future__ import annotations

import pytest
import timm
import torch

from nextvit_models.config import VARIANTS
from nextvit_models.layouts import layout_of, other_model, timm_name
from nextvit_models.nextvit import NextViT


@pytest.mark.parametrize(
    ("official", "timm_s"),
    [
        ("stem.2.norm.running_var", "stem.2.norm.running_var"),
        ("features.0.mhca.group_conv3x3.weight", "stages.0.blocks.0.mhca.group_conv3x3.weight"),
        ("features.2.mlp.conv1.bias", "stages.0.blocks.2.mlp.fc1.bias"),
        ("features.3.patch_embed.conv.weight", "stages.1.blocks.0.patch_embed.conv.weight"),
        ("features.6.e_mhsa.norm.weight", "stages.1.blocks.3.e_mhsa.norm.weight"),
        ("features.16.projection.norm.bias", "stages.2.blocks.9.projection.norm.bias"),
        ("features.19.mlp.conv2.weight", "stages.3.blocks.2.mlp.fc2.weight"),
        ("norm.weight", "norm.weight"),
        ("proj_head.0.bias", "head.fc.bias"),
    ],
)
def test_names_by_hand(official: str, timm_s: str) -> None:
    assert timm_name(official, (3, 4, 10, 3)) == timm_s


@pytest.mark.parametrize("variant", ["nextvit_small", "nextvit_base", "nextvit_large"])
def test_every_tensor_of_timm_has_its_official_name_and_shape(variant: str) -> None:
    config = VARIANTS[variant]
    with torch.device("meta"):
        ours, theirs = NextViT(config).state_dict(), timm.create_model(variant, device="meta").state_dict()
    renamed = {timm_name(name, config.depths): tensor.shape for name, tensor in ours.items()}
    assert renamed == {name: tensor.shape for name, tensor in theirs.items()}


def test_layout_of() -> None:
    with torch.device("meta"):
        names = list(NextViT(VARIANTS["nextvit_nano"]).state_dict())
    assert layout_of(names) == "official"
    assert layout_of(timm_name(name, (1, 2, 2, 2)) for name in names) == "timm"
    assert layout_of(["features.0.0.weight", "stages.0.blocks.0.conv_dw.weight", "norm.weight"]) is None


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("resnet18", "a ResNet"),
        ("vit_tiny_patch16_224", "a ViT"),
        ("convnext_atto", "a ConvNeXt"),
        ("mobilenetv3_small_050", "an EfficientNet or MobileNet of timm"),
    ],
)
def test_other_models_of_timm(model: str, says: str) -> None:
    names = list(timm.create_model(model, device="meta").state_dict())
    assert layout_of(names) is None
    assert str(other_model(names)).startswith(f"{says} (")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin transformer"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "a ViT of torchvision"),
        ("features.0.0.weight", "a MobileNet or EfficientNet of torchvision"),
    ],
)
def test_other_models_by_name(name: str, says: str) -> None:
    assert other_model(["x", name]) == f"{says} ({name})"


def test_no_other_model() -> None:
    assert other_model(["conv.weight"]) is None
