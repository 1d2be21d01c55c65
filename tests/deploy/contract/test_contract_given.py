"""What a user hands over is read, whatever its form, and what can't be is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nextvit_deploy.contract.given import Array, given, load_tensor, open_picture
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


def test_pickled_objects_are_refused_as_such(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    torch.save(Path("x"), tmp_path / "object.pt")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps({"a": 1}))
    for name in ("objects.npy", "object.pt", "pickle.npy"):
        with pytest.raises(DeployError, match="holds pickled Python objects"):
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
        (VALUES[:, :7], ": resize and crop to 8 x 8"),
        (VALUES[None].repeat(2, axis=0), "give one picture, not 2"),
        (VALUES[0], "one channel"),
        (VALUES[None, :1], "one channel"),
        (VALUES[0, :7, :, None], "one channel"),
        (np.concatenate([VALUES, VALUES[:1]])[None], "four channels"),
        (np.concatenate([VALUES, VALUES[:1]]).transpose(1, 2, 0), "four channels"),
        (np.concatenate([VALUES, VALUES])[:5], "three channels"),
        (VALUES.ravel(), "resize and crop"),
        (VALUES / np.float32(np.nan), "NaN or infinite"),
        (VALUES.astype(str), "floating-point numbers"),
    ],
)
def test_what_is_no_picture_is_refused(array: Array, said: str) -> None:
    with pytest.raises(DeployError, match=said):
        given(array, "it", 8)


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
