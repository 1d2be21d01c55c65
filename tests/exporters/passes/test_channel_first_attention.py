from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.passes.channel_first_attention import ChannelFirstAttention
from nextvit_exporters.passes.fold_attention_scale import FoldAttentionScale
from nextvit_exporters.passes.fold_pre_norm import FoldPreNorm
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import certified, check_pass, nano, official
from tests.exporters.toys import Attend, HeadsMixed, Permuted, Pooled, Unscaled, feature_map
from tests.harness import images, randomise

PASS = ChannelFirstAttention()
UNSCALED = (FoldAttentionScale(),)


class Context(Unscaled):
    """Queries from a map of its own, keys and values from another of other size and width."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> object:
        y = self.narrow(x)
        memory = self.tokens(x)
        weights = self.scores(self.queries(self.tokens(y)), self.heads(self.k(memory))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(memory)))), y)


class Processed(Unscaled):
    """Keys and values from tokens that are not a transposed map."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare = nn.Linear(8, 8)

    def memory(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.prepare(tokens)
        return out


class InARow(Unscaled):
    """Two attentions, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Unscaled()

    def forward(self, x: Tensor) -> object:
        return self.second(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "rewrites", "nodes"),
    [
        (Attend, 1, -7),
        (Permuted, 1, -6),
        (Unscaled, 1, -7),
        (Pooled, 1, -8),
        (Context, 1, -8),
        (Processed, 1, -4),
        (InARow, 2, -14),
    ],
)
def test_rewrites(kind: type[Attend], rewrites: int, nodes: int) -> None:
    checked = check_pass(randomise(kind(), 0), UNSCALED, PASS, rewrites=rewrites, nodes=nodes, inputs=feature_map())
    kept = [m for name, m in checked.graph.named_modules() if isinstance(m, nn.Linear) and name != "prepare"]
    assert kept == []


def test_without_biases() -> None:
    model = randomise(Attend(bias=False), 0)
    checked = check_pass(model, UNSCALED, PASS, rewrites=1, nodes=-7, inputs=feature_map())
    assert sorted(n for n, _ in checked.graph.named_parameters() if n.endswith("bias")) == ["proj.bias"]


def test_nothing_to_rewrite() -> None:
    model = randomise(nn.Conv2d(8, 4, 1), 0)
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map())


class OneHead(Unscaled):
    def heads(self, tokens: Tensor) -> Tensor:
        return tokens

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights @ v


class Merged(Unscaled):
    """Heads folded into the batch, for bmm."""

    def heads(self, tokens: Tensor) -> Tensor:
        return super().heads(tokens).flatten(0, 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.bmm(q, k.transpose(1, 2))

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        mixed = torch.bmm(weights, v)
        return mixed.view(-1, 2, mixed.shape[1], 4).transpose(1, 2).flatten(2)


class HeadsOutside(Unscaled):
    """(h, B, N, d): with a batch of two and two heads, only the labels tell the axes apart."""

    def heads(self, tokens: Tensor) -> Tensor:
        return super().heads(tokens).transpose(0, 1)

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        return (weights @ v).permute(1, 2, 0, 3).flatten(2)


class Interleaved(Unscaled):
    """Queries and keys count (d, h) where values count (h, d)."""

    def queries(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.q(tokens).reshape(tokens.shape[0], -1, 4, 2).permute(0, 3, 1, 2)
        return out

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        k = self.k(tokens).reshape(x.shape[0], -1, 4, 2).permute(0, 3, 2, 1)
        weights = (self.queries(tokens) @ k).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x)


class StaysTokens(Unscaled):
    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens * x.mean()


class OtherShape(Unscaled):
    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(x.shape[0], 8, x.shape[3], x.shape[2])


class ReadTwice(Unscaled):
    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return super().result(tokens, x) * tokens.mean()


class NotAMap(Unscaled):
    def tokens(self, x: Tensor) -> Tensor:
        return x[:, :, 0].transpose(1, 2)

    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unsqueeze(2) + x[:, :, :1]


class TwoMemories(Unscaled):
    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        weights = self.scores(self.queries(tokens), self.heads(self.k(tokens))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens.flip(1))))), x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Attend, "its scale is not folded yet"),
        (OneHead, "its heads are not laid out as (B, h, N, d)"),
        (Merged, "its heads are not laid out as (B, h, N, d)"),
        (HeadsOutside, "its heads are not laid out as (B, h, N, d)"),
        (Interleaved, "its heads are not laid out as (B, h, N, d)"),
        (StaysTokens, "its result is not returned to a map of the same shape"),
        (OtherShape, "its result is not returned to a map of the same shape"),
        (ReadTwice, "its result is not returned to a map of the same shape"),
        (NotAMap, "its tokens are not a flattened map"),
        (TwoMemories, "keys and values read different tokens"),
        (HeadsMixed, "its heads are not laid out in the order of the channels"),
    ],
)
def test_refuses(kind: type[Attend], reason: str) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


@pytest.mark.parametrize(("model", "nodes"), [(nano(), -5), (official(), -14)], ids=["ours", "official"])
@pytest.mark.parametrize("size", [(64, 64), (75, 97)])
def test_on_the_model(model: nn.Module, nodes: int, size: tuple[int, int]) -> None:
    inputs, before = images(2, 3, *size, seed=1).double(), (StripTrainOnly(), FoldPreNorm(), *UNSCALED)
    check_pass(model, before, PASS, rewrites=3, nodes=nodes, inputs=inputs)


def test_a_norm_behind_the_token_average_may_stay() -> None:
    inputs, before = images(2, 3, 64, 64, seed=1).double(), (StripTrainOnly(), *UNSCALED)
    check_pass(nano(), before, PASS, rewrites=3, nodes=-1, inputs=inputs)


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 3), ("official", 3), ("own head", 3), ("conv head", 3), ("backbone", 3), ("small", 4), ("timm", 4)],
)
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("channel-first-attention") == (count, ())
