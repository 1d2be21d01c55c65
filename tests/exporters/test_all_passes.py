"""All passes of the ONNX target behind each other, on every model they may meet."""

from __future__ import annotations

import pytest
from torch import nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import relative_error, run_passes
from nextvit_exporters.passes.sets import ONNX_RUNTIME
from tests.exporters.passes_harness import BOUND, MODELS, RAW, certified, pixels

KEPT_NORMS = {
    "conv head": ["backbone.norm"],
    "backbone with norms": [f"extra_norm_list.{i}" for i in range(3)] + ["norm"],
}


@pytest.mark.parametrize("model", MODELS)
def test_every_pass_is_certified_and_nothing_moves(model: str) -> None:
    done = certified(model)
    assert all(record.certified for record in done.records)
    assert max(record.error_float64 for record in done.records) < 2e-14
    assert max(record.error_float32 for record in done.records) < 1e-5
    assert relative_error(g.execute(done.graph, done.inputs), done.expected) <= BOUND


@pytest.mark.parametrize("model", MODELS)
def test_no_norm_is_left_that_could_go(model: str) -> None:
    graph = certified(model).graph
    left = [name for name, m in graph.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert left == KEPT_NORMS.get(model, [])
    assert not [node for node in graph.graph.nodes if g.is_op(node, "dropout", "scaled_dot_product_attention")]


@pytest.mark.parametrize("model", ["nano", "official", "own head", "backbone"])
def test_a_second_round_finds_nothing(model: str) -> None:
    done = certified(model)
    _, records = run_passes(done.graph, (*ONNX_RUNTIME, RAW), [done.inputs])
    assert {record.name: record.rewrites for record in records if record.rewrites} == {}


@pytest.mark.parametrize("model", ["small", "timm"])
def test_full_size_work_goes_down(model: str) -> None:
    records = certified(model).records
    first, last = records[0], records[-1]
    assert last.macs[1] < 0.955 * first.macs[0]
    assert last.parameters[1] < first.parameters[0]
    assert last.nodes[1] <= 300


def test_both_spellings_and_both_sources_end_in_the_same_graph() -> None:
    """Ours, the official code's and timm's attention: another way there, the same number of operations."""
    assert certified("official").records[-1].nodes[1] == certified("nano").records[-1].nodes[1]
    assert certified("timm").records[-1].macs[1] == certified("small").records[-1].macs[1]


def test_the_images_differ() -> None:
    """Otherwise a mistake that only some images show would pass."""
    inputs = pixels(2, 3, 64, 64, seed=1)
    assert relative_error([inputs[:1]], [inputs[1:]]) > 0.1
    for model in ("nano", "small"):
        (logits,) = certified(model).expected
        assert relative_error([logits[:1]], [logits[1:]]) > 0.05
