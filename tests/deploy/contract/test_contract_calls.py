"""A user's own function is called, more than once, and what it does wrong is told with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nextvit_deploy.contract.calls import call, is_function
from nextvit_deploy.contract.given import open_picture
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
