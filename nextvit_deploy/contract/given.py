"""What a user hands over: a function of theirs or a file with its result, and the picture it was given."""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nextvit_deploy.contract.steps import Values
from nextvit_exporters.errors import DeployError, first_line

TAKES: Final = ("path", "pil", "array")
SUFFIXES: Final = (".npy", ".npz", ".pt", ".pth", ".safetensors")
_TEST_SIZE: Final = (401, 300)
_SEED: Final = 7

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A preprocessed picture as (3, H, W) float64, how it was laid out, and what is harmless but worth saying."""

    values: Values
    layout: str
    notes: tuple[str, ...]


def is_function(source: str) -> bool:
    """Whether ``source`` is written FILE.py:FUNCTION."""
    return source.rpartition(":")[0].endswith(".py")


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
            opened.load()
            return opened.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DeployError(f"{path} can't be read as a picture; name a JPEG or PNG file") from error


def call(source: str, takes: str, picture: Image.Image, path: Path) -> Array:
    """What FILE.py:FUNCTION returns for the picture, given as ``takes`` says; ``path`` is where it lies.

    What it prints goes to stderr. Raises DeployError where it can't be imported or called, or returns no array.
    """
    file, _, name = source.rpartition(":")
    with contextlib.redirect_stdout(sys.stderr):
        function = _import(Path(file), name)
        upright = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        argument = {"path": str(path), "pil": picture, "array": upright.copy()}[takes]
        try:
            returned = function(argument)
        except (Exception, SystemExit) as error:  # whatever it is, it is theirs
            raise DeployError(
                f"{source} raises {type(error).__name__}: {_said(error)}; it was given {_article(takes)}, see --takes"
            ) from error
    return _as_array(returned, source)


def load_tensor(path: Path) -> Array:
    """The one array in a .npy, .npz, .pt or .safetensors file; raises DeployError where there isn't exactly one."""
    if path.suffix not in SUFFIXES:
        raise DeployError(f"{path} is neither FILE.py:FUNCTION nor a tensor; it takes {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DeployError(f"there is no file {path}; name a saved tensor")
    try:
        held = _read(path)
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DeployError(f"{path} can't be read as a tensor; save one plain array or tensor in it") from error
    if isinstance(held, dict):
        if len(held) != 1:
            raise DeployError(f"{path} holds {len(held)} tensors; save only the preprocessed picture")
        held = next(iter(held.values()))
    return _as_array(held, str(path))


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
            f"{source} gives shape {shape}; the checkpoint reads one picture of (1, 3, {size}, {size}), "
            f"so resize and crop to {size} x {size}"
        )
    if not np.isfinite(values).all():
        raise DeployError(f"{source} gives {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    if array.dtype != np.float32:
        notes.append(f"type {array.dtype}: the model reads float32, so convert it")
    return Given(values, layout, tuple(notes))


def _said(error: BaseException) -> str:
    return first_line(error) if isinstance(error, Exception) else "it ends the program"


def _article(takes: str) -> str:
    return {"path": "a path", "pil": "a PIL image", "array": "an HWC uint8 array"}[takes]


def _import(path: Path, name: str) -> Callable[[object], object]:
    if not path.is_file():
        raise DeployError(f"there is no file {path}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"_given_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DeployError(f"{path} can't be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    with _importable(path.resolve().parent, spec.name):
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever it is, it is theirs
            raise DeployError(f"{path} can't be imported: {type(error).__name__}: {_said(error)}") from error
    function: object = getattr(module, name, None)
    if not callable(function):
        raise DeployError(f"{path} has no function {name!r}; write FILE.py:FUNCTION")
    return function


@contextlib.contextmanager
def _importable(folder: Path, name: str) -> Iterator[None]:
    """Let the file import its neighbours, as it can where it is run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


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


def _as_array(value: object, source: str) -> Array:
    """NumPy's view of an array or a tensor."""
    if isinstance(value, np.ndarray):
        return value
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        array: Array = (plain.float() if plain.dtype is torch.bfloat16 else plain).numpy()
        return array
    raise DeployError(f"{source} gives {type(value).__name__}; return a NumPy array or a PyTorch tensor")
