from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_deploy.kit import build
from nextvit_deploy.kit.build import check_kit_place, write_kit
from nextvit_exporters.engine_spec import Range
from nextvit_exporters.errors import DeployError, OutputNotWritten, UnsupportedSpec
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import InputKind, Precision
from tests.deploy.kit.kits import DYNAMIC, IMAGES, STATIC, TOLERANCE, answers, changed, make, spec_of, tiny
from tests.deploy.support import contents

FILES = {"README.md", "check.py", "device.py", "golden.npz", "kit.json", "manifest.json", "model.onnx"}


def test_a_kit_holds_what_the_host_needs(tmp_path: Path) -> None:
    made = make(tmp_path, changed(DYNAMIC, workspace=64, opt_level=2))
    assert set(contents(made.folder)) == FILES
    told = made.json("kit.json")
    assert told["profile"] == {"min": [1, 3, 32, 32], "opt": [4, 3, 32, 32], "max": [8, 3, 32, 32]}
    assert (told["batch"], told["workspace"], told["opt_level"]) == (None, 64, 2)
    assert told["tolerance"] == {"relative_rms": 1e-2, "measured": TOLERANCE.measured}
    assert told["gpu"] == {"name": "Tesla T4", "capability": "7.5"}
    assert (told["input"], told["output"]) == (
        {"name": "image", "dtype": "float32"},
        {"name": "logits", "dtype": "float32"},
    )
    assert told["preprocessing"] == made.spec.preprocessing.as_dict()
    assert told["files"] == {name: sha256_of(made.folder / name) for name in FILES & set(told["files"])}
    assert set(told["files"]) == {"model.onnx", "golden.npz", "check.py", "device.py"}
    assert (made.folder / told["manifest"]).resolve() == made.manifest.resolve()
    assert made.json("manifest.json") == json.loads(made.manifest.read_bytes())
    with np.load(made.folder / "golden.npz", allow_pickle=False) as golden:
        assert np.array_equal(golden["inputs"], IMAGES)
        assert np.array_equal(golden["outputs"], answers(IMAGES))
    readme = (made.folder / "README.md").read_text(encoding="utf-8")
    assert "$ python check.py\n" in readme
    assert "Tesla T4" in readme


def test_no_path_of_this_machine_is_in_a_kit(tmp_path: Path) -> None:
    for data in contents(make(tmp_path).folder).values():
        assert str(tmp_path).encode() not in data


@pytest.mark.parametrize(
    ("precision", "half", "network", "engine", "required"),
    [
        (Precision.FP32, False, ["FLOAT"], ["Float"], "Float"),
        (Precision.FP16, True, ["HALF"], ["Half"], "Half"),
        (Precision.INT8, True, ["HALF"], ["Half", "Int8"], "Int8"),
        (Precision.INT8, False, ["FLOAT"], ["Float", "Int8"], "Int8"),
    ],
)
def test_expected_types_are_those_of_the_file(
    tmp_path: Path, precision: Precision, *, half: bool, network: list[str], engine: list[str], required: str
) -> None:
    told = make(tmp_path, spec_of(Range.of(2), precision), half=half).json("kit.json")
    assert told["dtypes"] == {"network": network, "engine": engine, "required": required}
    assert told["batch"] == 2


def test_a_file_that_is_not_of_the_precision_makes_no_kit(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpec, match=r"no convolution or matrix product of tiny.onnx computes in fp16"):
        make(tmp_path, STATIC, half=False)
    (tmp_path / "x.onnx").write_bytes(tiny(spec_of(Range.of(2), Precision.FP32)).SerializeToString())
    quantized = spec_of(Range.of(2), Precision.INT8)
    line = refused(tmp_path, spec=quantized, onnx=tmp_path / "x.onnx")
    assert line.startswith("no convolution or matrix product of x.onnx computes in int8")


