"""What was asked, what was done, and how far the saved file is from PyTorch: one JSON beside every artefact."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from nextvit_deploy.verdict import Verdict
from nextvit_deploy.verify import Check, overall
from nextvit_exporters import targets
from nextvit_exporters.files import atomic_write
from nextvit_exporters.passes.base import TOGETHER, PassRecord
from nextvit_exporters.spec import Artifact, ExportSpec
from nextvit_exporters.targets import Saved
from nextvit_exporters.tensorrt.backends import BACKENDS

SCHEMA: Final = 1
_JUDGES: Final = ("onnxruntime", "numpy")
"""What took part in verifying it; another version of these leaves the bytes alone."""
_WHERE_INSTALLED: Final = tuple(each.distribution for each in BACKENDS.values())


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """Where the weights came from. ``sha256`` is the file's, ``fingerprint`` that of the weights in it."""

    name: str
    sha256: str
    fingerprint: str
    layout: str
    found: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything needed to trust an artefact or to build it again."""

    spec: ExportSpec
    checkpoint: CheckpointInfo
    artifact: Artifact
    passes: tuple[PassRecord, ...]
    ops: Mapping[str, int]
    dtypes: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    seconds: Mapping[str, float]
    unit: str = "nodes"
    """What ``ops`` counts."""
    built: Mapping[str, object] = field(default_factory=dict)
    """What else was read back from the artefact, by name."""
    precision_plan: Mapping[str, object] | None = None
    """Which blocks stay in floating point in an INT8 artefact, and why; None where nothing was planned."""

    @property
    def verdict(self) -> Verdict:
        """The verdict over all checks."""
        return overall(self.checks)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; numbers that JSON has no word for (infinite ratios) are strings."""
        fields = {
            "schema": SCHEMA,
            "verdict": str(self.verdict),
            "spec": self.spec.as_dict(),
            "checkpoint": asdict(self.checkpoint),
            "artifact": {"file": self.artifact.path.name, "sha256": self.artifact.sha256, "bytes": self.artifact.size},
            "passes": [asdict(each) for each in self.passes],
            "ops": dict(self.ops),
            "unit": self.unit,
            "dtypes": self.dtypes,
            "built": dict(self.built),
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
            "versions": dict(self.versions),
            "seconds": dict(self.seconds),
        }
        if self.precision_plan is not None:
            fields["precision_plan"] = self.precision_plan
        return {key: plain(value) for key, value in fields.items()}

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all; raises OutputNotWritten."""
        record(path, self.as_dict())


def manifest_of(
    spec: ExportSpec,
    checkpoint: CheckpointInfo,
    artifact: Artifact,
    passes: tuple[PassRecord, ...],
    saved: Saved,
    checks: tuple[Check, ...],
    notes: tuple[str, ...],
    seconds: Mapping[str, float],
) -> Manifest:
    """The manifest of an artefact that was read back as ``saved``, judged here and now."""
    return Manifest(
        spec=spec,
        checkpoint=checkpoint,
        artifact=artifact,
        passes=passes,
        ops=saved.ops,
        dtypes=saved.dtypes,
        checks=checks,
        notes=notes,
        versions=versions(spec.target),
        seconds=seconds,
        unit=saved.unit,
        built=saved.facts,
    )


def manifest_path(artifact: Path) -> Path:
    """The manifest's place: beside the artefact, its name with ``.json`` added."""
    return artifact.with_name(artifact.name + ".json")


def record(path: Path, manifest: Mapping[str, object]) -> None:
    """Write a manifest that was read back and added to, whole or not at all; raises OutputNotWritten."""
    atomic_write(path, (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def provenance(spec: ExportSpec, checkpoint: CheckpointInfo, passes: tuple[PassRecord, ...]) -> dict[str, object]:
    """What goes inside the artefact: the same for every export of one spec, so no times, paths or measured noise."""
    return {
        "schema": SCHEMA,
        "spec": spec.as_dict(),
        "checkpoint": {"fingerprint": checkpoint.fingerprint, "layout": checkpoint.layout},
        "passes": rewrites(passes),
        "versions": {name: versions(spec.target)[name] for name in targets.load(spec.target).WRITERS},
    }


def rewrites(passes: Iterable[PassRecord]) -> dict[str, int]:
    """How often each certified pass rewrote something, as artefacts record it."""
    return {each.name: each.rewrites for each in passes if each.certified and each.name != TOGETHER}


def versions(target: str) -> dict[str, str]:
    """Versions of what writes and what judges an artefact of ``target``; of the TensorRTs, those that are installed."""
    found: dict[str, str] = {}
    for package in (*targets.load(target).WRITERS, *_JUDGES, *_WHERE_INSTALLED):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package not in _WHERE_INSTALLED:
                found[package] = "not installed"
    return found


def plain(value: object) -> object:
    """``value`` as JSON can say it: numbers without a word there (infinite, NaN) are strings, tuples are lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Verdict):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
