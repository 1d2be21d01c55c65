"""Networks that compute what they did, with channels of very different sizes: what plain INT8 can't hold.

The channels between two linear maps are multiplied by powers of two drawn at random, and what reads them is divided by
the same: exact in floating point, short of overflow. ``scramble`` does it to a graph behind the passes,
``scramble_model`` to a trained network with its norms, so that a checkpoint can be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes.equalize_channels import find_pairs, rescale
from nextvit_models.blocks import MHCA, ConvBNReLU, Mlp
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from nextvit_models.nextvit import NextViT

Maker = nn.BatchNorm2d | nn.Conv2d


def scramble(graph: fx.GraphModule, strength: float, seed: int) -> fx.GraphModule:
    """A copy of a measured graph without norms, each channel between two maps times 2^N(0, strength)."""
    generator = torch.Generator().manual_seed(seed)
    result = g.clone(graph)
    pairs, _ = find_pairs(result)
    for pair in pairs:
        channels = g.module_as(result, pair.source, nn.Module).weight
        assert isinstance(channels, Tensor)
        rescale(result, pair, 1.0 / _factors(len(channels), strength, generator))
    g.finish(result)
    return result


@torch.no_grad()
def scramble_model(model: NextViT, strength: float, seed: int) -> NextViT:
    """The same for a network with its norms, in place: the maps on both sides of every ReLU."""
    generator = torch.Generator().manual_seed(seed)
    for maker, reader in _around_relus(model):
        factors = _factors(maker.weight.shape[0], strength, generator).to(maker.weight.dtype)
        maker.weight.mul_(factors.view(-1, *(1,) * (maker.weight.dim() - 1)))
        assert maker.bias is not None
        maker.bias.mul_(factors)
        reader.weight.div_(factors.view(1, -1, 1, 1))
    return model


def scrambled_checkpoint(path: Path, strength: float, seed: int) -> Path:
    """The demo's checkpoint, scrambled, as a file of the same format."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    save_safetensors(replace(checkpoint, model=scramble_model(checkpoint.model, strength, seed)), path)
    return path


def _factors(channels: int, strength: float, generator: torch.Generator) -> Tensor:
    """Rounded to whole exponents, so that no digit is lost in any type."""
    exponents = strength * torch.randn(channels, generator=generator, dtype=torch.float64)
    return 2.0 ** exponents.round()


def _around_relus(model: NextViT) -> Iterator[tuple[Maker, nn.Conv2d]]:
    """What scales a channel last before a ReLU, and the ungrouped convolution that alone reads it behind."""
    stem = [layer for layer in model.stem if isinstance(layer, ConvBNReLU)]
    for layer, following in pairwise(stem):
        yield layer.norm, following.conv
    for module in model.modules():
        if isinstance(module, MHCA):
            yield module.norm, module.projection
        elif isinstance(module, Mlp):
            yield module.conv1, module.conv2
