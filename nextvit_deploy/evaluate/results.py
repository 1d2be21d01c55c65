"""What is kept of each image, and the figures over all of them: a few numbers an image, whatever the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.base import Array

TOP: Final = 5
NOTHING: Final = -1
"""In place of a class: there are fewer than five, or the artefact answered NaN or infinity."""
ROW: Final = np.dtype(
    [
        ("artefact", "<i4", (TOP,)),
        ("pytorch", "<i4", (TOP,)),
        ("error", "<f8"),
        ("power", "<f8"),
        ("max_abs", "<f8"),
        ("gap", "<f8"),
    ]
)
"""One image: the first five classes of both, best first; the sums of squares of the logits' differences and of
PyTorch's logits; the largest difference; the gap between PyTorch's first two."""

Rows = NDArray[np.void]
"""(N,) of ``ROW``."""
Labels = NDArray[np.int64]
"""(N,) class of each image."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of the images, 0 to 1, whose class is the first, or among the first five."""

    top1: float
    top5: float


@dataclass(frozen=True, slots=True)
class Flip:
    """How many images PyTorch puts in one class and the artefact in another, and how many that made right or wrong.

    A class is ``NOTHING`` where the artefact gave no number. Without labels nothing is right or wrong.
    """

    pytorch: int
    artefact: int
    count: int
    made_right: int | None
    made_wrong: int | None


@dataclass(frozen=True, slots=True)
class Figures:
    """The artefact over ``count`` images.

    ``agreement`` is the share on which it names PyTorch's first class. ``relative_rms`` is the logits' root mean square
    difference over PyTorch's root mean square, ``sqnr_db`` the same as a ratio of powers in decibel, ``max_abs`` the
    largest difference of one logit. ``can_flip`` counts images whose margin is 1 or more, ``not_finite`` those with
    NaN or infinity.
    """

    count: int
    pytorch: Accuracy | None
    artefact: Accuracy | None
    agreement: float
    relative_rms: float
    sqnr_db: float
    max_abs: float
    can_flip: int
    not_finite: int
    flips: tuple[Flip, ...]

    @property
    def points(self) -> tuple[float, float] | None:
        """The artefact's top-1 and top-5 less PyTorch's, in percentage points; None without labels."""
        if self.pytorch is None or self.artefact is None:
            return None
        return 100 * (self.artefact.top1 - self.pytorch.top1), 100 * (self.artefact.top5 - self.pytorch.top5)

    @property
    def flipped(self) -> int:
        """Images whose first class is another than PyTorch's."""
        return sum(each.count for each in self.flips)


def rows_of(artefact: Array, pytorch: Array) -> Rows:
    """What to keep of logits (N, classes) each; raises VerificationFailed when they have other shapes."""
    if artefact.shape != pytorch.shape or artefact.ndim != 2:
        raise VerificationFailed(f"the artefact's output has shape {artefact.shape}, PyTorch's has {pytorch.shape}")
    got, want = artefact.astype(np.float64), pytorch.astype(np.float64)
    finite = np.asarray(np.isfinite(got).all(axis=1))
    difference = np.where(finite[:, None], got - want, np.inf)
    rows = np.zeros(len(want), ROW)
    rows["artefact"], rows["pytorch"] = _first(got), _first(want)
    rows["artefact"][~finite] = NOTHING
    rows["error"], rows["power"] = (difference**2).sum(axis=1), (want**2).sum(axis=1)
    rows["max_abs"] = np.abs(difference).max(axis=1)
    ordered = np.sort(want, axis=1)
    rows["gap"] = ordered[:, -1] - ordered[:, -2] if want.shape[1] > 1 else np.inf
    return rows


def margins(rows: Rows) -> NDArray[np.float64]:
    """Twice the largest difference over PyTorch's gap, (N,): below 1 the first class can't change."""
    swing: NDArray[np.float64] = 2.0 * rows["max_abs"]
    return _quotient(swing, rows["gap"])


def relative_errors(rows: Rows) -> NDArray[np.float64]:
    """Each image's root mean square difference over PyTorch's root mean square, (N,)."""
    return _quotient(np.sqrt(rows["error"]), np.sqrt(rows["power"]))


def worst(values: NDArray[np.float64], count: int) -> list[int]:
    """The numbers of the images with the largest values, largest first, of equal ones the earlier first."""
    return [int(index) for index in np.argsort(-values, kind="stable")[:count]]


def figures(rows: Rows, labels: Labels | None) -> Figures:
    """The figures over all images, of which there is at least one.

    Raises VerificationFailed when PyTorch's logits are nothing but zeros.
    """
    error, power = float(rows["error"].sum()), float(rows["power"].sum())
    if power == 0.0:
        raise VerificationFailed("PyTorch's output is nothing but zeros; matching it shows nothing")
    with np.errstate(divide="ignore"):
        sqnr = float(-10.0 * np.log10(error / power))
    return Figures(
        count=len(rows),
        pytorch=None if labels is None else _accuracy(rows["pytorch"], labels),
        artefact=None if labels is None else _accuracy(rows["artefact"], labels),
        agreement=float(np.mean(rows["artefact"][:, 0] == rows["pytorch"][:, 0])),
        relative_rms=float(np.sqrt(error / power)),
        sqnr_db=sqnr,
        max_abs=float(rows["max_abs"].max()),
        can_flip=int((margins(rows) >= 1.0).sum()),
        not_finite=int((rows["artefact"][:, 0] == NOTHING).sum()),
        flips=_flips(rows, labels),
    )


def _quotient(upper: NDArray[np.float64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Infinite where there is nothing to divide by."""
    result = np.full(len(upper), np.inf)
    np.divide(upper, lower, out=result, where=lower > 0)
    return result


def _first(logits: NDArray[np.float64]) -> NDArray[np.int32]:
    """The first five classes, (N, 5), best first; of equal ones the lower class first."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    return np.pad(best, ((0, 0), (0, TOP - best.shape[1])), constant_values=NOTHING)


def _accuracy(first: NDArray[np.int32], labels: Labels) -> Accuracy:
    right = first == labels[:, None]
    return Accuracy(float(right[:, 0].mean()), float(right.any(axis=1).mean()))


def _flips(rows: Rows, labels: Labels | None) -> tuple[Flip, ...]:
    """Most frequent first, then by class."""
    want, got = rows["pytorch"][:, 0], rows["artefact"][:, 0]
    groups: dict[tuple[int, int], list[int]] = {}
    for index in np.flatnonzero(want != got):
        groups.setdefault((int(want[index]), int(got[index])), []).append(int(index))
    flips = [_flip(pair, members, labels) for pair, members in groups.items()]
    return tuple(sorted(flips, key=lambda each: (-each.count, each.pytorch, each.artefact)))


def _flip(pair: tuple[int, int], members: Sequence[int], labels: Labels | None) -> Flip:
    pytorch, artefact = pair
    if labels is None:
        return Flip(pytorch, artefact, len(members), None, None)
    truth = labels[list(members)]
    return Flip(pytorch, artefact, len(members), int((truth == artefact).sum()), int((truth == pytorch).sum()))
