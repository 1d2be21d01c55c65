"""Outputs that would lie in each other's way are refused before any work, and what ranges are verified at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import Self

from nextvit_deploy import verify as v
from nextvit_deploy.data import noise_images
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.errors import BuildFailed, DeployError, MissingExtra, NotExecutable, UnsupportedSpec
from nextvit_exporters.executors.base import Array, Arrays
from nextvit_exporters.spec import ExportSpec, Precision, Tolerance
from nextvit_models.preprocessing import Preprocessing
from tests.deploy.support import call, contents, refusal
from tests.deploy.support_trt import STEM

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
SIDE = Range.of(64)


@pytest.mark.parametrize(
    ("output", "options", "says"),
    [
        ("out", ("--kit", "out"), "--kit {}/out holds what --output names; choose a folder of its own"),
        ("out/engines", ("--kit", "out"), "--kit {}/out holds what --output names"),
        ("out/engines", ("--triton", "out"), "--triton {}/out holds what --output names"),
        ("out", ("--kit", "kit", "--triton", "kit"), "--kit {}/kit holds what --triton names"),
        ("out", ("--kit", "kit/here", "--triton", "kit"), "--triton {}/kit holds what --kit names"),
        ("out", ("--kit", f"out/{STEM}.onnx"), "has the name of another output; choose another"),
        ("out", ("--kit", "mine"), "{}/mine"),
    ],
)
def test_a_folder_written_as_a_whole_holds_no_other_output(
    tmp_path: Path, output: str, options: tuple[str, ...], says: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    paths = [each if each.startswith("--") else str(tmp_path / each) for each in options]
    assert says.format(tmp_path) in refusal("trt", "--fp16", "--output", tmp_path / output, *paths)
    assert contents(tmp_path) == before


def test_a_failed_proof_hands_nothing_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextvit_exporters import targets, to_tensorrt

    tight = {
        question: {precision: Tolerance(1e-12, "too tight") for precision in Precision}
        for question in to_tensorrt.TOLERANCES
    }
    monkeypatch.setattr(to_tensorrt, "TOLERANCES", tight)
    ran = call("trt", "--fp16", "--output", tmp_path / "out", "--kit", tmp_path / "kit", "--json")
    assert (ran.status, ran.json["verdict"]) == (3, "failed")
    assert targets.PRECISION_COST in ran.err
    assert any("the proof failed, so nothing was written for --kit" in note for note in ran.json["notes"])
    assert not (tmp_path / "kit").exists()


def ranged(batch: Range, height: Range = SIDE) -> ExportSpec:
    engine = EngineSpec("tensorrt-rtx", "t4", batch, height, SIDE)
    spec = ExportSpec("nano", 10, "tensorrt", Precision.FP16, height.optimum, 64, batch.optimum, 20, Preprocessing())
    return replace(spec, engine=engine, dynamic_batch=not batch.fixed, dynamic_size=not height.fixed)


@pytest.mark.parametrize(
    ("batch", "counts"),
    [(Range(1, 8, 32), [1, 32]), (Range(4, 8, 16), [4, 16]), (Range(1, 1, 500), [1, 32]), (Range(40, 40, 50), [40])],
)
def test_a_range_of_batches_is_verified_at_its_ends(batch: Range, counts: list[int]) -> None:
    images = noise_images(2, (64, 64), Preprocessing(), seed=1)
    first, *others = v.cases_for(ranged(batch), images)
    assert first[1] is images
    assert [len(case) for _, case in others] == counts
    assert [name for name, _ in others] == [f"noise, batch {count}" for count in counts]


def test_a_range_of_sizes_is_verified_at_its_ends_and_between() -> None:
    images = noise_images(2, (64, 64), Preprocessing(), seed=1)
    _, *others = v.cases_for(ranged(Range.of(2), Range(64, 96, 128)), images)
    assert [case.pixels.shape for _, case in others] == [(2, 3, side, 64) for side in (64, 97, 128)]


class Counting:
    """Answers with one number an image, and keeps how many it was given."""

    name, mode = "counting", "exact"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def run(self, inputs: Arrays) -> dict[str, Array]:
        (images,) = inputs.values()
        self.batches.append(len(images))
        return {"logits": images.reshape(len(images), -1)[:, :1]}


@pytest.mark.parametrize(
    ("images", "batch", "expected"),
    [(2, Range(4, 8, 16), [4]), (8, Range(1, 2, 4), [4, 4]), (5, Range(1, 2, 4), [4, 4]), (3, Range(1, 2, 8), [3])],
)
def test_an_engine_is_fed_what_it_takes(images: int, batch: Range, expected: list[int]) -> None:
    executor, spec = Counting(), ranged(batch)
    inputs = artefact_inputs(spec, noise_images(images, (64, 64), Preprocessing(), seed=1))
    rows = v.run_batched(spec, executor, inputs, v.Names("image", "logits"))["logits"]
    assert len(rows) == images
    assert executor.batches == expected


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (BuildFailed("it is wrong"), Verdict.FAILED),
        (UnsupportedSpec("it reads something else"), Verdict.FAILED),
        (NotExecutable("no GPU"), Verdict.NOT_VERIFIED),
        (MissingExtra("the lane", "trt"), Verdict.NOT_VERIFIED),
    ],
)
def test_what_could_not_run_is_not_wrong(error: DeployError, verdict: Verdict) -> None:
    blank = v.Check("q", "e", "exact", "PyTorch", "images", Verdict.NOT_VERIFIED, "", ())
    check = v._unanswered(error, blank)
    assert (check.verdict, check.why) == (verdict, str(error))
