"""Every way in which a row can be wrong is told, once and in one line; what isn't known is never a pass."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_deploy.check.baseline import entry_of
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.limits import Budget, Limits, Regression
from nextvit_deploy.check.result import Kind, Outcome
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.targets import COST_AT_WORST, ON_DEVICE, PRECISION_COST, SAME_NETWORK
from tests.deploy.check.support_rows import (
    CELL,
    HOSTILE,
    SAME,
    Json,
    answer,
    comparison,
    judged,
    layers,
    manifest,
    outcome,
    problems,
)
from tests.deploy.support import Exported, call, remove_relu, tamper

KEY = ("onnx", "fp16")


def budget(**stated: float) -> Limits:
    return Limits(budgets={KEY: Budget(**stated)})  # type: ignore[arg-type]  # whole numbers where they have to be


def test_a_sound_row_has_no_problems() -> None:
    row = judged(outcome())
    assert (row.verdict, row.problems, row.moves) == (Verdict.VERIFIED, (), ())


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        (SAME_NETWORK, Kind.SAME_NETWORK),
        (PRECISION_COST, Kind.PRECISION_COST),
        (COST_AT_WORST, Kind.PRECISION_COST),
        (f"{ON_DEVICE}, cpu", Kind.ON_DEVICE),
    ],
)
def test_a_failed_check_says_on_what_and_by_how_much(question: str, kind: Kind) -> None:
    bad = answer(
        question, comparison(1e-6), comparison(2e-3, 1e-5, output="probs"), verdict="failed", inputs="noise, 97x69"
    )
    row = judged(outcome(manifest(SAME, bad)))
    said = f"{question} on noise, 97x69: relative rms 2.0e-03 of probs, allowed 1e-05 (onnxruntime 1.32 cpu)"
    assert problems(row) == [(kind, said)]
    assert row.verdict is Verdict.FAILED


def test_each_failed_check_is_told() -> None:
    bad = [answer(SAME_NETWORK, comparison(1, 1e-5), verdict="failed", inputs=f"noise {size}") for size in (32, 96)]
    assert [message.partition(":")[0] for _, message in problems(judged(outcome(manifest(*bad))))] == [
        "same network on noise 32",
        "same network on noise 96",
    ]


@pytest.mark.parametrize("error", ["inf", "nan"])
def test_an_answer_that_is_no_number_is_called_so(error: str) -> None:
    bad = answer(PRECISION_COST, comparison(1.0), comparison(error, output="probs"), verdict="failed")
    ((kind, message),) = problems(judged(outcome(manifest(SAME, bad))))
    assert kind is Kind.PRECISION_COST
    assert "NaN or infinity in probs" in message


def test_what_could_not_be_compared_says_why() -> None:
    bad = answer(SAME_NETWORK, verdict="failed", why="output 'logits' has shape (8, 9)")
    assert "output 'logits' has shape (8, 9)" in problems(judged(outcome(manifest(bad))))[0][1]


def test_the_module_is_that_of_the_same_question_before_another() -> None:
    bad = answer(PRECISION_COST, comparison(1.0), verdict="failed")
    found = manifest(SAME, bad)

    def module(*series: tuple[str, str]) -> str:
        return judged(outcome(found, layers=layers(*series))).problems[0].module

    assert module((SAME_NETWORK, "stem.0"), (PRECISION_COST, "features.2")) == "features.2"
    assert module((SAME_NETWORK, "stem.0"), (PRECISION_COST, "")) == "stem.0"
    assert module((SAME_NETWORK, ""), (PRECISION_COST, "")) == ""
    assert module() == ""


def test_what_was_not_executed_is_not_verified() -> None:
    blank = answer(ON_DEVICE, verdict="not verified", why="no CUDA driver")
    row = judged(outcome(manifest(SAME, blank, blank)))
    assert problems(row) == [(Kind.NOT_VERIFIED, "on the device: no CUDA driver")]
    assert row.verdict is Verdict.NOT_VERIFIED


def test_no_checks_are_no_pass() -> None:
    row = judged(outcome(manifest() | {"checks": []}))
    assert row.verdict is Verdict.NOT_VERIFIED
    assert problems(row) == [(Kind.NOT_VERIFIED, "nothing was executed, so nothing is known of it")]


def test_a_device_that_a_kit_asked_can_fail_the_row() -> None:
    device = {"verdict": "failed", "why": "relative rms 0.5 > 0.01"}
    row = judged(outcome(manifest(Verdict="failed", Device=device)))
    assert problems(row) == [(Kind.ON_DEVICE, "failed: relative rms 0.5 > 0.01")]


@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        (Outcome(error="give another\n--size"), Kind.ERROR, "give another --size"),
        (Outcome(error="pip install it", missing=True), Kind.NOT_VERIFIED, "pip install it"),
        (Outcome(crash="killed by SIGSEGV"), Kind.CRASH, "killed by SIGSEGV"),
        (
            Outcome(crash="killed by SIGSEGV", error="build trt\n", log="/w/x.log"),
            Kind.CRASH,
            "killed by SIGSEGV; the log ends: build trt; log: /w/x.log",
        ),
        (
            Outcome(timed_out=True, seconds=3600.2, log="/w/x.log"),
            Kind.TIMEOUT,
            "stopped after 60 min 00 s, its time limit; log: /w/x.log",
        ),
        (Outcome(), Kind.ERROR, "its process left neither an artefact nor a reason"),
    ],
)
def test_how_a_process_ended_is_told(made: Outcome, kind: Kind, message: str) -> None:
    row = judged(made)
    assert problems(row) == [(kind, message)]
    assert row.verdict is (Verdict.NOT_VERIFIED if kind is Kind.NOT_VERIFIED else Verdict.FAILED)


def test_a_crash_behind_a_sound_manifest_still_fails() -> None:
    assert judged(outcome(crash="killed by SIGKILL")).verdict is Verdict.FAILED


def test_a_tolerance_of_the_users_is_held_where_the_targets_own_is_met() -> None:
    limits = Limits(tolerances={KEY: {PRECISION_COST: 3e-4}})
    found = manifest(
        SAME, answer(PRECISION_COST, comparison(2e-4)), answer(PRECISION_COST, comparison(4e-4), inputs="n")
    )
    row = judged(outcome(found, layers=layers((PRECISION_COST, "features.2"))), limits=limits)
    assert problems(row) == [(Kind.TOLERANCE, "precision cost on n: relative rms 4.0e-04, stated 3.0e-04")]
    assert row.problems[0].module == "features.2"
    assert judged(outcome(manifest(cost=3e-4)), limits=limits).verdict is Verdict.VERIFIED
    failed = answer(PRECISION_COST, comparison(1.0), verdict="failed")
    assert [kind for kind, _ in problems(judged(outcome(manifest(SAME, failed)), limits=limits))] == [
        Kind.PRECISION_COST
    ]


def test_a_tolerance_is_told_apart_from_what_misses_it_by_little() -> None:
    limits = Limits(tolerances={KEY: {PRECISION_COST: 4e-4}})
    ((_, message),) = problems(judged(outcome(manifest(cost=4.0001e-4)), limits=limits))
    assert message.endswith("relative rms 4.000100e-04, stated 4.000000e-04")


def test_a_tolerance_that_nothing_answers_to_is_not_verified() -> None:
    limits = Limits(tolerances={KEY: {ON_DEVICE: 1e-2}})
    row = judged(outcome(), limits=limits)
    assert problems(row) == [(Kind.NOT_VERIFIED, "on the device: a tolerance is stated, and this was not measured")]
    on_cpu = answer(f"{ON_DEVICE}, cpu", comparison(1e-3))
    assert judged(outcome(manifest(SAME, on_cpu)), limits=limits).verdict is Verdict.VERIFIED


def test_other_rows_limits_are_none_of_this_ones() -> None:
    limits = Limits(
        tolerances={("trt", "fp16"): {PRECISION_COST: 0.0}, ("onnx", "fp32"): {PRECISION_COST: 0.0}},
        budgets={("coreml", "fp16"): Budget(size=0)},
    )
    assert judged(outcome(), limits=limits).verdict is Verdict.VERIFIED


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"target": "tensorrt"}, ("trt", "fp16")),
        ({"target": "tensorrt", "precision": "int8"}, ("trt", "int8")),
        ({"target": "coreml", "coreml": {"activations": "int8", "weights": None}}, ("coreml", "int8")),
        ({"target": "coreml", "coreml": {"activations": None, "weights": "int8"}}, ("coreml", "fp16")),
    ],
)
def test_an_artefact_that_was_there_has_the_limits_of_its_own_spec(changes: Json, key: tuple[str, str]) -> None:
    limits = Limits(budgets={key: Budget(size=1)})
    cell = Cell("there", artefact="/models/x")
    assert [kind for kind, _ in problems(judged(outcome(manifest(**changes)), cell=cell, limits=limits))] == [
        Kind.BUDGET
    ]


def test_budgets_hold_to_the_byte() -> None:
    assert judged(outcome(), limits=budget(size=1_700_000, kernels=70)).verdict is Verdict.VERIFIED
    row = judged(outcome(), limits=budget(size=1_699_999, kernels=69))
    assert problems(row) == [
        (Kind.BUDGET, "size 1700000 bytes, stated 1699999 bytes at most"),
        (Kind.BUDGET, "70 nodes, stated 69 at most"),
    ]
    assert problems(judged(outcome(), limits=budget(size=1_000_000)))[0][1] == "size 1.7 MB, stated 1.0 MB at most"


def test_kernels_that_can_not_be_counted_are_not_verified() -> None:
    row = judged(outcome(manifest(Ops={})), limits=budget(kernels=10))
    assert [kind for kind, _ in problems(row)] == [Kind.NOT_VERIFIED]


@pytest.mark.parametrize(
    ("latency", "kinds"),
    [(0.9, []), (1.0, []), (1.01, [Kind.BUDGET]), (math.nan, [Kind.BUDGET]), (None, [Kind.NOT_VERIFIED])],
)
def test_a_latency_is_within_its_budget_or_said_to_be_unknown(latency: float | None, kinds: list[Kind]) -> None:
    row = judged(outcome(latency=latency, no_latency="no runtime here"), limits=budget(latency_ratio=1.0))
    assert [kind for kind, _ in problems(row)] == kinds
    assert all("no runtime here" in message for kind, message in problems(row) if kind is Kind.NOT_VERIFIED)


def test_regressions_fail_and_name_the_module() -> None:
    limits = Limits(regression=Regression(error_ratio=1.2, size_ratio=1.0))
    row = judged(
        outcome(manifest(cost=6e-4), layers=layers((PRECISION_COST, "features.5"))),
        limits=limits,
        before=entry_of(outcome()),
    )
    assert problems(row) == [
        (Kind.REGRESSION, "error, precision cost 6.0e-04, the baseline has 4.0e-04; at most 4.8e-04"),
    ]
    assert row.problems[0].module == "features.5"
    assert judged(outcome(manifest(cost=6e-4)), before=outcome()).verdict is Verdict.VERIFIED


def test_a_figure_that_is_gone_is_not_verified_where_a_limit_is_stated() -> None:
    limits = Limits(regression=Regression(latency_ratio=1.1))
    before = outcome(latency=0.8)
    row = judged(outcome(no_latency="no runtime here"), limits=limits, before=before)
    assert problems(row) == [
        (Kind.NOT_VERIFIED, "latency over PyTorch's is not measured, the baseline has 0.80: no runtime here")
    ]
    assert judged(outcome(), before=before).verdict is Verdict.VERIFIED


def test_messages_are_one_printable_line() -> None:
    bad = answer(SAME_NETWORK, verdict="failed", why=HOSTILE, inputs=HOSTILE)
    row = judged(outcome(manifest(bad), crash=HOSTILE, log=HOSTILE, error=HOSTILE))
    assert len(row.problems) == 2
    assert all(each.message.isprintable() for each in row.problems)


@pytest.mark.usefixtures("quick")
def test_real_manifests(demo: Exported, tmp_path: Path) -> None:
    cell = replace(CELL, artefact=str(demo.path), lane="", precision="")
    strict = Limits(tolerances={("onnx", "fp32"): {SAME_NETWORK: 1e-12}})
    assert judged(Outcome(demo.manifest), cell=cell).verdict is Verdict.VERIFIED
    assert {kind for kind, _ in problems(judged(Outcome(demo.manifest), cell=cell, limits=strict))} == {Kind.TOLERANCE}
    found = call("verify", tamper(demo.copied(tmp_path), remove_relu), "--json").json
    assert {kind for kind, _ in problems(judged(Outcome(found), cell=cell))} == {Kind.SAME_NETWORK, Kind.PRECISION_COST}


def test_judging_needs_no_framework() -> None:
    code = "import sys, nextvit_deploy.check.judge as j; print(sorted({'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
