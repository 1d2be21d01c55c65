from __future__ import annotations

import pytest
from torch import nn

from nextvit_exporters.passes.flatten_channels_last import FlattenChannelsLast
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import check_pass, nano
from tests.exporters.tensorrt_passes import on_its_way
from tests.exporters.toys import Attend, Wiring, feature_map, wired
from tests.harness import images, randomise

PASS = FlattenChannelsLast()


def layers() -> dict[str, nn.Module]:
    return {"narrow": nn.Linear(8, 4), "flat": nn.Flatten(2)}


@pytest.mark.parametrize(
    ("wiring", "nodes"),
    [
        (lambda m, x: m.narrow(x.flatten(2).transpose(1, 2)), 0),
        (lambda m, x: m.narrow(m.flat(x).permute(0, 2, 1)), 0),
        (lambda m, x: m.narrow(x.reshape(2, 8, -1).transpose(-1, -2)), 0),
        (lambda m, x: (m.narrow((y := x.flatten(2)).transpose(1, 2)), y), 1),
    ],
    ids=["flatten", "module", "reshape", "flat map read too"],
)
def test_moves_channels_last(wiring: Wiring, nodes: int) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())


def test_columns_first() -> None:
    model = wired(lambda m, x: m.narrow(x.transpose(2, 3).flatten(2).transpose(1, 2)), **layers())
    check_pass(model, (), PASS, rewrites=1, nodes=0, inputs=feature_map())


def test_in_an_attention() -> None:
    check_pass(randomise(Attend(), 0), (), PASS, rewrites=1, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.narrow(x.permute(0, 2, 3, 1).flatten(1, 2)),
        lambda m, x: m.narrow(x.flatten(2).transpose(0, 2)[..., :1].expand(-1, -1, 8)),
        lambda m, x: m.flat(x),
        lambda m, x: m.narrow((x.flatten(2) * 2.0).transpose(1, 2)),
        lambda m, x: m.narrow(x.permute(0, 1, 3, 2).reshape(2, 8, -1).reshape(2, -1, 8)),
    ],
    ids=["last already", "batch", "no tokens", "scaled", "mixed"],
)
def test_only_tokens_of_a_map_are_moved(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize("size", [(64, 64), (75, 97)])
def test_on_the_model(size: tuple[int, int]) -> None:
    inputs = images(2, 3, *size, seed=1).double()
    check_pass(nano(), (StripTrainOnly(),), PASS, rewrites=3, nodes=0, inputs=inputs)


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 3), ("official", 3), ("own head", 3), ("conv head", 3), ("backbone", 3), ("small", 4), ("timm", 4)],
)
def test_counts(model: str, count: int) -> None:
    assert on_its_way(model).counts("flatten-channels-last") == (count, ())
