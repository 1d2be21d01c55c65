from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nextvit_models.blocks import EMHSA, NCB, NTB, DropPath, PatchEmbed, make_divisible
from tests.harness import randomise, relative_error


def tokens(batch: int, count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(batch, count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("value", "expected"), [(288, 288), (192, 192), (96, 96), (24, 32), (47, 64), (70, 64)])
def test_make_divisible(value: float, expected: int) -> None:
    assert make_divisible(value) == expected


def test_make_divisible_never_loses_more_than_a_tenth() -> None:
    for value in range(32, 2048):
        rounded = make_divisible(value)
        assert rounded % 32 == 0
        assert rounded >= 0.9 * value


def test_drop_path_is_the_identity_in_eval_mode() -> None:
    x = tokens(8, 5, 4, seed=0)
    assert DropPath(0.9).eval()(x) is x


def test_drop_path_zeroes_whole_samples_and_keeps_the_expectation() -> None:
    rate, samples = 0.25, 20_000
    torch.manual_seed(0)
    out = DropPath(rate).train()(torch.ones(samples, 3, 2, 2))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    deviation = math.sqrt(rate / (1 - rate) / samples)  # of the mean of a scaled Bernoulli variable
    assert abs(float(out.mean()) - 1) < 5 * deviation


def test_stochastic_depth_drops_branches_only_while_training() -> None:
    block = randomise(NCB(32, 32, 1, 32, 3, drop_path=0.999_999), seed=1)
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert not torch.equal(block(x), x)
        torch.manual_seed(0)
        assert torch.equal(block.train()(x), x)  # both branches dropped: only the residual path is left


def attention_by_hand(module: EMHSA, x: Tensor) -> Tensor:
    """Equations 7 and 8, head by head and group by group."""
    ratio = module.sr_ratio**2
    groups = [x[:, start : start + ratio].mean(1) for start in range(0, x.shape[1] - ratio + 1, ratio)]
    reduced = torch.stack(groups, 1)
    norm = module.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    reduced = (reduced - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    q, k, v = module.q(x), module.k(reduced), module.v(reduced)
    heads = []
    for head in range(module.heads):
        part = slice(32 * head, 32 * (head + 1))
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(32)).softmax(-1)
        heads.append(weights @ v[..., part])
    out: Tensor = module.proj(torch.cat(heads, -1))
    return out


@pytest.mark.parametrize("count", [64, 67])
def test_attention_pools_consecutive_tokens_and_drops_the_rest(count: int) -> None:
    module = randomise(EMHSA(64, 32, sr_ratio=2).double(), seed=3)
    x = tokens(2, count, 64, seed=4)
    with torch.no_grad():
        assert relative_error(module(x), attention_by_hand(module, x)) < 1e-13


def test_attention_does_not_pool_patches() -> None:
    """Moving a token within its group of four consecutive ones changes no key; moving it down a row does."""
    module = randomise(EMHSA(64, 32, sr_ratio=2).double(), seed=5)
    x = tokens(1, 64, 64, seed=6)  # an 8x8 map
    within, below = x.clone(), x.clone()
    within[:, [0, 3]] = x[:, [3, 0]]
    below[:, [0, 8]] = x[:, [8, 0]]  # inside one 2x2 patch, but eight tokens apart
    with torch.no_grad():
        expected = module(x)[:, 63:]
        assert relative_error(module(within)[:, 63:], expected) < 1e-13
        assert relative_error(module(below)[:, 63:], expected) > 1e-4


def test_dropped_tokens_have_no_key() -> None:
    module = randomise(EMHSA(64, 32, sr_ratio=2).double(), seed=7)
    x = tokens(1, 66, 64, seed=8)
    changed = x.clone()
    changed[:, 64:] += 1
    with torch.no_grad():
        assert torch.equal(module(x)[:, :64], module(changed)[:, :64])
        assert not torch.equal(module(x)[:, 64:], module(changed)[:, 64:])


def test_patch_embed_is_the_identity_where_nothing_changes() -> None:
    same = PatchEmbed(32, 32)
    assert list(same.state_dict()) == []
    x = torch.randn(1, 32, 5, 5)
    assert torch.equal(same(x), x)


def test_patch_embed_averages_only_real_pixels_at_odd_sides() -> None:
    pool = PatchEmbed(4, 4, stride=2).avgpool
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert pool(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


@pytest.mark.parametrize("ratio", [8, 1])
def test_transformer_block_splits_its_width_three_to_one(ratio: int) -> None:
    block = NTB(64, 128, 2, ratio, 32, 2, 0.75, drop_path=0.2)
    assert block.norm1.num_features == 96
    assert isinstance(block.projection.norm, nn.BatchNorm2d)
    assert block.projection.norm.num_features == 32
    assert hasattr(block.e_mhsa, "norm") == (ratio > 1)
    assert block.mhsa_path_dropout.rate == pytest.approx(0.15)
    assert block.mhca_path_dropout.rate == pytest.approx(0.05)
