"""Calibration from a folder of pictures: done once, taken up again, and never stale."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nextvit_deploy import calibrate as c
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.pipeline import open_checkpoint
from nextvit_deploy.request import Request, spec_for
from nextvit_exporters import graph as g
from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.quantize.identity import graph_hash
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.quantize.placement import placement
from nextvit_exporters.quantize_spec import QuantizeSpec
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.demo import DEMO_IMAGES
from tests.deploy.support_calibrate import SIDE, SPEC, folder_of, network, of, pixels_of, silent
from tests.harness import randomise

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return of(folder_of(tmp_path / "photos"))


def asking(**fields: object) -> ExportSpec:
    assert SPEC.quantize is not None
    return replace(SPEC, quantize=replace(SPEC.quantize, **fields))  # type: ignore[arg-type]  # by name


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many images observers were shown."""
    count: Counter[str] = Counter()
    see = Observer.see

    def counting(self: Observer, images: torch.Tensor) -> None:
        count["images"] += len(images)
        see(self, images)

    monkeypatch.setattr(Observer, "see", counting)
    return count


def test_what_is_found_is_what_an_observer_finds(pictures: Pictures) -> None:
    graph, said = network(), list[str]()
    found, notes = c.calibrate(SPEC, graph, pictures, said.append)
    plain = Observer(graph, placement(graph), grams=False)
    for start in range(0, 24, c.AT_A_TIME):
        plain.see(torch.tensor(pictures.read(start, start + c.AT_A_TIME).normalised()))
    assert found.digest == plain.result("percentile", pictures.fingerprint, graph_hash(graph)).digest
    assert found.count == 24
    assert notes[0] == "calibrated on 24 of 24 images in photos"
    assert "calibrated on 24 images; 128 are recommended" in notes
    assert any(note.startswith("scales ") for note in notes)
    assert "calibrate, 8 of 24 images" in said


@pytest.mark.parametrize("kind", [InputKind.UINT8, InputKind.UINT8_NHWC])
def test_raw_pixels_reach_graphs_that_read_them(kind: InputKind, pictures: Pictures, seen: Counter[str]) -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.permute(0, 3, 1, 2) if kind is InputKind.UINT8_NHWC else x
            out: torch.Tensor = self.head(self.conv(x.float()).mean((2, 3)))
            return out

    graph = g.trace(randomise(Raw(), 0))
    found, _ = c.calibrate(replace(asking(method="minmax"), input=kind), graph, pictures, silent)
    assert seen["images"] == 24
    assert list(found.steps.values()) == [pictures.read().pixels.max() / 127]


def test_a_finished_one_is_taken_from_the_cache(pictures: Pictures, seen: Counter[str], cache: Path) -> None:
    first, notes = c.calibrate(SPEC, network(), pictures, silent)
    again, later = c.calibrate(SPEC, network(), pictures, silent)
    assert (again.digest, seen["images"]) == (first.digest, 24)
    assert later == (*notes, "calibration taken from the cache: same weights, images and settings")
    assert [path.name for path in cache.glob("*/*")] == ["calibration.safetensors"]


def test_a_stale_one_is_not_taken(tmp_path: Path, pictures: Pictures, seen: Counter[str]) -> None:
    graph = network()
    first, _ = c.calibrate(SPEC, graph, pictures, silent)
    assert seen["images"] == 24
    changed = network()
    with torch.no_grad():
        changed.get_submodule("2").bias[1] += 1e-9  # type: ignore[operator,index]  # a tensor
    minmax, _ = c.calibrate(asking(method="minmax"), graph, pictures, silent)
    fp32, _ = c.calibrate(asking(rest="fp32"), graph, pictures, silent)
    weights, _ = c.calibrate(SPEC, changed, pictures, silent)
    assert seen["images"] == 4 * 24
    assert fp32.digest == first.digest
    assert len({first.digest, minmax.digest, weights.digest}) == 3
    Image.fromarray(pixels_of(99)).save(tmp_path / "photos" / "0" / "000.png")
    picture, _ = c.calibrate(SPEC, graph, pictures, silent)
    fewer, _ = c.calibrate(SPEC, graph, of(tmp_path / "photos", 20), silent)
    assert seen["images"] == 5 * 24 + 20
    assert len({first.digest, picture.digest, fewer.digest}) == 3


