"""What the page tells, as data: everything was read and looked at before it gets here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from nextvit_deploy.bisect.record import Bisection
from nextvit_deploy.check.cells import LANES, PRECISIONS
from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.verdict import Verdict, worst

NETWORK: Final = "same network"
COST: Final = "precision cost"
"""The question whose answer is an artefact's error."""
_WORST_FIRST: Final = (Verdict.FAILED, Verdict.NOT_VERIFIED, Verdict.VERIFIED)


@dataclass(frozen=True, slots=True)
class Check:
    """One question to one executor on one set of inputs; figures of the worst output, None where there are none."""

    question: str
    executor: str
    mode: str
    against: str
    inputs: str
    verdict: Verdict
    why: str
    error: float | None = None
    allowed: float | None = None
    max_abs: float | None = None
    sqnr_db: float | None = None
    top1: float | None = None
    can_flip: int | None = None
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """One line of the certified table; pairs are (before, after), ``refused`` are (where, why)."""

    name: str
    certified: bool
    rewrites: int
    refused: tuple[tuple[str, str], ...]
    nodes: tuple[int, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    error_float64: float
    error_float32: float


@dataclass(frozen=True, slots=True)
class Reach:
    """How large one operation's numbers get."""

    name: str
    kind: str
    largest: float
    subnormal: float


@dataclass(frozen=True, slots=True)
class Headroom:
    """How close the operations come to float16's largest number, the largest first."""

    limit: float
    accumulator_limit: float
    remark: str
    operations: int
    weights_subnormal: float
    layers: tuple[Reach, ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """One time, or a ratio of times; ``basis`` is ``measured`` or ``estimate``."""

    basis: str
    short: str
    told: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One of the worst images; ``thumbnail`` is a data URI."""

    name: str
    label: str | None
    pytorch: str
    artefact: str
    margin: float
    relative_rms: float
    thumbnail: str | None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation over a folder found."""

    file: str
    sha256: str
    folder: str
    count: int
    agreement: float
    flipped: int
    can_flip: int
    not_finite: int
    sqnr_db: float
    top1: tuple[float, float] | None
    """The artefact's and PyTorch's share of right answers; None without labels."""
    pictures: tuple[Picture, ...]
    """Those nearest to another class, the nearest first."""


@dataclass(frozen=True, slots=True)
class Move:
    """One figure beside the baseline's."""

    what: str
    before: str
    after: str
    allowed: str
    regression: bool


@dataclass(frozen=True, slots=True)
class Made:
    """A manifest: what was made and how far it is from PyTorch."""

    file: str
    sha256: str
    size: int
    lane: str
    precision: str
    model: str
    verdict: Verdict
    checks: tuple[Check, ...]
    passes: tuple[Pass, ...]
    headroom: Headroom | None
    plan: PrecisionPlan | None
    latencies: tuple[Latency, ...]
    dtypes: str
    notes: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]
    ops: tuple[tuple[str, str], ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Item:
    """One artefact of the page, or a row of a check that came to none (``made`` is None)."""

    title: str
    lane: str
    precision: str
    verdict: Verdict
    problems: tuple[str, ...] = ()
    made: Made | None = None
    latencies: tuple[Latency, ...] = ()
    layers: Bisection | None = None
    evaluated: Evaluated | None = None
    moves: tuple[Move, ...] = ()
    place: str = ""
    """The artefact's path in the folder where it is there."""
    label: str = ""
    """A short name, unlike all others on the page."""

    @property
    def error(self) -> float | None:
        """The worst of what its precision costs: relative root mean square; None where nothing was executed."""
        return max((each.error for each in self._costs if each.error is not None), default=None)

    @property
    def worst_check(self) -> Check | None:
        """The check with that error."""
        found = [each for each in self._costs if each.error is not None]
        return max(found, key=lambda each: each.error or 0.0, default=None)

    @property
    def network(self) -> Check | None:
        """Whether it is the same network: the worst answer, None where nobody asked."""
        found = [] if self.made is None else [each for each in self.made.checks if each.question == NETWORK]
        return min(found, key=lambda each: (_WORST_FIRST.index(each.verdict), -(each.error or 0.0)), default=None)

    @property
    def _costs(self) -> tuple[Check, ...]:
        return () if self.made is None else tuple(each for each in self.made.checks if each.question == COST)


@dataclass(frozen=True, slots=True)
class Collected:
    """A folder as it was read; ``skipped`` are files that tell nothing, each with why."""

    name: str
    items: tuple[Item, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    baseline: str = ""

    @property
    def verdict(self) -> Verdict:
        """Failed when any item is, verified when all are, not verified otherwise."""
        return worst(each.verdict for each in self.items)

    def having(self, verdict: Verdict) -> tuple[Item, ...]:
        """The items of one verdict."""
        return tuple(each for each in self.items if each.verdict is verdict)


def ordered(items: Iterable[Item]) -> tuple[Item, ...]:
    """The failed first, then what is not verified, the exact before the compressed; each with a label."""

    def key(item: Item) -> tuple[int, int, int, str, str, str]:
        ranks = _rank(item.lane, LANES), _rank(item.precision, PRECISIONS)
        return _WORST_FIRST.index(item.verdict), *ranks, item.precision, item.title, item.place

    found = sorted(items, key=key)
    return tuple(
        replace(each, label=label) for each, label in zip(found, _labels([e.title for e in found]), strict=True)
    )


def _rank(name: str, known: Sequence[str]) -> int:
    """Its place among those that are known, behind all of them where it is none."""
    return known.index(name) if name in known else len(known)


def _labels(titles: list[str]) -> list[str]:
    """The titles without what all of them begin with; those that are alike are numbered."""
    cut = 0
    if len(set(titles)) > 1:
        shortest, longest = min(titles), max(titles)
        shared = next((at for at, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b), len(shortest))
        cut = max((shortest.rfind(mark, 0, shared) + 1 for mark in "_-"), default=0)
    seen: dict[str, int] = {}
    labels = []
    for title in titles:
        label = title[cut:] or title
        seen[label] = seen.get(label, 0) + 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels
