from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nextvit_exporters.passes.decompose_attention import DecomposeAttention
from tests.exporters.passes_harness import certified, check_pass
from tests.exporters.toys import Attend, Permuted, feature_map, wired
from tests.harness import randomise

PASS = DecomposeAttention()


class Fused(Attend):
    """The product, softmax and product in one call, with the arguments given."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.args, self.kwargs = args, kwargs

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = functional.scaled_dot_product_attention(q, k, v, *self.args, **self.kwargs)  # type: ignore[arg-type]  # the test's own
        return out

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        mixed = self.attend(*(self.heads(part(tokens)) for part in (self.q, self.k, self.v)))
        return self.result(self.proj(mixed.transpose(1, 2).flatten(2)), x)


class Named(Fused):
    """The same with every argument named."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False, attn_mask=None)


class Nested(Fused):
    """The result of one attention is the query of the next."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(super().attend(q, k, v), k, v)


@pytest.mark.parametrize(
    ("model", "count"),
    [(Fused(), 1), (Fused(scale=0.3), 1), (Fused(None, 0.0, False), 1), (Named(), 1), (Nested(), 2)],  # noqa: FBT003 - torch's own order
    ids=["plain", "scale", "positional", "named", "nested"],
)
def test_writes_attention_out(model: nn.Module, count: int) -> None:
    checked = check_pass(randomise(model, 0), (), PASS, rewrites=count, nodes=4 * count, inputs=feature_map())
    assert "scaled_dot_product_attention" not in str(checked.graph.graph)


def test_one_tensor_may_be_query_key_and_value() -> None:
    model = wired(
        lambda m, x: m.conv(functional.scaled_dot_product_attention(x, value=x, key=x)), conv=nn.Conv2d(8, 4, 1)
    )
    checked = check_pass(model, (), PASS, rewrites=1, nodes=4, inputs=feature_map())
    assert checked.record.macs[0] == checked.record.macs[1] == 2 * 6 * 10 * (8 * (6 + 6) + 8 * 4)


@pytest.mark.parametrize("kind", [Attend, Permuted])
def test_nothing_to_write_out(kind: type[Attend]) -> None:
    check_pass(randomise(kind(), 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Fused(is_causal=True), "it uses is_causal"),
        (Fused(enable_gqa=True), "it uses enable_gqa"),
    ],
    ids=["causal", "grouped queries"],
)
def test_refuses_what_it_does_not_write_out(model: nn.Module, reason: str) -> None:
    check_pass(randomise(model, 0), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=[reason])


def test_refuses_a_mask() -> None:
    class Masked(Fused):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.tanh(q @ k.transpose(-2, -1)))

    model = randomise(Masked(), 0)
    check_pass(model, (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=["it uses attn_mask"])


@pytest.mark.parametrize(("model", "count"), [("nano", 0), ("official", 0), ("small", 0), ("timm", 4)])
def test_counts(model: str, count: int) -> None:
    assert certified(model).counts("decompose-attention") == (count, ())