def test_pictures_rounded_on_the_way_in_are_others(pictures: Pictures, seen: Counter[str]) -> None:
    """Where the artefact reads FP16."""
    first, _ = c.calibrate(SPEC, network(), pictures, silent)
    half, _ = c.calibrate(replace(SPEC, io=Precision.FP16), network(), pictures, silent)
    assert seen["images"] == 2 * 24
    assert half.digest != first.digest


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "of another key"])
@pytest.mark.parametrize("file", ["calibration", "state"])
def test_a_corrupt_entry_is_done_anew(how: str, file: str, pictures: Pictures, seen: Counter[str], cache: Path) -> None:
    first, _ = c.calibrate(SPEC, network(), pictures, silent)
    (place,) = cache.glob("*/calibration.safetensors")
    if file == "state":
        place.unlink()
        interrupt_after(pictures, 20)
        place = place.with_name("state.safetensors")
    whole = bytearray(place.read_bytes())
    whole[len(whole) - 9] ^= 4
    other = c._Entry(cache / ("f" * 64))
    if how == "of another key":
        c.calibrate(SPEC, network(5), pictures, silent)
        places = [each for each in cache.glob("*/calibration.safetensors") if each.parent != place.parent]
        whole = bytearray(places[0].read_bytes())
    place.write_bytes(bytes({"cut": whole[:99], "emptied": b""}.get(how, whole)))
    seen.clear()
    again, notes = c.calibrate(SPEC, network(), pictures, silent)
    assert (again.digest, seen["images"]) == (first.digest, 24)
    assert not any("taken" in note for note in notes)
    assert other.finished() is None


class Interrupted(Exception):
    """What stops a calibration in the middle."""


def interrupt_after(pictures: Pictures, count: int, **fields: object) -> None:
    def stop(step: str) -> None:
        if step == f"calibrate, {count} of {len(pictures)} images":
            raise Interrupted

    with pytest.raises(Interrupted):
        c.calibrate(asking(**fields), network(), pictures, stop)


def test_an_interrupted_one_is_taken_up_again(
    pictures: Pictures, seen: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupt_after(pictures, 20)
    assert seen["images"] == 20
    found, notes = c.calibrate(SPEC, network(), pictures, silent)
    assert seen["images"] == 20 + 24 - c.SAVE_EVERY
    assert notes[-1] == "calibration taken up again after 16 of 24 images"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "fresh"))
    seen.clear()
    through, plain = c.calibrate(SPEC, network(), pictures, silent)
    assert (through.digest, seen["images"]) == (found.digest, 24)
    assert plain == notes[:-1]


KILLED = """
    import sys
    from pathlib import Path
    from nextvit_deploy import calibrate
    from nextvit_exporters.quantize.observe import Observer
    from tests.deploy.test_calibrate import calibrate_demo

    calibrate._SAVING = float("inf")  # saves when it is time, however slow the disk is at the moment
    see = Observer.see
    def saying(self, images):
        see(self, images)
        print("saw", len(images), flush=True)
    Observer.see = saying
    print("digest", calibrate_demo(), flush=True)
"""


def calibrate_demo() -> str:
    checkpoint = open_checkpoint(None, ema=False)
    spec = spec_for(Request(output=Path()), checkpoint)
    spec = replace(spec, quantize=QuantizeSpec(method="minmax"))
    pictures, _ = c.split(find_pictures(DEMO_IMAGES, None, (64, 64), spec.preprocessing), 96)
    return c.calibrate(spec, g.trace(checkpoint.model), pictures, silent)[0].digest


