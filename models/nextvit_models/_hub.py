"""Checkpoints on the Hugging Face hub: download or take from its cache, and read what timm wrote beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nextvit_models._read import one_line
from nextvit_models.errors import CheckpointMismatch, DeployError, MissingExtra
from nextvit_models.preprocessing import Preprocessing

_ID: Final = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE_SUFFIXES: Final = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".onnx", ".zip", ".tar")
_WEIGHTS: Final = ("model.safetensors", "pytorch_model.bin")
_FIELDS: Final = ("mean", "std", "interpolation", "crop_pct")


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Local copies of a repository's weights and, where it has one, its ``config.json``."""

    weights: Path
    config: Path | None


def is_hub_id(source: str) -> bool:
    """Whether ``source`` reads like ``owner/name`` rather than like a path to a weights file."""
    return _ID.fullmatch(source) is not None and not source.endswith(_FILE_SUFFIXES)


def download(repository: str) -> HubFiles:
    """Fetch the files, or find them in the cache (``HF_HUB_OFFLINE=1`` looks nowhere else).

    Raises ``MissingExtra`` without ``huggingface_hub``, ``CheckpointMismatch`` when the files cannot be had.
    """
    reachable = True
    for name in _WEIGHTS:
        weights = _fetch(repository, name, cache_only=not reachable)
        if isinstance(weights, Path):
            break
        reachable = reachable and weights != "unreachable"
    else:
        if reachable:
            raise CheckpointMismatch(f"{repository}: the repository has neither {' nor '.join(_WEIGHTS)}")
        raise _not_cached(repository, _WEIGHTS[0])
    config = _fetch(repository, "config.json", cache_only=not reachable)
    if config == "unreachable":
        raise _not_cached(repository, "config.json")
    return HubFiles(weights, config if isinstance(config, Path) else None)


def _fetch(repository: str, name: str, *, cache_only: bool) -> Path | Literal["absent", "unreachable"]:
    """The local copy of one file; "absent" from the repository, or "unreachable" and not in the cache."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise MissingExtra("loading from the Hugging Face hub", "hub") from error
    try:
        return Path(hf_hub_download(repository, name, local_files_only=cache_only))
    except errors.LocalEntryNotFoundError:
        return "unreachable"
    except errors.EntryNotFoundError:
        return "absent"
    except errors.RepositoryNotFoundError as error:
        raise CheckpointMismatch(
            f"{repository}: no such local file, and no repository of that name on the Hugging Face hub that may be read"
        ) from error
    except Exception as error:
        # The errors of its HTTP clients (requests, then httpx) share no base with each other.
        raise CheckpointMismatch(f"{repository}: the download failed: {one_line(error)}") from error


def _not_cached(repository: str, name: str) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{repository}: no such local file; as a hub id, its {name} is not in the cache and the Hugging Face hub "
        "cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    )


def read_config(path: Path) -> tuple[Preprocessing, tuple[str, ...]]:
    """Preprocessing and labels from timm's ``config.json``; what it does not say keeps its default.

    Raises ``CheckpointMismatch`` when it is not JSON or says something impossible.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(config, Mapping):
        raise CheckpointMismatch(f"{path}: not a JSON object")
    inner = config.get("pretrained_cfg", config)
    if not isinstance(inner, Mapping):
        raise CheckpointMismatch(f"{path}: pretrained_cfg is not a JSON object")
    fields = {key: inner[key] for key in _FIELDS if key in inner}
    size = inner.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        if size[1] != size[2]:
            raise CheckpointMismatch(f"{path}: input_size {size} is not square")
        fields["image_size"] = size[1]
    try:
        preprocessing = Preprocessing.from_dict(fields)
    except DeployError as error:
        raise CheckpointMismatch(f"{path}: {error}") from error
    labels = config.get("label_names", inner.get("label_names", []))
    return preprocessing, tuple(labels) if _are_labels(labels) else ()


def _are_labels(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(label, str) for label in value)
