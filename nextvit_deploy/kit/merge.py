"""Bring a verdict back from the machine with the GPU, and put it into the manifests it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn

from nextvit_deploy.int8_verdict import settle_beside, settled
from nextvit_deploy.kit import check, shape
from nextvit_deploy.kit.build import KIT, MANIFEST, is_kit
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.errors import DeployError
from nextvit_exporters.files import atomic_write, sha256_of

_LARGEST: Final = 1 << 20
"""Bytes of a verdict; a real one has two thousand."""


def merge_verdict(kit: Path, verdict: Path) -> dict[str, Any]:
    """Put ``verdict`` into the kit's manifest, and into the engine's where that is still of the same ONNX file.

    It becomes the entry ``device``; merging again replaces it. A device that failed makes the whole manifest
    ``failed``. Of an INT8 artefact, and of those beside an FP16 artefact, measured times replace what was estimated.
    Returns the merged manifest. Raises DeployError where the kit is not whole, the verdict belongs to another, or it
    is not one that check.py writes.
    """
    told = _kit(kit)
    found = _verdict(verdict, told)
    if found["kit"] != sha256_of(kit / KIT) or found["files"] != told["files"]:
        raise DeployError(f"{verdict} belongs to another kit than {kit}; run check.py in this one")
    _check_follows(verdict, found, told)
    own = Path(kit.resolve() / told["manifest"]).resolve()
    merged = settled(_with_device(_manifest(kit / MANIFEST), found), own)
    theirs = _beside(own, told, merged)
    _write(kit / MANIFEST, merged)
    if theirs is not None:
        joined = settled(_with_device(theirs, found), own)
        _write(own, joined)
        settle_beside(joined, own)
    return merged


def _kit(folder: Path) -> dict[str, Any]:
    if not is_kit(folder):
        raise DeployError(f"{folder} is no kit; name the folder that --kit wrote")
    told = _object(folder / KIT)
    if shape.misfit({name: told[name] for name in shape.KIT if name in told}, shape.KIT):
        raise DeployError(f"{folder / KIT} is damaged; write the kit again")
    for name, expected in told["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or sha256_of(path) != expected:
            raise DeployError(f"{path} is not the file that the kit was made with; write the kit again")
    return told


def _verdict(path: Path, kit: Mapping[str, Any]) -> dict[str, Any]:
    """A verdict that check.py may have written, every field of it looked at."""
    found = _object(path)
    executed = bool(shape.MEASURED & found.keys())
    if wrong := shape.misfit(found, shape.measured(kit, found.get("comparison")) if executed else shape.VERDICT):
        _refuse(path, wrong)
    if found["schema"] != 1 or found["verdict"] not in {str(each) for each in Verdict}:
        _refuse(path, "its schema or verdict is unknown")
    try:
        datetime.fromisoformat(found["date"])
    except ValueError:
        _refuse(path, "its date is none")
    return found


def _check_follows(path: Path, found: Mapping[str, Any], kit: dict[str, Any]) -> None:
    """A verdict must be the one that check.py draws from the same figures, or say why there are none."""
    said, why = found["verdict"], found["why"]
    if "gpu" not in found:
        if said != str(Verdict.NOT_VERIFIED) or not why:
            _refuse(path, f"it says {said} without a measurement")
        return
    if found["tolerance"] != kit["tolerance"]:
        _refuse(path, "its tolerance is not the kit's")
    verdict, reason = check.judge(kit, found["gpu"], found["dtypes"], found["comparison"])
    if said != verdict:
        _refuse(path, f"it says {said}, and its own figures say {verdict}" + (f" ({reason})" if reason else ""))
    if bool(why) == (said == str(Verdict.VERIFIED)):
        _refuse(path, f"it says {said} {'and gives a reason against it' if why else 'without a reason'}")


def _with_device(manifest: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the device's entry; its own verdict is kept beside, so that merging again starts from it."""
    earlier = manifest.get("device")
    own = earlier["verdict_without_device"] if isinstance(earlier, dict) else manifest["verdict"]
    failed = found["verdict"] == str(Verdict.FAILED)
    entry = {**found, "verdict_without_device": own}
    return {**manifest, "device": entry, "verdict": str(Verdict.FAILED) if failed else own}


def _manifest(path: Path) -> dict[str, Any]:
    told = _object(path)
    device = told.get("device", {"verdict_without_device": ""})
    if (
        not isinstance(told.get("verdict"), str)
        or not isinstance(device, dict)
        or not isinstance(device.get("verdict_without_device"), str)
    ):
        raise DeployError(f"{path} is no manifest; write the kit again")
    return told


def _beside(path: Path, told: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any] | None:
    """The engine's own manifest, where it is still there and tells of this kit's ONNX file or of the same artefact."""
    try:
        theirs = _manifest(path)
    except DeployError:
        return None
    same = _mentions(theirs, told["files"]["model.onnx"]) or theirs.get("artifact") == ours.get("artifact")
    return theirs if same else None


def _mentions(value: object, sha256: str) -> bool:
    if isinstance(value, dict | list):
        return any(_mentions(each, sha256) for each in (value.values() if isinstance(value, dict) else value))
    return value == sha256


def _object(path: Path) -> dict[str, Any]:
    """A file that holds one strict JSON object; raises DeployError for anything else."""

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def number(word: str) -> float:
        value = float(word)
        return value if math.isfinite(value) else constant(word)

    try:
        if path.stat().st_size > _LARGEST:
            raise DeployError(f"{path} is too large to be one of check.py's files; run check.py again")
        value = json.loads(path.read_bytes(), parse_constant=constant, parse_float=number)
    except OSError as error:
        raise DeployError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DeployError(f"{path} is no JSON; run check.py again and copy the whole file") from error
    if not isinstance(value, dict):
        raise DeployError(f"{path} holds no JSON object; run check.py again and copy the whole file")
    return value


def _refuse(path: Path, why: str) -> NoReturn:
    raise DeployError(f"{path} is not a verdict of check.py: {why}; run check.py again")


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    atomic_write(path, (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
