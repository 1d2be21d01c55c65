from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra, pack_key_value_maps
from nextvit_exporters.passes.base import run_passes
from nextvit_exporters.passes.pack_key_value_maps import PackKeyValueMaps
from nextvit_exporters.passes.sets import NEURAL_ENGINE
from tests.exporters.mutations import Plant, assert_undone
from tests.exporters.passes_harness import check_pass, make, nano, official, pixels
from tests.exporters.toys import feature_map
from tests.harness import images, randomise

PASS = PackKeyValueMaps()
PLACE = next(i for i, each in enumerate(NEURAL_ENGINE) if each.name == PASS.name)
BEFORE = NEURAL_ENGINE[:PLACE]


class Maps(nn.Module):
    """Channel-first attention over a map of (B, 8, H, W) with two heads; subclasses change one step."""

    k: nn.Module
    v: nn.Module

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(8, 8, 1, bias=bias) for _ in range(3))
        self.proj = nn.Conv2d(8, 8, 1)

    def memory(self, x: Tensor) -> Tensor:
        return x

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 2, 4, -1)

    def keys(self, memory: Tensor) -> Tensor:
        return self.heads(self.k(memory))

    def values(self, memory: Tensor) -> Tensor:
        return self.heads(self.v(memory))

    def forward(self, x: Tensor) -> object:
        memory = self.memory(x)
        k, v = self.keys(memory), self.values(memory)
        weights = (self.heads(self.q(x)).transpose(-2, -1) @ k).softmax(dim=-1)
        return self.proj((v @ weights.transpose(-2, -1)).reshape(x.shape))


class Pooled(Maps):
    """Keys and values from averaged positions in a row, as in E-MHSA."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Conv1d(8, 8, 1, bias=False) for _ in range(2))
        self.pool = nn.AvgPool1d(4, 4)

    def memory(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(x.flatten(2))
        return out


class Spelled(Maps):
    """The same layout in three steps, the function in place of the method, the module in place of the function."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def heads(self, x: Tensor) -> Tensor:
        return x.flatten(2).view(x.shape[0], 2, 4, -1).contiguous()

    def forward(self, x: Tensor) -> object:
        k, v = self.keys(x), self.values(x)
        weights = self.softmax(torch.matmul(self.heads(self.q(x)).transpose(-2, -1), k))
        return self.proj(torch.matmul(v, weights.permute(0, 1, 3, 2)).reshape(x.shape))


