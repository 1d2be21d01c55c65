"""Files that are no checkpoint, are damaged, or mean harm: one line each, and nothing of them runs."""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.errors import CheckpointMismatch, DeployError, UnsafeCheckpoint
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

SYSTEM = f"{os.system.__module__}.system"  # posix.system or nt.system


class Bomb:
    """Unpickling it creates the file ``canary``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo boom > {self.canary}",)


def refusal(path: Path, kind: type[DeployError] = CheckpointMismatch) -> str:
    with pytest.raises(kind) as caught:
        load_checkpoint(path)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def written(tmp_path: Path, data: bytes, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def torch_bytes(contents: object, *, with_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=with_zip)
    return buffer.getvalue()


def test_no_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.pth") == "no such file"


def test_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "a folder; name the weights file inside it"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "not a regular file"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, b"weights")

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{path} {mode}")

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path) == f"cannot be read: {os.strerror(errno.EACCES)}"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    assert refusal(written(tmp_path, b"", name)) == "the file is empty"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!DOCTYPE html><html>Google Drive - Quota exceeded</html>", "a web page, not weights; the download did not"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a Git LFS pointer, not the file itself; run:",
        ),
        (b"\x1f\x8b\x08\x00rest", "a gzip archive; unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"neither this nor that", "neither a checkpoint of PyTorch nor a safetensors file"),
        (bytes(range(255, -1, -1)) * 40, "neither a checkpoint of PyTorch nor a safetensors file"),
        (b"\x08\x07\x12\x07pytorch", "neither a checkpoint of PyTorch nor a safetensors file"),
        (pickle.dumps({"stem": [1.0, 2.0]}), "a bare pickle, not written by torch.save"),
    ],
)
def test_other_kinds_of_file(tmp_path: Path, data: bytes, says: str) -> None:
    assert refusal(written(tmp_path, data)).startswith(says)


def test_a_tar_archive_of_old(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("sys_info")
        archive.addfile(entry, io.BytesIO(b""))
    assert refusal(path) == "a tar archive of PyTorch before 0.4; load it there and save it again"


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert refusal(path) == "a zip archive, but not one that torch.save wrote"


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    with zipfile.ZipFile(path, "w") as archive:  # the entries torch.jit.save writes
        for entry in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"scripted/{entry}", b"\x80\x02}q\x00.")
    assert refusal(path).startswith("a TorchScript archive, which holds a program; save the state dict")


@pytest.mark.parametrize("part", [0.2, 0.5, 0.99, 0.999999])
def test_a_truncated_archive(tmp_path: Path, part: float) -> None:
    data = torch_bytes({"stem": torch.randn(1000)})
    says = refusal(written(tmp_path, data[: int(len(data) * part)]))
    assert says.startswith("a truncated or damaged archive: ")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_old_file(tmp_path: Path, part: float) -> None:
    data = torch_bytes({"stem": torch.randn(1000)}, with_zip=False)
    says = refusal(written(tmp_path, data[: int(len(data) * part)]))
    assert says.startswith(("a truncated or damaged pickle: ", "PyTorch cannot read it: "))


@pytest.mark.parametrize("keep", [5, 40, -1])
def test_a_truncated_safetensors_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"stem": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(path).startswith("a truncated or damaged safetensors file: ")


@pytest.mark.parametrize("length", [2**63, 2**40, 101_000_000, 300])
def test_a_safetensors_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    path = written(tmp_path, struct.pack("<Q", length) + b'{"stem":{}}', "w.safetensors")
    assert refusal(path) == f"a truncated or damaged safetensors file: it declares a header of {length} bytes in 19"


def test_safetensors_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    save_file({"stem": torch.randn(3)}, path)
    assert refusal(path).startswith("not a Next-ViT; ")


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    says = refusal(path)
    assert says.startswith("entry 'w/data.pkl' is compressed (")
    assert "torch.save stores entries uncompressed" in says


def test_sizes_beyond_the_file(tmp_path: Path) -> None:
    data = bytearray(torch_bytes({"stem": torch.randn(4)}))
    entry = data.index(b"PK\x01\x02")  # the first record of the central directory
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    says = refusal(written(tmp_path, bytes(data)))
    assert says.startswith("its entries declare 2147")
    assert says.endswith(f"the file holds {len(data)}")


def test_a_pickle_too_large(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", bytes(17 << 20))
    assert refusal(path).startswith("its pickle of 17825792 bytes is no state dict's")


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    """What the next tests rely on: unpickled without care, the bomb does create its file."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("with_zip", [True, False])
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.safetensors"])
def test_a_hostile_checkpoint(tmp_path: Path, name: str, *, with_zip: bool) -> None:
    contents = {"model": {"stem": torch.ones(2)}, "extra": Bomb(tmp_path / "canary")}
    path = written(tmp_path, torch_bytes(contents, with_zip=with_zip), name)
    says = refusal(path, UnsafeCheckpoint)
    assert says.startswith(f"loading it would import {SYSTEM}; nothing was executed; only if you trust its origin, ")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_bare_pickle(tmp_path: Path, protocol: int) -> None:
    path = written(tmp_path, pickle.dumps({"stem": Bomb(tmp_path / "canary")}, protocol))
    assert refusal(path, UnsafeCheckpoint).startswith(f"loading it would import {SYSTEM}; ")
    assert not (tmp_path / "canary").exists()


