"""Calibration from a folder of pictures: done once, taken up again, never stale, and refused on unfit pictures."""

from __future__ import annotations

import hashlib
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
from numpy.typing import NDArray
from PIL import Image
from torch import fx, nn

from nextvit_deploy import calibrate as c
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.data import Pictures, find_pictures, noise_images
from nextvit_deploy.pictures_check import LEAST, UNRELATED, check_pictures, relatedness
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
from nextvit_models.preprocessing import Preprocessing
from tests.harness import randomise

ROOT = Path(__file__).parents[2]
SIDE = 32
STEPS = Preprocessing(crop_pct=1.0, image_size=SIDE)
SPEC = ExportSpec(
    model="small",
    num_classes=5,
    target="onnx",
    precision=Precision.INT8,
    height=SIDE,
    width=SIDE,
    batch=1,
    opset=21,
    preprocessing=STEPS,
    quantize=QuantizeSpec(method="percentile"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def network(seed: int = 3) -> fx.GraphModule:
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )
    return g.trace(randomise(layers, seed=seed))


def pixels_of(seed: int, side: int = SIDE) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = noise_images(1, (side, side), STEPS, seed).pixels[0].transpose(1, 2, 0)
    return pixels


def folder_of(path: Path, count: int = 24) -> Path:
    """Different pictures with shapes in them, in two classes."""
    for seed in range(count):
        place = path / f"{seed % 2}" / f"{seed:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(seed)).save(place)
    return path


def of(folder: Path, limit: int | None = None) -> Pictures:
    return find_pictures(folder, limit, (SIDE, SIDE), STEPS)


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return of(folder_of(tmp_path / "photos"))


def asking(**fields: object) -> ExportSpec:
    assert SPEC.quantize is not None
    return replace(SPEC, quantize=replace(SPEC.quantize, **fields))  # type: ignore[arg-type]  # by name


def silent(_: str) -> None:
    """For whom progress is nothing."""


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
    from nextvit_exporters.quantize.observe import Observer
    from tests.deploy.test_calibrate import calibrate_demo

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
    pictures, _ = c.split(find_pictures(DEMO_IMAGES, None, (64, 64), spec.preprocessing), 48)
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
    again = images_in(first) + images_in(second) - 48
    assert images_in(second) < 48
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


def refused(pictures: Pictures) -> str:
    with pytest.raises(DeployError) as caught:
        c.calibrate(SPEC, network(), pictures, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_few_pictures_are_refused_before_any_is_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "few", LEAST - 1)
    assert refused(of(folder)) == (f"only 15 images in {folder}; calibration takes at least 16, 128 are recommended")
    assert "only 4 images" in refused(of(folder, 4))


def test_repeated_pictures_are_refused_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for index in range(3):
        (folder / "1" / f"copy{index}.png").write_bytes((folder / "0" / "002.png").read_bytes())
    assert refused(of(folder)) == (
        f"3 of 27 images in {folder} repeat another, as 1/copy0.png does 0/002.png; give different pictures"
    )


def test_the_same_pixels_in_another_file_are_a_repetition(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    Image.fromarray(pixels_of(2)).save(folder / "1" / "z.bmp")
    (note,) = (note for note in check_pictures(of(folder), silent) if "repeat" in note)
    assert note == "1 calibration images repeat another, as 1/z.bmp does 0/002.png"


def test_pictures_that_become_the_same_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 0)
    folder.mkdir()
    for index in range(16):
        picture = np.repeat(np.repeat(pixels_of(0), index % 3 + 1, 0), index % 3 + 1, 1)
        Image.fromarray(picture).save(folder / f"{index}.png")
    nearest = replace(STEPS, interpolation="nearest")
    line = refused(find_pictures(folder, None, (SIDE, SIDE), nearest))
    assert line == f"all 16 images in {folder} are the same at 32x32; give different pictures of your task"


def test_blank_pictures_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for index in range(3):
        Image.new("RGB", (SIDE, SIDE), (index, 90, 200)).save(folder / "1" / f"z{index}.jpg")
    assert refused(of(folder)) == (
        f"3 of 27 images in {folder} are blank: 1/z0.jpg, 1/z1.jpg, ...; give pictures of your task"
    )
    for index in (1, 2):
        (folder / "1" / f"z{index}.jpg").unlink()
    assert "1 calibration images are blank: 1/z0.jpg" in check_pictures(of(folder), silent)


def test_few_usable_pictures_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p", 15)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "blank.png")
    assert refused(of(folder)).startswith(f"only 15 usable images in {folder}; calibration takes at least 16")


NOISE = ("uniform", "gaussian", "grey")


def noise(kind: str, seed: int, side: int) -> NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    if kind == "gaussian":
        return np.clip(generator.normal(120, 60, (side, side, 3)), 0, 255).astype(np.uint8)
    channels = 1 if kind == "grey" else 3
    return np.repeat(generator.integers(0, 256, (side, side, channels), np.uint8), 3 // channels, 2)


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("side", [32, 100])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_noise_is_refused(tmp_path: Path, kind: str, side: int, suffix: str) -> None:
    for seed in range(16):
        Image.fromarray(noise(kind, seed, side)).save(tmp_path / f"{seed}.{suffix}")
    line = refused(of(tmp_path))
    assert "are noise: neighbouring pixels correlate by" in line
    found = [relatedness(pixels) for pixels in of(tmp_path).read().pixels]
    assert max(found) < UNRELATED - 0.1


def test_pictures_are_no_noise() -> None:
    from sklearn.datasets import load_sample_images

    generator, found = np.random.default_rng(0), []
    for index in range(40):
        photo = load_sample_images().images[index % 2]
        y, x = generator.integers(0, photo.shape[0] - 224), generator.integers(0, photo.shape[1] - 224)
        found.append(relatedness(photo[y : y + 224, x : x + 224].transpose(2, 0, 1)))
    digits = find_pictures(DEMO_IMAGES, 40, (64, 64), Preprocessing(image_size=64)).read()
    found += [relatedness(pixels) for pixels in digits.pixels]
    assert min(found) > UNRELATED + 0.2
    assert relatedness(np.full((3, 8, 8), 7, np.uint8)) == 1.0


def test_a_few_noisy_pictures_among_others_pass(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "p")
    for seed in range(4):
        Image.fromarray(noise("uniform", seed, SIDE)).save(folder / f"{seed}.png")
    assert check_pictures(of(folder), silent) == ("calibrated on 28 images; 128 are recommended",)


def test_a_split_is_even_over_classes_and_leaves_the_rest() -> None:
    everything = find_pictures(DEMO_IMAGES, None, (64, 64), Preprocessing(image_size=64))
    chosen, others = c.split(everything, 128)
    assert (len(chosen), len(others)) == (128, len(everything) - 128)
    assert not set(chosen.paths) & set(others.paths)
    assert set(chosen.paths) | set(others.paths) == set(everything.paths)
    counts = Counter(chosen.labels)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 1
    assert others.paths[:8] == everything.paths[:8]
    assert c.split(everything, 128)[0] == chosen
    hashes = [{hashlib.sha256(p.read_bytes()).digest() for p in part.paths} for part in (chosen, others)]
    assert not hashes[0] & hashes[1]


def test_a_split_of_uneven_classes_takes_from_each_in_turn(tmp_path: Path) -> None:
    for name, count in (("a", 1), ("b", 5), ("c", 3)):
        for index in range(count):
            place = tmp_path / name / f"{index}.png"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels_of(index)).save(place)
    chosen, others = c.split(of(tmp_path), 6)
    assert Counter(chosen.labels) == {"a": 1, "b": 3, "c": 2}
    assert others.names == ("b/0.png", "c/0.png", "b/1.png")


@pytest.mark.parametrize("count", [0, 24, 25])
def test_a_split_leaves_something_on_both_sides(pictures: Pictures, count: int) -> None:
    with pytest.raises(DeployError, match=r"there are 24 pictures.*calibrate on 23 at most"):
        c.split(pictures, count)
