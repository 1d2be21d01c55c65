"""What calibration images tell of a graph: one step per tensor, means, and whole numbers for weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import DeployError
from nextvit_exporters.quantize.sealed import digest_of, read_sealed, write_sealed
from nextvit_exporters.quantize_spec import METHODS

Float64s = NDArray[np.float64]
Int8s = NDArray[np.int8]

SCHEMA: Final = "nextvit-calibration 1"
_STEPS: Final = "steps"
_MEANS: Final = "means/"
_CODES: Final = "codes/"
_SHA256: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Found on images by running the float64 graph behind the passes, with nothing kept in floating point.

    ``steps`` holds, by node name, the largest magnitude divided by 127 that a tensor is clipped at, before any rounding
    of the step itself. ``means`` holds, by module name, the mean of what each weight of an output channel is multiplied
    with: (groups, K), K = input channels per group times kernel size, in the order of ``weight[0].flatten()``.
    ``codes`` holds, by module name, whole numbers for weights in their shape, where they were not simply rounded to the
    nearest. ``images`` is the fingerprint of the image set, ``count`` how many there were, ``graph`` the hash of the
    graph (``identity.graph_hash``). ``notes`` are for people, and no part of ``digest``.
    """

    method: str
    images: str
    count: int
    steps: Mapping[str, float]
    means: Mapping[str, Float64s]
    codes: Mapping[str, Int8s] = field(default_factory=dict)
    graph: str = ""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of everything but the notes, however it is stored; 64 hexadecimal digits."""
        return digest_of(self._arrays(), self._facts())

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all. Raises OutputNotWritten, or OSError for what it is not."""
        write_sealed(path, self._arrays(), self._facts() | {"notes": json.dumps(self.notes)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what ``save`` wrote; raises DeployError, in one line, for anything else."""
        arrays, facts = read_sealed(path)
        try:
            return _calibration(arrays, facts)
        except KeyError as error:
            raise DeployError(f"{path} is no calibration of this version: it lacks {error}; calibrate again") from error
        except (RecursionError, TypeError, ValueError) as error:
            raise DeployError(f"{path} is no calibration of this version: {error}; calibrate again") from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        steps = np.array(list(self.steps.values()), np.float64)
        means = {_MEANS + name: np.asarray(each, np.float64) for name, each in self.means.items()}
        return {_STEPS: steps} | means | {_CODES + name: np.asarray(each, np.int8) for name, each in self.codes.items()}

    def _facts(self) -> dict[str, str]:
        return {
            "schema": SCHEMA,
            "method": self.method,
            "images": self.images,
            "count": str(self.count),
            "graph": self.graph,
            "tensors": json.dumps(list(self.steps)),
        }


def _calibration(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, str]) -> Calibration:
    """From a whole file; raises KeyError, TypeError or ValueError where it holds something else than a calibration."""
    if facts["schema"] != SCHEMA:
        raise ValueError(f"its schema is '{facts['schema'][:40]}'")
    if facts["method"] not in METHODS:
        raise ValueError("its method is none of " + ", ".join(METHODS))
    if not all(_SHA256.fullmatch(facts[each]) for each in ("images", "graph")):
        raise ValueError("it doesn't say what it was calibrated on")
    count, names = int(facts["count"]), _names(facts["tensors"])
    if count < 1:
        raise ValueError(f"it was calibrated on {count} images")
    steps = arrays[_STEPS]
    if steps.dtype != np.float64 or steps.shape != (len(names),) or not (np.isfinite(steps) & (steps > 0)).all():
        raise ValueError("its steps are not one positive number for each tensor")
    return Calibration(
        method=facts["method"],
        images=facts["images"],
        count=count,
        steps={name: float(each) for name, each in zip(names, steps, strict=True)},
        means={name: _means(name, each) for name, each in _under(_MEANS, arrays).items()},
        codes={name: _codes(name, each) for name, each in _under(_CODES, arrays).items()},
        graph=facts["graph"],
        notes=_notes(facts["notes"]),
    )


def _names(text: str) -> list[str]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("its tensors have no names")
    if len(set(names)) != len(names):
        raise ValueError("it names a tensor twice")
    return names


def _notes(text: str) -> tuple[str, ...]:
    notes = json.loads(text)
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise TypeError("its notes are no lines")
    return tuple(notes)


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _means(name: str, array: NDArray[Any]) -> Float64s:
    if array.dtype != np.float64 or array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(f"the means of {name} are not finite numbers by group and weight")
    return array


def _codes(name: str, array: NDArray[Any]) -> Int8s:
    if array.dtype != np.int8 or array.ndim < 2 or (array == np.iinfo(np.int8).min).any():
        raise ValueError(f"the weights of {name} are not whole numbers from -127 to 127")
    return array