def test_a_hostile_first_pickle_of_an_old_file(tmp_path: Path) -> None:
    """The old format is five pickles in a row; every one of them counts."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
    path = written(tmp_path, head + pickle.dumps(Bomb(tmp_path / "canary"), protocol=2))
    assert refusal(path, UnsafeCheckpoint).startswith(f"loading it would import {SYSTEM}; ")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_hostile_checkpoint_of_a_newer_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "w.pth"
    torch.save({"stem": Bomb(tmp_path / "canary")}, path, pickle_protocol=protocol)
    assert refusal(path, UnsafeCheckpoint).startswith(f"loading it would import {SYSTEM}; ")
    assert not (tmp_path / "canary").exists()


def test_a_whole_pickled_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()), path)
    says = refusal(path, UnsafeCheckpoint)
    assert "torch.nn.modules.linear.Linear" in says
    assert "torch.nn.modules.container.Sequential" in says


def test_a_training_checkpoint_with_its_arguments(tmp_path: Path) -> None:
    """The official training script saves an argparse.Namespace; the advice given must be safe, and must work."""
    model = randomise(NextViT(VARIANTS["nextvit_nano"], 4), seed=30)
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": model.state_dict(), "epoch": 299, "args": argparse.Namespace(lr=5e-4)}, path)
    says = refusal(path, UnsafeCheckpoint)
    assert says.startswith(
        "loading it would import argparse.Namespace; nothing was executed; save the state dict alone: python -c "
    )
    assert "weights_only=True" in says
    command = shlex.split(says[says.index("python -c ") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    checkpoint = load_checkpoint(tmp_path / "checkpoint_best-weights.pth")
    assert checkpoint.num_classes == 4
    for name, tensor in model.named_parameters():
        assert torch.equal(checkpoint.model.get_parameter(name), tensor)


def test_tensors_that_claim_more_than_is_stored(tmp_path: Path) -> None:
    """A stride of zero makes 40 TB of four bytes; it must not be copied out."""
    with torch.device("meta"):
        state = NextViT(VARIANTS["nextvit_nano"], 10).state_dict()
    full = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") for name, tensor in state.items()}
    full["proj_head.0.weight"] = torch.zeros(()).expand(62_500_000_000, 160)
    full["proj_head.0.bias"] = torch.zeros(()).expand(62_500_000_000)
    path = tmp_path / "w.pth"
    torch.save(full, path)
    assert refusal(path).startswith("proj_head.0.weight of shape (62500000000, 160) has fewer values stored")


def safetensors_bytes() -> bytes:
    header = json.dumps({"stem": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


VALID = {
    "zip": torch_bytes({"model": {"stem": torch.arange(4.0)}, "epoch": 3}),
    "old": torch_bytes({"model": {"stem": torch.arange(4.0)}, "epoch": 3}, with_zip=False),
    "safetensors": safetensors_bytes(),
}


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same damage on every run: a change is judged by itself, not by luck
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damaged_anywhere(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Bytes changed, cut out or doubled anywhere: always a clear refusal, never another exception."""
    valid = VALID[kind]
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["change", "cut", "double"])):
            case "change":
                damaged[at] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 40))]
            case _:
                damaged[at:at] = damaged[at : at + data.draw(st.integers(1, 40))]
        if not damaged:
            break
    path = written(tmp_path, bytes(damaged))
    with pytest.raises((CheckpointMismatch, UnsafeCheckpoint)) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
