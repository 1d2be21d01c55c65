"""Attention, averages and normalisation broken on purpose; see ``test_mutations`` for the folds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import (
    algebra,
    attention,
    average_early,
    channel_first_attention,
    decompose_attention,
    pack_key_value,
    strip_train_only,
)
from nextvit_exporters.passes.algebra import Linear
from nextvit_exporters.passes.base import Refusal, run_passes
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_models.blocks import EMHSA
from tests.exporters.mutations import Plant, assert_caught, stages
from tests.exporters.passes_harness import RAW, make

SCALE_OUTPUT, WITH_WEIGHTS, FIND = algebra.scale_output, algebra.with_weights, attention.find
SPLIT, MAPS = channel_first_attention._split_heads, pack_key_value._maps


def swap_key_and_value(patch: pytest.MonkeyPatch) -> None:
    def find(graph: fx.GraphModule) -> Iterator[attention.Attention | Refusal]:
        for match in FIND(graph):
            yield match if isinstance(match, Refusal) else replace(match, k=match.v, v=match.k)

    patch.setattr(attention, "find", find)


def take_queries_for_keys(patch: pytest.MonkeyPatch) -> None:
    def find(graph: fx.GraphModule) -> Iterator[attention.Attention | Refusal]:
        for match in FIND(graph):
            yield match if isinstance(match, Refusal) else replace(match, k=match.q)

    patch.setattr(attention, "find", find)


def rewrite_swapped(patch: pytest.MonkeyPatch) -> None:
    rewrite = channel_first_attention._rewrite

    def swapped(graph: fx.GraphModule, match: attention.Attention, ends: channel_first_attention._Ends) -> None:
        rewrite(graph, replace(match, k=match.v, v=match.k), ends)

    patch.setattr(channel_first_attention, "_rewrite", swapped)


def scale(change: Callable[[Linear, float], Linear]) -> Plant:
    return lambda patch: patch.setattr(algebra, "scale_output", change)


def mix_heads(patch: pytest.MonkeyPatch) -> None:
    def split(new: fx.Graph, node: fx.Node, heads: int) -> fx.Node:
        """(d, h) for (h, d), of q alone."""
        channels = node.meta["shape"][1]
        shape = (node.meta["shape"][0], channels // heads, heads, -1)
        if not str(node.target).endswith("q"):
            return SPLIT(new, node, heads)
        return new.call_method("transpose", (new.call_method("reshape", (node, *shape)), 1, 2))

    patch.setattr(channel_first_attention, "_split_heads", split)


ATTENTION_MISTAKES: dict[str, tuple[str, Plant]] = {
    "scale twice": ("fold-attention-scale", scale(lambda m, s: SCALE_OUTPUT(m, s * s))),
    "scale missing": ("fold-attention-scale", scale(lambda m, _: m)),
    "scale inverted": ("fold-attention-scale", scale(lambda m, s: SCALE_OUTPUT(m, 1.0 / s))),
    "bias not scaled": (
        "fold-attention-scale",
        scale(lambda m, s: WITH_WEIGHTS(m, SCALE_OUTPUT(m, s).weight, m.bias)),
    ),
    "bias lost": ("fold-attention-scale", scale(lambda m, s: WITH_WEIGHTS(m, SCALE_OUTPUT(m, s).weight, None))),
    "value bias dropped for the key's": ("drop-key-bias", swap_key_and_value),
    "query bias dropped for the key's": ("drop-key-bias", take_queries_for_keys),
    "keys taken for values": ("channel-first-attention", rewrite_swapped),
    "heads interleaved": ("channel-first-attention", mix_heads),
    "biases lost": (
        "channel-first-attention",
        lambda patch: patch.setattr(algebra, "has_bias", lambda _: False),
    ),
    "packed the other way round": (
        "pack-key-value",
        lambda patch: patch.setattr(pack_key_value, "_maps", lambda graph, match: MAPS(graph, match)[::-1]),
    ),
}


@pytest.mark.parametrize("mistake", ATTENTION_MISTAKES)
def test_wrong_attention_is_caught(mistake: str) -> None:
    assert assert_caught("nano", *ATTENTION_MISTAKES[mistake]) > 1e-4


def test_a_key_bias_moved_for_the_values_is_caught() -> None:
    assert assert_caught("nano", "move-value-bias", swap_key_and_value, at="drop-key-bias") > 1e-4


def test_a_lost_key_bias_is_no_mistake_and_does_not_look_like_one() -> None:
    """The one bias that may go: certification isn't merely failing whatever changes a number."""
    known = stages("nano", 64)
    _, (record,) = run_passes(known.before["drop-key-bias"], [known.passes["drop-key-bias"]], [known.inputs])
    assert record.certified


