from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from nextvit_models.config import VARIANTS, NextViTConfig
from nextvit_models.layouts import timm_name
from nextvit_models.nextvit import NextViT, NextViTBackbone, backbone_of
from tests.harness import images, randomise, relative_error

SMALL, NANO = VARIANTS["nextvit_small"], VARIANTS["nextvit_nano"]


def shallow() -> NextViTConfig:
    """The published widths with as few blocks as timm can build."""
    stages = SMALL.stages
    return replace(SMALL, name="shallow", stages=(stages[0][:1], stages[1][-2:], stages[2][:5], stages[3][-2:]))


def copied(source: nn.Module, config: NextViTConfig, classes: int) -> NextViT:
    """Our model with the weights of timm's."""
    model = NextViT(config, classes)
    weights = source.state_dict()
    model.load_state_dict({name: weights[timm_name(name, config.depths)] for name in model.state_dict()})
    return model.eval()


@pytest.fixture(scope="module")
def timm_shallow() -> nn.Module:
    model: nn.Module = timm.create_model("nextvit_small", depths=(1, 2, 5, 2), num_classes=11)
    return randomise(model, seed=1)


@pytest.mark.full_size
def test_small_equals_timm() -> None:
    theirs = randomise(timm.create_model("nextvit_small", num_classes=5), seed=0)
    ours = copied(theirs, SMALL, 5)
    image = images(1, 3, 224, 224, seed=2)
    with torch.no_grad():
        assert relative_error(ours(image), theirs(image)) <= 1e-5
        assert relative_error(ours.double()(image.double()), theirs.double()(image.double())) <= 1e-12


@pytest.mark.parametrize("size", [(225, 200), (97, 65), (64, 64)])
def test_equals_timm_at_any_size(timm_shallow: nn.Module, size: tuple[int, int]) -> None:
    config = shallow()
    ours = copied(timm_shallow, config, 11)
    image = images(2, 3, *size, seed=3)
    with torch.no_grad():
        expected = timm_shallow(image)
        assert relative_error(ours(image), expected) <= 1e-5
        spread = (expected[0] - expected[1]).abs().max() / expected.abs().max()
    assert spread > 1e-2  # the two images differ by far more than the tolerance


def test_the_published_number_of_tensors() -> None:
    with torch.device("meta"):
        assert len(NextViT(SMALL).state_dict()) == 472


@pytest.mark.parametrize("classes", [1, 2, 37, 21_843])
def test_any_number_of_classes(classes: int) -> None:
    model = randomise(NextViT(NANO, classes), seed=4)
    with torch.no_grad():
        logits = model(images(2, 3, 64, 64, seed=5))
    assert logits.shape == (2, classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("side", [32, 33, 47, 64, 95])
def test_sizes_that_no_stride_divides(side: int) -> None:
    model = randomise(NextViT(NANO, 3), seed=6)
    with torch.no_grad():
        assert model(images(1, 3, side, side + 1, seed=7)).isfinite().all()


def test_training_draws_depths_and_eval_does_not() -> None:
    model = randomise(NextViT(replace(NANO, drop_path_rate=0.5), 3), seed=8)
    image = images(4, 3, 64, 64, seed=9)
    for module in model.modules():  # leave the statistics alone: only the depth is to change
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 0.0
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(model(image), expected)
        torch.manual_seed(0)
        model.train()
        first, second = model(image), model(image)
        assert not torch.equal(first, second)
        assert torch.equal(model.eval()(image), expected)


def test_every_parameter_has_a_gradient() -> None:
    model = randomise(NextViT(NANO, 3), seed=10).train()
    model(images(2, 3, 64, 64, seed=11)).square().sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_stochastic_depth_grows_with_the_block() -> None:
    with torch.device("meta"):
        model = NextViT(SMALL, 3)
    rates = [model.get_submodule(f"features.{index}.mlp_path_dropout") for index in range(20)]
    assert [rate.rate for rate in rates] == pytest.approx([0.1 * index / 19 for index in range(20)])


def test_features_equal_timm(timm_shallow: nn.Module) -> None:
    config = shallow()
    theirs: nn.Module = timm.create_model("nextvit_small", depths=(1, 2, 5, 2), features_only=True)
    weights = timm_shallow.state_dict()
    names = theirs.state_dict()
    theirs.load_state_dict({n: weights[n.replace("stem_", "stem.").replace("stages_", "stages.")] for n in names})
    ours = NextViTBackbone(config, extra_norms=False).eval()
    ours.load_state_dict({name: weights[timm_name(name, config.depths)] for name in ours.state_dict()})
    image = images(1, 3, 129, 96, seed=12)
    with torch.no_grad():
        for mine, other in zip(ours(image), theirs.eval()(image), strict=True):
            assert relative_error(mine, other) <= 1e-5


@pytest.mark.parametrize("extra_norms", [False, True])
def test_backbone_shapes_and_strides(*, extra_norms: bool) -> None:
    backbone = randomise(NextViTBackbone(NANO, extra_norms=extra_norms), seed=13)
    with torch.no_grad():
        maps = backbone(images(2, 3, 128, 96, seed=14))
    strides = (4, 8, 16, 32)
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 128 // stride, 96 // stride)
        for channels, stride in zip(NANO.stage_channels, strides, strict=True)
    ]


def test_extra_norms_stand_in_the_main_path() -> None:
    backbone = randomise(NextViTBackbone(NANO, extra_norms=True), seed=15)
    image = images(1, 3, 64, 64, seed=16)
    assert backbone.extra_norm_list is not None
    assert backbone.norm is not None
    norms = [*backbone.extra_norm_list, backbone.norm]
    blocks = list(backbone.features)
    expected: list[Tensor] = []
    with torch.no_grad():
        x = backbone.stem(image)
        for depth, norm in zip(NANO.depths, norms, strict=True):
            for block in blocks[:depth]:
                x = block(x)
            del blocks[:depth]
            x = norm(x)
            expected.append(x)
        maps = backbone(image)
    assert len(maps) == 4
    for actual, wanted in zip(maps, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_backbone_without_extra_norms_has_no_norm_of_the_head() -> None:
    names = NextViTBackbone(NANO, extra_norms=False).state_dict()
    assert {name.split(".")[0] for name in names} == {"stem", "features"}


def test_a_classifiers_own_backbone_shares_its_blocks_and_stops_after_each_stage() -> None:
    model = randomise(NextViT(NANO, num_classes=7), seed=17)
    backbone, image = backbone_of(model), images(2, 3, 64, 96, seed=18)
    assert not backbone.training
    assert {id(p) for p in backbone.parameters()} < {id(p) for p in model.parameters()}
    blocks, expected = list(model.features), []
    with torch.no_grad():
        x = model.stem(image)
        for depth in NANO.depths:
            for block in blocks[:depth]:
                x = block(x)
            del blocks[:depth]
            expected.append(x)
        maps = backbone(image)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(maps, expected, strict=True))
    assert len(maps) == 4
