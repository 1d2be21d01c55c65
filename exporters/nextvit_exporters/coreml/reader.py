"""Reading a saved Core ML package (a ``.mlpackage`` folder that holds an ML program), strictly.

coremltools opens a package whose weights are missing, cut short or somebody else's; on a device that is an app that
does not start, or a model that answers nonsense. Here a package is read whole, or it is refused with what is wrong.
Only coremltools' generated protobuf classes are used: the rest of it is what is being checked.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Final

from nextvit_exporters.coreml.blobs import Blobs
from nextvit_exporters.coreml.features import inputs_of, labels_of, outputs_of
from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import MANIFEST_JSON, SPECIFICATION, WEIGHTS_SHA256, Package
from nextvit_exporters.coreml.proto import program_of
from nextvit_exporters.errors import BuildFailed, NotExecutable
from nextvit_exporters.files import sha256_of

_DATA: Final = "Data"
_FORMAT: Final = "1.0.0"
_ABOUT: Final = {
    "author": "author",
    "license": "licence",
    "versionString": "version",
    "shortDescription": "description",
}


def read_package(path: Path) -> Package:
    """Read a package and hold every part of it against the others; its constants are read-only views of one file.

    Raises BuildFailed, in one line that starts with ``path``, where something is missing, damaged or contradicts
    itself; NotExecutable where it is sound as far as it was read and holds what can't be executed here (a neural
    network, several functions, states, control flow); MissingExtra without coremltools.
    """
    decode_error: type[Exception] = (
        part("proto.Model_pb2") and importlib.import_module("google.protobuf.message").DecodeError
    )
    try:
        return _read(path)
    except (BuildFailed, NotExecutable) as error:
        raise type(error)(f"{path}: {error}") from error.__cause__
    except (decode_error, OSError, OverflowError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BuildFailed(f"{path}: it is damaged ({reason}); copy or export it again") from error


def _read(path: Path) -> Package:
    root = _root(path)
    model = _model((path / root).read_bytes(), root)
    known = _opset(model.specificationVersion)
    _executable(model)
    description = _description(model.description)
    metadata = MappingProxyType(dict(model.description.metadata.userDefined))
    weights = f"{PurePosixPath(root).parent}/weights/weight.bin"
    files, data = _files(path, weights)
    recorded = metadata.get(WEIGHTS_SHA256)
    if recorded is not None and data is not None and files[weights] != recorded:
        raise BuildFailed(
            f"{weights} is not the file the package was written with (one byte differing is enough); export it again"
        )
    blobs = Blobs(weights, data)
    program = program_of(model.mlProgram, blobs, known)
    blobs.finish()
    inputs, outputs = inputs_of(description, program), outputs_of(description, program)
    return Package(
        path,
        int(model.specificationVersion),
        program,
        inputs,
        outputs,
        metadata,
        _about(model.description.metadata),
        labels_of(description, program, outputs),
        files,
    )


def _root(path: Path) -> str:
    """Where the model is inside the package, by its manifest; every item that it lists must be there."""
    if not path.is_dir():
        what = "is a file; a Core ML package is a folder" if path.exists() else "is not there"
        raise BuildFailed(f"it {what}; give the path of a .mlpackage")
    file = path / MANIFEST_JSON
    if not file.is_file():
        raise BuildFailed(f"{MANIFEST_JSON} is missing, so it is no Core ML package; give the path of a .mlpackage")
    try:
        manifest: object = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BuildFailed(f"{MANIFEST_JSON} is not JSON; copy or export it again") from error
    if not isinstance(manifest, dict) or manifest.get("fileFormatVersion") != _FORMAT:
        raise BuildFailed(f"{MANIFEST_JSON} does not have fileFormatVersion {_FORMAT}; copy or export it again")
    entries, chosen = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    if not isinstance(entries, dict) or not isinstance(chosen, str) or chosen not in entries:
        raise BuildFailed(f"{MANIFEST_JSON} names no model that it lists; copy or export it again")
    places = {key: _item(path, entry) for key, entry in entries.items()}
    if not (path / places[chosen]).is_file():
        raise BuildFailed(f"{places[chosen]} is no file; copy or export it again")
    return places[chosen]


def _item(path: Path, entry: object) -> str:
    """One item's path inside the package, which must not lead out of its data."""
    inside = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(inside, str) or not inside or "\0" in inside or "\\" in inside:
        raise BuildFailed(f"{MANIFEST_JSON} lists an item without a path; copy or export it again")
    pure = PurePosixPath(inside)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise BuildFailed(f"{MANIFEST_JSON} lists {inside!r}, which is not inside {_DATA}; copy or export it again")
    place = path / _DATA / pure
    if not place.exists():
        raise BuildFailed(f"{_DATA}/{pure} is missing; copy the package whole or export it again")
    if not place.resolve().is_relative_to((path / _DATA).resolve()):
        raise BuildFailed(f"{_DATA}/{pure} is a link that leads out of the package; copy the package with its files")
    return f"{_DATA}/{pure}"


def _files(path: Path, weights: str) -> tuple[Mapping[str, str], bytes | None]:
    """SHA-256 of every file, and what ``weights`` holds: the very bytes that were hashed."""
    top, found, data = path.resolve(), {}, None
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.resolve().is_relative_to(top):
            raise BuildFailed(f"{name} is a link that leads out of the package; copy the package with its files")
        if not file.is_file():
            continue
        if name == weights:
            data = file.read_bytes()
            found[name] = hashlib.sha256(data).hexdigest()
        else:
            found[name] = sha256_of(file)
    return MappingProxyType(found), data


def _model(data: bytes, name: str) -> Any:
    """The message; raises BuildFailed where the file is empty or holds what its classes don't know."""
    if not data:
        raise BuildFailed(f"{name} is empty; copy or export it again")
    messages = part("proto.Model_pb2")
    try:
        model = messages.Model.FromString(data)
    except importlib.import_module("google.protobuf.message").DecodeError as error:
        raise BuildFailed(f"{name} is damaged or no Core ML model; copy or export it again") from error
    return model


def _opset(specification: int) -> str:
    """The opset that belongs to a specification's version: CoreML5 to 6, and so on."""
    if specification not in SPECIFICATION.values():
        known = ", ".join(str(each) for each in sorted(SPECIFICATION.values()))
        raise BuildFailed(f"its specification is of version {specification}; known are {known}; export it again")
    return f"CoreML{specification - 1}"


def _executable(model: Any) -> None:
    which = model.WhichOneof("Type")
    if which is None:
        raise BuildFailed("it holds no model; export it again")
    if which != "mlProgram":
        raise NotExecutable(f"it holds a {which}; only ML programs are read here: export it as one")
    if model.isUpdatable:
        raise NotExecutable("it can be trained on the device, which can't be executed here")


def _description(message: Any) -> Any:
    """What is said of inputs and outputs, which packages of several functions say once for each."""
    described = message
    if message.functions:
        names = [each.name for each in message.functions]
        if names != ["main"] or message.defaultFunctionName not in ("", "main"):
            raise NotExecutable(f"it has the functions {', '.join(names)}; only the one function main is read here")
        described = message.functions[0]
    if described.state or message.state:
        raise NotExecutable("it keeps a state between calls, which can't be executed here")
    return described


def _about(message: Any) -> Mapping[str, str]:
    """Author, licence, version and description, those that are given."""
    found = {name: str(getattr(message, key)) for key, name in _ABOUT.items()}
    return MappingProxyType({name: text for name, text in found.items() if text})
