"""Shards hang on the artefact's batch alone; what is kept of them is trusted only when it is whole and the same's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate import shards as s
from nextvit_deploy.evaluate.results import ROW, Rows
from nextvit_exporters.engine_spec import EngineSpec, Range
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(image_size=64)
SHARDS = tuple(s.Shard(start, (Path("a.png"), Path("b.png"))) for start in (0, 2, 4))


def spec(**changes: Any) -> ExportSpec:
    fields: dict[str, Any] = {
        "model": "nextvit_nano",
        "num_classes": 10,
        "target": "onnx",
        "precision": Precision.FP32,
        "height": 64,
        "width": 64,
        "batch": 1,
        "opset": 18,
        "preprocessing": PREPROCESSING,
    }
    return ExportSpec(**fields | changes)


def engine(smallest: int) -> EngineSpec:
    side = Range.of(64)
    return EngineSpec("tensorrt-rtx", "t4", Range(smallest, smallest, 64), side, side)


def rows(seed: int) -> Rows:
    return np.frombuffer(np.random.default_rng(seed).bytes(2 * ROW.itemsize), ROW)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXTVIT_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("changes", "at_a_time", "shard"),
    [
        ({}, 8, 32),
        ({"batch": 3}, 9, 36),
        ({"batch": 40}, 40, 40),
        ({"dynamic_batch": True, "batch": 5}, 8, 32),
        ({"dynamic_batch": True, "engine": engine(6)}, 12, 36),
    ],
)
def test_sizes(changes: dict[str, Any], at_a_time: int, shard: int) -> None:
    paths = tuple(Path(f"{index}.png") for index in range(100))
    made = s.shards_of(Pictures(Path(), paths, 100, (64, 64), PREPROCESSING), spec(**changes))
    assert s.at_a_time(spec(**changes)) == at_a_time
    assert len(made[0]) == shard
    assert tuple(path for each in made for path in each.paths) == paths
    assert [each.start for each in made] == list(range(0, 100, shard))
    assert str(made[0]) == f"images 1 to {shard}"


def test_what_is_kept_comes_back() -> None:
    store = s.Store("key")
    assert store.finished(SHARDS) == {}
    store.add(SHARDS[0], rows(0))
    store.add(SHARDS[2], rows(2))
    found = s.Store("key").finished(SHARDS)
    assert {index: each.tobytes() for index, each in found.items()} == {
        0: rows(0).tobytes(),
        2: rows(2).tobytes(),
    }
    assert s.Store("other").finished(SHARDS) == {}
    store.remove()
    assert s.Store("key").finished(SHARDS) == {}
    assert not store.folder.parent.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer", "of another shard", "of another key"])
def test_what_is_damaged_is_not_trusted(damage: str) -> None:
    store = s.Store("key")
    store.add(SHARDS[0], rows(0))
    store.add(SHARDS[1], rows(1))
    s.Store("other").add(SHARDS[0], rows(0))
    (file,) = store.folder.glob("*0.rows")
    data = file.read_bytes()
    (second,) = store.folder.glob("*2.rows")
    (others,) = s.Store("other").folder.glob("*.rows")
    file.write_bytes(
        {
            "cut": data[:-1],
            "flip": data[:-1] + bytes([data[-1] ^ 1]),
            "empty": b"",
            "longer": data + data,
            "of another shard": second.read_bytes(),
            "of another key": others.read_bytes(),
        }[damage]
    )
    assert list(store.finished(SHARDS)) == [1]


def test_another_command_may_remove_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making it and writing into it, once; then the shard is kept all the same."""
    store, write = s.Store("key"), Path.write_bytes
    removed: list[Path] = []

    def slow(path: Path, data: bytes) -> int:
        if not removed:
            removed.append(path)
            shutil.rmtree(store.folder)
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", slow)
    store.add(SHARDS[0], rows(0))
    assert (len(removed), store.trouble) == (1, "")
    assert list(store.finished(SHARDS)) == [0]


def test_where_nothing_can_be_kept_the_work_goes_on(cache: Path) -> None:
    cache.write_text("a file")
    store = s.Store("key")
    store.add(SHARDS[0], rows(0))
    store.add(SHARDS[1], rows(1))
    assert store.trouble == f"{cache / 'evaluate'} can't be written: a part of the path is a file, not a folder"
    assert store.finished(SHARDS) == {}
    store.remove()
    assert list(cache.parent.iterdir()) == [cache]
