"""Arrays in one safetensors file that says what they add up to, so that a damaged one is told from a whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nextvit_exporters.errors import DeployError, OutputNotWritten, first_line
from nextvit_exporters.files import atomic_path

Arrays = Mapping[str, NDArray[Any]]

_FACTS: Final = "facts"
"""The one entry of the file's own metadata: of several, safetensors' writer changes the order from call to call."""
_DIGEST: Final = "sha256"
_DTYPES: Final = {"F64": np.float64, "F32": np.float32, "I64": np.int64, "I8": np.int8}


def digest_of(arrays: Arrays, facts: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes, numbers and facts, each by name: no matter how a file lays them out."""
    digest = hashlib.sha256()
    for name, fact in sorted(facts.items()):
        digest.update(f"{len(name)} {name} {len(fact.encode())} {fact} ".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{len(name)} {name} {array.dtype.name} {array.shape} ".encode())
        # the numbers themselves, not a copy; an array without any has no buffer to look at
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def write_sealed(path: Path, arrays: Arrays, facts: Mapping[str, str]) -> None:
    """Write arrays and facts with their digest, all or nothing. Raises OutputNotWritten or OSError."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    told = dict(facts) | {_DIGEST: digest_of(arrays, facts)}
    with atomic_path(path) as sibling:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(contiguous, sibling, {_FACTS: json.dumps(told, sort_keys=True)})
        except SafetensorError as error:  # which is what its writer makes of a full disk
            raise OutputNotWritten(f"{path} was not written: {first_line(error)}; choose another output") from error


def read_sealed(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays and the facts. Raises DeployError where the file is missing, damaged, or of another kind."""
    try:
        with safe_open(path, "numpy") as file:
            facts = _facts(file.metadata() or {})
            names: list[str] = list(file.keys())
            strange = next((name for name in names if file.get_slice(name).get_dtype() not in _DTYPES), None)
            arrays = {} if strange else {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DeployError(f"{path} can't be read: {first_line(error)}; calibrate again") from error
    if strange:
        raise DeployError(f"{path} holds {strange} in numbers of another type; calibrate again")
    if facts.pop(_DIGEST, None) != digest_of(arrays, facts):
        raise DeployError(f"{path} is damaged: its numbers are not those that were written; calibrate again")
    return arrays, facts


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Texts by name; none where the file holds something else."""
    try:
        facts = json.loads(metadata.get(_FACTS, "{}"))
    except (RecursionError, ValueError):
        return {}
    return {name: fact for name, fact in facts.items() if isinstance(fact, str)} if isinstance(facts, dict) else {}
