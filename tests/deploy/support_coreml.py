"""What the tests of Core ML packages share: exports made once, copies to damage, damage that no hash betrays."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import MODEL, MODULES, WEIGHTS, WEIGHTS_SHA256
from nextvit_exporters.to_coreml import SUFFIX
from tests.deploy.support import Exported, Json, call, one_line

STEM: Final = "nextvit_nano_classify_64_b1_fp16_image_ios16"
needs_coremltools: Final = pytest.mark.skipif(
    importlib.util.find_spec("coremltools") is None, reason="coremltools has no wheel for this platform"
)
_BUILT: Final[dict[tuple[Path, tuple[str, ...]], Exported]] = {}
_BLOB: Final = struct.Struct("<IIQQQ")
_BYTES: Final[dict[int, np.dtype[Any]]] = {10: np.dtype(np.float16), 21: np.dtype(np.int8), 31: np.dtype(np.uint8)}
"""What is written as bytes, by its number in ``MIL.proto``."""
_IN_FILE: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype(np.float16),
    2: np.dtype(np.float32),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int8),
}
"""What ``weight.bin`` holds, by its number there."""
Values = NDArray[Any]


def exported(base: Path, *options: str | Path) -> Exported:
    """``coreml --json`` with ``options``, run once below the session's folder ``base``."""
    key = base, tuple(map(str, options))
    if key not in _BUILT:
        folder = base / f"coreml-{len(_BUILT)}"
        ran = call("coreml", "--output", folder, "--json", *options)
        assert (ran.status, ran.err) == (0, ""), ran
        (path,) = folder.glob(f"*{SUFFIX}")
        _BUILT[key] = Exported(path, ran)
    return _BUILT[key]


def copied(made: Exported, folder: Path) -> Path:
    """A copy of a package alone, free to be damaged."""
    return Path(shutil.copytree(made.path, folder / made.path.name))


class Draft:
    """A saved package, open to be changed: its message, and the bytes of its ``weight.bin``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = part("proto.Model_pb2").Model.FromString((path / MODEL).read_bytes())
        self.weights = bytearray((path / WEIGHTS).read_bytes())
        (function,) = self.model.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        self.operations = block.operations
        self._modules: dict[str, str] = json.loads(self.model.description.metadata.userDefined[MODULES])

    def save(self) -> None:
        """Write both, and the hash that lets the reader believe it."""
        self.model.description.metadata.userDefined[WEIGHTS_SHA256] = hashlib.sha256(self.weights).hexdigest()
        (self.path / WEIGHTS).write_bytes(self.weights)
        (self.path / MODEL).write_bytes(self.model.SerializeToString(deterministic=True))

    def find(self, kind: str, module: str | None = None, index: int = 0) -> Any:
        """One operation by its kind and the torch module it comes from; of several the one with this number."""
        return [
            each
            for each in self.operations
            if each.type == kind and (module is None or self._modules.get(each.outputs[0].name) == module)
        ][index]

    def value(self, operation: Any, parameter: str) -> Any:
        """The value of a constant parameter; of a compressed weight its scales, or its table."""
        (argument,) = operation.inputs[parameter].arguments
        if argument.WhichOneof("binding") == "value":
            return argument.value
        maker = next(each for each in self.operations if argument.name in {out.name for out in each.outputs})
        held = next(name for name in ("val", "scale", "lut") if name in maker.attributes)
        return maker.attributes[held]

    def change(self, operation: Any, parameter: str, how: Callable[[Values], Values]) -> None:
        """Put other numbers of the same shape in the place of a constant's."""
        value = self.value(operation, parameter)
        before = self._numbers(value)
        after = np.asarray(how(before.copy()), before.dtype, order="C")
        assert after.shape == before.shape
        assert after.tobytes() != before.tobytes()
        if value.WhichOneof("value") == "blobFileValue":
            start = self._blob(value)[1]
            self.weights[start : start + after.nbytes] = after.tobytes()
            return
        tensor = value.immediateValue.tensor
        which = tensor.WhichOneof("value")
        if which == "bytes":
            tensor.bytes.values = after.tobytes()
        else:
            getattr(tensor, which).values[:] = after.reshape(-1).tolist()

    def _numbers(self, value: Any) -> Values:
        kind = value.type.tensorType
        shape = tuple(int(each.constant.size) for each in kind.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            dtype, start = self._blob(value)
            return np.frombuffer(self.weights, dtype, math.prod(shape), start).reshape(shape)
        tensor = value.immediateValue.tensor
        which = tensor.WhichOneof("value")
        if which == "bytes":
            return np.frombuffer(tensor.bytes.values, _BYTES[kind.dataType]).reshape(shape)
        return np.array(getattr(tensor, which).values).reshape(shape)

    def _blob(self, value: Any) -> tuple[np.dtype[Any], int]:
        """A blob's dtype, and where its bytes start."""
        _, code, _, start, _ = _BLOB.unpack_from(self.weights, value.blobFileValue.offset)
        return _IN_FILE[code], start


Fault = Callable[[Draft], None]


def planted(made: Exported, folder: Path, fault: Fault) -> Path:
    """A copy with a fault that the reader believes."""
    path = copied(made, folder)
    draft = Draft(path)
    before = draft.model.SerializeToString(deterministic=True), bytes(draft.weights)
    fault(draft)
    assert (draft.model.SerializeToString(deterministic=True), bytes(draft.weights)) != before
    draft.save()
    return path


def by_question(manifest: Json) -> dict[str, list[Json]]:
    """Checks by question."""
    found: dict[str, list[Json]] = {}
    for check in manifest["checks"]:
        found.setdefault(str(check["question"]), []).append(check)
    return found


def verified(path: Path, *options: str | Path) -> Json:
    """The manifest of one ``verify --json``, which must be ``verified``."""
    ran = call("verify", path, "--json", *options)
    assert (ran.status, ran.err) == (0, ""), ran
    assert ran.json["verdict"] == "verified"
    return ran.json


def failed(path: Path, *options: str | Path) -> Json:
    """The manifest of one ``verify --json``, which must be ``failed`` and say so in one line."""
    ran = call("verify", path, "--json", *options)
    assert ran.status == 3, ran
    assert one_line(ran.err).startswith(f"{path.name} is failed: ")
    assert ran.json["verdict"] == "failed"
    return ran.json


def error(check: Json) -> float:
    """The largest relative rms of a check's outputs; infinite where the package broke down."""
    errors = [float(each["relative_rms"]) for each in check["comparisons"]]  # "inf" where JSON has no word
    return max(errors, default=math.inf)
