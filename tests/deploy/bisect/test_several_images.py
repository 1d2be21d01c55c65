"""Several images in one bisection: what only some show, and what breaks down on the first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nextvit_deploy.bisect import run
from nextvit_deploy.bisect.bundle import write_bundle
from nextvit_deploy.bisect.run import bisect
from nextvit_deploy.data import ImageSet
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.request import Request
from nextvit_exporters import to_onnx
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.spec import ExportSpec
from tests.deploy.bisect.bundles import repro
from tests.deploy.bisect.onnx_faults import put
from tests.deploy.support import Exported, call, rewrite_once, strict_json, tamper, weights

COUNT = 4


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "rewrite", rewrite_once)


def named(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.name == name)
    return found


def test_what_the_first_image_hides_is_in_the_bundle(
    demo: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels that a ReLU shuts on the first image, and on no other, are read three times as strongly."""
    path = demo.copied(tmp_path)
    real, seen = run._batches, list[ImageSet]()

    def batches(*given: object) -> tuple[ImageSet, ...]:
        seen.extend(real(*given))  # type: ignore[arg-type]
        return tuple(seen)

    monkeypatch.setattr(run, "_batches", batches)
    found, _ = bisect(path, Request(output=tmp_path, count=COUNT), lambda _: None)
    assert found.parting is None
    monkeypatch.setattr(run, "_batches", lambda *_: tuple(seen))
    tamper(path, lambda model: _triple(model, _shut_on_the_first(path, model, seen, demo)))
    found, cuts = bisect(path, Request(output=tmp_path, count=COUNT), lambda _: None)
    assert found.parting is not None
    assert found.parting.module == "features.3.mlp.conv2"
    bundle = write_bundle(tmp_path / "repro", path, cuts[0], found, lambda _: None)
    assert bundle.fails
    assert bundle.error is not None
    assert bundle.error >= found.parting.error
    assert repro(bundle)[0] == 1


def _shut_on_the_first(path: Path, model: onnx.ModelProto, seen: list[ImageSet], demo: Exported) -> list[int]:
    spec = ExportSpec.from_dict(demo.manifest["spec"])
    (name,) = named(model, "features.3.mlp.act/Relu").output
    largest = []

    def see(tensor: str, values: np.ndarray) -> None:
        if tensor == name:
            largest.append(values.max((0, 2, 3)))

    for each in seen:
        OnnxRuntime(path, "exact").trace({to_onnx.INPUT: np.ascontiguousarray(artefact_inputs(spec, each))}, see)
    first, *others = largest
    return [int(each) for each in np.flatnonzero((first == 0) & (np.max(others, axis=0) > 0))]


def _triple(model: onnx.ModelProto, channels: list[int]) -> None:
    assert channels
    held = named(model, "features.3.mlp.conv2/Conv").input[1]
    (tensor,) = (each for each in model.graph.initializer if each.name == held)
    values = numpy_helper.to_array(tensor).copy()
    values[:, channels] *= 3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_what_breaks_down_is_named_on_any_number_of_images(demo: Exported, tmp_path: Path) -> None:
    """The stride is lost: PyTorch has more images, and the artefact as many numbers of the first alone."""
    path = demo.copied(tmp_path)
    model = onnx.load(str(path))
    put(named(model, "stem.3.conv/Conv"), "strides", [1, 1])
    path.write_bytes(model.SerializeToString())  # which no checker lets pass
    ran = call("bisect", path, "--json", "--count", str(COUNT))
    assert ran.status == 3, ran
    assert ran.json["series"][0]["partings"][0]["module"] == "stem.3.conv"


def test_what_the_artefact_was_made_from_is_told(demo: Exported, tmp_path: Path) -> None:
    path, other = demo.copied(tmp_path), weights(tmp_path / "other.pth", 10, 5)
    ran = call("bisect", path, "--json", "--count", "1", "--checkpoint", other)
    assert ran.status == 3, ran
    note = "the file was made from other weights than other.pth; give its own checkpoint with --checkpoint"
    assert note in ran.json["notes"]
    assert f"- {note}" in Path(ran.json["bundle"]["folder"], "issue.md").read_text(encoding="utf-8")
    assert note in strict_json(Path(ran.json["bundle"]["folder"], "bundle.json").read_text(encoding="utf-8"))["notes"]
    again = call("bisect", path, "--json", "--count", "1")
    assert (again.status, again.json["bundle"]) == (0, None)
    assert again.json["no_bundle"].endswith(f"; {path}.repro is an earlier run's")


def test_a_healthy_file_without_manifest_has_no_layer_that_is_off(demo: Exported, tmp_path: Path) -> None:
    """Passes rewrote layers, whose names alone would set them against other numbers."""
    path = tamper(demo.copied(tmp_path), lambda model: model.ClearField("metadata_props"))
    ran = call("bisect", path, "--json", "--count", "1")
    assert ran.status == 0, ran
    (series,) = json.loads(ran.out)["series"]
    errors = [each["error"] for each in series["layers"] if each["error"] is not None]
    assert len(errors) > 20
    assert max(errors) < series["tolerance"]
