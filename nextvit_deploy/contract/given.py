"""What a user hands over: a tensor, by itself or in a file, and the picture it was made from."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nextvit_deploy.contract.steps import Values
from nextvit_deploy.data import to_rgb
from nextvit_exporters.errors import DeployError

SUFFIXES: Final = (".npy", ".npz", ".pt", ".pth", ".safetensors")
_TEST_SIZE: Final = (401, 300)
_SEED: Final = 7
_HEADER: Final = 256
"""Bytes of a file within which it says what it holds."""

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A preprocessed picture as (3, H, W) float64, how it was laid out, and what is harmless but worth saying."""

    values: Values
    layout: str
    notes: tuple[str, ...]


def test_picture() -> Image.Image:
    """A seeded picture of coloured shapes and grain, wider than high, that shows every step."""
    generator = np.random.default_rng(_SEED)
    width, height = _TEST_SIZE
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((5, 70), (24, 50), (90, 30)):
        coarse = generator.standard_normal((cells, cells, 3)).astype(np.float32)
        total += weight * np.repeat(np.repeat(coarse, -(-height // cells), 0), -(-width // cells), 1)[:height, :width]
    tint = np.array([150, 120, 90], np.float32)
    return Image.fromarray(np.clip(total + tint, 0, 255).astype(np.uint8))


def open_picture(path: Path) -> Image.Image:
    """The picture in a file; raises DeployError where it can't be read."""
    try:
        with Image.open(path) as opened:
            to_rgb(opened)  # which refuses what no tensor can be made of
            return opened.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DeployError(f"{path} can't be read as a picture; name a JPEG or PNG file") from error


def load_tensor(path: Path) -> Array:
    """The one array in a .npy, .npz, .pt or .safetensors file; raises DeployError where there isn't exactly one."""
    if path.suffix not in SUFFIXES:
        raise DeployError(f"{path} is neither FILE.py:FUNCTION nor a tensor; it takes {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DeployError(f"there is no file {path}; name a saved tensor")
    try:
        held = _read(path)
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        if _pickled(path, error):
            raise DeployError(
                f"{path} holds pickled Python objects, which could run code when read; save one plain array or tensor"
            ) from error
        raise DeployError(f"{path} can't be read as a tensor; save one plain array or tensor in it") from error
    if isinstance(held, dict):
        if len(held) != 1:
            raise DeployError(f"{path} holds {len(held)} tensors; save only the preprocessed picture")
        held = next(iter(held.values()))
    return as_array(held, str(path))


def given(array: Array, source: str, size: int) -> Given:
    """The array as (3, size, size); raises DeployError for another shape, for no numbers and for NaN or infinity."""
    if array.dtype.kind not in "fiu":
        raise DeployError(f"{source} gives values of type {array.dtype}; return floating-point numbers")
    shape, notes = array.shape, []
    values = array.astype(np.float64)
    if values.ndim == 4 and len(values) == 1:
        values = values[0]
    elif values.ndim == 3:
        notes.append("no batch axis: the model reads (1, 3, H, W), so add one")
    if values.shape == (3, size, size):
        layout = "CHW"
    elif values.shape == (size, size, 3):
        layout, values = "HWC", values.transpose(2, 0, 1)
    else:
        raise DeployError(
            f"{source} gives shape {shape}; the checkpoint reads one picture of (1, 3, {size}, {size}): "
            f"{_reshape(shape, size)}"
        )
    if not np.isfinite(values).all():
        raise DeployError(f"{source} gives {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    if array.dtype != np.float32:
        notes.append(f"type {array.dtype}: the model reads float32, so convert it")
    return Given(values, layout, tuple(notes))


def _reshape(shape: tuple[int, ...], size: int) -> str:
    """What to do about a shape that the checkpoint can't read."""
    picture = shape[1:] if len(shape) == 4 else shape
    ends = {picture[0], picture[-1]} if len(picture) == 3 else set()
    if len(shape) == 4 and shape[0] != 1:
        return f"give one picture, not {shape[0]}"
    if len(picture) == 2 or (3 not in ends and 1 in ends):
        return "this has one channel, so convert the picture to RGB"
    if 3 not in ends and 4 in ends:
        return "this has four channels, alpha or black among them, so convert the picture to RGB"
    if len(picture) == 3 and 3 not in ends:
        return "give it three channels: red, green and blue"
    return f"resize and crop to {size} x {size}"


def _pickled(path: Path, error: Exception) -> bool:
    """Whether a file that can't be read is a pickle, or a NumPy or PyTorch file with one inside."""
    if path.suffix in {".pt", ".pth"}:
        return isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path)
    try:
        with path.open("rb") as opened:
            start = opened.read(_HEADER)
    except OSError:
        return False
    return start[:1] == b"\x80" or (start.startswith(b"\x93NUMPY") and b"'descr': '|O'" in start)


def _read(path: Path) -> object:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
    import torch

    loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def as_array(value: object, source: str) -> Array:
    """NumPy's view of an array or a tensor."""
    if isinstance(value, np.ndarray):
        return value
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        array: Array = (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()
        return array
    raise DeployError(f"{source} gives {type(value).__name__}; return a NumPy array or a PyTorch tensor")
