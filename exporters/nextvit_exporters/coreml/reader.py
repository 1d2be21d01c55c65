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
_LONGEST: Final = 600
"""Characters of a message."""
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
    try:
        return _read(path)
    except (BuildFailed, NotExecutable) as error:
        raise type(error)(f"{path}: {_line(error)}") from error
    except (OSError, OverflowError, RecursionError, ValueError) as error:
        raise BuildFailed(f"{path}: it is damaged ({_line(error)}); copy or export it again") from error


def _line(error: Exception) -> str:
    """What an error says in one line; names out of the package may hold anything, of any length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _read(path: Path) -> Package:
    manifest = _manifest(path)
    names = _walk(path)
    root = _root(path, manifest)
    model = _model(path / root, root)
    known = _opset(model)
    description = _description(model)
    metadata = MappingProxyType(dict(model.description.metadata.userDefined))
    weights = f"{PurePosixPath(root).parent}/weights/weight.bin"
    data = (path / weights).read_bytes() if weights in names else None
    files = {name: sha256_of(path / name) for name in names if name != weights}
    if data is not None:
        files[weights] = hashlib.sha256(data).hexdigest()
    _check_recorded(metadata.get(WEIGHTS_SHA256), files.get(weights), weights)
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
        MappingProxyType(dict(sorted(files.items()))),
    )


def _check_recorded(recorded: str | None, found: str | None, weights: str) -> None:
    """Hold ``weight.bin`` against the hash in the metadata, where there is one."""
    if recorded is None or recorded == found:
        return
    if found is None:
        raise BuildFailed(f"{weights} is missing; copy the package whole or export it again")
    raise BuildFailed(
        f"{weights} is not the file the package was written with (one byte differing is enough); export it again"
    )


def _manifest(path: Path) -> dict[str, Any]:
    """What ``Manifest.json`` holds."""
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
    return manifest


def _walk(path: Path) -> tuple[str, ...]:
    """The regular files by their path inside, in order; links are refused, as what they lead to may change."""
    found = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            raise BuildFailed(f"{name} is a link; copy the package with the files themselves")
        if file.is_file():
            found.append(name)
    return tuple(found)


def _root(path: Path, manifest: Mapping[str, Any]) -> str:
    """Where the model is inside the package; every item that the manifest lists must be there."""
    entries, chosen = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    if not isinstance(entries, dict) or not isinstance(chosen, str) or chosen not in entries:
        raise BuildFailed(f"{MANIFEST_JSON} does not list the model that it names; copy or export it again")
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
    return f"{_DATA}/{pure}"


def _model(file: Path, name: str) -> Any:
    """The message; raises BuildFailed where the file is empty, or holds what its classes don't know."""
    data = file.read_bytes()
    if not data:
        raise BuildFailed(f"{name} is empty; copy or export it again")
    messages, errors = part("proto.Model_pb2"), importlib.import_module("google.protobuf.message")
    try:
        model = messages.Model.FromString(data)
        size = model.ByteSize()
        model.DiscardUnknownFields()
    except errors.DecodeError as error:
        raise BuildFailed(f"{name} is damaged or no Core ML model; copy or export it again") from error
    which = model.WhichOneof("Type")
    if which not in (None, "mlProgram"):
        raise NotExecutable(f"it holds a {which}; only ML programs are read here: export it as one")
    if model.specificationVersion not in SPECIFICATION.values():
        known = ", ".join(str(each) for each in sorted(SPECIFICATION.values()))
        found = model.specificationVersion
        raise BuildFailed(f"its specification is of version {found}; known are {known}: export it again")
    if which is None or size != model.ByteSize():
        raise BuildFailed(f"{name} holds fields that are not known, or no model; copy or export it again")
    if model.isUpdatable:
        raise NotExecutable("it can be trained on the device, which can't be executed here")
    return model


def _opset(model: Any) -> str:
    """The opset that belongs to the specification's version: CoreML5 to 6, and so on."""
    return f"CoreML{model.specificationVersion - 1}"


def _description(model: Any) -> Any:
    """What is said of inputs and outputs; packages of several functions say it once for each."""
    message = model.description
    described = message.functions[0] if message.functions else message
    names = [each.name for each in message.functions]
    if names not in ([], ["main"]) or message.defaultFunctionName not in ("", "main"):
        raise NotExecutable(f"it has the functions {', '.join(names)}; only the one function main is read here")
    if described.state or message.state:
        raise NotExecutable("it keeps a state between calls, which can't be executed here")
    return described


def _about(message: Any) -> Mapping[str, str]:
    """Author, licence, version and description, those that are given."""
    found = {name: str(getattr(message, key)) for key, name in _ABOUT.items()}
    return MappingProxyType({name: text for name, text in found.items() if text})
