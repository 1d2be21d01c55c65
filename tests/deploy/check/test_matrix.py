"""Cells: their order, their names, and what is in each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvit_deploy.check.cells import Cell
from nextvit_deploy.check.config import Artefact, Config, Matrix, read_config
from nextvit_deploy.check.matrix import cells_of, default_matrix
from nextvit_exporters.tensorrt.backends import BACKENDS, GPUS

ROOT = Path(__file__).resolve().parents[3]
EMPTY = Config(path=None, output=Path("out"))
LANES = ("onnx", "trt", "coreml")


def cells(*matrices: Matrix, artefacts: tuple[Artefact, ...] = (), config: Config = EMPTY) -> tuple[Cell, ...]:
    return cells_of(replace(config, matrices=matrices, artefacts=artefacts))


def names(*matrices: Matrix, artefacts: tuple[Artefact, ...] = ()) -> list[str]:
    return [each.name for each in cells(*matrices, artefacts=artefacts)]


def of(*checkpoints: str | None, ema: bool = False) -> Matrix:
    return Matrix(checkpoints, ("onnx",), ("fp32",), ema=ema)


def test_the_projects_own() -> None:
    config = read_config(ROOT / "nextvit-export.toml")
    found = cells_of(config)
    made = [(lane, precision) for lane in LANES for precision in ("fp32", "fp16", "int8")]
    assert sorted((each.lane, each.precision) for each in found) == sorted([*made, ("onnx", "fp32")])
    assert [each.gpu for each in found if each.lane == "trt" and each.precision == "fp32"] == ["a10"]
    assert [each.name for each in found if each.passes == "none"] == ["demo-onnx-fp32-64-b1-nopasses"]
    assert {(each.checkpoint, each.size, each.layers) for each in found} == {(None, (64, 64), True)}
    assert set(config.limits.budgets) == set(config.limits.tolerances) == set(made)
    assert cells_of(read_config(ROOT / "nextvit-export.toml")) == found


def test_order_and_names() -> None:
    all_of_it = Matrix(
        checkpoints=(None, "/runs/best.pth"),
        targets=("trt", "onnx"),
        precisions=("fp16",),
        sizes=(None, (224, 320)),
        batches=(8,),
        passes=("all", "none"),
        gpu="a10",
        ema=True,
    )
    assert names(all_of_it, of(None)) == [
        "demo-trt-fp16-b8-a10-ema",
        "demo-trt-fp16-b8-a10-nopasses-ema",
        "demo-trt-fp16-224x320-b8-a10-ema",
        "demo-trt-fp16-224x320-b8-a10-nopasses-ema",
        "demo-onnx-fp16-b8-ema",
        "demo-onnx-fp16-b8-nopasses-ema",
        "demo-onnx-fp16-224x320-b8-ema",
        "demo-onnx-fp16-224x320-b8-nopasses-ema",
        *(f"best-trt-fp16-{size}b8-a10{rest}-ema" for size in ("", "224x320-") for rest in ("", "-nopasses")),
        *(f"best-onnx-fp16-{size}b8{rest}-ema" for size in ("", "224x320-") for rest in ("", "-nopasses")),
        "demo-onnx-fp32-b1",
    ]


def test_all_that_is_asked_for_is_in_a_cell() -> None:
    config = replace(
        EMPTY, images=Path("/i"), count=3, calibration=Path("/c"), calibration_size=64, layers=False, latency=True
    )
    matrix = Matrix(("/x.pth",), ("trt", "coreml"), ("fp16", "int8"), ((64, 96),), gpu="l4")
    common = Cell(
        name="", checkpoint="/x.pth", size=(64, 96), images="/i", count=3, layers=False, latency=True, precision="fp16"
    )
    int8 = replace(common, precision="int8", calibration="/c", calibration_size=64)
    assert [replace(each, name="") for each in cells(matrix, config=config)] == [
        replace(common, lane="trt", gpu="l4"),
        replace(int8, lane="trt", gpu="l4"),
        replace(common, lane="coreml"),
        replace(int8, lane="coreml", ios=17),
    ]


def test_artefacts_come_last() -> None:
    artefacts = (Artefact("/a/x.onnx", "/x.pth"), Artefact("/a/x.engine"), Artefact("/b/x.onnx"))
    found = cells(of(None), artefacts=artefacts, config=replace(EMPTY, images=Path("/i"), count=3, latency=True))
    assert [each.name for each in found] == ["demo-onnx-fp32-b1", "a-x-onnx", "x-engine", "b-x-onnx"]
    assert found[1] == Cell("a-x-onnx", checkpoint="/x.pth", artefact="/a/x.onnx", images="/i", count=3, latency=True)


@pytest.mark.parametrize(
    ("checkpoints", "labels"),
    [
        (("/r/a/best.pth", "/r/b/best.pth"), ["a-best", "b-best"]),
        (("/r/a/best.pth", "/s/a/best.pth", "/t.pth"), ["r-a-best", "s-a-best", "t"]),
        (("/best.pth", "/a/Best.pth"), ["best", "a-Best"]),
        (("/a/x.pth", "/a/x.safetensors"), ["a-x", "a-x"]),
        (("/a.pth", "/A.pth"), ["a", "A"]),  # the same folder on some systems
        ((None, "/runs/demo.pth"), ["demo", "runs-demo"]),
        (("timm/nextvit_small.bd_in1k", "/nextvit_small.pth"), ["nextvit_small.bd_in1k", "nextvit_small"]),
        (("/a b/ü (1).pth", "/...pth", "/ .pth"), ["ü-1", "checkpoint", "checkpoint"]),
        (("/" + "long" * 50 + ".pth",), ["long" * 12]),
    ],
)
def test_checkpoints_are_told_apart(checkpoints: tuple[str | None, ...], labels: list[str]) -> None:
    found = names(of(*checkpoints))
    assert [each.removesuffix("-2").removesuffix("-onnx-fp32-b1") for each in found] == labels
    assert len({each.casefold() for each in found}) == len(found)


paths = st.lists(st.text(alphabet="aA.-_ é/", min_size=1, max_size=6), min_size=1, max_size=3).map(
    lambda parts: "/" + "/".join(parts) + ".pth"
)


@given(st.lists(paths, min_size=1, max_size=6, unique=True), st.lists(paths, max_size=3, unique=True))
def test_names_are_folders_of_their_own(checkpoints: list[str], artefacts: list[str]) -> None:
    found = names(of(*checkpoints), of(*checkpoints, ema=True), artefacts=tuple(map(Artefact, artefacts)))
    assert len({each.casefold() for each in found}) == len(found) == 2 * len(checkpoints) + len(artefacts)
    assert all(Path(each).name == each and not each.startswith((".", "-")) for each in found)
    assert max(len(each.encode()) for each in found) < 255


def test_everything_of_the_demo() -> None:
    assert [each.name for each in default_matrix(None, LANES)] == [
        "demo-onnx-fp32-b1",
        "demo-onnx-fp16-b1",
        "demo-onnx-int8-b1",
        "demo-trt-fp16-b1",
        "demo-trt-int8-b1",
        "demo-coreml-fp32-b1",
        "demo-coreml-fp16-b1",
        "demo-coreml-int8-b1",
    ]
    assert [each.ios for each in default_matrix(None, ("coreml",))] == [None, None, 17]
    assert default_matrix(None, ()) == ()


def test_everything_of_a_checkpoint() -> None:
    found = default_matrix("/runs/best.pth", ("onnx", "trt"))
    assert [each.name for each in found] == ["best-onnx-fp32-b1", "best-onnx-fp16-b1", "best-trt-fp16-b1"]
    calibrated = default_matrix("/runs/best.pth", ("onnx", "trt"), "/photos")
    assert [(each.lane, each.precision) for each in calibrated if each.calibration == "/photos"] == [
        ("onnx", "int8"),
        ("trt", "int8"),
    ]
    assert {each.checkpoint for each in calibrated} == {"/runs/best.pth"}


@pytest.mark.parametrize("name", GPUS)
def test_engines_are_in_float32_where_tensorrt_rtx_has_it(name: str) -> None:
    found = [each.precision for each in default_matrix(None, ("trt",), built_for=name)]
    turing = name in {"t4", "rtx2080"}
    assert found == (["fp16", "int8"] if turing else ["fp32", "fp16", "int8"])
    assert turing == (GPUS[name].capability in BACKENDS["tensorrt-rtx"].refused)
