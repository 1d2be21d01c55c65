"""The README's commands do what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nextvit_exporters import to_coreml, to_onnx

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ ")
]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_commands_on_the_demo_run_in_their_order(tmp_path: Path) -> None:
    on_the_demo = [c for c in COMMANDS if c.startswith(".venv/bin/nextvit-export") and "nextvit_small" not in c]
    assert len(on_the_demo) == 16
    if find_spec("tensorrt_rtx") is None:  # there are no wheels of it for this machine
        on_the_demo = [c for c in on_the_demo if " trt " not in c and ".engine" not in c]
    if find_spec("coremltools") is None:
        on_the_demo = [c for c in on_the_demo if " coreml " not in c and ".mlpackage" not in c]
    for command in on_the_demo:
        _, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, "-m", "nextvit_deploy", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", sorted({each.name for each in (*to_onnx.PASSES, *to_coreml.PASSES)}))
def test_every_pass_has_its_row(name: str) -> None:
    assert f"| `{name}` |" in README


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
