"""A saved ML program as plain data: what the strict reader makes of a package, and everything else works on.

Names of operations, parameters and types are those of the MIL specification (``MIL.proto`` and the opset of each
``CoreMLx`` block specialisation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

SPECIFICATION: Final[Mapping[int, int]] = {15: 6, 16: 7, 17: 8, 18: 9, 26: 10}
"""Lowest specification version by the iOS release that introduced it."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's dtype, by NumPy's name or ``string``, ``int4``, ``uint1`` to ``uint6``; None for an open axis."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value that is in the package.

    ``data`` is an array of ``type``'s shape: float16, float32, int32, bool, whole numbers of eight bits or more; those
    of fewer bits come unpacked, one per (u)int8. Strings are arrays of objects. A single number has shape ().
    """

    type: TensorType
    data: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Output:
    """One result of an operation."""

    name: str
    type: TensorType


Binding = str | Constant
"""What a parameter is bound to: a value's name, or a value written in place."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, in the order of execution. ``const`` operations hold their value in ``attributes["val"]``.

    A parameter has several bindings where it takes a list, as concat's ``values`` does. ``attributes`` also hold what
    iOS 16's ``constexpr`` operations take; ``name`` is the operation's own, or its first output's.
    """

    kind: str
    name: str
    inputs: Mapping[str, tuple[Binding, ...]]
    attributes: Mapping[str, Constant]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """The main function. ``opset`` is ``CoreML6`` and the like; ``inputs`` are the types it declares."""

    opset: str
    inputs: Mapping[str, TensorType]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]

    def count(self) -> dict[str, int]:
        """Operations by kind, most frequent first; constants left out."""
        found: dict[str, int] = {}
        for each in self.operations:
            if each.kind != "const" and not each.kind.startswith("constexpr"):
                found[each.kind] = found.get(each.kind, 0) + 1
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, slots=True)
class Feature:
    """An input or output as the package describes it to an app.

    ``kind`` is ``image``, ``tensor``, ``dictionary``, ``string`` or ``int64``. ``color`` is ``RGB``, ``BGR`` or
    ``GRAYSCALE`` for images. ``shape`` is what the package names first, (1, 3, H, W) for an image; ``allowed`` holds
    the enumerated shapes where it has some, ``ranges`` (smallest, largest) for each axis where it is flexible.
    """

    name: str
    kind: str
    description: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    color: str | None = None
    allowed: tuple[tuple[int, ...], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the description allows an input of this shape."""
        if self.allowed:
            return shape in self.allowed
        if self.ranges:
            pairs = zip(shape, self.ranges, strict=False)
            return len(shape) == len(self.ranges) and all(low <= size <= high for size, (low, high) in pairs)
        return shape == self.shape


@dataclass(frozen=True, slots=True, eq=False)
class Package:
    """A package that was read whole and found sound.

    ``metadata`` holds the user-defined entries, ``about`` author, licence, version and description. ``labels`` are a
    classifier's, in the order of its probabilities, ``files`` the SHA-256 of each file by its path inside.
    """

    path: Path
    specification: int
    program: Program
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    metadata: Mapping[str, str]
    about: Mapping[str, str]
    labels: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        """Whether it returns a label and probabilities by label."""
        return any(each.kind == "dictionary" for each in self.outputs)


def modules_of(package: Package) -> Mapping[str, str]:
    """The torch module each operation comes from, by the operation's first output; what is missing is not known."""
    try:
        found: object = json.loads(package.metadata.get(MODULES, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


MODULES: Final = "nextvit_deploy.modules"
"""The metadata entry that names each operation's module."""
MANIFEST: Final = "nextvit_deploy.manifest"
"""The metadata entry that records how a package was made."""
WEIGHTS_SHA256: Final = "nextvit_deploy.weights_sha256"
"""The metadata entry that holds the SHA-256 of ``weight.bin``, so that a changed byte is seen without a sidecar."""
WEIGHTS: Final = "Data/com.apple.CoreML/weights/weight.bin"
MODEL: Final = "Data/com.apple.CoreML/model.mlmodel"
MANIFEST_JSON: Final = "Manifest.json"
