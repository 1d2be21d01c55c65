from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextvit_models import checkpoint as module
from nextvit_models.checkpoint import Checkpoint, load_checkpoint, save_safetensors
from nextvit_models.config import VARIANTS
from nextvit_models.errors import CheckpointMismatch, OutputNotWritten
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing
from tests.harness import randomise

NANO = VARIANTS["nextvit_nano"]
LABELS = ("chat", "Hündin", "猫")
PREPROCESSING = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0, 96)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    path = tmp_path / "weights.pth"
    torch.save({"model": randomise(NextViT(NANO, 3), seed=60).state_dict()}, path)
    return replace(load_checkpoint(path), labels=LABELS, preprocessing=PREPROCESSING)


def test_everything_comes_back(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_safetensors(checkpoint, tmp_path / "safe.safetensors")
    again = load_checkpoint(tmp_path / "safe.safetensors")
    assert again.fingerprint == checkpoint.fingerprint
    assert again.labels == LABELS
    assert again.preprocessing == PREPROCESSING
    assert again.model.config is NANO
    assert "preprocessing from its header" in again.found


def test_the_safetensors_library_reads_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "safe.safetensors"
    save_safetensors(checkpoint, path)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    expected = checkpoint.model.state_dict()
    assert set(tensors) == {name for name in expected if not name.endswith("num_batches_tracked")}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name])
    with safe_open(path, "pt") as file:
        assert file.metadata()["variant"] == "nextvit_nano"
    NextViT(NANO, 3).load_state_dict(tensors, strict=True)


def test_the_same_bytes_every_time(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_safetensors(checkpoint, tmp_path / "a.safetensors")
    save_safetensors(checkpoint, tmp_path / "b.safetensors")
    save_safetensors(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("length", range(8))
def test_the_header_is_aligned(tmp_path: Path, checkpoint: Checkpoint, length: int) -> None:
    save_safetensors(replace(checkpoint, labels=("x" * length,)), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__") == (
        len(data) - 8 - length
    )


def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    save_safetensors(checkpoint, folder / "w.safetensors")
    before = (folder / "w.safetensors").read_bytes()
    written: list[int] = []
    bytes_of = module._bytes

    def bytes_until_full(tensor: Tensor) -> bytes:
        if len(written) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(tensor.numel())
        return bytes_of(tensor)

    monkeypatch.setattr(module, "_bytes", bytes_until_full)
    with pytest.raises(OutputNotWritten, match=r"w\.safetensors was not written: no space left"):
        save_safetensors(checkpoint, folder / "w.safetensors")
    assert len(written) == 7
    assert (folder / "w.safetensors").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["w.safetensors"]


def test_labels_that_do_not_fit_are_ignored_aloud(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_safetensors(replace(checkpoint, labels=("a", "b")), tmp_path / "w.safetensors")
    again = load_checkpoint(tmp_path / "w.safetensors")
    assert again.labels == ()
    assert "labels ignored: its header has 2 for 3 classes" in again.found


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"preprocessing": "{not json"}, "damaged metadata in its header: "),
        ({"preprocessing": "[]"}, "damaged metadata in its header: unusable preprocessing: expected an object"),
        ({"preprocessing": '{"crop_pct": 7}'}, "damaged metadata in its header: unusable preprocessing: crop_pct must"),
        ({"preprocessing": "{}", "labels": "3"}, "damaged metadata in its header: labels are not a list of names"),
        ({"preprocessing": "{}", "labels": "[1]"}, "damaged metadata in its header: labels are not a list of names"),
    ],
)
def test_damaged_metadata(tmp_path: Path, checkpoint: Checkpoint, metadata: dict[str, str], says: str) -> None:
    path = tmp_path / "w.safetensors"
    save_file(checkpoint.model.state_dict(), path, metadata=metadata)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_metadata_of_someone_else(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "w.safetensors"
    save_file(checkpoint.model.state_dict(), path, metadata={"format": "pt"})
    assert load_checkpoint(path).preprocessing == replace(Preprocessing(), image_size=64)
