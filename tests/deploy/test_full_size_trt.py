"""The promise at full size: an SM75 engine of every published variant, proven, from a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextvit_deploy.pipeline import export
from nextvit_deploy.request import EngineRequest, Request, with_engine
from nextvit_deploy.verdict import Verdict
from nextvit_exporters import targets
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import Precision
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import randomise

pytestmark = pytest.mark.full_size
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
KERNELS = 150
ACTIVATION_BYTES = 11.6e6


def asked(variant: str, size: int, folder: Path) -> Request:
    name = f"nextvit_{variant}"
    checkpoint = folder / f"{name}.pth"
    torch.save(randomise(NextViT(VARIANTS[name]), seed=0).state_dict(), checkpoint)
    request = Request(
        output=folder / "out", checkpoint=str(checkpoint), precision=Precision.FP16, size=(size, size), count=1
    )
    return with_engine(request, EngineRequest(backend="tensorrt-rtx", gpu="t4"))


@pytest.mark.parametrize(
    ("variant", "size"), [(variant, size) for variant in ("small", "base", "large") for size in (224, 384)]
)
def test_a_t4_engine_is_built_and_proven(variant: str, size: int, tmp_path: Path) -> None:
    request = asked(variant, size, tmp_path)
    manifest = export(request, lambda _: None)
    assert manifest.verdict is Verdict.VERIFIED
    errors = {check.question: check.comparisons[0].relative_rms for check in manifest.checks}
    assert errors[targets.SAME_NETWORK] <= 1e-5
    assert 1e-5 < errors[targets.PRECISION_COST] <= 1e-2
    count = sum(manifest.ops.values())
    assert manifest.dtypes.startswith(f"fp16 asked, {count} of {count} computing kernels in fp16")
    assert manifest.built["for"] == "SM75"
    if (variant, size) == ("small", 224):
        assert count <= KERNELS
        assert 0 < int(str(manifest.built["activation bytes"])) <= ACTIVATION_BYTES
        first = sha256_of(manifest.artifact.path)
        assert export(request, lambda _: None).artifact.sha256 == first
