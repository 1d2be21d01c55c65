"""The command line: quick to answer, silent when asked, JSON that any reader takes, and honest about the demo."""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from nextvit_deploy import __version__, cli
from nextvit_exporters import to_onnx
from nextvit_exporters.passes.base import PassResult, Refusal, Rewrite
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, Ran, Replay, call, contents, one_line, run

COMMANDS = ("onnx", "verify", "evaluate", "inspect", "passes", "convert", "doctor")
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "PIL", "safetensors", "timm", "torchvision")
DEMO_NOTE = "the bundled demo"


def imports(*arguments: str, **environment: str) -> tuple[Ran, set[str]]:
    """One run in a process of its own, and which heavy packages it had imported at the end."""
    code = "import atexit, sys\nfrom nextvit_deploy.cli import main\n"
    code += f"atexit.register(lambda: print('imported', *({HEAVY} & sys.modules.keys()), file=sys.stderr))\nmain()"
    code = code.replace(str(HEAVY), str(set(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    *err, last = done.stderr.splitlines(keepends=True)
    word, *found = last.split()
    assert word == "imported", done.stderr
    return Ran(done.returncode, done.stdout, "".join(err)), set(found)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), *((command, "--help") for command in COMMANDS)])
def test_help_imports_no_framework(arguments: tuple[str, ...]) -> None:
    ran, found = imports(*arguments)
    assert found == set()
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("Usage: nextvit-export")
    if not arguments or arguments[0].startswith("-"):
        assert all(re.search(rf"^  {command} ", ran.out, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments", [("--version",), ("doctor",), ("doctor", "--json"), ("onyx",), ("onnx", "--siez")]
)
def test_neither_does_what_needs_none(arguments: tuple[str, ...]) -> None:
    assert imports(*arguments)[1] == set()


def test_the_check_sees_an_import() -> None:
    assert imports("inspect", "absent.pth")[1] >= {"torch", "numpy"}


def test_version() -> None:
    assert call("--version") == Ran(0, f"{__version__}\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell: str) -> None:
    """The shell is named, not guessed from the process that started the tests, which may be make."""
    ran, found = imports("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (ran.status, ran.err, found) == (0, "", set())
    assert "_NEXTVIT_EXPORT_COMPLETE" in ran.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("nextvit-export ve", {"verify"}),
        ("nextvit-export onnx --dyn", {"--dynamic-batch", "--dynamic-size"}),
        ("nextvit-export onnx --for tensorrt-1", {"tensorrt-10", "tensorrt-11"}),
    ],
)
def test_completion_completes_and_imports_no_framework(words: str, expected: set[str]) -> None:
    environment = {
        "_NEXTVIT_EXPORT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    ran, found = imports(**environment)
    assert (ran.status, found) == (0, set())
    assert set(ran.out.split()) == expected


@pytest.mark.parametrize(
    ("options", "commands"),
    [
        (("--json",), COMMANDS),
        (("--quiet", "-q"), ("onnx", "verify", "evaluate", "inspect", "passes", "convert")),
        (("--verbose", "-v"), ("onnx", "verify", "evaluate", "passes")),
        (("--ema",), ("onnx", "verify", "evaluate", "inspect", "passes", "convert")),
        (("--size",), ("onnx", "inspect", "passes")),
        (("--images", "--count"), ("onnx", "verify")),
        (("--skip-pass",), ("onnx", "passes")),
        (("--output", "-o", "--batch"), ("onnx",)),
    ],
)
def test_options_have_the_same_names_everywhere(options: tuple[str, ...], commands: tuple[str, ...]) -> None:
    for command in commands:
        shown = call(command, "--help").out
        assert all(re.search(rf"(^|\s){option}\b", shown) for option in options), command


def test_a_real_export_prints_its_manifest_and_nothing_else(demo: Exported) -> None:
    """No warning of a framework, no progress in a pipe: stderr is empty, stdout is one strict JSON object."""
    assert (demo.ran.status, demo.ran.err) == (0, "")
    assert demo.ran.json["verdict"] == "verified"


@pytest.fixture
def commands(demo: Exported, replay: Replay, tmp_path: Path) -> dict[str, tuple[str | Path, ...]]:
    """One successful call of every command that can be quiet, none of them slow."""
    del replay
    return {
        "onnx": ("onnx", "--output", tmp_path / "out"),
        "verify": ("verify", demo.path),
        "inspect": ("inspect",),
        "inspect artefact": ("inspect", demo.path),
        "passes": ("passes",),
        "convert": ("convert", DEMO_CHECKPOINT, tmp_path / "w.safetensors"),
    }


def test_quiet_is_silent(commands: dict[str, tuple[str | Path, ...]]) -> None:
    for command in commands.values():
        assert call(*command, "--quiet") == Ran(0, "", ""), command


def test_json_is_strict_and_alone(commands: dict[str, tuple[str | Path, ...]]) -> None:
    for command in (*commands.values(), ("doctor",)):
        ran = call(*command, "--json")
        assert (ran.status, ran.err) == (0, ""), command
        assert ran.json, command


def test_tables_go_to_stdout_alone(commands: dict[str, tuple[str | Path, ...]]) -> None:
    for command in (*commands.values(), ("doctor",)):
        ran = call(*command)
        assert (ran.status, ran.err) == (0, ""), command
        assert ran.out, command
        assert "\x1b" not in ran.out, command  # no colour in a pipe


def test_the_demo_is_named_wherever_it_is_used(
    commands: dict[str, tuple[str | Path, ...]], demo: Exported, tmp_path: Path
) -> None:
    for name in ("onnx", "verify", "inspect", "passes"):
        assert DEMO_NOTE in call(*commands[name]).out, name
        assert DEMO_NOTE in json.dumps(call(*commands[name], "--json").json), name
    own = tmp_path / "own.safetensors"
    own.write_bytes(DEMO_CHECKPOINT.read_bytes())
    for command in (("inspect", own), ("passes", own), ("verify", demo.path, "--checkpoint", own)):
        shown = json.dumps(call(*command, "--json").json)
        assert DEMO_NOTE not in shown, command
        assert ("verified on the demo's digits, not on pictures of your task" in shown) == (command[0] == "verify")
    pictures = call("verify", demo.path, "--checkpoint", own, "--images", tmp_path, "--json")
    assert one_line(pictures.err).startswith("no image in ")


def test_convert_keeps_the_weights(tmp_path: Path) -> None:
    original = load_checkpoint(DEMO_CHECKPOINT)
    torch.save({"model": original.model.state_dict()}, tmp_path / "w.pth")
    ran = call("convert", tmp_path / "w.pth", tmp_path / "new" / "w.safetensors", "--json")
    assert ran.json["weights"] == original.fingerprint
    assert ran.json["file"] == str(tmp_path / "new" / "w.safetensors")
    assert load_checkpoint(tmp_path / "new" / "w.safetensors").fingerprint == original.fingerprint
    assert sorted(contents(tmp_path)) == ["new/w.safetensors", "w.pth"]


def test_doctor_lists_packages_and_lanes() -> None:
    found = call("doctor", "--json").json
    assert found["facts"]["torch"] == torch.__version__.split("+")[0]
    assert {lane["name"]: lane["works"] for lane in found["lanes"]}["onnx"] is True


class Spoil(Rewrite):
    """A pass that goes wrong: it makes the first logit NaN, and says what it left alone."""

    name = "spoil"

    def __call__(self, graph: fx.GraphModule) -> PassResult:
        head = copy.deepcopy(graph.get_submodule("proj_head.0"))
        assert isinstance(head, torch.nn.Linear)
        with torch.no_grad():
            head.bias[0] = torch.nan
        graph.set_submodule("proj_head.0", head)
        return PassResult(1, (Refusal("features.0", "it is [bold]fine[/] as it is"),))


def test_a_pass_that_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is infinite, which JSON has no word for."""
    monkeypatch.setattr(to_onnx, "ONNX_RUNTIME", (Spoil(), *to_onnx.PASSES[:1]))
    ran = call("passes", "--json")
    assert ran.status == 3
    assert one_line(ran.err) == "rolled back, for it moved the outputs: spoil; report it, or --skip-pass it"
    spoil, *others = ran.json["passes"]
    assert (spoil["name"], spoil["certified"], spoil["error_float64"]) == ("spoil", False, "inf")
    assert all(each["certified"] for each in others)
    assert "pass spoil moved the outputs by inf and was rolled back" in ran.json["notes"]
    assert "rolled back" in call("passes").out
    assert call("passes", "--quiet").out == ""


def test_verbose_tells_what_was_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "ONNX_RUNTIME", (Spoil(),))
    said = "spoil left features.0: it is [bold]fine[/] as it is"
    assert said in call("passes", "-v").out
    assert said not in call("passes").out


def test_verbose_tells_what_was_inferred(demo: Exported, quick: None) -> None:
    del quick
    said = "variant nextvit_nano: 7 blocks"
    assert said in call("verify", demo.path, "--verbose").out
    assert said not in call("verify", demo.path).out


def on_a_terminal(*arguments: str | Path, **environment: str) -> tuple[str, str]:
    """Stdout of a run in a process of its own, and what it left on a terminal by stderr."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nextvit_deploy", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
        env=os.environ | {"TERM": "xterm"} | environment,
    )
    os.close(terminal)
    shown = b""
    try:
        while more := os.read(screen, 65536):
            shown += more
    except OSError:  # what Linux says when nobody holds the other end any more
        pass
    os.close(screen)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    return out, shown.decode()


def left_on_screen(shown: str) -> str:
    """What is still readable after the terminal did what it was told: carriage returns, erased lines, moves up."""
    lines = [""]
    for part in re.split(r"(\r\n|\r|\x1b\[[0-9;?]*[A-Za-z])", shown):
        if part == "\r\n":
            lines.append("")
        elif part in {"\x1b[2K", "\x1b[1A"}:
            lines = lines[:-1] or [""] if part == "\x1b[1A" else [*lines[:-1], ""]
        elif part != "\r" and not part.startswith("\x1b"):
            lines[-1] += part
    return "\n".join(lines).strip()


def test_progress_names_steps_and_seconds_and_leaves_nothing() -> None:
    out, shown = on_a_terminal("passes")
    assert "strip-train-only" in out
    for step in ("import PyTorch", "certify strip-train-only", "certify average-early"):
        assert step in shown
    assert re.search(r"\d:\d\d:\d\d", shown)
    assert left_on_screen(shown) == ""
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_the_screen_is_read_as_a_terminal_does() -> None:
    assert left_on_screen("one\r\x1b[2Ktwo\r\nthree\r\n\x1b[1A\x1b[2K") == "two"
    assert left_on_screen("step 1\r\n") == "step 1"


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_no_progress_where_none_was_asked_for(tmp_path: Path, option: str) -> None:
    _, shown = on_a_terminal("convert", DEMO_CHECKPOINT, tmp_path / "w.safetensors", option)
    assert shown == ""


def test_no_progress_in_a_pipe_that_is_told_to_be_colourful(tmp_path: Path) -> None:
    ran = run("convert", DEMO_CHECKPOINT, tmp_path / "w.safetensors", FORCE_COLOR="1")
    assert (ran.status, ran.err) == (0, "")


def test_nobody_reads_on() -> None:
    """As with ``| head``: no traceback when the other end of the pipe is closed."""
    for arguments in (("doctor",), ("doctor", "--json")):
        process = subprocess.Popen(
            [sys.executable, "-m", "nextvit_deploy", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.wait(timeout=600)
        process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_results_that_cannot_be_printed() -> None:
    for arguments in (("doctor",), ("doctor", "--json")):
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            done = subprocess.run(
                [sys.executable, "-m", "nextvit_deploy", *arguments],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert one_line(done.stderr) == "the results can't be printed: No space left on device"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can act on becomes one line."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("nextvit_deploy.pipeline.certify", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["passes"])
    monkeypatch.setattr(
        "nextvit_deploy.pipeline.certify",
        lambda *_: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    )
    ran = call("passes")
    assert (ran.status, one_line(ran.err)) == (1, "not enough memory; use a smaller --size, --batch or --count")
