"""What a user names by a path: a checkpoint, or a folder of pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

from nextvit_deploy.check.tables import shown
from nextvit_models.errors import DeployError

_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES: Final = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".onnx", ".zip", ".tar")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads like ``owner/name``: ``nextvit_models`` knows it too, but comes with PyTorch."""
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(_FILES)


def checkpoint_at(value: str, path: Path, otherwise: str) -> str:
    """The path of a checkpoint, or its hub id as it is.

    Raises DeployError where ``value``, which stands for ``path``, is neither; ``otherwise`` is what else to give.
    """
    what = what_is(path)
    if what == "file":
        return str(path)
    if what == "folder":
        raise DeployError(f"{shown(value)} is a folder; give the checkpoint's file")
    if is_hub_id(value):
        return value
    raise DeployError(f"there is no {shown(str(path))}; give the checkpoint's file, a hub id, or {otherwise}")


def check_pictures(path: Path, name: str) -> None:
    """Raise DeployError where ``path``, given as ``name``, is no folder."""
    if what_is(path) != "folder":
        what = "is a file" if what_is(path) else "isn't there"
        raise DeployError(f"{path} {what}; name a folder of pictures, or leave {name} out")


def what_is(path: Path) -> Literal["file", "folder", ""]:
    """What is there; nothing where it can't be asked, as with a name too long."""
    try:
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, ValueError):
        return ""
