"""A plan is read back as it was written, and anything else is refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nextvit_deploy.precision.plan import PrecisionPlan, read_plan, write_plan
from nextvit_deploy.precision.record import BlockPlan, Measurement
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.quantize.placement import blocks, placement
from tests.deploy.precision.networks import Network

PLAN = PrecisionPlan(
    model="nextvit_nano",
    size=(64, 64),
    budget="30dB",
    method="mse",
    images="0" * 64,
    count=3,
    blocks=(
        BlockPlan("stem.0", math.inf, 0.0, 1, 10, "int8"),
        BlockPlan("features.3", 12.5, 0.75, 4, 20, "fp16"),
        BlockPlan("features.4", 17.0, 0.25, 4, 20, "int8"),
    ),
    predicted_db=17.0,
    sqnr_db=16.5,
    float_top1=1.0,
    top1=2 / 3,
    steps=(Measurement(0, 11.0, 10.0, 1 / 3, False), Measurement(1, 17.0, 16.5, 2 / 3, True)),  # noqa: FBT003
    notes=("one note",),
)


def test_a_plan_is_read_back_from_its_own_file_or_a_manifest(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, PLAN)
    assert read_plan(path, network.spec, network.graph) == PLAN
    assert PLAN.keep == ("features.3",)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"schema": 1, "spec": {}, "precision_plan": PLAN.as_dict()}), encoding="utf-8")
    assert read_plan(manifest, network.spec, network.graph) == PLAN
    unlabelled = replace(PLAN, float_top1=None, top1=None, notes=())
    write_plan(path, unlabelled)
    assert read_plan(path, network.spec, network.graph) == unlabelled


def test_a_measured_plan_is_read_back_too(network: Network, tmp_path: Path) -> None:
    plan = network.plan("46dB")
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json", network.spec, network.graph) == plan


def changed(**fields: object) -> str:
    return json.dumps(PLAN.as_dict() | fields)


def block(**fields: object) -> dict[str, object]:
    return {"blocks": [asdict(PLAN.blocks[1]) | fields]}


HOSTILE: Mapping[str, str | bytes] = {
    "empty": "",
    "no JSON": "keep: [stem.0]",
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "deep": "[" * 100_000,
    "NaN": changed(sqnr_db=math.nan),
    "overflow": changed().replace("16.5", "1e999"),
    "long number": changed(count=1).replace('"count": 1', '"count": ' + "1" * 5000),
    "no plan in it": json.dumps({"schema": 1, "spec": {}}),
    "its plan is a list": json.dumps({"precision_plan": []}),
    "another schema": changed(schema=2),
    "a schema that is no number": changed(schema=[1] * 99),
    "no blocks": changed(blocks=[]),
    "blocks that are an object": changed(blocks={}),
    "a block that is text": changed(blocks=["stem.0"]),
    "a block twice": changed(blocks=[asdict(PLAN.blocks[1])] * 2),
    "no precision": changed(**block(precision="int4")),
    "a number as a name": changed(**block(block=3)),
    "control characters": changed(**block(block="stem.0\x1b[2J")),
    "text for a number": changed(**block(sqnr_db="12.5")),
    "truth for a number": changed(**block(sqnr_db=True)),
    "half a map": changed(**block(maps=0.5)),
    "less than none": changed(**block(macs=-1)),
    "one side": changed(size=[64]),
    "no size": changed(size=None),
    "a share beyond all": changed(top1=1.5),
    "steps that are text": changed(steps=["whole"]),
    "notes that are numbers": changed(notes=[1]),
    "no model": changed(model=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_plan_is_refused_in_one_line(network: Network, tmp_path: Path, name: str) -> None:
    path, text = tmp_path / "plan.json", HOSTILE[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnsupportedSpec) as refused:
        read_plan(path, network.spec, network.graph)
    message = str(refused.value)
    assert message.startswith(f"{path} holds no precision plan: ")
    assert message.endswith("; plan again with --accuracy-budget")
    assert len(message) < 300 + len(str(path))
    assert message.isprintable()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(PLAN, model="nextvit_small"), "is a plan for nextvit_small, not for nextvit_nano; give its own"),
        (
            replace(PLAN, blocks=(*PLAN.blocks, BlockPlan("features.99", 1.0, 0.0, 1, 1, "int8"))),
            "names a block 'features.99', which nextvit_nano doesn't quantize here",
        ),
    ],
)
def test_a_plan_for_another_network_is_refused(
    network: Network, tmp_path: Path, plan: PrecisionPlan, message: str
) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    with pytest.raises(UnsupportedSpec) as refused:
        read_plan(path, network.spec, network.graph)
    assert str(refused.value) == f"{path} {message}"


def test_a_plan_that_leaves_nothing_in_int8_is_refused(network: Network, tmp_path: Path) -> None:
    every = tuple(BlockPlan(name, 1.0, 0.0, 1, 1, "fp16") for name in blocks(placement(network.graph)))
    write_plan(tmp_path / "plan.json", replace(PLAN, blocks=every))
    with pytest.raises(UnsupportedSpec, match="leaves no block in INT8"):
        read_plan(tmp_path / "plan.json", network.spec, network.graph)


def test_a_manifest_without_a_plan_is_told_as_one(network: Network, tmp_path: Path) -> None:
    (tmp_path / "plain.json").write_text('{"schema": 1, "artifact": {"file": "plain.onnx"}}')
    with pytest.raises(UnsupportedSpec, match="plan: it is the manifest of an artefact that was made without one; "):
        read_plan(tmp_path / "plain.json", network.spec, network.graph)


def test_a_file_that_is_not_there_is_named(network: Network, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpec) as refused:
        read_plan(tmp_path / "none.json", network.spec, network.graph)
    assert str(refused.value).endswith("none.json can't be read: No such file or directory; give a plan or a manifest")


@pytest.mark.parametrize("name", sorted(PLAN.as_dict()))
def test_nothing_may_be_missing(name: str) -> None:
    fields = PLAN.as_dict()
    del fields[name]
    if name in {"float_top1", "top1"}:
        assert getattr(PrecisionPlan.from_dict(fields), name) is None
        return
    with pytest.raises(ValueError, match=r"its|names"):
        PrecisionPlan.from_dict(fields)
