from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.passes.fold_conv_norm import FoldConvNorm
from tests.exporters.passes_harness import certified, check_pass
from tests.exporters.toys import Wired, Wiring, feature_map, wired

PASS = FoldConvNorm()


def in_line(m: Wired, x: Tensor) -> Tensor:
    out: Tensor = m.norm(m.conv(x))
    return out


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 4, 1),
        nn.Conv2d(8, 4, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(8, 4, (3, 1), padding="same", groups=4),
        nn.Conv2d(8, 4, 3, padding=2, dilation=2, padding_mode="reflect"),
    ],
    ids=["1x1", "strided", "grouped", "reflected"],
)
def test_folds_a_convolution(conv: nn.Module) -> None:
    model = wired(in_line, conv=conv, norm=nn.BatchNorm2d(4))
    checked = check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())
    assert [node.target for node in checked.graph.graph.nodes if node.op == "call_module"] == ["conv"]


def test_folds_over_one_dimension() -> None:
    model = wired(in_line, conv=nn.Conv1d(8, 4, 3, padding=1), norm=nn.BatchNorm1d(4))
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map().flatten(2))


def test_folds_a_linear_map_of_vectors() -> None:
    model = wired(in_line, conv=nn.Linear(8, 4), norm=nn.BatchNorm1d(4))
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map().mean((2, 3)))


def test_folds_a_norm_without_gamma_and_beta() -> None:
    model = wired(in_line, conv=nn.Conv2d(8, 4, 1), norm=nn.Identity())
    model.norm = norm = nn.BatchNorm2d(4, eps=0.1, affine=False).eval()
    torch.manual_seed(0)
    norm.running_mean = torch.randn(4)
    norm.running_var = torch.rand(4) + 0.5
    check_pass(model, (), PASS, rewrites=1, nodes=-1, inputs=feature_map())


def test_one_norm_behind_two_convolutions_folds_into_both() -> None:
    model = wired(
        lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)), a=nn.Conv2d(8, 4, 1), b=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(4)
    )
    check_pass(model, (), PASS, rewrites=2, nodes=-2, inputs=feature_map())


@pytest.mark.parametrize(
    "model",
    [
        wired(lambda m, x: m.conv(m.norm(x)), conv=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(8)),
        wired(lambda m, x: m.norm(m.conv(x).relu()), conv=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(4)),
        wired(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 4, 1)),
    ],
    ids=["norm first", "relu between", "no norm"],
)
def test_nothing_to_fold(model: nn.Module) -> None:
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map())


def conv_tapped(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.conv(x)
    return m.norm(y), y


@pytest.mark.parametrize(
    ("wiring", "reason"),
    [
        (lambda m, x: m.norm(m.conv(x)) + m.conv(x.flip(2)), "conv is used, or its weight is shared, elsewhere"),
        (
            lambda m, x: m.norm(m.conv(x)) + functional.conv2d(x.flip(2), m.conv.weight),
            "conv is used, or its weight is shared, elsewhere",
        ),
        (lambda m, x: sum(conv_tapped(m, x)), "conv is also read by something else"),
        (conv_tapped, "conv is also read by something else"),
    ],
    ids=["called twice", "weight read", "shared consumer", "tapped"],
)
def test_refuses_a_convolution_that_something_else_needs(wiring: Wiring, reason: str) -> None:
    model = wired(wiring, conv=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(4))
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_refuses_a_norm_over_tokens() -> None:
    model = wired(in_line, conv=nn.Linear(10, 4), norm=nn.BatchNorm1d(8))
    reason = "the norm does not run over the outputs of conv"
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map()[:, :, 0], refused=[reason])


def test_refuses_a_norm_without_statistics() -> None:
    model = wired(in_line, conv=nn.Conv2d(8, 4, 1), norm=nn.Identity())
    model.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    reason = "the norm keeps no running statistics"
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("part", ["norm", ""])
def test_a_model_in_training_mode_is_not_traced(part: str) -> None:
    model = wired(in_line, conv=nn.Conv2d(8, 4, 1), norm=nn.BatchNorm2d(4))
    model.get_submodule(part).train()
    with pytest.raises(InvariantError, match=f"^{part or 'the model'} is in training mode; call .eval"):
        g.trace(model)


# Small: 4 in the stem, 5 patch embeddings that change width or resolution, 4 projections in the NTBs, 20 MHCAs
@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("nano", 19),
        ("official", 19),
        ("own head", 20),
        ("conv head", 20),
        ("backbone", 19),
        ("backbone with norms", 19),
        ("small", 33),
        ("timm", 33),
    ],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).record("fold-conv-norm").rewrites == count
