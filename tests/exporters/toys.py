"""Small models for near matches: each differs in one thing from what a pass rewrites."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.harness import images, randomise

MAP = (2, 8, 6, 10)


def feature_map(seed: int = 1) -> Tensor:
    """A random map of (2, 8, 6, 10) in float64."""
    return images(*MAP, seed=seed, dtype=torch.float64)


class Wired(nn.Module):
    """Named layers and the function that connects them: ``wiring(layers, x)``."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, wiring: Wiring, **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.wiring(self, x)


Wiring = Callable[[Wired, Tensor], object]


def wired(wiring: Wiring, **layers: nn.Module) -> Wired:
    """The model with random numbers in it, in eval mode."""
    return randomise(Wired(wiring, **layers), seed=0)


class Attend(nn.Module):
    """Self-attention over a map of (B, 8, H, W) with two heads; subclasses change one step."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def memory(self, tokens: Tensor) -> Tensor:
        return tokens

    def heads(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(tokens.shape[0], -1, 2, 4).transpose(1, 2)

    def queries(self, tokens: Tensor) -> Tensor:
        return self.heads(self.q(tokens))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * 0.5) @ k.transpose(-2, -1)

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        return (weights @ v).transpose(1, 2).flatten(2)

    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        memory = self.memory(tokens)
        k, v = self.heads(self.k(memory)), self.heads(self.v(memory))
        weights = self.scores(self.queries(tokens), k).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, v)), x)


class Unscaled(Attend):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1)


class Pooled(Unscaled):
    """Keys and values from averaged tokens, as in E-MHSA."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(4, 4)

    def memory(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.pool(tokens.transpose(1, 2)).transpose(1, 2)
        return out


class Permuted(Attend):
    """Keys permuted in one step and the product scaled, as in the official code."""

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        k = self.k(tokens).reshape(x.shape[0], -1, 2, 4).permute(0, 2, 3, 1)
        weights = ((self.queries(tokens) @ k) * 0.5).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x)


class PositionBias(Attend):
    """Something is added to the scores, so keys' biases and scales do not commute with what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Linear(8, 60)

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        bias = self.position(tokens).unsqueeze(1)
        weights = (self.scores(self.queries(tokens), self.heads(self.k(tokens))) + bias).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x)


class Tapped(Attend):
    """The attention map itself is an output too."""

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        weights = self.scores(self.queries(tokens), self.heads(self.k(tokens))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x), weights


class KeysTapped(Attend):
    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        k = self.heads(self.k(tokens))
        weights = self.scores(self.queries(tokens), k).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x), k


class ValuesTapped(Attend):
    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        v = self.heads(self.v(tokens))
        weights = self.scores(self.queries(tokens), self.heads(self.k(tokens))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, v)), x), v


class QueriesTapped(Attend):
    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        q = self.queries(tokens)
        weights = self.scores(q, self.heads(self.k(tokens))).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x), q


class SharedKeyValue(Attend):
    """One linear map makes keys and values."""

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        k = self.heads(self.k(tokens))
        weights = self.scores(self.queries(tokens), k).softmax(dim=-1)
        return self.result(self.proj(self.mix(weights, k)), x)


class ProjectedTwice(Attend):
    """The output projection is used once more behind itself."""

    def result(self, tokens: Tensor, x: Tensor) -> Tensor:
        return super().result(self.proj(tokens), x)


class OverQueries(Attend):
    """A softmax over the wrong axis: its rows do not sum to one."""

    def forward(self, x: Tensor) -> object:
        tokens = self.tokens(x)
        weights = self.scores(self.queries(tokens), self.heads(self.k(tokens))).softmax(dim=-2)
        return self.result(self.proj(self.mix(weights, self.heads(self.v(tokens)))), x)


class HeadsMixed(Attend):
    """The product returns to tokens without undoing the heads' transpose: channels and positions are mixed."""

    def mix(self, weights: Tensor, v: Tensor) -> Tensor:
        mixed = weights @ v
        return mixed.reshape(mixed.shape[0], -1, 8)


ATTENTION_REFUSALS: tuple[tuple[type[Attend], str], ...] = (
    (PositionBias, "the softmax's input is not a matrix product"),
    (Tapped, "the softmax does not weigh values by a matrix product"),
    (KeysTapped, "q, k and v are not three linear maps of tokens"),
    (ValuesTapped, "q, k and v are not three linear maps of tokens"),
    (QueriesTapped, "q, k and v are not three linear maps of tokens"),
    (SharedKeyValue, "q, k and v are not three linear maps of tokens"),
    (ProjectedTwice, "one of its weights is used elsewhere"),
    (OverQueries, "the softmax does not run over the last axis"),
    (HeadsMixed, "its heads are not laid out in the order of the channels"),
)
"""Attention that no attention pass may touch, and the reason it gives."""
