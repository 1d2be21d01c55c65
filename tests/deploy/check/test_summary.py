"""The summary of a workflow's step: whole, in order, and nothing in it is anything but text."""

from __future__ import annotations

import re
from dataclasses import replace

from nextvit_deploy.check.limits import Limits, Regression
from nextvit_deploy.check.result import Outcome
from nextvit_deploy.check.summary import escaped, summary
from tests.deploy.check.support_rows import CELL, HOSTILE, judged, manifest, outcome, result, rows_of_every_kind


def test_verdict_first_then_a_row_for_each_cell() -> None:
    text = summary(result(rows_of_every_kind()))
    lines = text.splitlines()
    assert lines[0] == "### ❌ nextvit-export check: failed"
    assert lines[2] == "1 verified, 4 failed, 1 not verified, in 1 min 15 s"
    assert lines[4].startswith("| cell |")
    assert lines[6:9] == [
        "| demo-onnx-fp16 | 4.0e-04 | 1.7 MB | 70 nodes | 3.5 s | ✅ verified |",
        "| demo-onnx-fp16-bad |  | 1.7 MB | 70 nodes | 3.5 s | ❌ failed |",
        "| demo-trt-fp16 |  | 1.7 MB | 70 kernels | 3.5 s | ⚠️ not verified |",
    ]
    assert "- **demo-onnx-fp16-bad**, same-network, module features.3.mlp.conv1: same network on 8 digits" in text
    assert "- **demo-trt-fp16**, not-verified: precision cost: no CUDA driver" in text
    assert "details" not in text


def test_a_sound_check_has_no_problems() -> None:
    text = summary(result([replace(judged(outcome()), cached=True)], notes=("a note",)))
    assert text.startswith("### ✅ nextvit-export check: verified\n")
    assert "| cached | ✅ verified |" in text
    assert "Problems" not in text
    assert "- a note\n" in text
    assert summary(result([])).startswith("### ⚠️ nextvit-export check: not verified\n")


def test_what_moved_is_folded_in() -> None:
    limits = Limits(regression=Regression(error_ratio=1.2))
    row = judged(outcome(manifest(cost=6e-4)), before=outcome(), limits=limits)
    text = summary(result([row], baseline="/old"))
    table = text.partition("<details><summary>1 figures moved since the baseline</summary>\n\n")[2]
    assert "| demo-onnx-fp16 | error, precision cost | 4.0e-04 | 6.0e-04 | at most 4.8e-04 | ❌ regression |\n" in table
    assert "same network" not in table
    assert table.rstrip().endswith("</details>")
    same = summary(result([judged(outcome(), before=outcome())], baseline="/old"))
    assert "Nothing moved since the baseline /old." in same


def test_names_are_text() -> None:
    row = judged(
        outcome(manifest(cost=6e-4), error=HOSTILE),
        cell=replace(CELL, name=HOSTILE),
        before=outcome(),
    )
    row = replace(row, problems=tuple(replace(each, module=HOSTILE) for each in row.problems))
    text = summary(result([row], baseline=HOSTILE, notes=(HOSTILE,)))
    text.encode()
    allowed = {"<details>", "<summary>", "</summary>", "</details>"}
    assert set(re.findall(r"<[^>]*>", text)) == allowed
    assert "\x1b" not in text
    assert "alert(1)" in text
    for line in text.splitlines():
        bare = re.sub(r"\\.", "", line)
        assert not set("`~[]_") & set(bare)
        assert line.startswith("|") or "|" not in bare
        if "alert" in line and line.startswith("|"):
            assert bare.count("|") == 7
        assert bare.count("**") in {0, 2}
    assert escaped("see https://x.y and www.x.y") == "see https&#58;//x.y and www&#46;x.y"
    assert escaped("&lt; \\| a\n| b") == r"&amp;lt; \\\| a \| b"


def test_what_github_would_refuse_is_cut() -> None:
    rows = [judged(Outcome(error="x" * 10_000), cell=replace(CELL, name=f"cell {number}")) for number in range(200)]
    text = summary(result(rows))
    assert len(text.encode()) < 1_000_000
    assert text.endswith("\nThere is more than GitHub shows; `check.json` has all of it.\n")
    assert text.startswith("### ❌")
