"""What INT8 costs in accuracy: this tool's against ONNX Runtime's plain quantizer on the usual export.

All are calibrated on the same pictures and judged on the same others, by ONNX Runtime without optimisations.

* *plain*: ``torch.onnx.export`` of the model as it is, then ``quantize_static`` with all that it quantizes by default,
  symmetric int8 activations by min-max and int8 weights per channel.
* *nearest*: this tool's file for TensorRT, steps by min-max too, weights to the nearest, channels as they are.
* *gptq*: the same with channels equalized and rounding errors fed back; *gptq, mse* takes steps by squared error.

The networks: the bundled demo; the demo with channels rescaled through its ReLUs, which leaves float32 answers what
they were; Next-ViT-S at 224 with random weights and norms, on crops of two photographs. Figures are decibels of signal
to noise of the logits, where 3 dB more is half the noise, and for the demo the share of right answers.

    python -m benchmarks.int8_quality [--calibration 64] [--judged 32] [--without-small]
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image
from sklearn.datasets import load_sample_images

from nextvit_deploy.calibrate import split
from nextvit_deploy.data import ImageSet, Pictures, find_pictures
from nextvit_deploy.pipeline import export
from nextvit_deploy.request import QuantizeRequest, Request, with_quantize
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from nextvit_models.nextvit import NextViT
from tests.exporters.quantize.scrambled import scrambled_checkpoint
from tests.harness import randomise

GAIN_DB: Final = 1.0
"""What equalization and fed-back rounding must gain over the plain quantizer on Next-ViT-S."""
SCRAMBLED: Final = 2.5
"""Octaves of the rescaling's standard deviation."""
OURS: Final[Mapping[str, QuantizeRequest]] = MappingProxyType(
    {
        "nearest": QuantizeRequest(method="minmax", equalize=False),
        "gptq": QuantizeRequest(method="minmax", rounding="gptq"),
        "gptq, mse": QuantizeRequest(method="mse", rounding="gptq"),
    }
)


@dataclass(frozen=True, slots=True)
class Quality:
    """Signal to noise in decibel, and the share of right answers where they are known."""

    sqnr_db: float
    top1: float | None

    def __str__(self) -> str:
        return f"{self.sqnr_db:6.2f} dB" + ("" if self.top1 is None else f"  top-1 {self.top1:6.1%}")


def main() -> None:
    """Print every network's figures and the gains over the plain quantizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--judged", type=int, default=32)
    parser.add_argument("--without-small", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime's quantizer advises preprocessing at every call
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = _demo_pictures(folder, arguments.calibration)
        scrambled = scrambled_checkpoint(folder / "scrambled.safetensors", SCRAMBLED, seed=0)
        _compare("demo", str(DEMO_CHECKPOINT), *pictures)
        _compare(f"demo, rescaled by 2^N(0, {SCRAMBLED})", str(scrambled), *pictures)
        if arguments.without_small:
            return
        small = folder / "small.pth"
        torch.save(randomise(NextViT(VARIANTS["nextvit_small"]), seed=0).state_dict(), small)
        crops = _crops(folder, arguments.calibration, arguments.judged)
        found = _compare("Next-ViT-S at 224, random", str(small), *crops)
    plain, nearest, gptq = (found[each].sqnr_db for each in ("plain", "nearest", "gptq"))
    print(f"nearest against plain: {nearest - plain:+.2f} dB, bound 0: {_met(nearest - plain, 0.0)}")
    print(f"gptq against plain: {gptq - plain:+.2f} dB, bound {GAIN_DB:.0f}: {_met(gptq - plain, GAIN_DB)}")


def _compare(title: str, checkpoint: str, calibration: Path, judged: Path) -> dict[str, Quality]:
    """One network's figures by method, printed as they come."""
    loaded, count = load_checkpoint(checkpoint), sum(1 for each in judged.rglob("*.png"))
    side = loaded.preprocessing.image_size
    images = find_pictures(judged, None, (side, side), loaded.preprocessing).read()
    print(f"{title}: calibrated on {sum(1 for _ in calibration.rglob('*.png'))}, judged on {count} others")
    expected, found = _answers(loaded, images), {}
    with tempfile.TemporaryDirectory() as folder:
        path = _plain(loaded, find_pictures(calibration, None, (side, side), loaded.preprocessing), Path(folder))
        found["plain"] = _told("plain", _quality(path, images, expected))
        for name, asked in OURS.items():
            path = _ours(checkpoint, asked, calibration, judged, Path(folder))
            found[name] = _told(name, _quality(path, images, expected))
    return found


