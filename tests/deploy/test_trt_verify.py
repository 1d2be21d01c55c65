"""A built engine is looked at and proven again: what is whole passes, what is not is found out or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from nextvit_deploy.manifest import manifest_path
from nextvit_exporters.tensorrt.backends import BACKENDS, load
from nextvit_exporters.to_tensorrt import log_of, onnx_of
from tests.deploy.support import (
    Exported,
    call,
    contents,
    drop_bias,
    judged,
    put_nan,
    refusal,
    remove_relu,
    scale_weight,
    swap_classes,
    swap_red_and_blue,
    tamper,
    verdicts,
    weights,
)
from tests.deploy.support_trt import STEM, beside, copied, damaged

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
pytestmark = pytest.mark.usefixtures("quick")
RTX = BACKENDS["tensorrt-rtx"]
Fault = Callable[[onnx.ModelProto], None]


def test_inspect(engine: Exported, tmp_path: Path) -> None:
    shown, found = call("inspect", engine.path), call("inspect", engine.path, "--json").json
    version = f"tensorrt-rtx {load(RTX).__version__}"
    assert shown.status == 0
    assert version in shown.out
    assert "SM75" in shown.out
    assert "features.4.e_mhsa.q" in shown.out
    assert (found["built by"], found["for"], found["spec"]["precision"]) == (version, "SM75", "fp16")
    assert found["kernels"] == len(found["kernel list"]) == len(engine.manifest["built"]["kernel list"])

    alone = copied(engine, tmp_path, without=beside(engine.path)[1:])
    shown, found = call("inspect", alone), call("inspect", alone, "--json").json
    assert shown.status == 0
    told = " ".join(shown.out.split())
    assert all(each in told for each in (version, "SM75", f"not known: {alone.name}.log is not beside it"))
    assert "kernels" not in told  # their number isn't known either
    assert (found["built by"], found["for"], "kernel list" in found) == (version, "SM75", False)


def test_inspect_of_another_engines_log(engine: Exported, open_batch: Exported, tmp_path: Path) -> None:
    path = copied(engine, tmp_path)
    log_of(path).write_bytes(log_of(open_batch.path).read_bytes())
    found = call("inspect", path, "--json").json
    assert found["computes in"] == f"not known: {path.name}.log tells of another engine"
    assert "kernel list" not in found


def test_verify_finds_a_whole_engine_verified(engine: Exported, tmp_path: Path) -> None:
    path = copied(engine, tmp_path)
    before = contents(tmp_path)
    status, checks, notes = judged(path)
    assert (status, verdicts(checks)) == (0, [{"verified"}, {"verified"}])
    assert not any("changed" in note or "other" in note for note in notes)
    assert contents(tmp_path) == before


def test_verify_open_axes(open_batch: Exported) -> None:
    status, checks, _ = judged(open_batch.path)
    assert status == 0
    assert [len(each) for each in checks.values()] == [3, 3]


def swap_key_and_value(model: onnx.ModelProto) -> None:
    key, value = (node for node in model.graph.node if node.name in {f"features.4.e_mhsa.{p}/MatMul" for p in "kv"})
    key.input[1], value.input[1] = value.input[1], key.input[1]


def softmax_over_queries(model: onnx.ModelProto) -> None:
    (softmax,) = (node for node in model.graph.node if node.name == "features.4.e_mhsa/Softmax")
    (axis,) = softmax.attribute
    axis.i = 2


FAULTS: tuple[Fault, ...] = (
    scale_weight,
    drop_bias,
    swap_key_and_value,
    softmax_over_queries,
    remove_relu,
    swap_classes,
    swap_red_and_blue,
    put_nan,
)


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_a_fault_that_the_log_vouches_for(engine: Exported, tmp_path: Path, fault: Fault) -> None:
    status, checks, _ = judged(damaged(engine, tmp_path, fault))
    assert status == 3
    assert verdicts(checks)[0] == {"failed"}
    assert (verdicts(checks)[1] == {"verified"}) <= (fault is scale_weight)  # lost in the rounding to FP16


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_weight(path: Path) -> None:
    tamper(onnx_of(path), scale_weight)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shortened, f"{STEM}.engine should hold "),
        (flipped, f"{STEM}.engine is not the file that {STEM}.engine.log tells of; export it again"),
        (other_weight, f"{STEM}.onnx is not the file that {STEM}.engine.log tells of; export it again"),
    ],
)
def test_verify_refuses_what_the_log_does_not_vouch_for(
    engine: Exported, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    path = copied(engine, tmp_path)
    damage(path)
    assert refusal("verify", path).startswith(says)


@pytest.mark.parametrize("gone", [onnx_of, log_of])
def test_verify_without_what_it_was_built_from(engine: Exported, tmp_path: Path, gone: Callable[[Path], Path]) -> None:
    """Nothing is known of it then: neither right nor wrong."""
    path = copied(engine, tmp_path, without=[gone(engine.path)])
    line = refusal("verify", path, status=4)
    assert line.startswith("not verified: ")
    assert line.endswith(f" not both beside {path.name}; export it again")


def test_verify_without_a_manifest(engine: Exported, tmp_path: Path) -> None:
    """All that the proof needs is in the ONNX file and the log."""
    assert judged(copied(engine, tmp_path, without=[manifest_path(engine.path)]))[0] == 0


def test_verify_against_another_checkpoint(engine: Exported, tmp_path: Path) -> None:
    other = weights(tmp_path / "other.pth", 10, seed=3)
    status, checks, notes = judged(engine.path, "--checkpoint", other)
    assert (status, verdicts(checks)) == (3, [{"failed"}, {"failed"}])
    assert any(note.startswith("the file was made from other weights than other.pth") for note in notes)
    fewer = weights(tmp_path / "fewer.pth", 7, seed=3)
    line = refusal("verify", engine.path, "--checkpoint", fewer)
    assert line.startswith(f"{engine.path.name} was made from a nextvit_nano with 10 classes, fewer.pth is a ")
