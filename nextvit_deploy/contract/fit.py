"""Which gain and offset, by channel, bring a tensor closest to a picture, and how far apart the two are."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_deploy.contract.cuts import Cut
from nextvit_deploy.contract.steps import Values

Mask = NDArray[np.bool_]

_OVERSHOOT: Final = 64
"""Steps by which a bicubic resize in floats may pass 0 and 255 where whole pixels are clipped."""
_FEWEST: Final = 16
"""Values of a channel that a line is put through."""
_FLAT: Final = 1e-24
_SPREAD: Final = 4.0
"""Standard deviation, in steps of a pixel, below which a channel doesn't tell its gain."""


def line(tensor: Values, cut: Cut) -> tuple[Values, Values]:
    """Gain and offset of each channel, by least squares: pixels are the tensor times the first, plus the second.

    Clipped pixels and padding are left out. A channel that is the same all over has gain 0.
    """
    used = cut.inside & (cut.pixels > 0) & (cut.pixels < 255)
    return _line(
        tensor, cut.pixels.astype(np.float64), np.where(used.sum((1, 2), keepdims=True) < _FEWEST, cut.inside, used)
    )


def line_unclipped(tensor: Values, floats: Values, cut: Cut) -> tuple[Values, Values]:
    """As ``line``, for a picture that was resized in floats."""
    return _line(tensor, floats, np.broadcast_to(cut.inside, floats.shape))


def _line(tensor: Values, target: Values, used: Mask) -> tuple[Values, Values]:
    gain, offset = np.zeros(3), np.zeros(3)
    for channel, mask in enumerate(used):
        value, pixel = tensor[channel][mask], target[channel][mask]
        spread = value - value.mean()
        square = float((spread**2).sum())
        gain[channel] = float((spread * pixel).sum()) / square if square > _FLAT * value.size else 0.0
        offset[channel] = pixel.mean() - gain[channel] * value.mean()
    return gain, offset


def tells(cut: Cut) -> bool:
    """Whether each channel varies enough for its gain to be known."""
    return bool(cut.pixels[:, cut.inside].std(axis=1).min() >= _SPREAD)


def seen(tensor: Values, gain: Values, offset: Values) -> Values:
    """The pixels that a tensor was made from, if these are its gain and offset."""
    result: Values = tensor * gain[:, None, None] + offset[:, None, None]
    return result


def ends(tensor: Values) -> Values:
    """The smallest and the largest value of each channel, (2, 3)."""
    result: Values = np.stack([tensor.min(axis=(1, 2)), tensor.max(axis=(1, 2))])
    return result


def between(ends: Values, one: tuple[Values, Values], other: tuple[Values, Values]) -> float:
    """How many steps of a pixel two pairs of gain and offset are apart at most, over the values between the ends."""
    return float(np.abs(ends * (one[0] - other[0]) + one[1] - other[1]).max())


def apart(made_from: Values, cut: Cut) -> Values:
    """By how many steps of a pixel each value is off, (3, H, W); padding may have any one value."""
    near = (made_from >= -_OVERSHOOT) & (made_from <= 255 + _OVERSHOOT)
    result: Values = np.abs(np.where(near, np.clip(made_from, 0, 255), made_from) - cut.pixels)
    return _padded(result, made_from, cut)


def apart_unclipped(made_from: Values, floats: Values, cut: Cut) -> Values:
    """As ``apart``, for a picture that was resized in floats."""
    return _padded(np.abs(made_from - floats), made_from, cut)


def _padded(result: Values, made_from: Values, cut: Cut) -> Values:
    outside = ~cut.inside
    if outside.any():
        values = made_from[:, outside]
        result[:, outside] = np.abs(values - np.median(values, axis=1, keepdims=True))
    return result