def _told(name: str, quality: Quality) -> Quality:
    print(f"  {name:10} {quality}", flush=True)
    return quality


def _answers(checkpoint: Checkpoint, images: ImageSet) -> Array:
    """PyTorch's, in float32."""
    with torch.no_grad():
        return np.concatenate([checkpoint.model(torch.tensor(each)).numpy() for each in _one_by_one(images)])


def _plain(checkpoint: Checkpoint, pictures: Pictures, folder: Path) -> Path:
    """What ONNX Runtime's quantizer makes of the usual export."""
    usual, path = folder / "usual.onnx", folder / "plain.onnx"
    side = checkpoint.preprocessing.image_size
    example = torch.zeros(1, 3, side, side)  # of which the exporter takes the shape alone
    torch.onnx.export(
        checkpoint.model,
        (example,),
        str(usual),
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
    )
    quantize_static(
        str(usual),
        str(path),
        _Reader(pictures),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return path


def _ours(checkpoint: str, asked: QuantizeRequest, calibration: Path, judged: Path, folder: Path) -> Path:
    """What this tool makes for TensorRT; raises where its own proof fails."""
    wanted = QuantizeRequest(calibration, 10**6, asked.method, asked.rounding, asked.equalize)
    request = Request(folder, checkpoint=checkpoint, images=judged, count=2, consumer="tensorrt-10")
    manifest = export(with_quantize(request, wanted), lambda _: None)
    same = manifest.checks[0]
    if str(same.verdict) != "verified":
        raise SystemExit(f"the file is not the same network: {same.why}")
    return manifest.artifact.path


def _quality(path: Path, images: ImageSet, expected: Array) -> Quality:
    with OnnxRuntime(path, "emulated") as executor:
        got = np.concatenate([executor.run({"image": each})["logits"] for each in _one_by_one(images)])
    noise, signal = (np.square(each.astype(np.float64)).sum() for each in (got - expected, expected))
    right = None
    if all(label is not None and label.isdigit() for label in images.labels):
        right = float(np.mean(got.argmax(1) == np.array([int(str(label)) for label in images.labels])))
    return Quality(float(10 * np.log10(signal / noise)), right)


def _one_by_one(images: ImageSet) -> Iterator[Any]:
    return (each[None] for each in images.normalised())


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
    """One picture after the other."""

    def __init__(self, pictures: Pictures) -> None:
        self._left = iter(range(len(pictures)))
        self._pictures = pictures

    def get_next(self) -> dict[str, Any] | None:
        """The next one, None behind the last."""
        at = next(self._left, None)
        return None if at is None else {"image": self._pictures.read(at, at + 1).normalised()}


def _demo_pictures(folder: Path, count: int) -> tuple[Path, Path]:
    """The demo's pictures in two folders: some to calibrate on, all others."""
    preprocessing = load_checkpoint(DEMO_CHECKPOINT).preprocessing
    parts = split(find_pictures(DEMO_IMAGES, None, (64, 64), preprocessing), count)
    for name, part in zip(("calibration", "judged"), parts, strict=True):
        for path in part.paths:
            place = folder / name / path.relative_to(DEMO_IMAGES)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return folder / "calibration", folder / "judged"


def _crops(folder: Path, calibration: int, judged: int) -> tuple[Path, Path]:
    """Seeded crops of scikit-learn's two photographs, no two the same."""
    generator, photographs = np.random.default_rng(0), load_sample_images().images
    places = folder / "crops", folder / "other-crops"
    for place, count in zip(places, (calibration, judged), strict=True):
        place.mkdir()
        for index in range(count):
            photograph = photographs[index % len(photographs)]
            side = int(generator.integers(120, 400))
            top, left = (int(generator.integers(0, length - side)) for length in photograph.shape[:2])
            crop = Image.fromarray(photograph[top : top + side, left : left + side])
            crop.resize((256, 256), Image.Resampling.BICUBIC).save(place / f"{index:03}.png")
    return places


def _met(value: float, bound: float) -> str:
    return "met" if value >= bound else "MISSED"


if __name__ == "__main__":
    main()
