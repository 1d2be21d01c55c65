"""A user's own function, imported from a file and called on a picture."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

from nextvit_deploy.contract.given import Array, as_array
from nextvit_deploy.data import to_rgb
from nextvit_exporters.errors import DeployError, first_line

_TAKEN: Final = {"path": "a path", "pil": "a PIL image", "array": "an HWC uint8 array"}
_PREFIX: Final = "_given_"
_CALLS: Final = 4
"""A flip of one picture in two is missed once in eight."""
_STEADY: Final = 1e-4
"""Share of a tensor's range by which results may differ: less than a step of a pixel."""


def is_function(source: str) -> bool:
    """Whether ``source`` is written FILE.py:FUNCTION."""
    return source.rpartition(":")[0].endswith(".py")


def call(source: str, takes: str, picture: Image.Image, path: Path) -> tuple[Array, ...]:
    """What FILE.py:FUNCTION returns for the picture, given as ``takes`` says, one time after another.

    ``path`` is where the picture lies. What the function prints goes to stderr. Raises DeployError where it can't be
    imported or called, or returns no array.
    """
    file, _, name = source.rpartition(":")
    folder = Path(file).resolve().parent
    with contextlib.redirect_stdout(sys.stderr), _importable(folder, Path(file).stem):
        function = _import(Path(file), name)
        upright = np.asarray(to_rgb(ImageOps.exif_transpose(picture)))
        returned = []
        for _ in range(_CALLS):
            argument = {"path": str(path), "pil": picture.copy(), "array": upright.copy()}[takes]
            try:
                result = function(argument)
            except (Exception, SystemExit) as error:  # whatever it is, it is theirs
                raise DeployError(
                    f"{source} raises {_said(error, folder)}; it was given {_TAKEN[takes]}, see --takes"
                ) from error
            returned.append(np.array(as_array(result, source)))  # a copy: it may be the same memory each time
    return tuple(returned)


def unsteady(arrays: Sequence[Array]) -> str:
    """In what way results of one function for one picture differ; empty where they don't."""
    shapes = list(dict.fromkeys(each.shape for each in arrays))
    if len(shapes) > 1:
        return f"one call gives shape {shapes[0]}, another {shapes[1]}, for the same picture"
    first, *others = (each.astype(np.float64) for each in arrays)
    most = max((float(np.abs(each - first).max(initial=0.0)) for each in others), default=0.0)
    if most <= _STEADY * float(np.ptp(first)):
        return ""
    return (
        f"the same picture gives another tensor each time, values up to {most:.3g} apart; "
        "random augmentation is on, so build it in eval mode"
    )


def _said(error: BaseException, folder: Path) -> str:
    """What went wrong, and the innermost line of the user's own files where it did."""
    kind = type(error).__name__
    told = f"{kind}: {first_line(error) if isinstance(error, Exception) else 'it ends the program'}"
    if isinstance(error, SyntaxError) and error.filename:
        return told  # which ends in the file and line
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(folder) and "site-packages" not in path.parts:
            return f"{told} (at {path.name}:{frame.lineno})"
    return told


def _import(path: Path, name: str) -> Callable[[object], object]:
    if not path.is_file():
        raise DeployError(f"there is no file {path}; write FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(f"{_PREFIX}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise DeployError(f"{path} can't be imported; name a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever it is, it is theirs
        raise DeployError(f"{path} can't be imported: {_said(error, path.resolve().parent)}") from error
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
        sys.modules.pop(f"{_PREFIX}{name}", None)
