"""What holds for every file: short modules and functions, documented, safe to load, light to import."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "nextvit_deploy", ROOT / "models" / "nextvit_models", ROOT / "exporters" / "nextvit_exporters")
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
SOURCES = sorted([*MODULES, *(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))])
HEAVY = ("onnx", "onnxruntime", "onnxscript", "onnxsim", "timm", "torch", "torchvision")

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
MACHINE_PATH = re.compile(rb"/(?:work|root|home|Users)/\w")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str) -> Iterator[str]:
    """Functions longer than allowed, decorators and docstring included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines = (node.end_lineno or first) - first + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name}: {lines} lines"


def undocumented(source: str) -> Iterator[str]:
    """The module, and its public functions and classes, that have no docstring."""
    module = ast.parse(source)
    if module.body and not ast.get_docstring(module):
        yield "the module"
    named = [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    yield from (node.name for node in named if not node.name.startswith("_") and not ast.get_docstring(node))


def unsafe_loads(source: str) -> Iterator[str]:
    """Calls of ``torch.load`` that may run code from the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_short_and_safe(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    assert list(long_functions(source)) == []
    assert list(unsafe_loads(source)) == []


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_documented(path: Path) -> None:
    assert list(undocumented(path.read_text(encoding="utf-8"))) == []


def test_the_checks_see_what_they_look_for() -> None:
    body = "\n".join(f"    x{index} = {index}" for index in range(MAX_FUNCTION_LINES))
    assert list(long_functions(f"def f():\n{body}\n")) == ["f: 61 lines"]
    assert list(undocumented("def f(): ...\nclass C: ...\ndef _g(): ...\n")) == ["the module", "f", "C"]
    assert list(undocumented('"""Doc."""\ndef f():\n    """Doc."""\n')) == []
    assert len(list(unsafe_loads("torch.load(p)\ntorch.load(p, weights_only=False)\n"))) == 2
    assert list(unsafe_loads("torch.load(p, weights_only=True)\n")) == []
    assert MACHINE_PATH.search(b"see /" + b"home/ada/model.onnx")


def test_no_file_names_a_place_on_someones_machine() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / entry.decode() for entry in listing.split(b"\0") if entry]
    assert ROOT / "pyproject.toml" in files
    assert [name(path) for path in files if path.is_file() and MACHINE_PATH.search(path.read_bytes())] == []


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["nextvit_deploy", "nextvit_deploy.cli"])
def test_help_need_not_wait_for_a_framework(module: str) -> None:
    assert run(f"import sys, {module}; print(sorted({set(HEAVY)!r} & set(sys.modules)))") == "[]"


def test_every_module_imports_and_takes_no_common_name() -> None:
    modules = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
        if path.name not in {"__init__.py", "__main__.py"}
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(sorted({'models', 'exporters', 'tests', 'benchmarks'} & set(sys.modules)))"
    assert run(code.replace("sys.argv[1:]", repr(modules))) == "[]"
