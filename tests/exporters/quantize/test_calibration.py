"""A saved calibration is read back as it was, and anything else is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nextvit_exporters.errors import DeployError, OutputNotWritten
from nextvit_exporters.quantize import sealed
from nextvit_exporters.quantize.calibration import SCHEMA, Calibration
from nextvit_exporters.quantize.sealed import read_sealed, write_sealed

FOUND = Calibration(
    method="mse",
    images="a" * 64,
    count=40,
    steps={"x": 0.1, "relu": 2.0**-14},
    means={"stem": np.array([[1.5, -0.25]]), "head": np.array([[0.1, 0.2], [0.3, 0.4]])},
    codes={"stem": np.array([[-127, 127]], np.int8)},
    graph="b" * 64,
    notes=("40 of 41 images in photos",),
)

Arrays = dict[str, NDArray[Any]]
Facts = dict[str, str]


def written(path: Path, found: Calibration = FOUND) -> Path:
    found.save(path)
    return path


def test_it_is_read_back_as_it_was(tmp_path: Path) -> None:
    back = Calibration.load(written(tmp_path / "deep" / "c.safetensors"))
    assert (back.method, back.images, back.count, back.graph, back.notes) == (
        FOUND.method,
        FOUND.images,
        FOUND.count,
        FOUND.graph,
        FOUND.notes,
    )
    assert back.steps == FOUND.steps
    assert list(back.steps) == list(FOUND.steps)
    for ours, theirs in ((FOUND.means, back.means), (FOUND.codes, back.codes)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.dtype == theirs[name].dtype
            np.testing.assert_array_equal(array, theirs[name])
    assert back.digest == FOUND.digest
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["c.safetensors"]


def test_the_same_calibration_is_the_same_bytes(tmp_path: Path) -> None:
    other = replace(FOUND, means=dict(sorted(FOUND.means.items())))
    assert written(tmp_path / "a").read_bytes() == written(tmp_path / "b", other).read_bytes()


def test_the_digest_is_of_all_that_counts_and_of_nothing_else() -> None:
    others = [
        replace(FOUND, method="minmax"),
        replace(FOUND, images="c" * 64),
        replace(FOUND, graph="c" * 64),
        replace(FOUND, count=41),
        replace(FOUND, steps={"x": float(np.nextafter(0.1, 1)), "relu": 2.0**-14}),
        replace(FOUND, steps={"y": 0.1, "relu": 2.0**-14}),
        replace(FOUND, means={"stem": FOUND.means["stem"]}),
        replace(FOUND, means=dict(FOUND.means) | {"stem": np.array([[1.5], [-0.25]])}),
        replace(FOUND, codes={}),
        replace(FOUND, codes={"stem": np.array([[-127, 126]], np.int8)}),
    ]
    assert len({each.digest for each in (FOUND, *others)}) == len(others) + 1
    assert replace(FOUND, notes=()).digest == FOUND.digest
    assert len(FOUND.digest) == 64


def refusal(path: Path) -> str:
    with pytest.raises(DeployError) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    whole = written(tmp_path / "c").read_bytes()
    generator = np.random.default_rng(0)
    for at in (0, 5, 9, 40, len(whole) - 1, *generator.integers(8, len(whole), 60)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(0, 8))
        (tmp_path / "d").write_bytes(damaged)
        refusal(tmp_path / "d")


@pytest.mark.parametrize("kept", [0, 3, 8, 60, -1])
def test_a_part_of_a_file_is_refused(tmp_path: Path, kept: int) -> None:
    whole = written(tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[:kept])
    assert "calibrate again" in refusal(tmp_path / "c")


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    assert "can't be read" in refusal(tmp_path / "missing")
    assert "can't be read" in refusal(tmp_path)
    (tmp_path / "huge").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "can't be read" in refusal(tmp_path / "huge")
    save_file({"steps": np.zeros(2)}, tmp_path / "foreign", {})
    assert "is damaged" in refusal(tmp_path / "foreign")
    for facts in ("[" * 100_000, "[]", "{", '{"sha256": 3}'):
        save_file({"steps": np.zeros(2)}, tmp_path / "foreign", {"facts": facts})
        assert "is damaged" in refusal(tmp_path / "foreign")
    save_file({"steps": np.zeros(2, np.float16)}, tmp_path / "half", {})
    assert "numbers of another type" in refusal(tmp_path / "half")


def parts() -> tuple[Arrays, Facts]:
    return dict(FOUND._arrays()), FOUND._facts() | {"notes": "[]"}


HOSTILE: dict[str, tuple[dict[str, object], Facts, str]] = {
    "another schema": ({}, {"schema": "nextvit-calibration 9"}, "schema is 'nextvit-calibration 9'"),
    "an unknown method": ({}, {"method": "median"}, "method is none of minmax"),
    "no fingerprint": ({}, {"images": "../etc/passwd"}, "what it was calibrated on"),
    "no image": ({}, {"count": "0"}, "on 0 images"),
    "a huge count": ({}, {"count": "9" * 5000}, "calibrate again"),
    "a count in words": ({}, {"count": "many"}, "calibrate again"),
    "names that are none": ({}, {"tensors": "[1, 2]"}, "have no names"),
    "names without end": ({}, {"tensors": "[" * 100_000}, "calibrate again"),
    "a name twice": ({}, {"tensors": '["x", "x"]'}, "names a tensor twice"),
    "notes that are none": ({}, {"notes": '{"a": 1}'}, "notes are no lines"),
    "too few steps": ({"steps": np.ones(1)}, {}, "one positive number for each"),
    "a zero step": ({"steps": np.array([0.0, 1.0])}, {}, "one positive number for each"),
    "an infinite step": ({"steps": np.array([np.inf, 1.0])}, {}, "one positive number for each"),
    "no number": ({"steps": np.array([np.nan, 1.0])}, {}, "one positive number for each"),
    "whole steps": ({"steps": np.array([1, 2])}, {}, "one positive number for each"),
    "a mean without rank": ({"means/stem": np.ones(2)}, {}, "means of stem are not finite"),
    "an infinite mean": ({"means/stem": np.full((1, 2), np.inf)}, {}, "means of stem are not finite"),
    "wide codes": ({"codes/stem": np.ones((1, 2), np.int64)}, {}, "weights of stem are not whole numbers"),
    "a code too low": ({"codes/stem": np.full((1, 2), -128, np.int8)}, {}, "weights of stem are not whole"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_whole_file_of_nonsense_is_refused(tmp_path: Path, what: str) -> None:
    arrays, facts = parts()
    more, other, expected = HOSTILE[what]
    write_sealed(tmp_path / "c", arrays | more, facts | other)  # type: ignore[arg-type]  # arrays all
    assert expected in refusal(tmp_path / "c")


@pytest.mark.parametrize("fact", ["schema", "method", "images", "count", "graph", "tensors", "notes"])
def test_what_lacks_a_fact_is_refused(tmp_path: Path, fact: str) -> None:
    arrays, facts = parts()
    del facts[fact]
    write_sealed(tmp_path / "c", arrays, facts)
    assert fact in refusal(tmp_path / "c")


def test_what_lacks_steps_is_refused(tmp_path: Path) -> None:
    arrays, facts = parts()
    del arrays["steps"]
    write_sealed(tmp_path / "c", arrays, facts)
    assert "steps" in refusal(tmp_path / "c")
    assert json.loads(facts["tensors"]) == ["x", "relu"]
    assert facts["schema"] == SCHEMA


def test_a_seal_holds_arrays_of_any_layout(tmp_path: Path) -> None:
    arrays: Arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.zeros((0, 4)),
        "c": np.arange(8, dtype=np.int64)[::2],
    }
    write_sealed(tmp_path / "s", arrays, {"k": "v"})
    back, facts = read_sealed(tmp_path / "s")
    assert facts == {"k": "v"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sealed, "save_file", full)
    with pytest.raises(OutputNotWritten, match="was not written: I/O error: No space left on device"):
        FOUND.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())
