"""A user's own function is called, more than once, and what it does wrong is told with its line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nextvit_deploy.contract.calls import call, is_function, unsteady
from nextvit_deploy.contract.given import Array, open_picture
from nextvit_deploy.contract.given import test_picture as make_picture
from nextvit_exporters.errors import DeployError


@pytest.mark.parametrize(
    ("takes", "body"),
    [
        ("pil", "numpy.asarray(x.convert('RGB'))"),
        ("path", "numpy.asarray(PIL.Image.open(x))"),
        ("array", "x"),
        ("array", "torch.from_numpy(x)"),
    ],
)
def test_a_function_is_called(takes: str, body: str, tmp_path: Path) -> None:
    make_picture().save(tmp_path / "a.png")
    file = tmp_path / "mine.py"
    (tmp_path / "beside_it.py").write_text("import numpy, torch, PIL.Image\n")
    file.write_text(f"from beside_it import *\ndef run(x):\n    return {body}\n")
    returned, *_ = call(f"{file}:run", takes, open_picture(tmp_path / "a.png"), tmp_path / "a.png")
    assert np.array_equal(returned, np.asarray(make_picture()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def run(x): raise KeyError('k')", "raises KeyError"),
        ("def run(x): raise SystemExit", "raises SystemExit: it ends the program"),
        ("def run(x): return [1]", "gives list"),
        ("def other(x): pass", "has no function 'run'"),
        ("run = 3", "has no function 'run'"),
        ("import not_there_at_all", "can't be imported: ModuleNotFoundError"),
        ("def run(:", "can't be imported: SyntaxError"),
    ],
)
def test_a_function_that_fails_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(DeployError, match=said):
        call(f"{file}:run", "pil", make_picture(), tmp_path / "a.png")


def test_functions_and_files_are_told_apart() -> None:
    assert is_function("a.py:f")
    assert not is_function("a.npy")
    assert not is_function("C:a.npy")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine.py": "def run(x):\n    return x.nothing"}, r"AttributeError: .* \(at mine.py:2\);"),
        ({"mine.py": "import PIL.Image\ndef run(x):\n    return PIL.Image.open(3)"}, r"\(at mine.py:3\);"),
        ({"mine.py": "from other import *", "other.py": "def run(x):\n\n    return 1 / 0"}, r"\(at other.py:3\);"),
        (
            {"mine.py": "import other", "other.py": "\n\n1 / 0"},
            r"can't be imported: ZeroDivisionError: .* \(at other.py:3\)$",
        ),
        ({"mine.py": "\ndef run(:"}, r"can't be imported: SyntaxError: .*mine.py, line 2"),
        ({"mine.py": "def run(): pass"}, r"TypeError: .* positional argument.*; it was given"),
    ],
)
def test_what_it_raises_is_told_with_its_line(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    try:
        with pytest.raises(DeployError, match=said) as raised:
            call(f"{tmp_path / 'mine.py'}:run", "pil", make_picture(), tmp_path / "a.png")
        assert "\n" not in str(raised.value)
    finally:
        sys.modules.pop("other", None)


def test_it_may_change_what_it_is_given_and_return_the_same_memory(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("held = []\ndef run(x):\n    held.append(x)\n    x += 1\n    return x\n")
    arrays = call(f"{file}:run", "array", make_picture(), tmp_path / "a.png")
    assert unsteady(arrays) == ""


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([np.zeros((2, 2)), np.zeros((2, 3))], "another \\(2, 3\\)"),
        ([np.eye(2), np.eye(2), np.eye(2)[::-1]], "values up to 1 apart; .* eval mode"),
        ([np.eye(2), np.eye(2) + 1e-6], "^$"),
        ([np.eye(2, dtype=np.uint8), 1 - np.eye(2, dtype=np.uint8)], "values up to 1 apart"),
        ([np.eye(2)], "^$"),
    ],
)
def test_results_that_differ_are_told(arrays: list[Array], said: str) -> None:
    assert re.search(said, unsteady(arrays))