def mean_folded_too(patch: pytest.MonkeyPatch) -> None:
    """Mean and scale both in the first convolution: right inside, wrong at the padded border."""

    def with_weights(conv: Linear, weight: Tensor, bias: Tensor | None) -> Linear:
        mean = 255.0 * torch.tensor(RAW.mean, dtype=torch.float64)
        moved = algebra.bias_of(conv) - weight.sum((2, 3)) @ mean
        return WITH_WEIGHTS(conv, weight, moved if bias is None else bias - weight.sum((2, 3)) @ mean)

    patch.setattr(algebra, "with_weights", with_weights)
    patch.setattr(NormalizeInput, "_subtract_mean", lambda *_: None)


def other_constants(mean: tuple[float, ...] = RAW.mean, std: tuple[float, ...] = RAW.std) -> Plant:
    """The pass is given other constants than the inputs were made with."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = NormalizeInput.adapt
        patch.setitem(stages("nano", 64).passes, RAW.name, replace(RAW, mean=mean, std=std))
        patch.setattr(NormalizeInput, "adapt", lambda _, inputs: right(RAW, inputs))

    return plant


MEAN, STD = RAW.mean, RAW.std
INPUT_MISTAKES: dict[str, Plant] = {
    "mean folded into the bias": mean_folded_too,
    "mean left out": lambda patch: patch.setattr(NormalizeInput, "_subtract_mean", lambda *_: None),
    "BGR mean": other_constants(mean=MEAN[::-1]),
    "BGR std": other_constants(std=STD[::-1]),
    "mean in units of 255": other_constants(mean=tuple(255.0 * m for m in MEAN)),
    "std in units of 255": other_constants(std=tuple(255.0 * s for s in STD)),
    "Inception's constants": other_constants(mean=(0.5,) * 3, std=(0.5,) * 3),
    "a mean rounded to three digits": other_constants(mean=tuple(round(255.0 * m) / 255.0 for m in MEAN)),
}


@pytest.mark.parametrize("mistake", INPUT_MISTAKES)
def test_wrong_normalisation_is_caught(mistake: str) -> None:
    known = stages("nano", 64)
    graph = known.before[RAW.name]
    with pytest.MonkeyPatch.context() as patch:
        INPUT_MISTAKES[mistake](patch)
        result, (record,) = run_passes(graph, [known.passes[RAW.name]], [known.inputs])
    assert not record.certified
    assert record.error_float64 > 1e-4
    assert result.code == graph.code
    assert torch.equal(g.execute(result, known.inputs)[0], g.execute(graph, known.inputs)[0])


def floor_mode(patch: pytest.MonkeyPatch) -> None:
    """The average drops the last row and column of an odd map."""
    rewrite = average_early._rewrite

    def floored(graph: fx.GraphModule, pool: fx.Node, total: fx.Node, convs: list[fx.Node]) -> None:
        if isinstance(graph.get_submodule(str(pool.target)), nn.AvgPool2d):
            graph.set_submodule(str(pool.target), nn.AdaptiveAvgPool2d(tuple(pool.meta["shape"][2:])))
        rewrite(graph, pool, total, convs)

    patch.setattr(average_early, "_rewrite", floored)


def count_padding(patch: pytest.MonkeyPatch) -> None:
    """Another divisor at the border, and the check that would have seen it switched off."""
    rewrite = average_early._rewrite

    def padded(graph: fx.GraphModule, pool: fx.Node, total: fx.Node, convs: list[fx.Node]) -> None:
        if isinstance(graph.get_submodule(str(pool.target)), nn.AvgPool2d):
            graph.set_submodule(str(pool.target), nn.AvgPool2d(2, ceil_mode=True, divisor_override=4))
        rewrite(graph, pool, total, convs)

    patch.setattr(average_early, "_rewrite", padded)


def forget_a_term(patch: pytest.MonkeyPatch) -> None:
    def forgetful(graph: fx.GraphModule, pool: fx.Node, total: fx.Node, convs: list[fx.Node]) -> None:
        source = convs[0].all_input_nodes[0]
        with graph.graph.inserting_before(pool):
            moved = graph.graph.node_copy(pool, lambda node: source if node is total else node)
            result = graph.graph.call_module(str(convs[0].target), (moved,))
        pool.replace_all_uses_with(result)
        graph.graph.erase_node(pool)

    patch.setattr(average_early, "_rewrite", forgetful)


@pytest.mark.parametrize("plant", [floor_mode, count_padding, forget_a_term])
def test_a_wrong_average_is_caught(plant: Plant) -> None:
    assert assert_caught("nano", "average-early", plant, side=75) > 1e-4


def test_an_even_size_hides_the_odd_ones() -> None:
    """Why certification keeps the full size's remainders."""
    with pytest.raises(AssertionError, match="e-1"):
        assert_caught("nano", "average-early", count_padding, side=64)


