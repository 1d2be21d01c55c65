from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.passes.fold_attention_scale import FoldAttentionScale
from tests.exporters.passes_harness import certified, check_pass, nano, official
from tests.exporters.toys import ATTENTION_REFUSALS, Attend, Permuted, Unscaled, feature_map
from tests.harness import images, randomise

PASS = FoldAttentionScale()


class Divided(Attend):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) / 2.0


class Swapped(Attend):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.mul(0.5, q) @ k.transpose(-2, -1)


class BeforeHeads(Attend):
    def queries(self, tokens: Tensor) -> Tensor:
        return self.heads(self.q(tokens) * 0.25)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)


class Twice(Attend):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q * 0.7) @ k.transpose(-2, -1)) * 0.7


class Zero(Attend):
    """A scale of nothing: every weight is the same."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * 0.0) @ k.transpose(-2, -1)


@pytest.mark.parametrize(
    ("kind", "nodes"),
    [(Attend, -1), (Permuted, -1), (Divided, -1), (Swapped, -1), (BeforeHeads, -1), (Twice, -2), (Zero, -1)],
)
def test_folds_the_scale(kind: type[Attend], nodes: int) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())


def test_scales_the_bias_of_q_too_and_needs_none() -> None:
    check_pass(randomise(Attend(bias=False), 0), (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


@pytest.mark.parametrize("model", [Unscaled(), nn.Linear(10, 4)], ids=["no scale", "no attention"])
def test_nothing_to_fold(model: nn.Module) -> None:
    check_pass(randomise(model, 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


class ScaledKeys(Attend):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ (k * 0.5).transpose(-2, -1)


class Temperature(Attend):
    """The scale is trained, one number a head."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Linear(2, 1, bias=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1)) * self.temperature.weight.view(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *ATTENTION_REFUSALS,
        (ScaledKeys, "q, k and v are not three linear maps of tokens"),
        (Temperature, "the softmax's input is not a matrix product"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_refuses(kind: type[Attend], reason: str) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
def test_on_the_model(model: nn.Module) -> None:
    check_pass(model, (), PASS, rewrites=3, nodes=-3, inputs=images(2, 3, 64, 64, seed=1).double())


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 3), ("official", 3), ("own head", 3), ("conv head", 3), ("backbone", 3), ("small", 4), ("timm", 4)],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("fold-attention-scale") == (count, ())
