"""The BatchNorms that stand directly in front of a linear map, and whether someone has folded them already.

Such a norm can be folded into the map behind it::

    y = x·s + t          s = gamma / sqrt(var + eps), t = beta - mean·s
    z = W·y + b       =  (W·s)·x + (b + W·t)

timm's ``reparameterize`` does so and takes the norm out: its tensors are missing. The official ``merge_bn`` does so
and leaves the norm's tensors in place: only the weights themselves can tell, and a model that applies these norms
once more computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Final

from torch import Tensor

from nextvit_models.config import NextViTConfig

_EPS: Final = 1e-5
_NO_SPREAD: Final = 1e-9


@dataclass(frozen=True, slots=True)
class FoldableMap:
    """A linear map (module name) and the norms in front of it (module names, in the order they apply)."""

    norms: tuple[str, ...]
    map: str


def foldable_maps(config: NextViTConfig) -> Iterator[FoldableMap]:
    """Every linear map of the model with the norms that can be folded into it, in the order of the blocks."""
    index = 0
    for stage, sr_ratio in zip(config.stages, config.sr_ratios, strict=True):
        for block in stage:
            prefix = f"features.{index}."
            index += 1
            if block.kind == "ncb":
                yield FoldableMap((f"{prefix}norm",), f"{prefix}mlp.conv1")
                continue
            tokens = (f"{prefix}norm1", f"{prefix}e_mhsa.norm") if sr_ratio > 1 else (f"{prefix}norm1",)
            yield FoldableMap((f"{prefix}norm1",), f"{prefix}e_mhsa.q")
            yield FoldableMap(tokens, f"{prefix}e_mhsa.k")
            yield FoldableMap(tokens, f"{prefix}e_mhsa.v")
            yield FoldableMap((f"{prefix}norm2",), f"{prefix}mlp.conv1")


def foldable_norms(config: NextViTConfig) -> tuple[str, ...]:
    """The norms of ``foldable_maps``, each once: those that timm's ``reparameterize`` takes out."""
    return tuple(dict.fromkeys(norm for foldable in foldable_maps(config) for norm in foldable.norms))


@dataclass(frozen=True, slots=True)
class FoldEvidence:
    """How the columns of the maps follow the scales of the norms in front of them.

    Folding multiplies column c of W by s_c, and so adds log|s_c| to log|W_c|. ``slope`` and ``correlation`` are
    those of log|W_c| over log|s_c|, channel by channel, pooled over all maps after each one's means are taken out:
    the slope grows by exactly 1 when the norms are folded.

    Measured (slope, correlation): random weights (0.00, 0.03), the demo's trained ones (0.26, 0.23); after folding
    in place (1.00, 0.99) and (1.26, 0.75).
    """

    slope: float
    correlation: float

    @property
    def suspect(self) -> bool:
        """Whether the norms seem to have been folded already; the bounds lie midway between the demo's figures."""
        return self.slope > 0.75 and self.correlation > 0.5


def fold_evidence(tensors: Mapping[str, Tensor], config: NextViTConfig) -> FoldEvidence:
    """Look for norms folded in place; ``tensors`` holds the float tensors by official name, norms included."""
    covariance = scales = columns = 0.0
    for foldable in foldable_maps(config):
        x, y = _logs(tensors, foldable)
        covariance += float(x @ y)
        scales += float(x @ x)
        columns += float(y @ y)
    if min(scales, columns) < _NO_SPREAD:  # all channels are scaled alike: folding leaves no trace
        return FoldEvidence(0.0, 0.0)
    return FoldEvidence(covariance / scales, covariance / (scales * columns) ** 0.5)


def _logs(tensors: Mapping[str, Tensor], foldable: FoldableMap) -> tuple[Tensor, Tensor]:
    """log|s_c| and log|W_c| of one map, (C,) float64, without their means and without dead channels."""
    scale = reduce(mul, (_scale(tensors, norm) for norm in foldable.norms)).abs()
    column = tensors[f"{foldable.map}.weight"].double().flatten(1).norm(dim=0)
    alive = (scale > 0) & (column > 0)
    x, y = scale[alive].log(), column[alive].log()
    return (x - x.mean(), y - y.mean()) if alive.any() else (x, y)


def _scale(tensors: Mapping[str, Tensor], norm: str) -> Tensor:
    variance = tensors[f"{norm}.running_var"].double()
    return tensors[f"{norm}.weight"].double() / (variance + _EPS).sqrt()
