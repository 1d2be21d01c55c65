from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from nextvit_models.complexity import count_macs, count_parameters, count_published_flops
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

# The tables of arXiv 2207.05501 and of the official README: parameters in millions, FLOPs in G at 224 and at 384.
PUBLISHED = {
    "nextvit_small": (31.7, 5.8, 17.3),
    "nextvit_base": (44.8, 8.3, 24.6),
    "nextvit_large": (57.8, 10.8, 32.0),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_figures(variant: str) -> None:
    parameters, at_224, at_384 = PUBLISHED[variant]
    with torch.device("meta"):
        model = NextViT(VARIANTS[variant])
    assert count_parameters(model) // 100_000 / 10 == parameters  # the tables cut, they do not round
    assert round(count_published_flops(model, 224) / 1e9, 1) == at_224
    assert round(count_published_flops(model, 384) / 1e9, 1) == at_384


def test_multiply_accumulates_alone_miss_a_published_figure() -> None:
    """Why two counts: without the norms, small at 384 pixels would read 17.2."""
    with torch.device("meta"):
        model = NextViT(VARIANTS["nextvit_small"])
    assert count_macs(model, 384) == 17_215_627_264


def test_counts_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),  # 8·3·9 a pixel
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),  # 8·2·9 a pixel
        nn.Flatten(2),
        nn.Linear(48, 5),  # 8 rows of 48 to 5
    )
    pixels = 6 * 8
    macs = pixels * (8 * 3 * 9 + 8 * 2 * 9) + 8 * 48 * 5
    assert count_macs(model, (12, 16)) == macs
    assert count_published_flops(model, (12, 16)) == macs + 2 * 8 * pixels
    assert count_parameters(model) == 216 + 16 + 144 + 8 + 245


def test_the_model_is_left_alone() -> None:
    model = randomise(NextViT(VARIANTS["nextvit_nano"], 3), seed=50).train().half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model, 64) == count_macs(NextViT(VARIANTS["nextvit_nano"], 3), 64)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_in_training_is_counted_as_in_eval() -> None:
    """At 32 pixels the last norms see one value a channel, which BatchNorm refuses while training."""
    model = NextViT(VARIANTS["nextvit_nano"], 3)
    assert count_macs(model.train(), 32) == count_macs(model.eval(), 32) > 0


def test_a_traced_graph_counts_the_same() -> None:
    model = NextViT(VARIANTS["nextvit_nano"], 3).eval()
    graph = fx.symbolic_trace(model)
    assert count_macs(graph, (64, 96)) == count_macs(model, (64, 96))
    assert count_published_flops(graph, (64, 96)) == count_published_flops(model, (64, 96))
    assert count_published_flops(graph, (64, 96)) > count_macs(graph, (64, 96))
