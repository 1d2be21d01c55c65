"""A check as SARIF 2.1.0, as code scanning reads it: a rule for each kind of problem, a result for each problem."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import quote

from nextvit_deploy import __version__
from nextvit_deploy.check import figures
from nextvit_deploy.check.result import CheckResult, Kind, Problem, Row
from nextvit_deploy.verdict import Verdict

SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_ROOT: Final = "%SRCROOT%"
"""What code scanning calls the checkout."""
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|\binf\b|\bnan\b", re.IGNORECASE)

RULES: Final[Mapping[Kind, tuple[str, str, str]]] = MappingProxyType(
    {
        Kind.SAME_NETWORK: (
            "SameNetwork",
            "The artefact is not the same network.",
            "In exact arithmetic it differs from PyTorch: a weight, shape or operation is wrong; bisect names where.",
        ),
        Kind.PRECISION_COST: (
            "PrecisionCost",
            "The stored precision costs more than the target allows.",
            "Rounding moves outputs too far; bisect names where, and those blocks can stay in a wider type.",
        ),
        Kind.ON_DEVICE: (
            "OnTheDevice",
            "The real runtime answers differently.",
            "Run on its own device the artefact is further from PyTorch than allowed, or was built in another type.",
        ),
        Kind.TOLERANCE: (
            "Tolerance",
            "A tolerance of the configuration is missed.",
            "The target's own tolerance is met and the tighter one of the configuration isn't.",
        ),
        Kind.BUDGET: (
            "Budget",
            "A budget of the configuration is exceeded.",
            "Size, number of kernels or latency is beyond what the configuration states.",
        ),
        Kind.REGRESSION: (
            "Regression",
            "A figure moved further from the baseline than allowed.",
            "An error, size, kernels or latency grew by more than is stated; the moves name what else changed.",
        ),
        Kind.ERROR: (
            "Error",
            "The artefact could not be made or read.",
            "The message says what to do.",
        ),
        Kind.CRASH: (
            "Crash",
            "The process that made or verified the artefact died.",
            "The message says how, and where its log is. Nothing is known of the artefact.",
        ),
        Kind.TIMEOUT: (
            "Timeout",
            "The process that made or verified the artefact took too long.",
            "It was stopped at the time limit of the configuration. Nothing is known of the artefact.",
        ),
        Kind.NOT_VERIFIED: (
            "NotVerified",
            "The artefact is not verified.",
            "Something that has to be executed or measured could not be, which is no pass; the message says what.",
        ),
    }
)
"""Name, what it says, and help."""


def sarif(result: CheckResult, base: Path) -> dict[str, object]:
    """The whole file as JSON; addresses are relative to ``base``, the checkout, where they are in it."""
    kinds = list(RULES)
    seen: Counter[str] = Counter()
    results = [
        _result(row, problem, result, base.absolute(), kinds.index(problem.kind), seen)
        for row in result.rows
        for problem in row.problems
    ]
    driver = {
        "name": "nextvit-export",
        "fullName": "nextvit-export check",
        "semanticVersion": __version__,
        "rules": [_rule(kind) for kind in kinds],
    }
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": "nextvit-export-check/"},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True}],
        "results": results,
        "properties": {"verdict": str(result.verdict), "rows": len(result.rows)},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(kind: Kind) -> dict[str, object]:
    name, says, how = RULES[kind]
    return {
        "id": str(kind),
        "name": name,
        "shortDescription": {"text": says},
        "fullDescription": {"text": f"{says} {how}"},
        "help": {"text": how},
        "defaultConfiguration": {"level": _level(kind)},
        "properties": {"tags": ["export", "verification"]},
    }


def _level(kind: Kind) -> str:
    return "warning" if kind is Kind.NOT_VERIFIED else "error"


def _result(
    row: Row, problem: Problem, result: CheckResult, base: Path, index: int, seen: Counter[str]
) -> dict[str, object]:
    name, message = figures.one_line(row.cell.name), figures.one_line(problem.message)
    module = figures.one_line(problem.module)
    location: dict[str, object] = {
        "physicalLocation": {
            "artifactLocation": _address(row, result, base),
            "region": {"startLine": 1},  # code scanning shows no result without a line
        }
    }
    if module:
        location["logicalLocations"] = [{"fullyQualifiedName": module, "kind": "module"}]
    return {
        "ruleId": str(problem.kind),
        "ruleIndex": index,
        "level": "error" if problem.verdict is Verdict.FAILED else "warning",
        "message": {"text": f"{name}: {message}" + (f" (module {module})" if module else "")},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": _fingerprint(row, problem, seen)},
        "properties": {"cell": name},
    }


def _address(row: Row, result: CheckResult, base: Path) -> dict[str, object]:
    """The artefact, else what it was to be made of, else the check's folder: every result has to be somewhere."""
    candidates = (row.outcome.artefact, row.cell.artefact, row.cell.checkpoint)
    found = next((each for each in candidates if each is not None), result.output)
    path = base / found
    if path.is_relative_to(base):
        return {"uri": quote(path.relative_to(base).as_posix(), errors="replace"), "uriBaseId": _ROOT}
    return {"uri": "file://" + quote(path.as_posix() if path.root == "/" else f"/{path.as_posix()}", errors="replace")}


def _fingerprint(row: Row, problem: Problem, seen: Counter[str]) -> str:
    """The same for the same problem of the next check, whatever its figures are by then."""
    about = _NUMBER.sub("#", problem.message.partition(":")[0])
    text = "\n".join((row.cell.name, str(problem.kind), problem.module, about))
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]
    seen[digest] += 1
    return f"{digest}:{seen[digest]}"
