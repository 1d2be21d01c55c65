from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.coreml.loading import heard, part
from nextvit_exporters.coreml_spec import WEIGHTS
from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.precision.compress import (
    TABLES,
    check_blocks,
    compress,
    compress_graph,
    compressible,
    for_conversion,
    measure,
    to_int8,
)
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.precision.tables import distinct, nearest, table_of
from tests.exporters.passes_harness import nano

Float16s = NDArray[np.float16]
NANO_COMPRESSED: Final = 45
SCHEMES: Final = pytest.mark.parametrize("scheme", WEIGHTS)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return g.trace(nano())


def tensor(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape) * scale


def weights_of(graph: fx.GraphModule, name: str) -> NDArray[Any]:
    weights: NDArray[Any] = graph.get_submodule(name).get_parameter("weight").detach().numpy()
    return weights


def by_coremltools(weight: Float16s) -> Float16s:
    quantizer = part("optimize.coreml._quantization_passes").linear_quantize_weights
    with heard():
        found = quantizer.blockwise_compress_by_dtype(weight, "int8", "LINEAR_SYMMETRIC", [1] + [0] * (weight.ndim - 1))
        whole: Float16s = quantizer.decompress(found)
    return whole


def odd_tensors() -> dict[str, Float16s]:
    scales = np.logspace(-9, 4, 64)[:, None, None, None]
    outlier = tensor(2, 16, 200)
    outlier[3, 7] = 31000
    zero = tensor(3, 8, 24, 1, 1)
    zero[[0, 5]] = 0
    return {
        "channels of every scale": (tensor(0, 64, 9, 3, 3) * scales).clip(-32000, 32000).astype(np.float16),
        "subnormal": tensor(1, 40, 60, scale=2e-6).astype(np.float16),
        "one huge outlier": outlier.astype(np.float16),
        "zero channels": zero.astype(np.float16),
        "one channel": tensor(4, 1, 3000).astype(np.float16),
        "every FP16 number up to 1": np.arange(0x3C01, dtype=np.uint16).view(np.float16).reshape(1, -1),
        "rank 3": tensor(5, 30, 70, 3).astype(np.float16),
    }


@pytest.mark.parametrize("name", odd_tensors())
def test_int8_is_what_coremltools_decompresses_to_bit_for_bit(name: str) -> None:
    weight = odd_tensors()[name]
    assert np.array_equal(to_int8(weight).view(np.uint16), by_coremltools(weight).view(np.uint16))


@pytest.mark.parametrize("name", odd_tensors())
def test_odd_tensors_stay_within_the_bound_of_int8(name: str) -> None:
    weight = odd_tensors()[name]
    loss = measure("a", "int8", weight.astype(np.float64), to_int8(weight))
    assert loss.relative_rms <= loss.bound


@pytest.mark.parametrize("scheme", TABLES)
@pytest.mark.parametrize("name", ["one huge outlier", "zero channels", "one channel", "rank 3"])
def test_odd_tensors_stay_within_the_bound_of_tables(name: str, scheme: str) -> None:
    weight = odd_tensors()[name]
    loss = measure("a", scheme, weight.astype(np.float64), compress(weight, scheme))
    assert loss.relative_rms <= loss.bound
    assert loss.relative_rms > 0 or len(distinct(weight)[0]) <= TABLES[scheme]


@SCHEMES
def test_kept_blocks_have_plain_fp16_weights(graph: fx.GraphModule, scheme: str) -> None:
    keep = ("stem.3", "features.2")
    kept, losses = compress_graph(graph, scheme, keep)
    whole, plain = compress_graph(graph, scheme)[0], round_constants(graph)
    for name in compressible(graph):
        is_kept = name.startswith(tuple(f"{block}." for block in keep))
        assert np.array_equal(weights_of(kept, name), weights_of(plain if is_kept else whole, name))
    assert [each.module for each in losses] == list(compressible(graph, keep))
    assert 0 < len(losses) < NANO_COMPRESSED


def test_a_block_that_is_not_there_is_told(graph: fx.GraphModule) -> None:
    check_blocks(graph, ("stem.0", "features.6", "proj_head.0"))
    with pytest.raises(UnsupportedSpec) as refusal:
        check_blocks(graph, ("features.6", "features.7"))
    assert str(refusal.value) == (
        "no block is called 'features.7'; the blocks are stem.0, stem.1, stem.2, stem.3, "
        f"{', '.join(f'features.{index}' for index in range(7))}, proj_head.0"
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_of_int8_holds_for_float64_weights_of_any_scale(seed: int) -> None:
    scale = np.random.default_rng(seed).uniform(-8, 4, (24, 1))
    weight = (tensor(seed, 24, 400) * 10**scale).clip(-30000, 30000)
    measure("a", "int8", weight, to_int8(weight.astype(np.float16)))


@SCHEMES
def test_a_graph_carries_the_compressed_weights_and_leaves_the_original_alone(
    graph: fx.GraphModule, scheme: str
) -> None:
    before = g.fingerprint(graph)
    compressed, losses = compress_graph(graph, scheme)
    names, rounded = compressible(graph), round_constants(graph)
    assert g.fingerprint(graph) == before
    assert [loss.module for loss in losses] == list(names)
    assert len(names) == NANO_COMPRESSED
    for name, module in compressed.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        expected = weights_of(rounded, name).astype(np.float16)
        changed = compress(expected, scheme) if name in names else expected
        assert np.array_equal(weights_of(compressed, name), changed.astype(np.float32))
        assert (name in names) == (weights_of(graph, name).size > 2048)
        if scheme in TABLES and name in names:
            assert len(distinct(changed)[0]) <= TABLES[scheme]


@SCHEMES
def test_two_runs_give_the_same_bytes(graph: fx.GraphModule, scheme: str) -> None:
    first, second = (compress_graph(graph, scheme)[0] for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.detach().numpy().tobytes() == other.detach().numpy().tobytes()


def test_a_weight_of_exactly_the_threshold_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 65)).eval()
    traced = g.trace(model)
    assert compressible(traced) == ("2",)


