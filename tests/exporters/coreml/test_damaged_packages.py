"""A package with damaged files is refused, and the message names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.coreml.program import MANIFEST_JSON, MODEL, WEIGHTS, WEIGHTS_SHA256
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import DeployError
from tests.exporters.coreml.packages import edit, package, refused, sound

__all__ = ["package", "sound"]


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    return lambda package: (package / name).write_bytes(
        (package / name).read_bytes()[: keep((package / name).stat().st_size)]
    )


def poke(name: str, offset: int, data: bytes) -> Callable[[Path], object]:
    def change(package: Path) -> None:
        held = bytearray((package / name).read_bytes())
        assert held[offset : offset + len(data)] != data
        held[offset : offset + len(data)] = data
        (package / name).write_bytes(held)

    return change


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def apply(package: Path) -> None:
        held = json.loads((package / MANIFEST_JSON).read_text())
        change(held)
        (package / MANIFEST_JSON).write_text(json.dumps(held))

    return apply


def place(path: object) -> Callable[[Path], object]:
    return manifest(lambda m: m["itemInfoEntries"][m["rootModelIdentifier"]].update(path=path))


def elsewhere(package: Path) -> None:
    target = package.parent / "elsewhere.bin"
    (package / WEIGHTS).rename(target)
    (package / WEIGHTS).symlink_to(target)


WRITTEN_WITH = "weight.bin is not the file the package was written with (one byte differing is enough)"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights missing": (lambda p: (p / WEIGHTS).unlink(), "weight.bin is missing"),
    "weights a link": (elsewhere, "weight.bin is a link"),
    "weights empty": (cut(WEIGHTS, lambda _: 0), WRITTEN_WITH),
    "weights half": (cut(WEIGHTS, lambda size: size // 2), WRITTEN_WITH),
    "weights a byte short": (cut(WEIGHTS, lambda size: size - 1), WRITTEN_WITH),
    "weights' header alone": (cut(WEIGHTS, lambda _: 64), WRITTEN_WITH),
    "one bit": (poke(WEIGHTS, 1000, b"\0"), WRITTEN_WITH),
    "manifest missing": (lambda p: (p / MANIFEST_JSON).unlink(), "Manifest.json is missing"),
    "manifest empty": (cut(MANIFEST_JSON, lambda _: 0), "Manifest.json is not JSON"),
    "manifest half": (cut(MANIFEST_JSON, lambda size: size // 2), "Manifest.json is not JSON"),
    "manifest nested": (lambda p: (p / MANIFEST_JSON).write_text("[" * 100_000), "Manifest.json is not JSON"),
    "manifest not UTF-8": (lambda p: (p / MANIFEST_JSON).write_bytes(b'{"\xff": 1}'), "Manifest.json is not JSON"),
    "manifest a list": (lambda p: (p / MANIFEST_JSON).write_text("[]"), "fileFormatVersion 1.0.0"),
    "manifest of tomorrow": (manifest(lambda m: m.update(fileFormatVersion="2.0.0")), "fileFormatVersion 1.0.0"),
    "no root": (manifest(lambda m: m.pop("rootModelIdentifier")), "does not list the model that it names"),
    "unknown root": (manifest(lambda m: m.update(rootModelIdentifier="x")), "does not list the model that it names"),
    "root a list": (manifest(lambda m: m.update(rootModelIdentifier=[])), "does not list the model that it names"),
    "no items": (manifest(lambda m: m.update(itemInfoEntries=[])), "does not list the model that it names"),
    "item without path": (place(None), "lists an item without a path"),
    "item with a NUL": (place("a\0b"), "lists an item without a path"),
    "item above": (place("../../tiny.mlpackage/" + MODEL), "is not inside Data"),
    "item absolute": (place("/etc/hosts"), "is not inside Data"),
    "item gone": (place("com.apple.CoreML/gone.mlmodel"), "Data/com.apple.CoreML/gone.mlmodel is missing"),
    "item's name too long": (place("x" * 10_000), "; copy "),
    "item a half character": (place("\ud800"), "; copy "),
    "root a folder": (place("com.apple.CoreML/weights"), "weights is no file"),
    "model missing": (lambda p: (p / MODEL).unlink(), "model.mlmodel is missing"),
    "model empty": (cut(MODEL, lambda _: 0), "model.mlmodel is empty"),
    "model half": (cut(MODEL, lambda size: size // 2), "model.mlmodel is damaged or no Core ML model"),
    "model something else": (lambda p: (p / MODEL).write_bytes(b"\x7fELF" * 99), "model.mlmodel is damaged"),
    "weights gone from disk, still listed": (lambda p: shutil.rmtree((p / WEIGHTS).parent), "weights is missing"),
}


@pytest.mark.parametrize("damage", FILES)
def test_damaged_files_are_refused(damage: str, package: Path) -> None:
    change, reason = FILES[damage]
    change(package)
    assert reason in refused(package)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (cut(WEIGHTS, lambda _: 0), "weight.bin holds 0 bytes"),
        (cut(WEIGHTS, lambda size: size // 2), "weight.bin holds"),
        (cut(WEIGHTS, lambda size: size - 1), "weight.bin holds"),
        (cut(WEIGHTS, lambda _: 64), "weight.bin holds 64 bytes"),
        (poke(WEIGHTS, 4, b"\1"), "weight.bin is of version 1"),
        (poke(WEIGHTS, 64, b"\0"), "weight.bin has no blob at 64"),
        (poke(WEIGHTS, 68, b"\2"), "that it is float32, not float16"),
        (poke(WEIGHTS, 80, b"\xc0"), "weight.bin has a blob at 64 that reaches into the one at"),
    ],
)
def test_damaged_weights_are_refused_without_their_hash(
    change: Callable[[Path], object], reason: str, package: Path
) -> None:
    edit(package, lambda m: m.description.metadata.userDefined.pop(WEIGHTS_SHA256))
    read_package(package)
    change(package)
    assert reason in refused(package)


def test_what_is_no_package(package: Path, tmp_path: Path) -> None:
    assert "is not there" in refused(tmp_path / "gone.mlpackage")
    assert "is a file; a Core ML package is a folder" in refused(package / MODEL)
    assert "it is no Core ML package" in refused(package / "Data")


def test_other_files_do_no_harm(package: Path) -> None:
    (package / ".DS_Store").write_bytes(b"")
    assert ".DS_Store" in read_package(package).files


@pytest.mark.parametrize("name", [MODEL, MANIFEST_JSON])
def test_any_bytes_are_a_package_or_one_line(name: str, package: Path) -> None:
    """Seeded damage: bits flipped, bytes written over, pieces cut out or repeated."""
    generator, whole = np.random.default_rng(7), (package / name).read_bytes()
    refusals: list[str] = []
    for _ in range(120):
        data, at = bytearray(whole), int(generator.integers(len(whole)))
        kind = int(generator.integers(4))
        length = int(generator.integers(1, 40))
        if kind == 0:
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            data[at : at + length] = generator.bytes(length)
        elif kind == 2:
            del data[at : at + length]
        else:
            data[at:at] = data[at : at + length]
        (package / name).write_bytes(data)
        try:
            assert read_package(package).program.operations
        except DeployError as error:
            refusals.append(str(error))
    assert len(refusals) > 40
    assert all(each.isprintable() for each in refusals)
