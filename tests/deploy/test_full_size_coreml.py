"""The promise at full size: a package of Next-ViT-S at 224, proven, within its budget of operations."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch

from nextvit_deploy.pipeline import export
from nextvit_deploy.request import CoreMLRequest, Request, with_coreml
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.spec import InputKind, Precision
from nextvit_exporters.targets import COST_AT_WORST, PRECISION_COST, SAME_NETWORK
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.deploy.support_coreml import needs_coremltools
from tests.harness import randomise

pytestmark = [pytest.mark.full_size, needs_coremltools]
OPERATIONS: Final = 248


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "nextvit_small.pth"
    torch.save(randomise(NextViT(VARIANTS["nextvit_small"]), seed=0).state_dict(), path)
    return path


@pytest.mark.parametrize("head", ["classify", "logits"])
def test_a_package_is_built_and_proven(checkpoint: Path, head: str, tmp_path: Path) -> None:
    request = Request(
        output=tmp_path,
        checkpoint=str(checkpoint),
        precision=Precision.FP16,
        size=(224, 224),
        count=1,
        input=InputKind.IMAGE,
    )
    manifest = export(with_coreml(request, CoreMLRequest(head=head)), lambda _: None)
    assert manifest.verdict is Verdict.VERIFIED
    assert sum(manifest.ops.values()) <= OPERATIONS
    assert {"batch_norm", "transpose"}.isdisjoint(manifest.ops)
    errors = {check.question: max(each.relative_rms for each in check.comparisons) for check in manifest.checks}
    assert list(errors) == [SAME_NETWORK, PRECISION_COST, COST_AT_WORST]
    assert errors[SAME_NETWORK] <= 1e-5
    assert errors[SAME_NETWORK] < errors[PRECISION_COST] <= 1e-2
    assert manifest.spec.coreml is not None
    assert manifest.spec.coreml.keep_fp32 == ()
    assert "1 of " in manifest.dtypes  # the picture's mean is all that is float32