def test_tables_are_converted_as_they_are_and_int8_from_rounded_weights(graph: fx.GraphModule) -> None:
    compressed, _ = compress_graph(graph, "lut6")
    assert for_conversion(graph, compressed, "lut6") is compressed
    given = for_conversion(graph, compressed, "int8")
    assert np.array_equal(weights_of(given, "proj_head.0"), weights_of(round_constants(graph), "proj_head.0"))


def test_a_step_that_is_one_percent_off_is_seen() -> None:
    weight = tensor(0, 32, 100)
    compressed = to_int8(weight.astype(np.float16))
    compressed[5] *= np.float16(1.01)
    with pytest.raises(InvariantError, match=r"int8 moves weight\[5, \d+\] of stem.conv from .* further than"):
        measure("stem.conv", "int8", weight, compressed)


@pytest.mark.parametrize("scheme", TABLES)
def test_a_table_entry_that_is_off_and_swapped_indices_are_seen(scheme: str) -> None:
    weight = tensor(0, 64, 400)
    entry, swapped = (compress(weight.astype(np.float16), scheme) for _ in range(2))
    table = np.unique(entry)
    entry[entry == table[-2]] *= np.float16(0.5)
    swapped[0, 0], swapped[0, np.argmax(swapped[0] != swapped[0, 0])] = swapped[0, 1], swapped[0, 0]
    swapped[3] = swapped[3, ::-1]
    for damaged in (entry, swapped):
        with pytest.raises(InvariantError, match=r"moves weight.* of stem.conv"):
            measure("stem.conv", scheme, weight, damaged)


def test_a_table_too_small_for_the_tensor_is_refused() -> None:
    weight = tensor(0, 64, 400)
    worse = np.sign(weight).astype(np.float16)
    with pytest.raises(InvariantError, match=r"of their root mean square, more than 0\.3; use a scheme of more bits"):
        measure("stem.conv", "lut4", weight, worse)


@pytest.mark.parametrize(("scheme", "reach"), [("int8", 40000.0), ("lut8", 70000.0), ("int8", float("nan"))])
def test_weights_beyond_the_range_are_refused_by_name(scheme: str, reach: float) -> None:
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight[3, 3] = reach
    model = nn.Sequential(linear, nn.ReLU()).eval()
    with pytest.raises(InvariantError, match=rf"the weights of 0 reach .* in FP16; {scheme} needs them within"):
        compress_graph(g.trace(model), scheme)


def test_an_unknown_scheme_is_refused(graph: fx.GraphModule) -> None:
    with pytest.raises(UnsupportedSpec, match="there is no weight compression int3; choose one of int8, lut8"):
        compress_graph(graph, "int3")


@pytest.mark.parametrize(("size", "allowed"), [(16, 1.08), (64, 1.1), (256, 1.15)])
def test_a_table_is_near_the_best_one(size: int, allowed: float) -> None:
    weight = (tensor(0, 900) * np.exp(tensor(1, 900))).astype(np.float16)
    values, counts = distinct(weight)
    table = table_of(values, counts, size)
    lost = np.square(table[nearest(table, weight)].astype(np.float64) - weight).sum()
    assert lost <= allowed**2 * least_squares(values.astype(np.float64), counts, size)


def least_squares(values: NDArray[np.float64], counts: NDArray[np.int64], size: int) -> float:
    """What the best table loses, by dynamic programming over all ways to cut the ascending values."""
    number, total, squares = (
        np.concatenate([[0.0], np.cumsum(each)]) for each in (counts, counts * values, counts * values**2)
    )
    members = number[None] - number[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = squares[None] - squares[:, None] - (total[None] - total[:, None]) ** 2 / members
    cost[members <= 0] = np.inf
    best = cost[0]
    for _ in range(size - 1):
        best = np.min(best[:, None] + cost, axis=0)
    return float(best[-1])


def test_few_values_are_their_own_table_with_one_zero() -> None:
    weight = np.array([[-0.0, 0.0, 1.0, -2.0]], np.float16)
    assert table_of(*distinct(weight), 4).tolist() == [-2.0, 0.0, 1.0]
    assert not np.signbit(compress(weight, "lut4")[0, 0])
