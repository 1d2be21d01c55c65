"""What a check found, as data: read by the tables, the JSON, JUnit, SARIF, the step summary and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Final

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.verdict import Verdict, worst

SCHEMA: Final = 1


class Kind(str, Enum):
    """What is wrong with a row; SARIF's rules and JUnit's types are called so."""

    SAME_NETWORK = "same-network"
    PRECISION_COST = "precision-cost"
    ON_DEVICE = "on-the-device"
    TOLERANCE = "tolerance"
    BUDGET = "budget"
    REGRESSION = "regression"
    ERROR = "error"
    CRASH = "crash"
    TIMEOUT = "timeout"
    NOT_VERIFIED = "not-verified"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in one line, and the model's module where it is known."""

    kind: Kind
    message: str
    module: str = ""

    @property
    def verdict(self) -> Verdict:
        """What it makes of the row."""
        return Verdict.NOT_VERIFIED if self.kind is Kind.NOT_VERIFIED else Verdict.FAILED


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a cell's process left behind; kept between checks where it came to an end by itself.

    ``manifest`` is the artefact's, as in the file beside it; None where there is none. ``error`` is one line;
    ``missing`` says that it tells nothing of the artefact, because something isn't installed. ``crash`` says how the
    process died: ``killed by SIGSEGV``. ``layers`` is what ``bisect`` found, as its JSON. ``latency`` is a ratio.
    """

    manifest: Mapping[str, Any] | None = None
    artefact: str | None = None
    error: str = ""
    missing: bool = False
    crash: str = ""
    timed_out: bool = False
    log: str | None = None
    layers: Mapping[str, Any] | None = None
    latency: float | None = None
    no_latency: str = ""
    """Why ``latency`` is None where it was asked for."""
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether it ended as it will end again: with a verdict."""
        return self.manifest is not None and not self.crash and not self.timed_out and not self.error

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Read what ``as_dict`` wrote; raises TypeError when it is something else."""
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Move:
    """One figure beside the baseline's: error of a question, size, kernels, an operation's count, a version.

    ``allowed`` is the limit as text where one is stated; ``regression`` whether it is exceeded.
    """

    what: str
    before: str
    after: str
    allowed: str | None = None
    regression: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A cell and what is to be said of it; no problems means verified."""

    cell: Cell
    outcome: Outcome
    problems: tuple[Problem, ...]
    moves: tuple[Move, ...] = ()
    cached: bool = False

    @property
    def verdict(self) -> Verdict:
        """Failed, not verified or verified."""
        return worst([Verdict.VERIFIED, *(each.verdict for each in self.problems)])

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "verdict": str(self.verdict),
            "cell": self.cell.as_dict(),
            "problems": [asdict(each) | {"kind": str(each.kind)} for each in self.problems],
            "moves": [asdict(each) for each in self.moves],
            "cached": self.cached,
            "outcome": self.outcome.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class CheckResult:
    """All rows, in the order of the matrix."""

    rows: tuple[Row, ...]
    output: str
    """The folder with the artefacts and this result."""
    baseline: str | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    jobs: int = 1

    @property
    def verdict(self) -> Verdict:
        """Failed when any row failed, verified when all are, not verified otherwise."""
        return worst([row.verdict for row in self.rows])

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "rows": [row.as_dict() for row in self.rows],
            "output": self.output,
            "baseline": self.baseline,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "jobs": self.jobs,
        }


def rows_with(rows: Sequence[Row], verdict: Verdict) -> tuple[Row, ...]:
    """The rows of one verdict."""
    return tuple(row for row in rows if row.verdict is verdict)