def strip_activations(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strip_train_only, "_MODULES", (*strip_train_only._MODULES, nn.ReLU))


def test_stripping_too_much_is_caught() -> None:
    assert assert_caught("nano", "strip-train-only", strip_activations) > 1e-2


def fused(**other: object) -> Plant:
    write_out = decompose_attention._write_out

    def plant(patch: pytest.MonkeyPatch) -> None:
        def wrong(graph: fx.GraphModule, node: fx.Node, given: dict[str, fx.node.Argument]) -> None:
            changed = {key: given[str(value)] if isinstance(value, str) else value for key, value in other.items()}
            write_out(graph, node, {**given, **changed})  # type: ignore[dict-item]  # numbers and nodes

        patch.setattr(decompose_attention, "_write_out", wrong)

    return plant


@pytest.mark.parametrize(
    "plant", [fused(scale=1.0), fused(scale=1.0 / 32), fused(key="value"), fused(key="value", value="key")]
)
def test_attention_written_out_wrongly_is_caught(plant: Plant) -> None:
    assert assert_caught("fused", "decompose-attention", plant) > 1e-4


@pytest.mark.parametrize("mistake", ["scale twice", "value bias dropped for the key's", "keys taken for values"])
def test_wrong_attention_is_caught_at_full_size(mistake: str) -> None:
    assert assert_caught("small", *ATTENTION_MISTAKES[mistake]) > 1e-4


@pytest.mark.parametrize("model", ["nano", "small"])
def test_the_attention_of_the_models_matters(model: str) -> None:
    """A softmax that is flat, or one-hot everywhere, would hide what happens in front of it."""
    known = stages(model, 64)
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if g.is_op(n, "softmax"):
                seen.append(value)
            return value

    with torch.no_grad():
        Watch(known.before["fold-attention-scale"]).run(known.inputs)
    assert len(seen) == sum(isinstance(m, EMHSA) for m in make(model).modules())
    for weights in seen:
        spread = (weights * weights.shape[-1]).std()
        assert 0.05 < float(spread) < 0.8 * weights.shape[-1] ** 0.5
