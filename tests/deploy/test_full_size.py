"""The promise at full size: from a checkpoint in either layout to an ONNX file that answers as timm's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from torch import nn

from nextvit_deploy.pipeline import export, rewrite
from nextvit_deploy.request import Request, spec_for
from nextvit_deploy.verdict import Verdict
from nextvit_exporters import graph as g
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.layouts import timm_name
from nextvit_models.nextvit import NextViT
from tests.harness import images, randomise, relative_error

pytestmark = pytest.mark.full_size
LAYOUTS = ("official", "timm")


@pytest.fixture(scope="module")
def timms_own() -> nn.Module:
    return randomise(timm.create_model("nextvit_small"), seed=11)


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request: pytest.FixtureRequest, timms_own: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's weights as timm saves them, or under the official names, beside what a training run leaves there."""
    path = tmp_path_factory.mktemp(request.param) / "nextvit_small.pth"
    weights = timms_own.state_dict()
    if request.param == "official":
        model = under_official_names(weights)
        torch.save({"model": model, "epoch": 299, "optimizer": {"state": {}, "param_groups": []}}, path)
    else:
        torch.save(weights, path)
    return path


def under_official_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config = VARIANTS["nextvit_small"]
    with torch.device("meta"):
        names = NextViT(config).state_dict()
    return {f"module.{name}": weights[timm_name(name, config.depths)] for name in names}


def test_the_file_answers_as_timms_own_model(checkpoint: Path, timms_own: nn.Module, tmp_path: Path) -> None:
    manifest = export(Request(output=tmp_path, checkpoint=str(checkpoint), count=2), lambda _: None)
    assert manifest.verdict is Verdict.VERIFIED
    assert manifest.checkpoint.layout == checkpoint.parent.name.rstrip("0123456789")
    assert sum(manifest.ops.values()) <= 260
    assert "BatchNormalization" not in manifest.ops
    session = ort.InferenceSession(str(manifest.artifact.path), providers=["CPUExecutionProvider"])
    for seed in range(2):
        image = images(1, 3, 224, 224, seed=seed)
        with torch.no_grad():
            expected = timms_own(image)
        (answer,) = session.run(None, {"image": image.numpy()})
        assert relative_error(torch.from_numpy(np.asarray(answer)), expected) <= 1e-5


def test_the_folded_graph_is_timms_model_in_float64(checkpoint: Path, timms_own: nn.Module, tmp_path: Path) -> None:
    loaded: Checkpoint = load_checkpoint(checkpoint)
    request = Request(output=tmp_path, checkpoint=str(checkpoint), size=(96, 96))
    graph, records = rewrite(spec_for(request, loaded), loaded, lambda _: None)
    assert all(record.certified for record in records)
    image = images(2, 3, 96, 96, seed=3, dtype=torch.float64)
    expected = timms_own.double()(image).detach()
    timms_own.float()
    assert relative_error(g.execute(graph, image)[0], expected) <= 1e-10
