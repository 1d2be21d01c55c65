"""The GitHub action and the pre-commit hook: valid, and their shell does what they say whatever it is given."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACTION: Final[dict[str, Any]] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS: Final[list[dict[str, Any]]] = ACTION["runs"]["steps"]
HOSTILE: Final = "a b; touch pwned $(touch pwned) `touch pwned` \"'|&&*?[x]{}~\\"
BASH: Final = shutil.which("bash") or ""
FAKE: Final = """#!{python}
import json, os, pathlib, sys

asked = sys.argv[1:]
if pathlib.Path(sys.argv[0]).name == "python" and asked[:1] != ["-m"]:
    os.execv(sys.executable, [sys.executable, *asked])
program = pathlib.Path(sys.argv[0]).name
told = {{"program": program, "asked": asked, "cwd": os.getcwd(), "environment": dict(os.environ)}}
with open(os.environ["FAKE_LOG"], "a") as file:
    file.write(json.dumps(told) + "\\n")
for each in asked:
    if each.startswith("--sarif=") and os.environ.get("FAKE_STATUS", "0") in {{"0", "3", "4"}}:
        pathlib.Path(each.removeprefix("--sarif=")).write_text("{{}}")
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


@dataclass
class Runner:
    """What GitHub's runner does with the action's steps that run a shell."""

    folder: Path
    inputs: dict[str, str]
    outputs: dict[str, dict[str, str]]
    status: int = 0

    def evaluated(self, text: str) -> str:
        """An expression's value; only those that the action has in its steps' environments."""

        def value(match: re.Match[str]) -> str:
            kind, _, name = match[1].partition(".")
            if kind == "inputs":
                return self.inputs[name]
            if kind == "steps":
                step, _, output = name.partition(".outputs.")
                return self.outputs.get(step, {}).get(output, "")
            assert match[1] == "runner.temp"
            return str(self.folder / "temp")

        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", value, text)

    def run(self, name: str, **environment: str) -> int:
        """Run one step as the runner does; its exit status."""
        (step,) = (each for each in STEPS if each["name"] == name)
        script, output = self.folder / "script.sh", self.folder / "output"
        script.write_text(step["run"], encoding="utf-8")
        output.write_bytes(b"")
        own = {key: self.evaluated(value) for key, value in step.get("env", {}).items()}
        done = subprocess.run(
            [BASH, "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)],
            cwd=self.folder / "work",
            env={
                "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "GITHUB_ACTION_PATH": str(self.folder / "an action"),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"),
                "FAKE_LOG": str(self.folder / "log"),
                **own,
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if "id" in step:
            self.outputs[step["id"]] = dict(line.split("=", 1) for line in output.read_text().splitlines())
        assert not list(self.folder.rglob("pwned")), done
        return done.returncode

    @property
    def told(self) -> dict[str, Any]:
        """What the one program that a step started was asked."""
        (line,) = (self.folder / "log").read_text(encoding="utf-8").splitlines()
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    for name in ("work", "bin", "temp"):
        (tmp_path / name).mkdir()
    for name in ("python", "nextvit-export"):
        fake = tmp_path / "bin" / name
        fake.write_text(FAKE.format(python=sys.executable), encoding="utf-8")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    return Runner(tmp_path, {name: each.get("default", "") for name, each in ACTION["inputs"].items()}, {})


def asked(runner: Runner, status: str = "0") -> tuple[list[str], dict[str, str]]:
    """What the check was asked, and what the step gives out."""
    assert runner.run("Name the places") == 0
    assert runner.run("Check", FAKE_STATUS=status) == 0
    told = runner.told
    assert told["program"] == "nextvit-export"
    return told["asked"], runner.outputs["check"]


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.github-actions", "action.yml"),
        ("vendor.github-workflows", ".github/workflows/check.yml"),
        ("custom.github-workflows-require-timeout", ".github/workflows/check.yml"),
    ],
)
def test_it_fits_githubs_schema(schema: str, path: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_takes_the_hook(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-manifest", str(ROOT / ".pre-commit-hooks.yaml")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ) | {"PRE_COMMIT_HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert (hook["id"], hook["entry"], hook["pass_filenames"]) == (
        "nextvit-export-check",
        "nextvit-export check",
        False,
    )
    for name, wanted in {
        "nextvit-export.toml": True,
        "models/nextvit-export.toml": True,
        "models/nano.safetensors": True,
        "nano.pth": True,
        "pyproject.toml": False,
        "nano.pth.md": False,
    }.items():
        assert bool(re.search(hook["files"], name)) is wanted


def test_nothing_is_put_into_a_shells_text() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8"))
    steps = [*STEPS, *(step for job in workflow["jobs"].values() for step in job["steps"])]
    scripts = [step["run"] for step in steps if "run" in step]
    assert len(scripts) == 6
    assert not [script for script in scripts if "${{" in script]
    assert all(step["shell"] == "bash" for step in STEPS if "run" in step)


def test_what_is_kept_and_uploaded_is_so_whatever_the_verdict() -> None:
    late = STEPS[[step["name"] for step in STEPS].index("Check") + 1 :]
    assert [step["name"] for step in late] == [
        "Keep the outcomes",
        "Send problems to code scanning",
        "Upload the folder",
        "Leave with the verdict",
    ]
    assert all(step["if"].startswith("always() && ") for step in late)
    assert set(ACTION["outputs"]) == {"verdict", "report"}


def test_the_usual_command(runner: Runner) -> None:
    arguments, outputs = asked(runner)
    report = str(runner.folder / "work" / "nextvit-export-check")
    assert runner.outputs["places"] == {"report": report}
    assert arguments == [
        "check",
        f"--output={report}",
        f"--junit={report}/junit.xml",
        f"--sarif={report}/check.sarif",
        f"--summary={runner.folder / 'summary.md'}",
        "--",
        "nextvit-export.toml",
    ]
    assert outputs == {"verdict": "verified", "status": "0", "sarif": f"{report}/check.sarif"}
    assert runner.told["cwd"] == str(runner.folder / "work")
    assert runner.told["environment"]["NEXTVIT_DEPLOY_CACHE"] == str(runner.folder / "temp" / "nextvit-deploy-cache")


@pytest.mark.parametrize(
    ("status", "verdict"),
    [("0", "verified"), ("3", "failed"), ("4", "not verified"), ("1", "error"), ("2", "error"), ("130", "error")],
)
def test_the_step_goes_on_and_the_action_leaves_with_the_status(runner: Runner, status: str, verdict: str) -> None:
    _, outputs = asked(runner, status)
    assert outputs["verdict"] == verdict
    assert ("sarif" in outputs) == (verdict != "error")
    assert runner.run("Leave with the verdict") == int(status)


@pytest.mark.parametrize("value", [HOSTILE, "-rf", "--fresh", "two  spaces", "ünï", "line\nbreak"])
def test_inputs_are_values_whatever_is_in_them(runner: Runner, value: str) -> None:
    runner.inputs |= {"config": value, "baseline": value}
    arguments, _ = asked(runner)
    assert arguments[-3:] == [f"--baseline={value}", "--", value]
    assert len(arguments) == 8


@pytest.mark.parametrize("value", [HOSTILE, "-rf", "two  spaces", "ünï"])
def test_folders_are_found_whatever_they_are_called(runner: Runner, value: str) -> None:
    (runner.folder / "work" / value).mkdir()
    runner.inputs |= {"working-directory": value, "output": value}
    arguments, outputs = asked(runner)
    report = str(runner.folder / "work" / value / value)
    assert arguments[1] == f"--output={report}"
    assert outputs["sarif"] == f"{report}/check.sarif"
    assert runner.told["cwd"] == str(runner.folder / "work" / value)


def test_a_line_break_in_a_folder_can_not_say_what_the_outputs_are(runner: Runner) -> None:
    runner.inputs["output"] = "x\nverdict=verified"
    assert runner.run("Name the places") == 1
    assert runner.outputs["places"] == {}


def test_options_are_split_as_a_shell_splits_and_nothing_is_run(runner: Runner) -> None:
    runner.inputs["args"] = """--jobs 2 --only '*-fp16-*' --only "a b"\n --ray=$(touch pwned) `touch` * $HOME '' \\;"""
    arguments, _ = asked(runner)
    assert arguments[5:-2] == [
        *("--jobs", "2", "--only", "*-fp16-*", "--only", "a b", "--ray=$(touch", "pwned)"),
        *("`touch`", "*", "$HOME", "", ";"),
    ]


def test_options_that_can_not_be_split_are_an_error(runner: Runner) -> None:
    runner.inputs["args"] = "--only 'x"
    assert runner.run("Name the places") == 0
    assert runner.run("Check") != 0
    assert runner.outputs["check"] == {"verdict": "error"}
    assert not (runner.folder / "log").exists()


def test_an_earlier_checks_results_are_not_this_ones(runner: Runner) -> None:
    report = runner.folder / "work" / "nextvit-export-check"
    report.mkdir()
    names = ("check.json", "check.sarif", "junit.xml", "report.html", "x.onnx")
    for name in names:
        (report / name).write_text("old")
    _, outputs = asked(runner, "1")
    assert [name for name in names if (report / name).exists()] == ["x.onnx"]
    assert "sarif" not in outputs


@pytest.mark.parametrize(("extras", "what"), [("coreml,trt-rtx", "[coreml,trt-rtx]"), ("", "")])
def test_it_installs_its_own_checkout(runner: Runner, extras: str, what: str) -> None:
    runner.inputs["extras"] = extras
    assert runner.run("Install nextvit-deploy") == 0
    here = str(runner.folder / "an action")
    assert runner.told["asked"] == ["-m", "pip", "install", "--constraint", f"{here}/constraints.txt", f"{here}{what}"]


@pytest.mark.parametrize("extras", [HOSTILE, "coreml] --index-url https://x.y", "a b", "a\nb", "a;b"])
def test_extras_are_names(runner: Runner, extras: str) -> None:
    runner.inputs["extras"] = extras
    assert runner.run("Install nextvit-deploy") == 1
    assert not (runner.folder / "log").exists()


def test_a_failed_installation_fails_the_step(runner: Runner) -> None:
    assert runner.run("Install nextvit-deploy", FAKE_STATUS="1") == 1
