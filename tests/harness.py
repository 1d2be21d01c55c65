"""What several tests share: models whose every number matters, and inputs that are never zero.

A freshly built network hides mistakes: its BatchNorms are the identity (mean 0, variance 1, gamma 1, beta 0) and
its biases are zero, so a dropped norm or a lost bias changes nothing. ``randomise`` takes those hiding places away.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Deviation of a map's weights, times sqrt(fan in), by the end of its name (ours and timm's). A convolution in front
# of a ReLU keeps the variance through it (He); the last map of a residual branch is small so that activations stay
# of order one through sixty branches; query and key are large, since keys are averages that differ little, so that
# the softmax is neither flat nor one-hot: its weights differ by 10 % (nano) to 100 % (small) of their mean.
_GAINS = {
    "mhca.projection": 0.2,
    "mlp.conv2": 0.2,
    "mlp.fc2": 0.2,
    "e_mhsa.proj": 0.2,
    "e_mhsa.q": 2.5,
    "e_mhsa.k": 2.5,
    "patch_embed.conv": 0.8,
    "projection.conv": 0.8,
    "head.fc": 1.0,
    "proj_head.0": 1.0,
}
_HE = 2.0**0.5


def randomise(model: ModuleT, seed: int) -> ModuleT:
    """Fill every parameter and buffer of ``model`` with values that matter, in place, and set it to eval.

    BatchNorm: gamma in ±[0.5, 1.5], beta and running mean of deviation 0.2, running variance in [0.5, 2].
    Convolutions and linear maps: deviation of order 1 / sqrt(fan in), biases of deviation 0.2. Drawn in float64, so a
    float32 and a float64 model get the same numbers up to rounding. A module of another kind is a TypeError.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                _fill_norm(module, generator)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                _fill_map(module, _gain(name), generator)
            elif own:
                raise TypeError(f"{name}: do not know how to randomise a {type(module).__name__}")
    return model.eval()


def images(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Input of ``shape`` (B, C, H, W), of order one and the same in every dtype up to rounding.

    Every image has a tint, large shapes and grain of its own: grain alone is averaged away by the pooling, and
    all images would look the same to the head.
    """
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    tint = _normal((batch, channels, 1, 1), generator)
    coarse = nn.functional.interpolate(
        _normal((batch, channels, 5, 5), generator), (height, width), mode="bilinear", align_corners=False
    )
    return (tint + coarse + 0.5 * _normal(shape, generator)).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude expected; both computed in float64."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    difference = (actual.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


def _fill_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, generator: torch.Generator) -> None:
    shape = tuple(norm.weight.shape)
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        raise TypeError("a BatchNorm without running statistics cannot be randomised")
    sign = _uniform(shape, generator).sub(0.5).sign()
    norm.weight.copy_(sign * (0.5 + _uniform(shape, generator)))
    norm.bias.copy_(0.2 * _normal(shape, generator))
    norm.running_mean.copy_(0.2 * _normal(shape, generator))
    norm.running_var.copy_(0.5 + 1.5 * _uniform(shape, generator))
    norm.num_batches_tracked.fill_(1000)


def _gain(name: str) -> float:
    return next((gain for end, gain in _GAINS.items() if name.endswith(end)), _HE)


def _fill_map(layer: nn.Conv1d | nn.Conv2d | nn.Linear, gain: float, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    layer.weight.copy_(gain * fan_in**-0.5 * _normal(tuple(layer.weight.shape), generator))
    if layer.bias is not None:
        layer.bias.copy_(0.2 * _normal(tuple(layer.bias.shape), generator))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
