"""Whether INT8 is worth it: measured by kits where both engines were timed, estimated where not.

A manifest of an INT8 artefact holds under ``built``, ``int8`` what ``nextvit_exporters.tensorrt.int8_cost`` estimates.
Its ``basis``, ``recommendation`` and ``sentence`` are replaced as soon as a kit of it and one of the FP16 artefact
beside it have been timed on the same GPU with the same TensorRT at the same shape; the estimate is kept.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from nextvit_exporters.errors import DeployError
from nextvit_exporters.files import atomic_write
from nextvit_exporters.tensorrt.int8_advice import DOUBTFUL, ESTIMATE, GO, MEASURED, NO_GO, advise

_SAME: Final = ("model", "task", "num_classes", "height", "width", "batch", "input")
"""What both artefacts' specs must agree in for their times to say something of INT8."""
_ADVICE: Final[Mapping[str, str]] = {
    GO: "go, use INT8",
    DOUBTFUL: "hardly faster, use FP16 unless the memory counts",
    NO_GO: "no-go, use FP16",
}


@dataclass(frozen=True, slots=True)
class Timed:
    """One artefact's time on a GPU: the median of an inference in milliseconds, without transfers."""

    milliseconds: float
    gpu: str
    tensorrt: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        """The GPU, TensorRT and the shape, in words."""
        return f"{self.gpu} with TensorRT {self.tensorrt} at {'x'.join(map(str, self.shape))}"


@dataclass(frozen=True, slots=True)
class Int8Verdict:
    """What is known of INT8 against FP16.

    ``basis`` is ``measured`` or ``estimate``, ``recommendation`` go, doubtful or no-go, ``ratio`` INT8's time by
    FP16's. ``missing`` says what would have to be there for measured times to count; nothing where they do.
    """

    basis: str
    recommendation: str
    sentence: str
    ratio: float
    int8: Timed | None
    fp16: Timed | None
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        fields = asdict(self) | {"missing": list(self.missing)}
        for name in ("int8", "fp16"):
            timed = fields[name]
            fields[name] = timed and timed | {"shape": list(timed["shape"])}
        return fields


def int8_verdict(int8_manifest: Path, fp16_manifest: Path | None = None) -> Int8Verdict:
    """Measured where both artefacts were timed alike, else the estimate, with what is missing.

    The FP16 artefact's manifest is looked for beside the other where it is not given. Raises DeployError where
    ``int8_manifest`` is no manifest with an estimate, or a given one can't be read.
    """
    told = _read(int8_manifest)
    if fp16_manifest is not None:
        return _judge(told, int8_manifest.name, _read(fp16_manifest), fp16_manifest.name)
    found = _counterpart(told, int8_manifest)
    return _judge(told, int8_manifest.name, found and found[1], found[0].name if found else "")


