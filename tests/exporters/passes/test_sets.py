from __future__ import annotations

import pytest
import torch

from nextvit_exporters import graph as g
from nextvit_exporters.passes import sets
from nextvit_exporters.passes.average_early import AverageEarly
from nextvit_exporters.passes.base import Pass, run_passes
from nextvit_exporters.passes.channel_first_attention import ChannelFirstAttention
from nextvit_exporters.passes.merge_average_conv import MergeAverageConv
from nextvit_exporters.passes.pack_key_value import PackKeyValue
from nextvit_exporters.passes.pack_key_value_maps import PackKeyValueMaps
from tests.exporters.passes_harness import make, pixels

LISTS = {"onnx-runtime": sets.ONNX_RUNTIME, "neural-engine": sets.NEURAL_ENGINE, **sets.TENSORRT}


def names(passes: tuple[Pass, ...]) -> list[str]:
    return [each.name for each in passes]


def test_tensorrt_has_two_lists_and_a_default() -> None:
    assert dict(sets.TENSORRT) == {"fewest-kernels": sets.FEWEST_KERNELS, "fewest-macs": sets.FEWEST_MACS}
    assert sets.DEFAULT_PASS_SET in sets.TENSORRT


@pytest.mark.parametrize("chosen", sets.TENSORRT)
def test_nothing_hides_attention_from_tensorrt(chosen: str) -> None:
    assert ChannelFirstAttention().name not in names(sets.TENSORRT[chosen])
    assert ChannelFirstAttention().name in names(sets.ONNX_RUNTIME)


def test_only_fewest_macs_averages_early() -> None:
    assert AverageEarly().name in names(sets.FEWEST_MACS)
    assert AverageEarly().name not in names(sets.FEWEST_KERNELS)
    assert MergeAverageConv().name not in names(sets.FEWEST_MACS)


@pytest.mark.parametrize("passes", LISTS.values(), ids=LISTS)
def test_each_pass_is_listed_once(passes: tuple[Pass, ...]) -> None:
    assert len(set(names(passes))) == len(passes)
    assert PackKeyValue().name not in names(passes)


def test_fixed_size_passes_are_named() -> None:
    listed = {name for passes in LISTS.values() for name in names(passes)}
    assert {"average-tokens", "merge-average-conv"} == sets.FIXED_SIZE_ONLY
    assert listed >= sets.FIXED_SIZE_ONLY


@pytest.mark.parametrize("passes", LISTS.values(), ids=LISTS)
def test_without_the_fixed_size_passes_every_size_is_computed(passes: tuple[Pass, ...]) -> None:
    kept = [each for each in passes if each.name not in sets.FIXED_SIZE_ONLY]
    graph = g.trace(make("nano"))
    rewritten, records = run_passes(graph, kept, [pixels(1, 3, 64, 64, seed=1)])
    assert all(record.certified for record in records)
    other = pixels(1, 3, 75, 97, seed=2)
    torch.testing.assert_close(g.execute(rewritten, other), g.execute(graph, other), rtol=1e-11, atol=1e-12)


def test_the_neural_engine_takes_what_onnx_runtime_takes_with_keys_and_values_packed() -> None:
    packed = PackKeyValueMaps().name
    assert [each for each in names(sets.NEURAL_ENGINE) if each != packed] == names(sets.ONNX_RUNTIME)
    assert names(sets.NEURAL_ENGINE).index(packed) == names(sets.NEURAL_ENGINE).index(ChannelFirstAttention().name) + 1


def test_work_is_least_with_fewest_macs() -> None:
    work = {}
    for name, passes in sets.TENSORRT.items():
        _, records = run_passes(g.trace(make("nano")), passes, [pixels(1, 3, 64, 64, seed=1)])
        work[name] = (records[0].macs[0], records[-1].macs[1])
    assert work["fewest-macs"][1] < work["fewest-macs"][0] < work["fewest-kernels"][1]
