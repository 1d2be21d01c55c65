"""Hub ids, offline: the cache is laid out as huggingface_hub leaves it after a download."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from nextvit_models._hub import is_hub_id
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.errors import CheckpointMismatch, MissingExtra
from nextvit_models.layouts import timm_name
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing
from tests.harness import randomise

NANO = VARIANTS["nextvit_nano"]
HUB_ID = "timm/nextvit_nano.test"
REVISION = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architecture": "nextvit_nano",
    "num_classes": 3,
    "pretrained_cfg": {
        "tag": "test",
        "input_size": [3, 384, 384],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "label_names": ["a", "b", "c"],
    },
}


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the repository's files in an offline cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--timm--nextvit_nano.test"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True)
    return folder


def tensors(seed: int) -> dict[str, torch.Tensor]:
    state = randomise(NextViT(NANO, 3), seed).state_dict()
    return {timm_name(name, NANO.depths): tensor for name, tensor in state.items()}


def write_config(snapshot: Path, config: object) -> None:
    (snapshot / "config.json").write_text(json.dumps(config))


def refusal(source: str = HUB_ID) -> str:
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_from_the_cache(snapshot: Path) -> None:
    weights = tensors(seed=70)
    save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    write_config(snapshot, CONFIG)
    checkpoint = load_checkpoint(HUB_ID)
    assert checkpoint.name == HUB_ID
    assert checkpoint.layout == "timm"
    assert checkpoint.labels == ("a", "b", "c")
    assert checkpoint.preprocessing == Preprocessing((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bilinear", 1.0, 384)
    assert "preprocessing from config.json" in checkpoint.found
    assert torch.equal(checkpoint.model.get_parameter("proj_head.0.weight"), weights["head.fc.weight"])


def test_the_older_file(snapshot: Path) -> None:
    torch.save(tensors(seed=71), snapshot / "pytorch_model.bin")
    write_config(snapshot, CONFIG)
    assert load_checkpoint(Path(HUB_ID)).num_classes == 3


def test_a_partial_config(snapshot: Path) -> None:
    save_file(tensors(seed=72), snapshot / "model.safetensors")
    write_config(snapshot, {"input_size": [3, 288, 288], "label_names": ["x", "y", "z"]})
    checkpoint = load_checkpoint(HUB_ID)
    assert checkpoint.preprocessing == replace(Preprocessing(), image_size=288)
    assert checkpoint.labels == ("x", "y", "z")


def test_labels_of_another_number_are_ignored_aloud(snapshot: Path) -> None:
    save_file(tensors(seed=73), snapshot / "model.safetensors")
    write_config(snapshot, {"label_names": ["x"]})
    checkpoint = load_checkpoint(HUB_ID)
    assert checkpoint.labels == ()
    assert "labels ignored: config.json has 1 for 3 classes" in checkpoint.found


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ([], "not a JSON object"),
        ({"pretrained_cfg": 3}, "pretrained_cfg is not a JSON object"),
        ({"input_size": [3, 224, 288]}, "input_size [3, 224, 288] is not square"),
        ({"mean": [1]}, "unusable preprocessing: mean must be three numbers, not [1]"),
    ],
)
def test_an_impossible_config(snapshot: Path, config: object, says: str) -> None:
    save_file(tensors(seed=74), snapshot / "model.safetensors")
    write_config(snapshot, config)
    assert refusal() == f"{snapshot / 'config.json'}: {says}"


def test_a_config_that_is_not_json(snapshot: Path) -> None:
    save_file(tensors(seed=75), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{")
    assert refusal().startswith(f"{snapshot / 'config.json'}: cannot be read: ")


def test_not_in_the_cache(snapshot: Path) -> None:
    assert snapshot.is_dir()
    assert refusal() == (
        f"{HUB_ID}: no such local file; as a hub id, its model.safetensors is not in the cache and the Hugging Face "
        "hub cannot be reached (no network, or HF_HUB_OFFLINE is set)"
    )


def test_weights_without_their_config_are_not_guessed_at(snapshot: Path) -> None:
    save_file(tensors(seed=76), snapshot / "model.safetensors")
    assert "its config.json is not in the cache" in refusal()


def test_a_mismatch_names_the_hub_id(snapshot: Path) -> None:
    save_file({"layer1.0.conv1.weight": torch.ones(1)}, snapshot / "model.safetensors")
    write_config(snapshot, CONFIG)
    assert refusal().startswith(f"{HUB_ID}: not a Next-ViT; looks like a ResNet")


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        (("model.safetensors", "pytorch_model.bin"), "the repository has neither model.safetensors nor pytorch_model"),
        (("config.json",), None),
    ],
)
def test_files_the_repository_does_not_have(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...], says: str | None
) -> None:
    save_file(tensors(seed=77), snapshot / "model.safetensors")

    def online(repository: str, name: str, *, local_files_only: bool) -> str:
        assert (repository, local_files_only) == (HUB_ID, False)
        if name in absent:
            raise errors.EntryNotFoundError(name)
        return str(snapshot / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", online)
    if says:
        assert refusal().startswith(f"{HUB_ID}: {says}")
    else:
        assert load_checkpoint(HUB_ID).found[-1].startswith("preprocessing not in the file")


def test_an_unreachable_hub_is_asked_once(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library retries for a long time; after the first refusal only the cache is looked at."""
    assert snapshot.is_dir()
    asked: list[tuple[str, bool]] = []

    def unreachable(repository: str, name: str, *, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        raise errors.LocalEntryNotFoundError(repository)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert "cannot be reached" in refusal()
    assert asked == [("model.safetensors", False), ("pytorch_model.bin", True)]


@pytest.mark.parametrize("kind", [ConnectionResetError, ValueError, Exception])
def test_a_broken_download(snapshot: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    assert snapshot.is_dir()

    def broken(repository: str, name: str, *, local_files_only: bool) -> str:
        assert not local_files_only
        raise kind(f"{repository}/{name}\nreset by peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    assert refusal() == f"{HUB_ID}: the download failed: {HUB_ID}/model.safetensors reset by peer"


def test_no_such_repository(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert snapshot.is_dir()

    def unknown(repository: str, name: str, *, local_files_only: bool) -> str:
        del repository, name, local_files_only
        raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unknown)
    assert "no repository of that name on the Hugging Face hub that may be read" in refusal()


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[hub\]'"):
        load_checkpoint(HUB_ID)


@pytest.mark.parametrize("source", ["timm/nextvit_small.bd_in1k", "owner/name", "a-b/c_d.e-1"])
def test_hub_ids(source: str) -> None:
    assert is_hub_id(source)


@pytest.mark.parametrize(
    "source",
    ["weights/small.pth", "small", "/abs/name", "a/b/c", "./a", "../a", "a/b.safetensors", "a b/c", "a/", "a/.."],
)
def test_paths_are_no_hub_ids(source: str) -> None:
    assert not is_hub_id(source)


def test_a_local_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm").mkdir()
    torch.save(tensors(seed=78), tmp_path / "timm" / "nextvit_nano.test")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load_checkpoint(HUB_ID).name == "nextvit_nano.test"