def killed(cache: Path, after: int | None = None) -> list[str]:
    """Lines of a command that calibrates the demo; killed when it has seen so many images."""
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "models", "exporters"))
    told = {VARIABLE: str(cache), "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": paths}
    command = [sys.executable, "-c", textwrap.dedent(KILLED)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | told) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if images_in(lines) == after:
                process.kill()
    assert process.returncode == (0 if after is None else -9)
    return lines


def images_in(lines: list[str]) -> int:
    return sum(int(line.split()[1]) for line in lines if line.startswith("saw "))


def test_a_killed_command_costs_less_than_one_interval(tmp_path: Path) -> None:
    first = killed(tmp_path / "one", after=40)
    second = killed(tmp_path / "one")
    again = images_in(first) + images_in(second) - 96
    assert images_in(second) < 96
    assert 0 <= again <= c.SAVE_EVERY + c.AT_A_TIME
    assert second[-1] == f"digest {calibrate_demo()}"  # under a cache of its own
    assert [path.name for path in (tmp_path / "one").rglob("*") if path.is_file()] == ["calibration.safetensors"]


def test_a_folder_that_takes_nothing_does_not_stop_it(
    tmp_path: Path, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = c.calibrate(SPEC, network(), pictures, silent)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    found, notes = c.calibrate(SPEC, network(), pictures, silent)
    assert found.digest == first.digest
    assert notes[-1] == (
        f"{tmp_path / 'file' / 'calibration'} can't be written: a part of the path is a file, not a folder; the "
        "calibration is not kept, and an interrupted one starts anew"
    )


def test_a_full_disk_does_not_stop_it(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise OutputNotWritten(f"{path} was not written: no space left on the disk; free some or choose another output")

    monkeypatch.setattr(c, "write_sealed", full)
    found, notes = c.calibrate(SPEC, network(), pictures, silent)
    assert found.count == 24
    assert "can't be written: no space left on the disk; the calibration is not kept" in notes[-1]


def test_two_at_once_leave_a_whole_one(pictures: Pictures, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is in the middle of its images."""
    digests: list[str] = []

    def meanwhile(step: str) -> None:
        if step == "calibrate, 20 of 24 images":
            digests.append(c.calibrate(SPEC, network(), pictures, silent)[0].digest)

    found, notes = c.calibrate(SPEC, network(), pictures, meanwhile)
    assert digests == [found.digest]
    assert not any("can't be written" in note for note in notes)
    assert [path.name for path in cache.glob("*/*")] == ["calibration.safetensors"]
    monkeypatch.setattr(Observer, "see", None)
    assert c.calibrate(SPEC, network(), pictures, silent)[0].digest == found.digest


def test_the_oldest_entries_go(pictures: Pictures, cache: Path) -> None:
    for index in range(c._ENTRIES + 3):
        (cache / f"old{index}").mkdir(parents=True)
        os.utime(cache / f"old{index}", (index, index))
    c.calibrate(SPEC, network(), pictures, silent)
    kept = {path.name for path in cache.iterdir()}
    assert len(kept) == c._ENTRIES
    assert "old0" not in kept
    assert "old18" in kept


def test_weights_rounded_with_feedback_come_with_it(pictures: Pictures) -> None:
    interrupt_after(pictures, 20, rounding="gptq")
    graph, said = network(), list[str]()
    found, notes = c.calibrate(asking(rounding="gptq"), graph, pictures, said.append)
    assert notes[-1] == "calibration taken up again after 16 of 24 images"
    assert {name: codes.shape for name, codes in found.codes.items()} == {"0": (6, 3, 3, 3), "2": (8, 6, 3, 3)}
    assert all(codes.dtype == np.int8 and np.abs(codes.astype(int)).max() == 127 for codes in found.codes.values())
    assert "round weights, 1 of 2 maps" in said
    plain, _ = c.calibrate(SPEC, graph, pictures, silent)
    assert not plain.codes
    assert plain.steps == found.steps


def test_a_network_without_int8_maps_is_refused(pictures: Pictures) -> None:
    graph = g.trace(randomise(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 5)), 0))
    with pytest.raises(DeployError, match="nothing in this graph computes in INT8"):
        c.calibrate(SPEC, graph, pictures, silent)
