"""What the tests of the command line share: running it, and planting faults in what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import fx

from nextvit_deploy import cli, pipeline
from nextvit_deploy.manifest import manifest_path
from nextvit_exporters import graph as g
from nextvit_exporters import targets
from nextvit_exporters.files import atomic_write
from nextvit_exporters.passes.base import PassRecord
from nextvit_exporters.spec import Artifact, ExportSpec
from nextvit_models.checkpoint import Checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

Floats = NDArray[np.float32]
Json = dict[str, Any]
Rewritten = tuple[fx.GraphModule, tuple[PassRecord, ...]]


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of the command line: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Json:
        """Stdout as strict JSON, and nothing else on it."""
        return strict_json(self.out)


def strict_json(text: str) -> Json:
    """One JSON object, without the words that only Python reads."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is not JSON")

    value = json.loads(text, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def call(*arguments: str | Path) -> Ran:
    """Run a command in this process, through the entry point that the installed script calls."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int | None)
    return Ran(left.value.code or 0, out.getvalue(), err.getvalue())


def refusal(*arguments: str | Path, status: int = 1) -> str:
    """Run a command that must be refused, and return its one line without the program's name."""
    ran = call(*arguments)
    assert (ran.status, ran.out) == (status, ""), ran
    return one_line(ran.err)


def one_line(err: str) -> str:
    assert err.startswith("nextvit-export: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err.removeprefix("nextvit-export: ").removesuffix("\n")


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nextvit_deploy", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment() | environment,
    )


def run(*arguments: str | Path, **environment: str) -> Ran:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=600)
    return Ran(process.returncode, out, err)


def _environment() -> dict[str, str]:
    """Without what would change how tables look."""
    return {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "FORCE_COLOR"}}


@dataclass(frozen=True, slots=True)
class Exported:
    """An artefact on disk that a test may copy but not change."""

    path: Path
    ran: Ran

    @property
    def manifest(self) -> Json:
        return strict_json(manifest_path(self.path).read_text(encoding="utf-8"))

    def copied(self, folder: Path) -> Path:
        """A copy with its manifest, free to be damaged."""
        shutil.copy(manifest_path(self.path), folder)
        return Path(shutil.copy(self.path, folder))


def judged(*arguments: str | Path) -> tuple[int, dict[str, list[Json]], list[str]]:
    """Exit status, checks by question, and notes of one ``verify --json``; both questions are always answered."""
    ran = call("verify", *arguments, "--json")
    checks: dict[str, list[Json]] = {}
    manifest = ran.json
    for check in manifest["checks"]:
        checks.setdefault(check["question"], []).append(check)
    assert list(checks) == [targets.SAME_NETWORK, targets.PRECISION_COST]
    verdict = manifest["verdict"]
    assert ran.status == {"verified": 0, "failed": 3, "not verified": 4}[str(verdict)]
    if ran.status:
        assert one_line(ran.err).startswith(f"{Path(arguments[0]).name} is {verdict}: ")
    else:
        assert ran.err == ""
    return ran.status, checks, manifest["notes"]


def verdicts(checks: dict[str, list[Json]]) -> list[set[object]]:
    return [{check["verdict"] for check in group} for group in checks.values()]


def weights(path: Path, classes: int, seed: int) -> Path:
    """A checkpoint of the demo's variant with other weights."""
    torch.save(randomise(NextViT(VARIANTS["nextvit_nano"], classes), seed).state_dict(), path)
    return path


@dataclass(slots=True)
class Replay:
    """Stands in for the target's build: writes ``data`` as the build writes its file."""

    data: bytes

    def build(
        self,
        spec: ExportSpec,
        module: fx.GraphModule,
        path: Path,
        provenance: object,
        on_step: pipeline.OnStep,
        examples: object = None,
    ) -> Artifact:
        del spec, module, provenance, examples
        on_step("replay")
        atomic_write(path, self.data)
        return Artifact.of(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What each fault does to the file at ``features.3`` and ``features.4``, which every stage-3 output depends on.
def scale_weight(model: onnx.ModelProto) -> None:
    _change(model, "features.3.mlp.conv1.weight", lambda values: values * np.float32(1.001))


def drop_bias(model: onnx.ModelProto) -> None:
    del _node(model, "features.3.mlp.conv1/Conv").input[2]


def swap_key_and_value(model: onnx.ModelProto) -> None:
    key, value = _node(model, "features.4.e_mhsa.k/Conv"), _node(model, "features.4.e_mhsa.v/Conv")
    key.input[1], value.input[1] = value.input[1], key.input[1]


def remove_relu(model: onnx.ModelProto) -> None:
    relu = _node(model, "features.3.mlp.act/Relu")
    relu.op_type = "Identity"


def shorten_pool(model: onnx.ModelProto) -> None:
    """One token fewer in each mean; the shapes stay."""
    pool = _node(model, "features.2.e_mhsa.sr/AveragePool")
    (kernel,) = (attribute for attribute in pool.attribute if attribute.name == "kernel_shape")
    kernel.ints[0] -= 1


def swap_classes(model: onnx.ModelProto) -> None:
    for part in ("weight", "bias"):
        _change(model, f"proj_head.0.{part}", lambda values: values[[0, 1, 2, 5, 4, 3, 6, 7, 8, 9]])


def swap_red_and_blue(model: onnx.ModelProto) -> None:
    _change(model, "stem.0.conv.weight", lambda values: values[:, ::-1])


def put_nan(model: onnx.ModelProto) -> None:
    _change(model, "proj_head.0.bias", lambda values: values * np.float32(np.nan))


FAULTS: Final[tuple[Callable[[onnx.ModelProto], None], ...]] = (
    scale_weight,
    drop_bias,
    swap_key_and_value,
    remove_relu,
    shorten_pool,
    swap_classes,
    swap_red_and_blue,
    put_nan,
)


def tamper(path: Path, fault: Callable[[onnx.ModelProto], None]) -> Path:
    """Plant a fault in the file at ``path``; it is still a whole ONNX file."""
    model = onnx.load(str(path))
    before = model.SerializeToString(deterministic=True)
    fault(model)
    onnx.checker.check_model(model, full_check=True)
    after = model.SerializeToString(deterministic=True)
    assert after != before
    path.write_bytes(after)
    return path


def forget(model: onnx.ModelProto) -> None:
    """Remove what this tool wrote of itself."""
    del model.metadata_props[:]


def rename(model: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give inputs and outputs other names."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [node for node in model.graph.node if node.name == name]
    assert len(found) == 1, name
    return found[0]


def _change(model: onnx.ModelProto, name: str, how: Callable[[Floats], Floats]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(values)).astype(values.dtype), name))


def rewrite_once(spec: ExportSpec, checkpoint: Checkpoint, on_step: pipeline.OnStep) -> Rewritten:
    """``pipeline.rewrite``, certified once for each spec and checkpoint: it takes most of a verification."""
    key = spec, checkpoint.fingerprint
    if key not in _REWRITTEN:
        _REWRITTEN[key] = _REWRITE(spec, checkpoint, on_step)
    graph, records = _REWRITTEN[key]
    return g.clone(graph), records  # exports give back what they were given


_REWRITE: Final = pipeline.rewrite
_REWRITTEN: Final[dict[tuple[ExportSpec, str], Rewritten]] = {}
