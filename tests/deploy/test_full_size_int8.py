"""INT8 at full size: a T4 engine of Next-ViT-S from a checkpoint, and three readings of its file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from nextvit_deploy.data import find_pictures
from nextvit_deploy.manifest import Manifest
from nextvit_deploy.pipeline import export, open_checkpoint, rewrite
from nextvit_deploy.quantization import quantize_again
from nextvit_deploy.request import EngineRequest, QuantizeRequest, Request, with_engine, with_quantize
from nextvit_deploy.verdict import Verdict
from nextvit_exporters import graph as g
from nextvit_exporters import targets, to_onnx
from nextvit_exporters.executors.base import Array, Executor
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.executors.tensorrt_network import TensorRTNetwork
from nextvit_exporters.quantize.quantized import Quantizer
from nextvit_exporters.tensorrt.backends import backend
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

pytestmark = pytest.mark.full_size
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
FLOOR = 2e-2
"""Values on a step's edge fall either way in two sound executors; measured between these: 1.3e-2 to 1.5e-2."""
RTX = backend("tensorrt-rtx")


def crops(folder: Path, count: int, seed: int) -> Path:
    """Crops of two photographs."""
    generator, photographs = np.random.default_rng(seed), load_sample_images().images
    folder.mkdir()
    for index in range(count):
        photograph = photographs[index % 2]
        top, left = (int(generator.integers(0, side - 256)) for side in photograph.shape[:2])
        Image.fromarray(photograph[top : top + 256, left : left + 256]).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTVIT_DEPLOY_CACHE", str(folder / "cache"))
        checkpoint = folder / "small.pth"
        torch.save(randomise(NextViT(VARIANTS["nextvit_small"]), seed=0).state_dict(), checkpoint)
        asked = Request(folder / "out", checkpoint=str(checkpoint), images=crops(folder / "judged", 3, 1), count=3)
        int8 = with_quantize(asked, QuantizeRequest(calibration=crops(folder / "calibration", 16, 0), size=16))
        return export(with_engine(int8, EngineRequest(backend="tensorrt-rtx", gpu="t4")), lambda _: None)


@pytest.fixture(scope="module")
def images(made: Manifest) -> Array:
    folder = made.artifact.path.parents[1] / "judged"
    return find_pictures(folder, None, (224, 224), made.spec.preprocessing).read().normalised()


def answers(executor: Executor, images: Array) -> Array:
    with executor as running:
        return np.concatenate([running.run({"image": image[None]})["logits"] for image in images])


def difference(actual: Array, expected: Array) -> float:
    one, other = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.sqrt(np.square(one - other).mean() / np.square(other).mean()))


def test_the_engine_is_proven(made: Manifest) -> None:
    assert made.verdict is Verdict.VERIFIED
    errors = {check.question: check.comparisons[0].relative_rms for check in made.checks}
    assert errors[targets.SAME_NETWORK] <= 1e-5
    assert 1e-3 < errors[targets.PRECISION_COST] <= 3e-2
    int8 = made.built["int8"]
    assert isinstance(int8, Mapping)
    assert str(int8["sentence"]).startswith("quantized 97 of 97 convolutions and 12 of 21 matrix products")


def test_three_readings_agree_within_the_floor(made: Manifest, images: Array) -> None:
    """The emulation, ONNX Runtime as it comes but for its optimisations, and TensorRT's network."""
    import onnxruntime

    path = made.artifact.path.with_suffix(".onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    readings = [
        answers(OnnxRuntime(path, "emulated"), images),
        np.concatenate([session.run(None, {"image": image[None]})[0] for image in images]),
        answers(TensorRTNetwork(path, "emulated", RTX), images),
    ]
    for one, other in combinations(readings, 2):
        assert 0 < difference(one, other) <= FLOOR


def test_in_float64_no_value_falls_the_other_way(made: Manifest, images: Array) -> None:
    """With rounding to steps: TensorRT's network against PyTorch carrying the same numbers."""
    path = made.artifact.path.with_suffix(".onnx")
    spec = made.spec
    checkpoint = open_checkpoint(str(made.artifact.path.parents[1] / "small.pth"), ema=False)
    graph, _ = rewrite(spec, checkpoint, lambda _: None)
    reference = to_onnx.reference(spec, quantize_again(spec, graph, path))
    for module in reference.modules():
        if isinstance(module, Quantizer):
            module.rounds = True
    exact = g.cast(reference, torch.float64)
    wanted = np.concatenate([g.execute(exact, torch.tensor(image[None]).double())[0].numpy() for image in images])
    found = answers(TensorRTNetwork(path, "exact", RTX, dtype=torch.float64), images)
    assert difference(found, wanted) <= 1e-9
