"""How a pass is tested, and the models that passes are counted on.

``check_pass`` holds a pass to everything every pass promises; ``certified`` runs a target's whole list once per model
and keeps the table, so that each pass's test can look up its own line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import timm
import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.base import Pass, PassRecord, relative_error, run_passes
from nextvit_exporters.passes.normalize_input import NormalizeInput
from nextvit_exporters.passes.pack_key_value import PackKeyValue
from nextvit_exporters.passes.sets import ONNX_RUNTIME
from nextvit_models.blocks import EMHSA, NTB
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT, NextViTBackbone
from nextvit_models.preprocessing import Preprocessing
from tests.harness import images, randomise

MEAN: Final = Preprocessing().mean
STD: Final = Preprocessing().std
BOUND: Final = 1e-12
RAW: Final = NormalizeInput(MEAN, STD, uint8=False)


def pixels(*shape: int, seed: int) -> Tensor:
    """Whole pixels from 0 to 255, normalised: (B, 3, H, W) float64; images differ from each other."""
    raw = (images(*shape, seed=seed, dtype=torch.float64) * 50.0 + 120.0).round().clamp(0.0, 255.0)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (raw / 255.0 - mean) / std


@dataclass(frozen=True, slots=True)
class Checked:
    """A rewritten graph and its line in the certified table."""

    graph: fx.GraphModule
    record: PassRecord


def check_pass(
    model: nn.Module,
    before: Sequence[Pass],
    each: Pass,
    *,
    rewrites: int,
    nodes: int,
    inputs: Tensor,
    refused: Sequence[str] = (),
) -> Checked:
    """Apply ``each`` behind ``before`` and hold it to what every pass promises.

    ``rewrites`` is the exact count, ``nodes`` the operations added (negative: removed), ``inputs`` a float64 batch,
    ``refused`` the reasons of the refused matches, in order.
    """
    untraced = copy.deepcopy(model).double()
    expected = g.execute(untraced, inputs)
    weights = _snapshot(model)
    traced = g.trace(model)
    _assert_unchanged(model, weights, "tracing changed the model")
    prepared, table = run_passes(traced, before, [inputs])
    assert all(record.certified for record in table), table
    ready = inputs
    for record, earlier in zip(table, before, strict=True):
        ready = earlier.adapt(ready) if record.rewrites else ready

    held, code, answer = _snapshot(prepared), prepared.code, g.execute(prepared, ready)
    graph, (record,) = run_passes(prepared, [each], [ready])
    _assert_unchanged(prepared, held, "the pass changed the caller's graph")
    assert prepared.code == code
    assert all(map(torch.equal, g.execute(prepared, ready), answer))
    _assert_unchanged(model, weights, "the pass changed the model")

    assert record.certified, record
    assert (record.rewrites, [refusal.reason for refusal in record.refused]) == (rewrites, list(refused))
    assert all(refusal.where for refusal in record.refused)
    assert record.nodes[1] - record.nodes[0] == g.nodes(graph) - g.nodes(prepared) == nodes
    assert record.macs[1] <= record.macs[0]
    after = g.execute(graph, each.adapt(ready) if rewrites else ready)
    for got, then, first in zip(after, answer, expected, strict=True):
        assert (got.shape, got.dtype) == (then.shape, then.dtype) == (first.shape, torch.float64)
    assert relative_error(after, answer) <= BOUND
    assert relative_error(after, expected) <= BOUND
    _, (again,) = run_passes(graph, [each], [each.adapt(ready) if rewrites else ready])
    assert again.rewrites == 0
    return Checked(graph, record)


def _snapshot(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors}


def _assert_unchanged(module: nn.Module, before: dict[str, tuple[int, Tensor]], why: str) -> None:
    after = _snapshot(module)
    assert list(after) == list(before), why
    for name, (identity, tensor) in before.items():
        assert after[name][0] == identity, f"{why}: {name} is another tensor"
        assert after[name][1].dtype == tensor.dtype, f"{why}: dtype of {name}"
        assert torch.equal(after[name][1], tensor), f"{why}: numbers of {name}"


class OfficialAttention(nn.Module):
    """An E-MHSA's layers, wired as in the official code: keys permuted, and the product scaled instead of q."""

    def __init__(self, of: EMHSA) -> None:
        super().__init__()
        self.heads, self.dim, self.scale, self.ratio = of.heads, of.head_dim, of.scale, of.sr_ratio
        self.q, self.k, self.v, self.proj, self.drop = of.q, of.k, of.v, of.proj, of.proj_drop
        if self.ratio > 1:
            self.sr, self.norm = of.sr, of.norm

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q = self.q(x).reshape(batch, count, self.heads, self.dim).permute(0, 2, 1, 3)
        memory = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2) if self.ratio > 1 else x
        k = self.k(memory).reshape(batch, -1, self.heads, self.dim).permute(0, 2, 3, 1)
        v = self.v(memory).reshape(batch, -1, self.heads, self.dim).permute(0, 2, 1, 3)
        weights = ((q @ k) * self.scale).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, count, width)
        out: Tensor = self.drop(self.proj(mixed))
        return out


