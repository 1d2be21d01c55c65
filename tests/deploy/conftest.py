"""Real exports of the demo, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nextvit_deploy import pipeline
from nextvit_exporters import to_onnx
from tests.deploy.support import Exported, Ran, Replay, call, rewrite_once, run
from tests.deploy.support_coreml import exported as exported_package
from tests.deploy.support_trt import OPEN_BATCH, exported

Runner = Callable[..., Ran]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo in float32, as the installed program exports it; in a process of its own."""
    return _exported(tmp_path_factory.mktemp("demo"), run)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo in FP16 that reads raw pixels, three images at a time."""
    return _exported(tmp_path_factory.mktemp("half"), call, "--fp16", "--input", "uint8", "--batch", "3")


@pytest.fixture(scope="session")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo with its batch and its size left open."""
    return _exported(tmp_path_factory.mktemp("dynamic"), call, "--dynamic-batch", "--dynamic-size")


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo as a TensorRT engine in FP16."""
    return exported(tmp_path_factory.getbasetemp(), "--fp16")


@pytest.fixture(scope="session")
def open_batch(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same for a range of batches, reading a camera's bytes."""
    return exported(tmp_path_factory.getbasetemp(), *OPEN_BATCH)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo as a Core ML package: FP16, a picture in, label and probabilities out."""
    return exported_package(tmp_path_factory.getbasetemp())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certify the passes of one spec and checkpoint only once."""
    monkeypatch.setattr(pipeline, "rewrite", rewrite_once)


@pytest.fixture
def replay(demo: Exported, monkeypatch: pytest.MonkeyPatch, quick: None) -> Replay:
    """Exports of the demo that copy the file built once: all the rest of them is real, and takes no time."""
    del quick
    played = Replay(demo.path.read_bytes())
    monkeypatch.setattr(to_onnx, "build", played.build)
    return played


def _exported(folder: Path, how: Runner, *options: str) -> Exported:
    ran = how("onnx", "--output", folder, "--json", *options)
    assert ran.status == 0, ran
    (path,) = folder.glob("*.onnx")
    return Exported(path, ran)
