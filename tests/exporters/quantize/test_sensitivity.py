"""Any choice of blocks in INT8 answers as the graph that is made for it, without being made."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.sets import ONNX_RUNTIME
from nextvit_exporters.quantize import sensitivity
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.identity import graph_hash
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.quantize.placement import Map, blocks, placement
from nextvit_exporters.quantize.quantized import quantize_graph
from nextvit_exporters.quantize.sensitivity import BlockwiseInt8
from nextvit_exporters.quantize_spec import QuantizeSpec
from tests.exporters.passes_harness import RAW, make, pixels
from tests.harness import images, randomise

SPEC = QuantizeSpec(rest="fp32", method="minmax")


@cache
def network(*, raw: bool = False) -> tuple[fx.GraphModule, Calibration, Tensor]:
    """A random network behind its passes, what was found on some images, and two others; raw pixels if asked."""
    graph = g.trace(make("nano"))
    seen, images = pixels(4, 3, 64, 64, seed=1), pixels(2, 3, 64, 64, seed=2)
    graph, records = run_passes(graph, (*ONNX_RUNTIME, *([RAW] if raw else [])), [images])
    assert all(record.certified for record in records)
    if raw:
        seen, images = RAW.adapt(seen), RAW.adapt(images)
    observer = Observer(graph, placement(graph), grams=False)
    observer.see(seen)
    return graph, observer.result("minmax", "0" * 64, graph_hash(graph)), images


def by_choice(
    blockwise: BlockwiseInt8, images: Tensor, choices: Sequence[Collection[str]]
) -> tuple[list[Tensor], Tensor]:
    found = list(blockwise.logits(images, choices))
    assert found[-1][0] is None, "the float graph comes last"
    indices = [index for index, _ in found[:-1]]
    assert sorted(index for index in indices if index is not None) == list(range(len(choices)))
    logits = dict(found)
    return [logits[index] for index in range(len(choices))], logits[None]


def choices_of(graph: fx.GraphModule) -> list[tuple[str, ...]]:
    """Every block alone, two that are apart, all but the first, all, and none."""
    names = blocks(placement(graph))
    return [*((name,) for name in names), (names[-1], names[1]), names[3:], names, ()]


@cache
def expected(*, raw: bool) -> tuple[list[Tensor], Tensor]:
    """The answers of graphs made for each choice, and of the float graph."""
    graph, found, images = network(raw=raw)
    names, answers = blocks(placement(graph)), []
    for choice in choices_of(graph):
        keep = tuple(name for name in names if name not in choice)
        made = quantize_graph(graph, QuantizeSpec(rest="fp32", method="minmax", keep=keep), found)
        answers.append(g.execute(made, images)[0])
    return answers, g.execute(graph, images)[0]


def differing(blockwise: BlockwiseInt8, *, raw: bool = False) -> list[tuple[str, ...]]:
    """The choices that are answered otherwise than by the graph made for them."""
    graph, _, images = network(raw=raw)
    choices, (wanted, float_wanted) = choices_of(graph), expected(raw=raw)
    answers, plain = by_choice(blockwise, images, choices)
    assert torch.equal(plain, float_wanted)
    for choice, want in zip(choices, wanted, strict=True):
        assert torch.equal(want, plain) == (not choice), "INT8 costs something"
    rows = zip(choices, wanted, answers, strict=True)
    return [choice for choice, want, answer in rows if not torch.equal(want, answer)]


@pytest.mark.parametrize("raw", [False, True])
def test_every_choice_answers_as_its_own_graph_to_the_last_bit(raw: bool) -> None:  # noqa: FBT001 - pytest's
    graph, found, _ = network(raw=raw)
    held, code = g.fingerprint(graph), graph.code
    blockwise = BlockwiseInt8(graph, SPEC, found, torch.float64)
    assert blockwise.blocks == blocks(placement(graph))
    assert differing(blockwise, raw=raw) == []
    assert differing(blockwise, raw=raw) == [], "a second walk is as the first"
    assert g.fingerprint(graph) == held
    assert graph.code == code


def late(self: BlockwiseInt8, parts: sensitivity._Parts) -> str | None:
    """Begins behind the first tensor on steps."""
    names = [node.name for node in self._nodes if node.name in parts.quantizers]
    return names[-1] if names else None


def without_steps(self: BlockwiseInt8, choice: Collection[str]) -> sensitivity._Parts:
    """Forgets the activations."""
    return sensitivity._Parts(RIGHT_PARTS(self, choice).modules, {})


def without_weights(self: BlockwiseInt8, choice: Collection[str]) -> sensitivity._Parts:
    return sensitivity._Parts({}, RIGHT_PARTS(self, choice).quantizers)


def and_the_next(self: BlockwiseInt8, choice: Collection[str]) -> sensitivity._Parts:
    """Quantizes one block more than asked."""
    more = {self.blocks[(self.blocks.index(name) + 1) % len(self.blocks)] for name in choice}
    return RIGHT_PARTS(self, {*choice, *more})


RIGHT_PARTS = BlockwiseInt8._parts


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("_first", late), ("_parts", without_steps), ("_parts", without_weights), ("_parts", and_the_next)],
)
def test_a_mistake_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., object]) -> None:
    graph, found, _ = network()
    blockwise = BlockwiseInt8(graph, SPEC, found, torch.float64)
    monkeypatch.setattr(BlockwiseInt8, name, wrong)
    assert len(differing(blockwise)) >= 7


def test_modules_that_write_in_place_leave_others_what_they_read() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Hardswish(inplace=True))

    a, b = nn.Sequential(block(), block()), nn.Sequential(block(), nn.Conv2d(4, 4, 1))
    graph = g.trace(randomise(nn.Sequential(OrderedDict(a=a, b=b)), seed=4))
    image = images(2, 4, 6, 6, seed=5, dtype=torch.float64)
    observer = Observer(graph, placement(graph), grams=False, dtype=torch.float64)
    observer.see(image)
    found = observer.result("minmax", "0" * 64, graph_hash(graph))
    blockwise = BlockwiseInt8(graph, SPEC, found, torch.float64)
    answers, plain = by_choice(blockwise, image, [(name,) for name in blockwise.blocks])
    assert blockwise.blocks == ("a.0", "a.1", "b.0")
    assert torch.equal(plain, g.execute(graph, image)[0])
    for name, answer in zip(blockwise.blocks, answers, strict=True):
        keep = tuple(other for other in blockwise.blocks if other != name)
        made = quantize_graph(graph, replace(SPEC, keep=keep), found)
        assert torch.equal(answer, g.execute(made, image)[0])
    assert any(getattr(module, "inplace", False) for module in graph.modules()), "the graph itself is as it was"


def test_float32_is_close_to_float64() -> None:
    graph, found, images = network()
    names = blocks(placement(graph))
    exact, _ = by_choice(BlockwiseInt8(graph, SPEC, found, torch.float64), images, [names])
    quick, plain = by_choice(BlockwiseInt8(graph, SPEC, found), images.float(), [names])
    assert plain.dtype == torch.float32
    cost = (exact[0] - plain.double()).square().mean()
    assert (quick[0].double() - exact[0]).square().mean() <= 0.1 * cost, "steps fall elsewhere, but few"


def test_what_is_kept_in_any_case_is_tried_too() -> None:
    graph, found, images = network()
    names = blocks(placement(graph))
    kept = QuantizeSpec(rest="fp32", method="minmax", keep=names[:3])
    one, _ = by_choice(BlockwiseInt8(graph, kept, found, torch.float64), images, [names[:1]])
    other, _ = by_choice(BlockwiseInt8(graph, SPEC, found, torch.float64), images, [names[:1]])
    assert torch.equal(one[0], other[0])


def test_sizes_are_those_of_the_maps() -> None:
    graph, found, images = network()
    sizes = BlockwiseInt8(graph, SPEC, found, torch.float64).sizes(images[:1])
    placed = placement(graph)
    assert tuple(sizes) == blocks(placed)
    assert sum(each.maps for each in sizes.values()) == len(placed.maps)
    g.measure(graph, images[:1])
    expected = dict.fromkeys(sizes, 0)
    for node in graph.graph.nodes:
        if node.target in placed.maps:
            module = g.module_of(graph, node)
            assert isinstance(module, Map)
            block = next(name for name in sizes if str(node.target).startswith(f"{name}."))
            expected[block] += math.prod(node.meta["shape"]) * int(np.prod(module.weight.shape[1:]))
    assert {name: each.macs for name, each in sizes.items()} == expected


def test_a_block_that_is_not_there_is_named() -> None:
    graph, found, images = network()
    with pytest.raises(InvariantError, match=r"there is no block features\.99 to quantize; the blocks are stem\.0, "):
        next(iter(BlockwiseInt8(graph, SPEC, found).logits(images.float(), [("features.99",)])))
