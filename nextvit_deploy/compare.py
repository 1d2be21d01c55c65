"""How far two sets of outputs are from each other, and whether that is close enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.base import Arrays
from nextvit_exporters.spec import Tolerance

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output against its reference, over all images; true when it is within its tolerance.

    ``max_abs`` is in units of the output, ``relative_max`` and ``relative_rms`` are divided by the reference's largest
    magnitude and root mean square; ``cosine`` is the worst image's, ``sqnr_db`` the signal-to-noise ratio in
    decibel. For classifiers, ``top1`` and ``top5`` are the share of images with the same first class and the mean
    overlap of the first five; ``margin`` is the worst 2·max|difference| over the gap between the first two
    classes: below 1 no decision can flip, and ``can_flip`` counts the images at 1 or above.
    """

    output: str
    count: int
    finite: bool
    max_abs: float
    relative_max: float
    relative_rms: float
    cosine: float
    sqnr_db: float
    top1: float | None
    top5: float | None
    margin: float | None
    can_flip: int | None
    tolerance: Tolerance

    def __bool__(self) -> bool:
        return self.finite and self.relative_rms <= self.tolerance.relative_rms

    def __str__(self) -> str:
        if not self.finite:
            return f"FAIL {self.output}: NaN or Inf in the output"
        word, sign = ("ok", "<=") if self else ("FAIL", ">")
        text = (
            f"{word} {self.output}: relative rms {self.relative_rms:.1e} {sign} {self.tolerance.relative_rms:.0e}, "
            f"max|d| {self.max_abs:.1e}, {self.sqnr_db:.0f} dB"
        )
        if self.can_flip is not None:
            text += f", can flip {self.can_flip} of {self.count} decisions"
        return text


def compare(actual: Arrays, expected: Arrays, tolerance: Tolerance) -> tuple[Comparison, ...]:
    """Compare outputs by name, (N, ...) each.

    Raises VerificationFailed when names or shapes differ, or there is nothing to compare: no output, no image, or a
    reference of zeros, which a dead network matches.
    """
    if set(actual) != set(expected) or not expected:
        msg = f"outputs differ: {sorted(actual)} against {sorted(expected)}; nothing can be compared"
        raise VerificationFailed(msg)
    return tuple(_compare(name, actual, expected, tolerance) for name in expected)


def _compare(name: str, actual: Arrays, expected: Arrays, tolerance: Tolerance) -> Comparison:
    if actual[name].shape != expected[name].shape:
        msg = f"output '{name}' has shape {actual[name].shape}, PyTorch's has {expected[name].shape}"
        raise VerificationFailed(msg)
    if not expected[name].any():  # so too when it holds no images
        msg = f"PyTorch's output '{name}' is nothing but zeros; matching it shows nothing"
        raise VerificationFailed(msg)
    got = np.asarray(actual[name], np.float64).reshape(len(actual[name]), -1)
    want = np.asarray(expected[name], np.float64).reshape(got.shape)
    finite = bool(np.isfinite(got).all() and np.isfinite(want).all())
    if not finite:
        return _incomparable(name, len(got), tolerance)
    error = np.abs(got - want)
    relative = _rms(error) / _rms(want)
    decisions = _decisions(got, want, error) if actual[name].ndim == 2 and got.shape[1] > 1 else {}
    return Comparison(
        output=name,
        count=len(got),
        finite=True,
        max_abs=float(error.max()),
        relative_max=float(error.max() / np.abs(want).max()),
        relative_rms=relative,
        cosine=_worst_cosine(got, want),
        sqnr_db=float("inf") if relative == 0.0 else float(-20.0 * np.log10(relative)),
        top1=decisions.get("top1"),
        top5=decisions.get("top5"),
        margin=decisions.get("margin"),
        can_flip=int(decisions["can_flip"]) if decisions else None,
        tolerance=tolerance,
    )


def _incomparable(name: str, count: int, tolerance: Tolerance) -> Comparison:
    """NaN or Inf on either side: as far apart as can be."""
    inf = float("inf")
    return Comparison(
        output=name,
        count=count,
        finite=False,
        max_abs=inf,
        relative_max=inf,
        relative_rms=inf,
        cosine=-1.0,
        sqnr_db=-inf,
        top1=None,
        top5=None,
        margin=None,
        can_flip=None,
        tolerance=tolerance,
    )


def _decisions(got: Float, want: Float, error: Float) -> Mapping[str, float]:
    """What the differences do to a classifier's decisions; logits are (N, classes)."""
    first = min(5, want.shape[1])
    best_got, best_want = (np.argsort(-values, axis=1, kind="stable")[:, :first] for values in (got, want))
    overlap = [len(set(a) & set(b)) / first for a, b in zip(best_got, best_want, strict=True)]
    ordered = np.sort(want, axis=1)
    gap = ordered[:, -1] - ordered[:, -2]
    swing = 2.0 * error.max(axis=1)
    margin = np.divide(swing, gap, out=np.full_like(swing, np.inf), where=gap > 0)
    return {
        "top1": float((best_got[:, 0] == best_want[:, 0]).mean()),
        "top5": float(np.mean(overlap)),
        "margin": float(margin.max()),
        "can_flip": float((margin >= 1.0).sum()),
    }


def _rms(values: Float) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _worst_cosine(got: Float, want: Float) -> float:
    """Over images; where one side is all zeros 0, where both are 1."""
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(want, axis=1)
    products = (got * want).sum(axis=1)
    cosines = np.divide(products, lengths, out=(got == want).all(axis=1).astype(np.float64), where=lengths > 0)
    return float(cosines.min())
