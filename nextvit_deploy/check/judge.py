"""What is wrong with a row: its checks, how its process ended, and the limits that are stated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from nextvit_deploy.check import figures
from nextvit_deploy.check.baseline import Baseline, BaselineEntry, entry_of
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.limits import Budget, Limits
from nextvit_deploy.check.moves import NOT_MEASURED, moves
from nextvit_deploy.check.result import Kind, Move, Outcome, Problem, Row
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.targets import ON_DEVICE, SAME_NETWORK

_Json = Mapping[str, Any]
_NOTHING: Final[_Json] = {}


def judge(
    cell: Cell, outcome: Outcome, limits: Limits, before: Baseline | BaselineEntry | Outcome | None, *, cached: bool
) -> Row:
    """The row of a cell: every problem that its outcome has, and what moved since ``before``.

    A limit that is stated and can't be held against a figure makes the row not verified. ``cached`` says that the
    outcome is an earlier check's.
    """
    problems = list(_ending(outcome))
    moved: tuple[Move, ...] = ()
    manifest = outcome.manifest
    if manifest is not None:
        key = figures.lane_and_precision(cell, manifest)
        problems += _answers(outcome, manifest)
        problems += _tolerances(outcome, manifest, limits.tolerances.get(key, _NOTHING))
        problems += _over_budget(outcome, manifest, limits.budgets.get(key, Budget()))
        entry = _entry(before, cell, manifest)
        if entry is not None and not entry.why:
            moved = moves(manifest, entry, limits.regression, outcome.latency)
            problems += _regressions(outcome, moved)
        elif entry is not None:
            problems.append(Problem(Kind.NOT_VERIFIED, f"not compared with the baseline: {entry.why}"))
    elif not problems:
        problems.append(Problem(Kind.ERROR, "its process left neither an artefact nor a reason"))
    return Row(cell, outcome, tuple(dict.fromkeys(problems)), moved, cached)


def _entry(before: Baseline | BaselineEntry | Outcome | None, cell: Cell, manifest: _Json) -> BaselineEntry | None:
    if isinstance(before, Baseline):
        return before.before(cell, manifest)
    return entry_of(before) if isinstance(before, Outcome) else before


def _ending(outcome: Outcome) -> Iterator[Problem]:
    """How the process ended, where it didn't end well."""
    log = f"; log: {figures.one_line(outcome.log)}" if outcome.log else ""
    said = figures.one_line(outcome.error)
    if outcome.crash:
        last = f"; the log ends: {said}" if said else ""
        yield Problem(Kind.CRASH, f"{figures.one_line(outcome.crash)}{last}{log}")
    if outcome.timed_out:
        yield Problem(Kind.TIMEOUT, f"stopped after {figures.seconds_text(outcome.seconds)}, its time limit{log}")
    if said and not outcome.crash:
        yield Problem(Kind.NOT_VERIFIED if outcome.missing else Kind.ERROR, said)


def _answers(outcome: Outcome, manifest: _Json) -> Iterator[Problem]:
    """Every check that failed or could not be made; at least one where the manifest's verdict isn't verified."""
    quiet = True
    for check in manifest["checks"]:
        verdict, question = Verdict(check["verdict"]), str(check["question"])
        if verdict is not Verdict.VERIFIED:
            quiet = False
        if verdict is Verdict.NOT_VERIFIED:
            yield Problem(Kind.NOT_VERIFIED, figures.one_line(f"{question}: {check['why'] or 'not executed'}"))
        elif verdict is Verdict.FAILED:
            said = f"{question} on {check['inputs']}: {_wrong(check)} ({check['executor']})"
            yield Problem(_kind(question), figures.one_line(said), parting(outcome.layers, question))
    if not manifest["checks"]:
        yield Problem(Kind.NOT_VERIFIED, "nothing was executed, so nothing is known of it")
    elif quiet and manifest["verdict"] != str(Verdict.VERIFIED):
        kind = Kind.ON_DEVICE if manifest["verdict"] == str(Verdict.FAILED) else Kind.NOT_VERIFIED
        why = (manifest.get("device") or {}).get("why") or "its manifest says so, for another reason than its checks"
        yield Problem(kind, figures.one_line(f"{manifest['verdict']}: {why}"))


