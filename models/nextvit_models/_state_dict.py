"""Finding the weights among what a checkpoint file holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from nextvit_models.errors import CheckpointMismatch

_WEIGHTS: Final = ("model", "state_dict", "model_state_dict", "module")
_AVERAGED: Final = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
_PREFIXES: Final = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
_MAX_DEPTH: Final = 4


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name, without wrappers and their prefixes, and lines that say where they were."""

    tensors: dict[str, Tensor]
    found: tuple[str, ...]


def find_state_dict(contents: object, *, ema: bool) -> StateDict:
    """The tensors of a bare state dict, or of one under the usual keys of a training script.

    Of trained and averaged (EMA) weights the trained ones are taken unless ``ema`` is set or there are no others.
    Raises ``CheckpointMismatch``, its message a half sentence about the file.
    """
    trail: list[str] = []
    found: list[str] = []
    while isinstance(contents, Mapping) and (key := _wrapper(contents, ema=ema and not _is_averaged(trail))):
        if len(trail) == _MAX_DEPTH:
            raise CheckpointMismatch(f"containers nested deeper than {_MAX_DEPTH}: {' > '.join(trail)}")
        trail.append(key)
        found += _beside(contents, key)
        contents = contents[key]
    if not isinstance(contents, Mapping):
        raise CheckpointMismatch(f"holds a {type(contents).__name__}, not a state dict")
    if ema and not _is_averaged(trail):
        raise CheckpointMismatch(f"holds no averaged weights (none of the keys {', '.join(_AVERAGED)})")
    tensors = {name: value for name, value in contents.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointMismatch(f"holds no tensors; its keys: {_some(contents)}")
    if trail:
        found.insert(0, f"weights under {' > '.join(repr(key) for key in trail)}")
    if others := [name for name in contents if name not in tensors]:
        found.append(f"ignored among the weights, not tensors: {_some(others)}")
    stripped, removed = _without_prefixes(tensors)
    if removed:
        found.append(f"prefix {removed!r} removed from all names")
    return StateDict(stripped, tuple(found))


def _wrapper(contents: Mapping[object, object], *, ema: bool) -> str | None:
    """The key to descend into, or None where ``contents`` is the state dict itself."""
    order = (*_AVERAGED, *_WEIGHTS) if ema else (*_WEIGHTS, *_AVERAGED)
    return next((key for key in order if isinstance(contents.get(key), Mapping)), None)


def _beside(contents: Mapping[object, object], key: str) -> list[str]:
    """What the container held besides the key taken."""
    lines = []
    others = [other for other in contents if other != key]
    alternatives = [other for other in others if other in _WEIGHTS + _AVERAGED]
    if alternatives:
        kind = "averaged" if key in _AVERAGED else "trained"
        lines.append(f"took the {kind} weights {key!r}, not {_some(alternatives)}")
    elif key in _AVERAGED:
        lines.append(f"took the averaged weights {key!r}: there are no others")
    if ignored := [other for other in others if other not in alternatives]:
        lines.append(f"ignored beside the weights: {_some(ignored)}")
    return lines


def _is_averaged(trail: list[str]) -> bool:
    return any(key in _AVERAGED for key in trail)


def _without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors without every wrapper's prefix that all names share, and what was removed."""
    removed = ""
    while prefix := next((p for p in _PREFIXES if all(n.startswith(removed + p) for n in tensors)), None):
        removed += prefix
    return {name[len(removed) :]: tensor for name, tensor in tensors.items()}, removed


def _some(names: Iterable[object]) -> str:
    """Up to five of the names, the rest as a number."""
    listed = [str(name)[:60] if str(name).isprintable() else ascii(name)[:60] for name in names]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