def test_raw_pixels_keep_their_type_and_order(tmp_path: Path) -> None:
    spec = replace(STATIC, input=InputKind.UINT8_NHWC, io=Precision.FP16)
    (tmp_path / "x.onnx").write_bytes(tiny(STATIC).SerializeToString())
    pixels = np.zeros((5, 32, 32, 3), np.uint8)
    write_kit(tmp_path / "kit", tmp_path / "x.onnx", spec, pixels, answers(IMAGES), TOLERANCE, {}, tmp_path / "m.json")
    told = json.loads((tmp_path / "kit" / "kit.json").read_bytes())
    assert (told["input"]["dtype"], told["output"]["dtype"]) == ("uint8", "float16")
    assert told["profile"]["opt"] == [2, 32, 32, 3]


def refused(folder: Path, **changes: Any) -> str:
    source = folder / "tiny.onnx"
    source.write_bytes(tiny(STATIC).SerializeToString())
    inputs, expected = changes.get("inputs", IMAGES), changes.get("expected", answers(IMAGES))
    spec, onnx = changes.get("spec", STATIC), changes.get("onnx", source)
    with pytest.raises(DeployError) as raised:
        write_kit(folder / "kit", onnx, spec, inputs, expected, TOLERANCE, {}, folder / "m.json")
    assert not (folder / "kit").exists()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    good = answers(IMAGES)
    assert "don't fit the engine" in refused(tmp_path, inputs=IMAGES[:, :, :16])
    assert "don't fit the engine" in refused(tmp_path, inputs=IMAGES.astype(np.float16))
    assert "don't fit the engine" in refused(tmp_path, inputs=IMAGES[0])
    assert "makes no engine" in refused(tmp_path, spec=replace(STATIC, engine=None))
    assert "(5, 3) float32" in refused(tmp_path, expected=good[:4])
    assert "(5, 3) float32" in refused(tmp_path, expected=good.astype(np.float64))
    assert "matching them shows nothing" in refused(tmp_path, expected=good * np.float32(np.nan))
    assert "matching them shows nothing" in refused(tmp_path, expected=good * np.float32(0))
    assert "is no file" in refused(tmp_path, onnx=tmp_path / "gone.onnx")
    assert isinstance(UnsupportedSpec("x"), DeployError)


def test_an_earlier_kit_is_replaced(tmp_path: Path) -> None:
    made = make(tmp_path)
    check_kit_place(made.folder)
    make(tmp_path, DYNAMIC)
    assert set(contents(made.folder)) == FILES
    assert made.json("kit.json")["batch"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "tiny.engine.json", "tiny.onnx"]


@pytest.mark.parametrize("foreign", ["verdict.json", "notes.txt", "exports/x.onnx"])
def test_what_was_put_into_a_kit_is_not_deleted(tmp_path: Path, foreign: str) -> None:
    made = make(tmp_path)
    (made.folder / foreign).parent.mkdir(exist_ok=True)
    (made.folder / foreign).write_bytes(b"mine")
    before = contents(tmp_path)
    named = rf"kit holds {foreign.partition('/')[0]} besides the kit; move it away or choose another folder"
    with pytest.raises(OutputNotWritten, match=named):
        make(tmp_path)
    with pytest.raises(OutputNotWritten, match=named):
        check_kit_place(made.folder)
    assert contents(tmp_path) == before
    assert build.is_kit(made.folder)


@pytest.mark.parametrize("foreign", ["notes.txt", "kit.json"])
def test_a_folder_with_something_else_is_refused(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / foreign).write_text('{"kind": "mine"}', encoding="utf-8")
    with pytest.raises(OutputNotWritten, match="is no kit of this program"):
        make(tmp_path)
    assert contents(tmp_path / "kit") == {foreign: b'{"kind": "mine"}'}


def test_a_failure_half_way_leaves_the_earlier_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)
    before = contents(made.folder)

    def fail(folder: Path, *_: object) -> str:
        raise RuntimeError(f"no room in {folder}")

    monkeypatch.setattr(build, "_readme", fail)
    with pytest.raises(RuntimeError, match="no room"):
        make(tmp_path, DYNAMIC)
    assert contents(made.folder) == before
    with pytest.raises(RuntimeError, match="no room"):
        make(tmp_path, name="deep/er/kit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kit", "tiny.engine.json", "tiny.onnx"]