def _wrong(check: _Json) -> str:
    """Of the output that is furthest off: its error and what is allowed; why, where nothing could be compared."""
    if not check["comparisons"]:
        return str(check["why"]) or "it could not be compared"
    worst = max(check["comparisons"], key=_excess)
    if not worst["finite"]:
        return f"NaN or infinity in {worst['output']}"
    allowed = figures.number(worst["tolerance"]["relative_rms"])
    return f"relative rms {figures.number(worst['relative_rms']):.1e} of {worst['output']}, allowed {allowed:.0e}"


def _excess(comparison: _Json) -> float:
    """How far an output is past its tolerance; an answer that is no number is furthest."""
    error, allowed = (figures.number(each["relative_rms"]) for each in (comparison, comparison["tolerance"]))
    return error - allowed if comparison["finite"] and not math.isnan(error) else math.inf


def _kind(question: str) -> Kind:
    if question.startswith(ON_DEVICE):
        return Kind.ON_DEVICE
    return Kind.SAME_NETWORK if question == SAME_NETWORK else Kind.PRECISION_COST


def parting(layers: _Json | None, question: str) -> str:
    """The model's module where the artefact leaves PyTorch: of this question, else of another; empty where unknown."""
    series: Sequence[_Json] = () if layers is None else layers["series"]
    for each in sorted(series, key=lambda one: one["question"] != question):
        for place in each["partings"]:
            return str(place["module"])
    return ""


def _tolerances(outcome: Outcome, manifest: _Json, stated: Mapping[str, float]) -> Iterator[Problem]:
    """Tolerances of the user that are missed where the target's own are met, or that nothing answers to."""
    for question, allowed in stated.items():
        answers = [each for each in manifest["checks"] if _asks(question, str(each["question"]))]
        if not answers:
            yield Problem(Kind.NOT_VERIFIED, f"{question}: a tolerance is stated, and this was not measured")
        for check in answers:
            error = figures.worst_of(check)
            if Verdict(check["verdict"]) is Verdict.VERIFIED and error is not None and not error <= allowed:
                text = figures.telling_apart(figures.ERROR, error, allowed)
                said = f"{check['question']} on {check['inputs']}: relative rms {text(error)}, stated {text(allowed)}"
                yield Problem(Kind.TOLERANCE, figures.one_line(said), parting(outcome.layers, str(check["question"])))


def _asks(stated: str, question: str) -> bool:
    """Whether a check answers a question; on the device there is one for each unit."""
    return question == stated or (stated == ON_DEVICE and question.startswith(ON_DEVICE))


def _over_budget(outcome: Outcome, manifest: _Json, budget: Budget) -> Iterator[Problem]:
    size, count, latency = figures.size(manifest), figures.kernels(manifest), outcome.latency
    if budget.size is not None and size > budget.size:
        text = figures.telling_apart(figures.SIZE, size, budget.size)
        yield Problem(Kind.BUDGET, f"size {text(size)}, stated {text(budget.size)} at most")
    if budget.kernels is not None:
        if count is None:
            yield Problem(Kind.NOT_VERIFIED, f"{manifest['unit']} can't be counted, stated {budget.kernels} at most")
        elif count > budget.kernels:
            yield Problem(Kind.BUDGET, f"{count} {manifest['unit']}, stated {budget.kernels} at most")
    if budget.latency_ratio is not None:
        stated = f"stated {budget.latency_ratio:g} at most"
        if latency is None:
            why = figures.one_line(outcome.no_latency) or "it was not measured"
            yield Problem(Kind.NOT_VERIFIED, f"latency over PyTorch's: {why}; {stated}")
        elif not latency <= budget.latency_ratio:
            text = figures.telling_apart(figures.RATIO, latency, budget.latency_ratio)
            yield Problem(Kind.BUDGET, f"latency over PyTorch's {text(latency)}, {stated}")


def _regressions(outcome: Outcome, moved: Sequence[Move]) -> Iterator[Problem]:
    """Figures that moved too far, and those that are missing though a limit is stated for them."""
    for each in moved:
        question = each.what.removeprefix("error, ")
        if each.regression:
            module = parting(outcome.layers, question) if question != each.what else ""
            yield Problem(
                Kind.REGRESSION, f"{each.what} {each.after}, the baseline has {each.before}; {each.allowed}", module
            )
        elif each.allowed is not None and each.after == NOT_MEASURED:
            why = f": {figures.one_line(outcome.no_latency)}" if outcome.no_latency and "latency" in each.what else ""
            yield Problem(Kind.NOT_VERIFIED, f"{each.what} is not measured, the baseline has {each.before}{why}")
