"""JUnit XML as a CI reads it: counted right, whole whatever a file is called, and nothing unknown reads as a pass."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.junit import junit
from nextvit_deploy.check.result import CheckResult, Outcome
from tests.deploy.check.support_rows import CELL, HOSTILE, judged, manifest, outcome, result, rows_of_every_kind


def parsed(found: CheckResult) -> ET.Element:
    return ET.fromstring(junit(found).encode())  # noqa: S314 - what was just written


def counts(element: ET.Element) -> list[int]:
    return [int(element.attrib[name]) for name in ("tests", "failures", "errors", "skipped")]


def test_a_suite_for_each_target_a_case_for_each_cell() -> None:
    root = parsed(result(rows_of_every_kind()))
    assert counts(root) == [6, 1, 4, 0]
    assert root.attrib["time"] == "75.000"
    assert [(each.attrib["name"], counts(each)) for each in root] == [("onnx", [3, 1, 1, 0]), ("trt", [3, 0, 3, 0])]
    for suite in root:
        cases = suite.findall("testcase")
        assert len(cases) == int(suite.attrib["tests"])
        assert len(suite.findall("testcase/failure")) == int(suite.attrib["failures"])
        assert len(suite.findall("testcase/error")) == int(suite.attrib["errors"])
        assert float(suite.attrib["time"]) == pytest.approx(sum(float(case.attrib["time"]) for case in cases))
        assert {case.attrib["classname"] for case in cases} == {f"nextvit-export check.{suite.attrib['name']}"}


def test_every_verdict_has_its_element() -> None:
    told = {}
    for case in parsed(result(rows_of_every_kind())).iter("testcase"):
        children = [each for each in case if each.tag in {"failure", "error", "skipped"}]
        assert len(children) <= 1
        told[case.attrib["name"]] = [(each.tag, each.attrib["type"]) for each in children]
    assert told == {
        "demo-onnx-fp16": [],
        "demo-onnx-fp16-bad": [("failure", "same-network")],
        "demo-trt-fp16": [("error", "not-verified")],
        "dead": [("error", "crash")],
        "slow": [("error", "timeout")],
        "refused": [("error", "error")],
    }


def test_a_case_has_its_figures_its_module_and_its_log() -> None:
    sound, bad, *_ = parsed(result(rows_of_every_kind())).iter("testcase")
    found = {each.attrib["name"]: each.attrib["value"] for each in sound.iter("property")}
    assert found == {
        "target": "onnx",
        "precision": "fp16",
        "error, same network": "2e-07",
        "error, precision cost": "0.0004",
        "size in bytes": "1700000",
        "nodes": "70",
        "sha256": "a" * 64,
        "checkpoint": "f" * 64,
        "cached": "false",
    }
    assert sound.findtext("system-out") == "log: /w/demo-onnx-fp16.log"
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib["message"].endswith("(module features.3.mlp.conv1)")
    assert (failure.text or "").startswith("same-network: same network on 8 digits: relative rms 2.0e-03")


def test_what_fails_comes_before_what_is_not_verified_and_all_is_told() -> None:
    row = judged(Outcome(crash="killed by SIGSEGV", manifest=manifest() | {"checks": []}))
    row = replace(row, problems=row.problems[::-1])
    error = parsed(result([row])).find("testsuite/testcase/error")
    assert error is not None
    assert error.attrib["type"] == "crash"
    assert [line.partition(":")[0] for line in (error.text or "").splitlines()] == ["not-verified", "crash"]


def test_what_is_cached_took_no_time() -> None:
    case = parsed(result([replace(judged(outcome()), cached=True)])).find("testsuite/testcase")
    assert case is not None
    assert case.attrib["time"] == "0.000"


def test_an_artefact_that_was_there_is_in_its_targets_suite() -> None:
    rows = [
        judged(outcome(manifest(target="tensorrt")), cell=Cell("a", artefact="/w/a.engine")),
        judged(Outcome(error="it is gone"), cell=Cell("b", artefact="/w/b.engine")),
    ]
    assert [each.attrib["name"] for each in parsed(result(rows))] == ["trt", "artefact"]


def test_no_name_breaks_out() -> None:
    row = judged(outcome(error=HOSTILE, log=HOSTILE), cell=replace(CELL, name=HOSTILE))
    case = parsed(result([row])).find("testsuite/testcase")
    assert case is not None
    assert case.attrib["name"] == HOSTILE.replace("\x1b", "").replace("\udcff", "")
    assert {each.tag for each in case} == {"properties", "error", "system-out"}
    nulls = parsed(result([judged(Outcome(error="a\x00b\x0b\ufffe\x85c"))])).find("testsuite/testcase/error")
    assert nulls is not None
    assert nulls.attrib["message"] == "abc"


def test_nothing_is_something_too() -> None:
    assert counts(parsed(result([]))) == [0, 0, 0, 0]
