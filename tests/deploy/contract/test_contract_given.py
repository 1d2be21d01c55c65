"""What a user hands over is read, whatever its form, and what can't be is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nextvit_deploy.contract.given import Array, call, given, is_function, load_tensor, open_picture
from nextvit_deploy.contract.given import test_picture as make_picture
from nextvit_exporters.errors import DeployError

VALUES = np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)


def saved(folder: Path, suffix: str) -> Path:
    path = folder / f"tensor{suffix}"
    tensor = torch.from_numpy(VALUES)
    match suffix:
        case ".npy":
            np.save(path, VALUES)
        case ".npz":
            np.savez(path, picture=VALUES)
        case ".pt":
            torch.save(tensor, path)
        case _:
            save_file({"picture": tensor}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_files_are_read(suffix: str, tmp_path: Path) -> None:
    assert np.array_equal(load_tensor(saved(tmp_path, suffix)), VALUES)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_broken_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"tensor{suffix}"
    path.write_bytes(b"no tensor at all")
    with pytest.raises(DeployError, match="can't be read as a tensor"):
        load_tensor(path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    torch.save(Path("x"), tmp_path / "object.pt")
    for name in ("objects.npy", "object.pt"):
        with pytest.raises(DeployError, match="can't be read as a tensor"):
            load_tensor(tmp_path / name)


def test_two_tensors_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=VALUES, b=VALUES)
    with pytest.raises(DeployError, match="holds 2 tensors"):
        load_tensor(tmp_path / "two.npz")


@pytest.mark.parametrize(
    ("array", "layout", "notes"),
    [
        (VALUES[None], "CHW", 0),
        (VALUES, "CHW", 1),
        (VALUES.transpose(1, 2, 0)[None], "HWC", 0),
        (VALUES.transpose(1, 2, 0).astype(np.float64), "HWC", 2),
    ],
)
def test_layouts(array: Array, layout: str, notes: int) -> None:
    read = given(array, "it", 8)
    assert np.array_equal(read.values, VALUES)
    assert (read.layout, len(read.notes)) == (layout, notes)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (VALUES[:, :7], "reads one picture of"),
        (VALUES[None].repeat(2, axis=0), "reads one picture of"),
        (VALUES[0], "reads one picture of"),
        (VALUES / np.float32(np.nan), "NaN or infinite"),
        (VALUES.astype(str), "floating-point numbers"),
    ],
)
def test_what_is_no_picture_is_refused(array: Array, said: str) -> None:
    with pytest.raises(DeployError, match=said):
        given(array, "it", 8)


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
    returned = call(f"{file}:run", takes, open_picture(tmp_path / "a.png"), tmp_path / "a.png")
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


def test_the_picture_is_always_the_same_and_not_square() -> None:
    first, second = make_picture(), make_picture()
    assert first.size == (401, 300)
    assert first.tobytes() == second.tobytes()


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"none")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert open_picture(tmp_path / "b.png").size == (4, 4)
    for name in ("a.jpg", "missing.png"):
        with pytest.raises(DeployError, match="can't be read as a picture"):
            open_picture(tmp_path / name)


def test_functions_and_files_are_told_apart() -> None:
    assert is_function("a.py:f")
    assert not is_function("a.npy")
    assert not is_function("C:a.npy")
