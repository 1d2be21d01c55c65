"""Write a coremltools model as a package: the same bytes each time, with everything an app and a reader ask for.

coremltools puts the date of conversion into the model and random identifiers into ``Manifest.json``. Both go: the
identifiers are made from what they name, and protobuf's maps are written in order of their keys.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from nextvit_exporters.coreml.convert import Converted, known
from nextvit_exporters.coreml.loading import heard, part
from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, MODULES, WEIGHTS, WEIGHTS_SHA256
from nextvit_exporters.coreml_spec import About
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.files import sha256_of
from nextvit_exporters.scopes import fill_scopes

_DATE: Final = "com.github.apple.coremltools.conversion_date"
_PREVIEW: Final = "com.apple.coreml.model.preview.type"
_ITEMS: Final = {
    "com.apple.CoreML/model.mlmodel": ("model.mlmodel", "CoreML Model Specification"),
    "com.apple.CoreML/weights": ("weights", "CoreML Model Weights"),
}


def write_package(
    converted: Converted, path: Path, about: About, descriptions: Mapping[str, str], metadata: Mapping[str, str]
) -> None:
    """Write the folder ``path``, which must not be there yet.

    ``descriptions`` are of inputs and outputs by name, ``metadata`` what is kept under user-defined keys. Raises
    BuildFailed where coremltools can't save the model, OSError as the system does.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".coremltools-") as folder:
        saved = Path(folder, "model.mlpackage")
        with heard():
            try:
                converted.model.save(str(saved))
            except shutil.Error as error:  # what copying a folder makes of a full disk
                raise _cause(error, path) from error
            except (RuntimeError, ValueError) as error:
                raise BuildFailed(f"coremltools could not save the package: {str(error).splitlines()[0]}") from error
        (path / MODEL).parent.mkdir(parents=True)
        spec: Any = part("proto.Model_pb2").Model()
        spec.ParseFromString((saved / MODEL).read_bytes())
        _describe(spec, about, descriptions)
        entries = spec.description.metadata.userDefined
        entries.pop(_DATE, None)
        if (saved / WEIGHTS).is_file():
            (path / WEIGHTS).parent.mkdir()
            shutil.move(saved / WEIGHTS, path / WEIGHTS)
            entries[WEIGHTS_SHA256] = sha256_of(path / WEIGHTS)
        entries[MODULES] = json.dumps(_modules(spec, converted.modules), sort_keys=True)
        entries.update(metadata)
        (path / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    (path / MANIFEST_JSON).write_text(package_manifest(path))


def _cause(error: shutil.Error, path: Path) -> OSError:
    """The system's own error about ``path``, which copying a folder reports as text alone."""
    found = re.search(r"\[Errno (\d+)\]", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def _describe(spec: Any, about: About, descriptions: Mapping[str, str]) -> None:
    metadata = spec.description.metadata
    metadata.author, metadata.license = about.author, about.licence
    metadata.versionString, metadata.shortDescription = about.version, about.description
    for feature in (*spec.description.input, *spec.description.output):
        feature.shortDescription = descriptions.get(feature.name, "")
    if spec.description.predictedFeatureName:
        metadata.userDefined[_PREVIEW] = "imageClassifier"


def _modules(spec: Any, modules: Mapping[str, str]) -> dict[str, str]:
    """The torch module of each operation by its first output; where coremltools made it up, what its makers share."""
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    operations = [each for each in block.operations if each.type != "const" and not each.type.startswith("constexpr")]
    makers = {out.name: number for number, each in enumerate(operations) for out in each.outputs}
    neighbours: list[set[int]] = []
    scopes: list[str] = []
    for each in operations:
        read = [argument.name for value in each.inputs.values() for argument in value.arguments]
        neighbours.append({makers[name] for name in read if name in makers})
        weight = each.inputs["weight"].arguments if "weight" in each.inputs else ()  # asking would make an entry
        weights = (known(argument.name, modules) for argument in weight)
        own = known(each.outputs[0].name, modules)
        scopes.append(own if own is not None else next((name for name in weights if name), ""))
    filled = zip(operations, fill_scopes(scopes, neighbours), strict=True)
    return {each.outputs[0].name: scope for each, scope in filled if scope}


def package_manifest(path: Path) -> str:
    """``Manifest.json`` with identifiers that follow from what they name."""
    present = {name: item for name, item in _ITEMS.items() if (path / "Data" / name).exists()}
    identifiers = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"nextvit-deploy/{name}")) for name in present}
    entries = {
        identifiers[name]: {"author": "com.apple.CoreML", "description": text, "name": title, "path": name}
        for name, (title, text) in present.items()
    }
    whole = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers["com.apple.CoreML/model.mlmodel"],
    }
    return json.dumps(whole, indent=4, sort_keys=True) + "\n"
