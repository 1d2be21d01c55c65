"""What the tests of TensorRT engines share: each export made once, copies to damage, and logs that vouch for damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx

from nextvit_deploy.manifest import manifest_path
from nextvit_exporters.files import atomic_write, sha256_of
from nextvit_exporters.spec import Artifact
from nextvit_exporters.to_tensorrt import SUFFIX, Origin, log_of, onnx_of
from tests.deploy.support import Exported, Json, Ran, call, contents, one_line, tamper

STEM: Final = "nextvit_nano_classify_64_b1_fp16_t4"
OPEN_BATCH: Final = ("--fp16", "--uint8-nhwc", "--batch", "1:2:4")
"""The options of an export that more than one module looks at."""
NETWORK: Final = "tensorrt-network-reference"
_BUILT: Final[dict[tuple[Path, tuple[str, ...]], Exported]] = {}


def exported(base: Path, *options: str | Path) -> Exported:
    """``trt --json`` with ``options``, run once below the session's folder ``base``."""
    key = base, tuple(map(str, options))
    if key not in _BUILT:
        folder = base / f"trt-{len(_BUILT)}"
        ran = call("trt", "--output", folder, "--json", *options)
        assert (ran.status, ran.err) == (0, ""), ran
        (path,) = folder.glob(f"*{SUFFIX}")
        _BUILT[key] = Exported(path, ran)
    return _BUILT[key]


def beside(path: Path) -> list[Path]:
    """The four files of an export."""
    return [path, onnx_of(path), log_of(path), manifest_path(path)]


def copied(engine: Exported, folder: Path, *, without: Sequence[Path] = ()) -> Path:
    """A copy of the engine with what is beside it, free to be damaged; ``without`` some of it."""
    for file in beside(engine.path):
        if file not in without:
            shutil.copy(file, folder)
    return folder / engine.path.name


def signed(path: Path) -> Path:
    """Let the log vouch for the files as they are now: damage that no hash gives away."""
    log = log_of(path)
    *lines, record = log.read_text(encoding="utf-8").splitlines()
    told = Origin.of_line(record)
    assert told is not None
    vouched = replace(told, engine=sha256_of(path), onnx=sha256_of(onnx_of(path)))
    log.write_text("\n".join([*lines, vouched.line(), ""]), encoding="utf-8")
    return path


def damaged(engine: Exported, folder: Path, fault: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy whose ONNX file has a fault, which its log vouches for."""
    path = copied(engine, folder)
    tamper(onnx_of(path), fault)
    return signed(path)


def questions(manifest: Json) -> dict[str, list[Json]]:
    """Checks by question."""
    found: dict[str, list[Json]] = {}
    for check in manifest["checks"]:
        found.setdefault(check["question"], []).append(check)
    return found


def is_proven(manifest: Json, cost: float = 2e-3) -> bool:
    """Whether the network executor verified both questions on every input, each within a bound that is tight."""
    answers = questions(manifest)
    assert list(answers) == ["same network", "precision cost"]
    for checks, bound in zip(answers.values(), (1e-5, cost), strict=True):
        for check in checks:
            (comparison,) = check["comparisons"]
            assert check["verdict"] == "verified"
            assert str(check["executor"]).startswith(NETWORK)
            assert comparison["relative_rms"] <= bound, check["inputs"]
            assert comparison["top1"] == 1.0
    return bool(manifest["verdict"] == "verified")


class OnnxAsBefore:
    """Stands in for the ONNX half of a build: writes ``data``, so that only TensorRT's half takes time."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def build(
        self, spec: object, module: object, path: Path, provenance: object, on_step: object, examples: object
    ) -> Artifact:
        del spec, module, provenance, on_step, examples
        atomic_write(path, self.data)
        return Artifact(path, sha256_of(path), path.stat().st_size)


def refused(folder: Path, ran: Ran, status: int = 1) -> str:
    """The one line of a refusal that left nothing in ``folder``, hidden files included."""
    assert (ran.status, ran.out) == (status, ""), ran
    assert contents(folder) == {} if folder.exists() else True
    return one_line(ran.err)