def settled(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``manifest``, which lies at ``path``, with what is known by now; the same where it tells of no INT8 estimate."""
    if _estimated(manifest) is None:
        return dict(manifest)
    found = _counterpart(manifest, path)
    return _with(manifest, _judge(manifest, path.name, found and found[1], found[0].name if found else ""))


def settle_beside(manifest: Mapping[str, Any], path: Path) -> None:
    """Settle the INT8 artefacts beside an FP16 artefact, whose ``manifest`` lies at ``path``; of any other, nothing.

    Raises OutputNotWritten.
    """
    if _precision(manifest) != "fp16":
        return
    for other, told in _manifests(path, "int8"):
        if _estimated(told) is not None and _agree(told, manifest):
            known = _with(told, _judge(told, other.name, manifest, path.name))
            if known != told:
                text = json.dumps(known, indent=2, sort_keys=True, allow_nan=False) + "\n"
                atomic_write(other, text.encode())


def _with(manifest: Mapping[str, Any], verdict: Int8Verdict) -> dict[str, Any]:
    """The manifest with the verdict in place of the one before; the estimate stays."""
    told = verdict.as_dict()
    int8 = {key: value for key, value in manifest["built"]["int8"].items() if key != MEASURED}
    int8 |= {key: told[key] for key in ("basis", "recommendation", "sentence", "missing")}
    if verdict.basis == MEASURED:
        int8[MEASURED] = {key: told[key] for key in ("ratio", "int8", "fp16")}
    return {**manifest, "built": {**manifest["built"], "int8": int8}}


def _judge(told: Mapping[str, Any], name: str, other: Mapping[str, Any] | None, other_name: str) -> Int8Verdict:
    estimated = _estimated(told)
    if estimated is None:
        raise DeployError(f"{name} tells of no INT8 estimate; export it again")
    int8, fp16 = _timed(told), other and _timed(other)
    missing = [] if int8 else [f"no kit with times is merged into {name}"]
    if other is None:
        missing.append(f"no manifest of the same in FP16 is beside {name}")
    elif not _agree(told, other):
        missing.append(f"{other_name} is not of the same in FP16")
    elif not fp16:
        missing.append(f"no kit with times is merged into {other_name}")
    elif int8 and int8.where != fp16.where:
        missing.append(f"INT8 was timed on {int8.where}, FP16 on {fp16.where}")
    if missing or not int8 or not fp16:
        short = estimated["recommendation"], estimated["sentence"], estimated["ratio"]
        return Int8Verdict(ESTIMATE, *short, int8, fp16 or None, tuple(missing))
    ratio = int8.milliseconds / fp16.milliseconds
    advice = advise(ratio, ratio)
    times = f"INT8 takes {int8.milliseconds:.3f} ms and FP16 {fp16.milliseconds:.3f} ms on {int8.where}"
    sentence = f"{times}, {ratio:.2f} times FP16's time: {_ADVICE[advice]} (measured)"
    return Int8Verdict(MEASURED, advice, sentence, ratio, int8, fp16, ())


def _estimated(manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The estimate that a manifest was written with, None where it holds none."""
    found = _at(manifest, "built", "int8", "estimate")
    if not isinstance(found, dict) or not _is_number(found.get("ratio")):
        return None
    texts = (found.get(name) for name in ("recommendation", "sentence"))
    return found if all(isinstance(each, str) for each in texts) else None


def _timed(manifest: Mapping[str, Any]) -> Timed | None:
    """What a merged verdict measured, None where there is none."""
    latency = _at(manifest, "device", "latency_ms")
    median = _at(latency, "without transfers", "p50")
    names = _at(manifest, "device", "gpu", "name"), _at(manifest, "device", "tensorrt")
    shape = _at(latency, "shape")
    if not _is_number(median) or median <= 0 or not all(isinstance(each, str) for each in names):
        return None
    if not isinstance(shape, list) or not all(isinstance(each, int) for each in shape):
        return None
    return Timed(float(median), str(names[0]), str(names[1]), tuple(shape))


def _agree(int8: Mapping[str, Any], fp16: Mapping[str, Any]) -> bool:
    """Whether both are of one network at one size, for one GPU, the second in FP16."""
    same = all(_at(int8, "spec", key) == _at(fp16, "spec", key) for key in _SAME)
    gpus = {_at(each, "spec", "engine", "gpu") for each in (int8, fp16)}
    return same and len(gpus) == 1 and _precision(fp16) == "fp16"


def _precision(manifest: Mapping[str, Any]) -> object:
    return _at(manifest, "spec", "precision")


def _counterpart(told: Mapping[str, Any], path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The FP16 artefact's manifest beside ``path``: one that was timed, then the one of the same name, then any."""
    wanted = re.sub(r"(?<![a-z0-9])int8(?![a-z0-9])", "fp16", path.name)
    found = [each for each in _manifests(path, "fp16") if _agree(told, each[1])]
    found.sort(key=lambda each: (_timed(each[1]) is None, each[0].name != wanted, each[0].name))
    return found[0] if found else None


def _manifests(path: Path, precision: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The manifests beside ``path`` that are of this precision; what can't be read is passed over.

    An evaluation tells the same of its artefact, and is none.
    """
    for other in sorted(path.parent.glob(f"*{precision}*.json")):
        try:
            told = _read(other)
        except DeployError:
            continue
        if _precision(told) == precision and "built" in told:
            yield other, told


def _at(value: object, *keys: str) -> Any:
    """What lies under these keys, None where nothing does."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_bytes())
    except OSError as error:
        raise DeployError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DeployError(f"{path} is no JSON; export again") from error
    if not isinstance(told, dict):
        raise DeployError(f"{path} is no manifest; export again")
    return told
