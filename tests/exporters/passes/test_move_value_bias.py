from __future__ import annotations

import pytest
from torch import nn

from nextvit_exporters.passes.move_value_bias import MoveValueBias
from tests.exporters.passes_harness import certified, check_pass, nano, official
from tests.exporters.toys import ATTENTION_REFUSALS, Attend, Permuted, Pooled, Unscaled, feature_map
from tests.harness import images, randomise

PASS = MoveValueBias()


@pytest.mark.parametrize("kind", [Attend, Unscaled, Permuted, Pooled])
def test_moves_the_bias(kind: type[Attend]) -> None:
    checked = check_pass(randomise(kind(), 0), (), PASS, rewrites=1, nodes=0, inputs=feature_map())
    assert [name for name, _ in checked.graph.named_parameters() if name.startswith("v.")] == ["v.weight"]


def test_gives_a_bias_to_a_projection_without_one() -> None:
    model = Attend()
    model.proj = nn.Linear(8, 8, bias=False)
    check_pass(randomise(model, 0), (), PASS, rewrites=1, nodes=0, inputs=feature_map())


@pytest.mark.parametrize("model", [Attend(bias=False), nn.Linear(10, 4)], ids=["no bias", "no attention"])
def test_nothing_to_move(model: nn.Module) -> None:
    check_pass(randomise(model, 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    ("kind", "reason"), ATTENTION_REFUSALS, ids=lambda v: v.__name__ if isinstance(v, type) else ""
)
def test_refuses(kind: type[Attend], reason: str) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
def test_on_the_model(model: nn.Module) -> None:
    check_pass(model, (), PASS, rewrites=3, nodes=0, inputs=images(2, 3, 64, 64, seed=1).double())


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 3), ("official", 3), ("own head", 3), ("conv head", 3), ("backbone", 3), ("small", 4), ("timm", 4)],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("move-value-bias") == (count, ())