@pytest.mark.parametrize(("kind", "nodes"), [(Maps, -1), (Pooled, -1), (Spelled, -5)])
def test_packs(kind: type[Maps], nodes: int) -> None:
    checked = check_pass(randomise(kind(), 0), (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())
    packed = checked.graph.get_submodule("k_v")
    assert isinstance(packed, nn.Conv1d | nn.Conv2d)
    assert (packed.in_channels, packed.out_channels, packed.bias) == (8, 16, None)
    assert checked.record.macs[0] == checked.record.macs[1]


def test_packs_with_biases() -> None:
    checked = check_pass(randomise(Maps(bias=True), 0), (), PASS, rewrites=1, nodes=-1, inputs=feature_map())
    assert checked.graph.get_parameter("k_v.bias").shape == (16,)


@pytest.mark.parametrize("size", [(2, 8, 6, 10), (1, 8, 5, 7), (3, 8, 4, 4)])
def test_other_batches_and_sizes_are_computed_too(size: tuple[int, ...]) -> None:
    graph = g.trace(randomise(Pooled(), 0))
    packed, (record,) = run_passes(graph, [PASS], [feature_map()])
    assert record.rewrites == 1
    other = images(*size, seed=2, dtype=torch.float64)
    torch.testing.assert_close(g.execute(packed, other), g.execute(graph, other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", [nn.Linear(10, 4), nn.Conv2d(8, 8, 1)])
def test_nothing_to_pack(model: nn.Module) -> None:
    check_pass(randomise(model, 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


class OneBias(Maps):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Conv2d(8, 8, 1)


class TwoMemories(Maps):
    def values(self, memory: Tensor) -> Tensor:
        return super().values(memory.flip(-1))


class KeysTapped(Maps):
    def values(self, memory: Tensor) -> Tensor:
        return super().values(memory) + self.keys(memory).mean()


class MapTapped(Maps):
    def keys(self, memory: Tensor) -> Tensor:
        made: Tensor = self.k(memory)
        return self.heads(made) * made.sum()


class Shared(Maps):
    """One convolution makes keys and values."""

    def forward(self, x: Tensor) -> object:
        k = self.keys(x)
        weights = (self.heads(self.q(x)).transpose(-2, -1) @ k).softmax(dim=-1)
        return self.proj((k @ weights.transpose(-2, -1)).reshape(x.shape))


class CalledTwice(Maps):
    def values(self, memory: Tensor) -> Tensor:
        return self.keys(memory)


class Wide(Maps):
    """A convolution that looks at more than one position."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Conv2d(8, 8, 3, padding=1, bias=False)


class Strided(Maps):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Conv2d(8, 8, 1, stride=2, bias=False) for _ in range(2))


class Interleaved(Maps):
    """Channel i·h + n is head n's i-th, in keys and queries."""

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 4, 2, -1).transpose(1, 2)


class Turned(Maps):
    """Positions in another order: rows and columns swapped, in keys and values alike."""

    def keys(self, memory: Tensor) -> Tensor:
        return self.heads(self.k(memory).transpose(2, 3))

    def values(self, memory: Tensor) -> Tensor:
        return self.heads(self.v(memory).transpose(2, 3))


class WiderValues(Maps):
    """Heads of four keys and of eight values."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.proj = nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> object:
        weights = (self.heads(self.q(x)).transpose(-2, -1) @ self.keys(x)).softmax(dim=-1)
        v = self.v(x).reshape(x.shape[0], 2, 8, -1)
        return self.proj((v @ weights.transpose(-2, -1)).reshape(x.shape[0], 16, x.shape[2], x.shape[3]))


class NoValues(Maps):
    def forward(self, x: Tensor) -> object:
        return (self.heads(self.q(x)).transpose(-2, -1) @ self.keys(x)).softmax(dim=-1)


class Scaled(Maps):
    def forward(self, x: Tensor) -> object:
        k, v = self.keys(x), self.values(x)
        weights = ((self.heads(self.q(x)).transpose(-2, -1) @ k) * 0.5).softmax(dim=-1)
        return self.proj((v @ weights.transpose(-2, -1)).reshape(x.shape))


NOT_TWO = "keys and values are not two 1x1 convolutions that nothing else reads"
NOT_BETWEEN = "the softmax is not between two matrix products"
LAYOUT = "its heads are not laid out as (B, h, d, N)"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OneBias, "only one of keys and values has a bias"),
        (TwoMemories, "keys and values read different maps"),
        (CalledTwice, "one of its weights is used elsewhere"),
        (WiderValues, "keys and values have heads of different sizes"),
        (Interleaved, LAYOUT),
        (Turned, LAYOUT),
        (KeysTapped, NOT_TWO),
        (MapTapped, NOT_TWO),
        (Shared, NOT_TWO),
        (Wide, NOT_TWO),
        (Strided, NOT_TWO),
        (NoValues, NOT_BETWEEN),
        (Scaled, NOT_BETWEEN),
    ],
)
def test_refuses(kind: type[Maps], reason: str) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
@pytest.mark.parametrize("size", [(64, 64), (75, 97)])
def test_on_the_model(model: nn.Module, size: tuple[int, int]) -> None:
    inputs = images(2, 3, *size, seed=1).double()
    check_pass(model, BEFORE, PASS, rewrites=3, nodes=-3, inputs=inputs)


def test_without_channel_first_attention_there_are_no_maps() -> None:
    inputs = images(2, 3, 64, 64, seed=1).double()
    check_pass(nano(), (), PASS, rewrites=0, nodes=0, inputs=inputs, refused=[NOT_TWO] * 3)


@pytest.mark.parametrize(("model", "count"), [("own head", 3), ("backbone", 3), ("small", 4), ("timm", 4)])
def test_counts(model: str, count: int) -> None:
    inputs = pixels(2, 3, 64, 64, seed=1)
    graph, records = run_passes(g.trace(make(model)), NEURAL_ENGINE, [inputs])
    assert all(record.certified for record in records)
    assert (records[PLACE].rewrites, records[PLACE].refused) == (count, ())
    _, again = run_passes(graph, NEURAL_ENGINE, [inputs])
    assert {record.name: record.rewrites for record in again if record.rewrites} == {}


STACK, PACK = pack_key_value_maps._stack, pack_key_value_maps._pack


def swap_filters(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pack_key_value_maps, "_stack", lambda key, value: STACK(value, key))


def swap_halves(patch: pytest.MonkeyPatch) -> None:
    def pack(graph: fx.GraphModule, maps: pack_key_value_maps._Maps) -> None:
        PACK(graph, pack_key_value_maps._Maps(maps.key, maps.value, maps.values, maps.keys))

    patch.setattr(pack_key_value_maps, "_pack", pack)


def split_at(rows: Callable[[int], int]) -> Plant:
    """The stacked filters rolled, so that the split takes other rows than it should."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def stack(key: algebra.Linear, value: algebra.Linear) -> algebra.Linear:
            packed = STACK(key, value)  # type: ignore[arg-type]  # convolutions, as the pass hands them on
            return algebra.with_weights(packed, packed.weight.roll(rows(len(key.weight)), 0), packed.bias)

        patch.setattr(pack_key_value_maps, "_stack", stack)

    return plant


def values_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pack_key_value_maps, "_stack", lambda _, value: STACK(value, value))


def lose_biases(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(algebra, "has_bias", lambda _: False)


@pytest.mark.parametrize(
    "plant", [swap_filters, swap_halves, split_at(lambda n: n // 2), split_at(lambda _: 1), values_twice]
)
@pytest.mark.parametrize("model", ["nano", "small"])
def test_a_wrong_pack_is_caught(model: str, plant: Plant) -> None:
    inputs = pixels(2, 3, 64, 64, seed=1)
    graph, _ = run_passes(g.trace(make(model)), BEFORE, [inputs])
    assert assert_undone(graph, PASS, inputs, g.execute(graph, inputs), plant) > 1e-4


def test_lost_biases_are_caught() -> None:
    inputs, graph = feature_map(), g.trace(randomise(Maps(bias=True), 0))
    assert assert_undone(graph, PASS, inputs, g.execute(graph, inputs), lose_biases) > 1e-4
