"""What a configuration's reader repeats of others, to do without PyTorch, is what those say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nextvit_deploy.check.places import is_hub_id
from nextvit_deploy.check.stated import OWN_TOLERANCES
from nextvit_exporters import targets
from nextvit_exporters.spec import Precision
from nextvit_exporters.to_coreml import COMPRESSED
from nextvit_models import _hub

ROOT = Path(__file__).resolve().parents[3]


def test_the_targets_own_tolerances() -> None:
    names = {"onnx": "onnx", "trt": "tensorrt", "coreml": "coreml"}
    for (lane, precision), own in OWN_TOLERANCES.items():
        target = targets.load(names[lane])
        if (lane, precision) == ("coreml", "int8"):  # fp16 with everything compressed to 8 bits
            there = dict.fromkeys(target.TOLERANCES, COMPRESSED["w8a8"].relative_rms)
            there[targets.SAME_NETWORK] = target.TOLERANCES[targets.SAME_NETWORK][Precision.FP16].relative_rms
        else:
            by_question = target.TOLERANCES.items()
            there = {
                q: each[Precision(precision)].relative_rms for q, each in by_question if Precision(precision) in each
            }
        assert own == there, (lane, precision)
    assert set(OWN_TOLERANCES) == {(lane, str(each)) for lane in names for each in Precision}


@pytest.mark.parametrize(
    "source", ["timm/x.y", "a/b/c", "x.pth", "o/x.pth", "o/x.safetensors", "-a/b", ".a/b", "o/x.zip"]
)
def test_hub_ids_are_those_of_the_models(source: str) -> None:
    assert is_hub_id(source) == _hub.is_hub_id(source)


def test_no_framework_is_needed() -> None:
    code = "import sys\nfrom pathlib import Path\nfrom nextvit_deploy.check import config, matrix\n"
    code += "print(len(matrix.cells_of(config.read_config(Path('nextvit-export.toml')))), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["10", "False"], "")
