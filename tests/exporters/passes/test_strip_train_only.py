from __future__ import annotations

import pytest
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from nextvit_models.blocks import DropPath
from tests.exporters.passes_harness import certified, check_pass, nano
from tests.exporters.toys import Wired, feature_map, wired
from tests.harness import images

PASS = StripTrainOnly()


@pytest.mark.parametrize(
    "layer",
    [nn.Identity(), nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), DropPath(0.5)],
    ids=lambda layer: type(layer).__name__,
)
def test_strips_a_module(layer: nn.Module) -> None:
    model = wired(lambda m, x: x + m.layer(m.conv(x)), layer=layer, conv=nn.Conv1d(8, 8, 1))
    checked = check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map().flatten(2))
    assert "layer" not in dict(checked.graph.named_modules())


def test_strips_functions_and_methods() -> None:
    def forward(m: Wired, x: Tensor) -> Tensor:
        x = functional.dropout(m.conv(x), 0.5, m.training).contiguous()
        out: Tensor = m.drop(functional.dropout2d(x, p=0.5, training=False))
        return out

    model = wired(forward, conv=nn.Conv2d(8, 8, 1), drop=nn.Dropout2d(0.5))
    check_pass(model, (), PASS, rewrites=4, nodes=-4, inputs=feature_map())


def test_strips_each_call_of_a_shared_module() -> None:
    model = wired(lambda m, x: m.drop(m.conv(m.drop(x))), drop=nn.Dropout(0.5), conv=nn.Conv2d(8, 8, 1))
    check_pass(model, (), PASS, rewrites=2, nodes=-2, inputs=feature_map())


def test_strips_what_is_an_output() -> None:
    model = wired(lambda m, x: (m.drop(y := m.conv(x)), y), drop=nn.Dropout(0.5), conv=nn.Conv2d(8, 8, 1))
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


def test_nothing_to_strip() -> None:
    model = wired(lambda m, x: m.conv(x).relu(), conv=nn.Conv2d(8, 8, 1))
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map())


def test_refuses_a_dropout_that_stays_on() -> None:
    model = wired(lambda m, x: functional.dropout(m.conv(x), 0.0, training=True), conv=nn.Conv2d(8, 8, 1))
    reason = "its training argument is not a literal False"
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_on_the_model() -> None:
    check_pass(nano(), (), PASS, rewrites=45, nodes=-45, inputs=images(2, 3, 64, 64, seed=1).double())


# Nano: 4 in each of 4 NCBs, 6 in each of 3 NTBs, and 11 identities in patch embeddings that change nothing
@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 45), ("own head", 45), ("conv head", 45), ("backbone", 45), ("small", 139), ("timm", 97)],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("strip-train-only") == (count, ())
