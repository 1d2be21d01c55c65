"""Take raw pixels: subtract the mean in the graph, fold the scale into the first convolution.

Before::

    y = conv(x, W, b)                    # x = (p / 255 - mean) / std, zero-padded

After::

    y = conv(p - 255 * mean, W / (255 * std), b)        # p: raw pixels, 0 to 255

The mean stays a subtraction on purpose. Folding it into the bias as well would be exact only without padding: at
the border the padded zeros would stand for black instead of the mean, and all logits move (by 14 % on a trained
model). Not applied unless every reader of the input is a convolution with zero padding or none.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_exporters.passes.dataflow import describe, reads_shape, replace_module

MEAN = "input_mean"


@dataclass(frozen=True, slots=True)
class NormalizeInput(Rewrite):
    """The model reads RGB pixels from 0 to 255, as uint8 or float; ``mean`` and ``std`` are in units of 1.

    With ``channels_last`` they come as (B, H, W, 3) and are transposed behind the subtraction: some builders refuse to
    transpose eight-bit numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    uint8: bool
    channels_last: bool = False
    name: str = "normalize-input"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        """Insert the subtraction and scale the first convolution."""
        image = next(n for n in graph.graph.nodes if n.op == "placeholder")
        convs = [user for user in image.users if not reads_shape(user)]
        if any(n.target == MEAN for n in graph.graph.nodes):
            return PassResult(0)
        if reason := _why_not(graph, convs, len(self.mean)):
            return PassResult(0, (Refusal(image.name, reason),))
        scale = 1.0 / (255.0 * torch.tensor(self.std, dtype=torch.float64))
        for node in convs:
            conv = g.module_as(graph, node, nn.Conv2d)
            weight = conv.weight.detach() * scale.view(1, -1, 1, 1)
            replace_module(graph, node, algebra.with_weights(conv, weight, conv.bias))
        self._subtract_mean(graph, image)
        return PassResult(1)

    def _subtract_mean(self, graph: fx.GraphModule, image: fx.Node) -> None:
        mean = 255.0 * torch.tensor(self.mean, dtype=torch.float64)
        graph.register_buffer(MEAN, mean.view(1, 1, 1, -1) if self.channels_last else mean.view(1, -1, 1, 1))
        with graph.graph.inserting_after(image):
            constant = graph.graph.get_attr(MEAN)
        with graph.graph.inserting_after(constant):
            centred = graph.graph.call_function(operator.sub, (image, constant))  # uint8 - float is float
        result = centred
        if self.channels_last:
            with graph.graph.inserting_after(centred):
                permuted = graph.graph.call_method("permute", (centred, 0, 3, 1, 2))
            with graph.graph.inserting_after(permuted):
                result = graph.graph.call_method("contiguous", (permuted,))  # strides would travel through the model
        image.replace_all_uses_with(result, delete_user_cb=lambda user: user is not centred)

    def adapt(self, inputs: Tensor) -> Tensor:
        """Normalised inputs as the pixels they came from; rounded to whole ones for uint8."""
        mean, std = (torch.tensor(v, dtype=inputs.dtype).view(1, -1, 1, 1) for v in (self.mean, self.std))
        pixels = 255.0 * (inputs * std + mean)
        pixels = pixels.permute(0, 2, 3, 1).contiguous() if self.channels_last else pixels
        return pixels.round().to(torch.uint8) if self.uint8 else pixels


def _why_not(graph: fx.GraphModule, readers: list[fx.Node], channels: int) -> str | None:
    for node in readers:
        conv = g.module_of(graph, node)
        if not isinstance(conv, nn.Conv2d):
            return f"{describe(node)} reads the input and is not a convolution"
        if conv.padding_mode != "zeros" or conv.groups != 1 or conv.in_channels != channels:
            return f"{describe(node)} is not an ungrouped convolution of {channels} channels with zero padding"
        if not g.calls_once(graph, node):
            return f"{describe(node)} is used, or its weight is shared, elsewhere"
    return None if readers else "nothing reads the input"
