from __future__ import annotations

import pytest
import torch
from torch import nn

from nextvit_exporters.passes.fold_head_norm import FoldHeadNorm
from tests.exporters.passes_harness import certified, check_pass
from tests.exporters.toys import Wired, Wiring, feature_map, wired

PASS = FoldHeadNorm()


def layers() -> dict[str, nn.Module]:
    return {
        "norm": nn.BatchNorm2d(8),
        "pool": nn.AdaptiveAvgPool2d(1),
        "fc": nn.Linear(8, 5),
        "other": nn.Linear(8, 3),
        "conv": nn.Conv2d(8, 5, 1),
    }


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.fc(torch.flatten(m.pool(m.norm(x)), 1)),
        lambda m, x: m.fc(m.norm(x).mean((2, 3))),
        lambda m, x: m.fc(m.norm(x).flatten(2).mean(-1)),
        lambda m, x: m.fc(m.pool(m.norm(x)).squeeze(-1).squeeze(-1)),
        lambda m, x: [head(m.pool(m.norm(x)).flatten(1)) for head in (m.fc,)],
    ],
    ids=["adaptive", "mean", "flat mean", "squeezed", "listed"],
)
def test_folds_through_the_average(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


def test_folds_into_two_classifiers() -> None:
    def two(m: Wired, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = m.norm(x).mean((2, 3))
        return m.fc(pooled), m.other(pooled)

    check_pass(wired(two, **layers()), (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


@pytest.mark.parametrize(
    "wiring",
    [lambda m, x: m.fc(x.mean((2, 3))), lambda m, x: m.conv(m.norm(x))],
    ids=["no norm", "reads the map"],
)
def test_nothing_to_fold(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (lambda m, x: m.fc(m.norm(x).amax((2, 3))), "amax also reads it"),
        (lambda m, x: m.fc(m.norm(x).sum((2, 3))), "sum_1 also reads it"),
        (lambda m, x: m.fc(m.norm(x).relu().mean((2, 3))), "relu also reads it"),
        (lambda m, x: (m.fc((y := m.norm(x)).mean((2, 3))), y), "the graph's output also reads it"),
        (lambda m, x: (m.fc(y := m.norm(x).mean((2, 3))), y), "the graph's output also reads it"),
        (
            lambda m, x: m.fc(m.norm(x).mean((2, 3))) + m.fc(x.mean((2, 3))),
            "fc is used, or its weight is shared, elsewhere",
        ),
        (lambda m, x: m.fc(m.norm(x).mean((1, 2))[:, :8]), "getitem also reads it"),
    ],
    ids=["max", "sum", "relu", "map tapped", "vector tapped", "shared weight", "wrong axes"],
)
def test_refuses(wiring: Wiring, reason: str) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("nano", 1),
        ("official", 1),
        ("own head", 1),
        ("conv head", 0),
        ("backbone", 0),
        ("backbone with norms", 0),
        ("small", 1),
        ("timm", 1),
    ],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).record("fold-head-norm").rewrites == count
