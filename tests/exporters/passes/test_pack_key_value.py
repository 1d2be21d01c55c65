from __future__ import annotations

import pytest
from torch import Tensor, nn

from nextvit_exporters.passes.pack_key_value import PackKeyValue
from tests.exporters.passes_harness import certified, check_pass, nano, official
from tests.exporters.toys import ATTENTION_REFUSALS, Attend, Permuted, Pooled, Unscaled, feature_map
from tests.harness import images, randomise

PASS = PackKeyValue()


@pytest.mark.parametrize("kind", [Attend, Unscaled, Permuted, Pooled])
def test_packs(kind: type[Attend]) -> None:
    checked = check_pass(randomise(kind(), 0), (), PASS, rewrites=1, nodes=2, inputs=feature_map())
    packed = checked.graph.get_submodule("k_v")
    assert isinstance(packed, nn.Linear)
    assert (packed.in_features, packed.out_features) == (8, 16)


def test_packs_without_biases() -> None:
    check_pass(randomise(Attend(bias=False), 0), (), PASS, rewrites=1, nodes=2, inputs=feature_map())


def test_packs_two_attentions_of_one_module() -> None:
    class Two(Attend):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attend()
            self.k2, self.v2 = nn.Linear(8, 8), nn.Linear(8, 8)
            self.q2, self.proj2 = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> object:
            first = self.tokens(x)
            k, v = self.heads(self.k(first)), self.heads(self.v(first))
            then = self.proj(self.mix(self.scores(self.queries(first), k).softmax(dim=-1), v))
            k, v = self.heads(self.k2(then)), self.heads(self.v2(then))
            weights = self.scores(self.heads(self.q2(then)), k).softmax(dim=-1)
            return self.inner(self.result(self.proj2(self.mix(weights, v)), x))

    check_pass(randomise(Two(), 0), (), PASS, rewrites=3, nodes=6, inputs=feature_map())


@pytest.mark.parametrize("model", [nn.Linear(10, 4), nn.Conv2d(8, 8, 1)])
def test_nothing_to_pack(model: nn.Module) -> None:
    check_pass(randomise(model, 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


class OneBias(Attend):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(8, 8, bias=False)


class TwoMemories(Attend):
    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        weights = self.scores(self.queries(tokens), self.heads(self.k(tokens))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens.flip(1))))), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *ATTENTION_REFUSALS,
        (OneBias, "only one of keys and values has a bias"),
        (TwoMemories, "keys and values read different tokens"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_refuses(kind: type[Attend], reason: str) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
def test_on_the_model(model: nn.Module) -> None:
    check_pass(model, (), PASS, rewrites=3, nodes=6, inputs=images(2, 3, 64, 64, seed=1).double())


# timm's attention is fused, so there is none to see before decompose-attention
@pytest.mark.parametrize(("model", "count"), [("nano", 3), ("official", 3), ("own head", 3), ("small", 4), ("timm", 0)])
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("pack-key-value") == (count, ())
