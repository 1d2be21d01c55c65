"""What FP16 can't hold: kept in float32, named, or refused; never infinite without a word.

The checkpoints answer what the demo's answers, bit by bit: one convolution comes to a power of two times as much, and
the next one, behind a ReLU, takes it back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch

from nextvit_deploy.manifest import manifest_path
from nextvit_exporters.coreml.program import Package, modules_of
from nextvit_exporters.coreml.reader import read_package
from nextvit_models.checkpoint import load_checkpoint, save_safetensors
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, Json, call, one_line, refusal, strict_json
from tests.deploy.support_coreml import (
    STEM,
    Draft,
    by_question,
    exported,
    failed,
    needs_coremltools,
    planted,
    verified,
)
from tests.harness import images

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
BLOCK: Final = "features.3.mlp"
KEPT: Final = [f"{BLOCK}.conv1", f"{BLOCK}.act", f"{BLOCK}.conv2"]
LARGEST: Final = 3.1775
"""What ``conv1`` comes to in the demo, on its own digits."""


def scaled(path: Path, power: int) -> Path:
    """The demo's checkpoint with ``conv1`` times two to the ``power``, and ``conv2`` by that."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    example = images(2, 3, 64, 64, seed=0)
    with torch.no_grad():
        before = checkpoint.model(example)
        up, down = (checkpoint.model.get_submodule(f"{BLOCK}.{name}") for name in ("conv1", "conv2"))
        for parameter in up.parameters():
            parameter.mul_(2.0**power)
        down.get_parameter("weight").mul_(2.0**-power)
        assert torch.equal(checkpoint.model(example), before)
    save_safetensors(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that comes to 104 thousand."""
    return scaled(tmp_path_factory.mktemp("beyond") / "beyond.safetensors", 15)


@pytest.fixture(scope="module")
def mixed(beyond: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Its package, as the defaults make it."""
    return exported(tmp_path_factory.getbasetemp(), beyond)


def dtypes(package: Package) -> dict[str, set[str]]:
    """What each torch module computes in, by its name."""
    modules, found = modules_of(package), dict[str, set[str]]()
    for operation in package.program.operations:
        if operation.kind in {"conv", "relu", "linear", "softmax", "matmul"}:
            module = modules[operation.outputs[0].name]
            found.setdefault(module, set()).update(output.type.dtype for output in operation.outputs)
    return found


def headroom(manifest: Json) -> Json:
    """The one audit that a manifest holds."""
    (audit,) = [check["findings"]["headroom"] for check in manifest["checks"] if "headroom" in check["findings"]]
    assert isinstance(audit, dict)
    return audit


def test_what_overflows_is_kept_in_float32(mixed: Exported) -> None:
    manifest = mixed.manifest
    assert manifest["verdict"] == "verified"
    assert manifest["spec"]["coreml"]["keep_fp32"] == KEPT
    note = f"kept in float32, for FP16 would overflow: {', '.join(KEPT)}; the Neural Engine computes in FP16 only"
    assert note in manifest["notes"]

    computed = dtypes(read_package(mixed.path))
    assert {module for module, found in computed.items() if found != {"float16"}} == set(KEPT)
    assert all(computed[module] == {"float32"} for module in KEPT)


def test_its_weights_are_those_of_the_checkpoint(mixed: Exported, beyond: Path) -> None:
    """Not rounded to FP16, which holds nothing of ``conv2`` but some steps."""
    wanted = load_checkpoint(beyond).model.get_submodule(f"{BLOCK}.conv2").get_parameter("weight")
    package = read_package(mixed.path)
    modules, operations = modules_of(package), package.program.operations
    (conv,) = (each for each in operations if modules.get(each.outputs[0].name) == KEPT[2] and each.kind == "conv")
    held = {each.outputs[0].name: each.attributes["val"] for each in operations if each.kind == "const"}
    weight = held[str(conv.inputs["weight"][0])]
    assert weight.type.dtype == "float32"
    assert torch.equal(torch.from_numpy(weight.data.copy()), wanted)


def test_the_audit_leaves_out_what_is_kept(mixed: Exported) -> None:
    """It tells of FP16, and of that there is plenty."""
    audit = headroom(mixed.manifest)
    assert 100 < audit["largest"] < 200
    assert audit["factor"] == pytest.approx(65504 / audit["largest"])
    assert (audit["beyond_quarter"], audit["beyond_accumulator"]) == (0, [])
    assert audit["runs"] == 8
    modules = {layer["module"] for layer in audit["layers"] if layer["kind"] != "cast"}  # that leads back into FP16
    assert "features.2.e_mhsa" in modules
    assert not modules & set(KEPT)


def test_verify_reads_what_is_kept_from_the_package(mixed: Exported, beyond: Path) -> None:
    manifest = verified(mixed.path, "--checkpoint", beyond, "--count", "2")
    assert manifest["spec"]["coreml"]["keep_fp32"] == KEPT
    assert any(note.startswith("kept in float32") for note in manifest["notes"])


def test_a_fault_in_what_is_kept_is_found(mixed: Exported, beyond: Path, tmp_path: Path) -> None:
    def zero_bias(draft: Draft) -> None:
        draft.change(draft.find("conv", f"{BLOCK}.conv1"), "bias", lambda values: values * 0)

    failed(planted(mixed, tmp_path, zero_bias), "--checkpoint", beyond, "--count", "2")


def test_the_overflow_is_found_where_nothing_is_kept(beyond: Path, tmp_path: Path) -> None:
    """The package is written, for a newer device may do better, and it is marked."""
    ran = call("coreml", beyond, "--no-keep-fp32", "--output", tmp_path, "--count", "2", "--json")
    assert ran.status == 3
    line = one_line(ran.err)
    assert line.startswith(f"{STEM}.mlpackage is failed: precision cost: conv ")
    assert f"(of {BLOCK}.conv1) comes to " in line
    assert "float16 ends at 65504: keep it in float32, or scale what goes into it" in line

    manifest = strict_json(manifest_path(tmp_path / f"{STEM}.mlpackage").read_text(encoding="utf-8"))
    assert manifest == ran.json
    assert manifest["spec"]["coreml"]["keep_fp32"] == []
    verdicts = {question: {check["verdict"] for check in group} for question, group in by_question(manifest).items()}
    assert verdicts == {
        "same network": {"verified"},  # that asks for no precision
        "precision cost": {"failed"},
        "precision cost, at worst": {"failed"},
    }


@pytest.mark.parametrize(
    "compression", [("--weights", "int8"), ("--activations", "int8", "--no-equalize", "--ios", "17")]
)
def test_a_compressed_package_keeps_nothing(beyond: Path, compression: tuple[str, ...], tmp_path: Path) -> None:
    says = f"{KEPT[0]} would overflow FP16 and has to stay in float32, which a compressed package can't do"
    assert refusal("coreml", beyond, *compression, "--output", tmp_path).startswith(says)
    assert not list(tmp_path.iterdir())


def test_rescaled_channels_need_no_float32(beyond: Path, tmp_path: Path) -> None:
    """What one map makes too large and the next makes small again is brought into balance before int8."""
    ran = call("coreml", beyond, "--activations", "int8", "--ios", "17", "--count", "2", "--output", tmp_path, "--json")
    assert (ran.status, ran.err, ran.json["verdict"]) == (0, "", "verified")
    asked = ran.json["spec"]["coreml"]
    assert (asked["keep_fp32"], asked["equalize"], asked["calibration_size"]) == ([], True, 0)
    assert any("activation scales were taken from the images" in note for note in ran.json["notes"])


def test_a_package_that_comes_near_says_so(tmp_path: Path) -> None:
    """Beyond half of what FP16 holds: kept by default, told where it is not."""
    near = scaled(tmp_path / "near.safetensors", 14)
    ran = call("coreml", near, "--no-keep-fp32", "--output", tmp_path, "--json")
    assert (ran.status, ran.json["verdict"]) == (0, "verified"), ran.err
    audit = headroom(ran.json)
    assert audit["largest"] == pytest.approx(LARGEST * 2**14, rel=1e-3)
    assert audit["layers"][0]["module"] == f"{BLOCK}.conv1"
    assert audit["layers"][0]["largest"] == audit["largest"]
    assert audit["beyond_quarter"] == 1
    assert audit["beyond_accumulator"] == [audit["layers"][0]["operation"]]
    assert audit["factor"] < 2


def test_a_sweep_tells_what_cannot_be_compressed(beyond: Path, tmp_path: Path) -> None:
    ran = call("coreml", beyond, "--sweep", "--count", "2", "--output", tmp_path, "--json")
    assert (ran.status, ran.err) == (0, ""), ran
    swept = strict_json(ran.out)
    assert swept["recommended"] == "fp16"
    first, *others = swept["trials"]
    assert first["verdict"] == "verified"
    assert [each["name"] for each in others] == ["int8", "lut8", "lut6", "lut4", "w8a8"]
    for each in others[:-1]:
        assert each["why"].startswith(f"{KEPT[0]} would overflow FP16")