class ConvHead(nn.Module):
    """Dense predictions from the last map: 3x3 convolution, BatchNorm, ReLU, 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = NextViTBackbone(VARIANTS["nextvit_nano"], extra_norms=True)
        self.squeeze = nn.Conv2d(160, 48, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.act = nn.ReLU()
        self.classify = nn.Conv2d(48, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classify(self.act(self.norm(self.squeeze(self.backbone(x)[-1]))))
        return out


def nano() -> NextViT:
    """nextvit_nano with ten classes, every number of it random."""
    return randomise(NextViT(VARIANTS["nextvit_nano"], 10), seed=0)


def official() -> NextViT:
    """The same network as ``nano``, its attention written as in the official code."""
    model = nano()
    for block in model.features:
        if isinstance(block, NTB):
            setattr(block, "e_mhsa", OfficialAttention(block.e_mhsa))  # noqa: B010 - of another type than declared
    return model.eval()


class FusedAttention(nn.Module):
    """An E-MHSA's layers around PyTorch's fused attention, as in timm."""

    def __init__(self, of: EMHSA) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        of = self.of
        memory = of.norm(of.sr(x.transpose(1, 2))).transpose(1, 2) if of.sr_ratio > 1 else x
        q, k, v = of._split_heads(of.q(x)), of._split_heads(of.k(memory)), of._split_heads(of.v(memory))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = of.proj(mixed.transpose(1, 2).flatten(2))
        return out


def fused() -> NextViT:
    """The same network as ``nano``, its attention fused."""
    model = nano()
    for block in model.features:
        if isinstance(block, NTB):
            setattr(block, "e_mhsa", FusedAttention(block.e_mhsa))  # noqa: B010 - of another type than declared
    return model.eval()


def own_head() -> NextViT:
    """nextvit_nano with a head of the user's own behind global pooling."""
    model = NextViT(VARIANTS["nextvit_nano"], 10)
    model.proj_head = nn.Sequential(nn.Linear(160, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 7))
    return randomise(model, seed=0)


def backbone(*, extra_norms: bool) -> NextViTBackbone:
    """The four-scale nano backbone."""
    return randomise(NextViTBackbone(VARIANTS["nextvit_nano"], extra_norms=extra_norms), seed=0)


def _small() -> nn.Module:
    return randomise(NextViT(VARIANTS["nextvit_small"], 100), seed=0)


def _timm_small() -> nn.Module:
    model: nn.Module = timm.create_model("nextvit_small", num_classes=100)
    return randomise(model, seed=0)


_MAKERS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "nano": nano,
    "official": official,
    "own head": own_head,
    "conv head": lambda: randomise(ConvHead(), seed=0),
    "backbone": lambda: backbone(extra_norms=False),
    "backbone with norms": lambda: backbone(extra_norms=True),
    "small": _small,
    "timm": _timm_small,
}
MODELS: Final = tuple(_MAKERS)


def make(name: str) -> nn.Module:
    """One of ``MODELS``, or the nano with fused attention, afresh."""
    return fused() if name == "fused" else _MAKERS[name]()


@dataclass(frozen=True, slots=True, eq=False)
class Certified:
    """One model after all passes of the ONNX target, raw-pixel input, and packed keys and values by themselves."""

    graph: fx.GraphModule
    records: tuple[PassRecord, ...]
    packed: PassRecord
    inputs: Tensor
    """Whole pixels as float64, what ``graph`` reads."""
    expected: tuple[Tensor, ...]
    """What the untraced float64 model says of the same pixels, normalised."""

    def record(self, name: str) -> PassRecord:
        """The line of one pass."""
        lines = {record.name: record for record in (*self.records, self.packed)}
        return lines[name]

    def counts(self, name: str) -> tuple[int, tuple[str, ...]]:
        """Rewrites of one pass, and the places it refused."""
        record = self.record(name)
        return record.rewrites, tuple(refusal.where for refusal in record.refused)


@cache
def certified(name: str) -> Certified:
    """Certify every pass on one of ``MODELS`` at 64 pixels; once per process."""
    model = make(name)
    inputs = pixels(2, 3, 64, 64, seed=1)
    traced = g.trace(model)
    graph, records = run_passes(traced, (*ONNX_RUNTIME, RAW), [inputs])
    _, (packed,) = run_passes(traced, [PackKeyValue()], [inputs])
    expected = g.execute(model.double(), inputs)
    return Certified(graph, records, packed, RAW.adapt(inputs), expected)
