"""Next-ViT nano, unchanged, converted by coremltools in every way an app asks for: the saved package against PyTorch.

Measured: float32 packages are at 2e-7 of PyTorch, float16 ones in exact arithmetic at 0 of their float32 twin with its
constants rounded, float16 emulated at 6e-4 of PyTorch. The mildest planted fault is at 2.8e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextvit_exporters.coreml.activations import quantize_activations
from nextvit_exporters.coreml.loading import coremltools, heard
from nextvit_exporters.coreml.reader import read_package
from nextvit_exporters.errors import UnsupportedSpec, VerificationFailed
from nextvit_exporters.executors.base import Array
from nextvit_exporters.executors.mil import MilReference
from tests.exporters.coreml.whole_models import (
    BIAS,
    LABELS,
    SCALE,
    SIZE,
    Pictured,
    converted,
    distance,
    logits,
    picture,
    plain,
    preprocessed,
    ran,
    rounded,
    saved,
    tensors,
)
from tests.exporters.passes_harness import nano
from tests.harness import images

SAME = 1e-5


def example(*shape: int) -> Array:
    found: Array = images(*(shape or (1, 3, SIZE, SIZE)), seed=5).numpy()
    return found


@torch.no_grad()
def pytorch(image: Array) -> Array:
    found: Array = nano()(torch.from_numpy(image)).numpy()
    return found


@pytest.mark.parametrize("release", ["iOS15", "iOS16", "iOS17", "iOS18", "iOS26"])
def test_a_float32_package_is_the_same_network_and_float16_its_rounded_twin(tmp_path: Path, release: str) -> None:
    wide, stored = (
        read_package(saved(plain(release, precision), tmp_path / f"{precision}.mlpackage"))
        for precision in ("FLOAT32", "FLOAT16")
    )
    image = example()
    expected = pytorch(image)
    assert distance(ran(wide, "exact", image)["logits"], expected) < SAME
    assert np.array_equal(ran(wide, "emulated", image)["logits"], ran(wide, "exact", image)["logits"])
    twin = ran(rounded(wide), "exact", image)["logits"]
    assert distance(ran(stored, "exact", image)["logits"], twin) < SAME
    cost, worst = (distance(ran(stored, mode, image)["logits"], expected) for mode in ("emulated", "pessimistic"))
    assert cost != worst
    assert all(1e-4 < each < 2e-3 for each in (cost, worst))


def test_float64_is_closer_still(tmp_path: Path) -> None:
    path = saved(plain("iOS16", "FLOAT32"), tmp_path / "it.mlpackage")
    image = example()
    with torch.no_grad():
        expected = nano().double()(torch.from_numpy(image).double()).numpy()
    with MilReference(path, "exact", double=True) as executor:
        got = executor.run({"image": image})["logits"]
    assert got.dtype == np.float64
    assert distance(got, expected) < 2e-7  # batch_norm's epsilon and folded weights are float32


@pytest.mark.parametrize("color", ["RGB", "BGR"])
@pytest.mark.parametrize(("release", "precision"), [("iOS15", "FLOAT32"), ("iOS18", "FLOAT16")])
def test_a_classifier_of_pictures(tmp_path: Path, release: str, precision: str, color: str) -> None:
    """A package whose first layer takes BGR gets the channels in that order: the network then reads them so."""
    ct = coremltools()
    given = ct.ImageType(
        name="image",
        shape=(1, 3, SIZE, SIZE),
        scale=SCALE,
        bias=list(BIAS),
        color_layout=getattr(ct.colorlayout, color),
    )
    labels = ct.ClassifierConfig(list(LABELS))
    model = converted(given, release, precision, Pictured, classifier_config=labels)
    image = picture()
    read = image if color == "RGB" else image[..., ::-1]
    with torch.no_grad():
        network = Pictured().eval()
        expected = network.model(preprocessed(read)).numpy()
    with MilReference(saved(model, tmp_path / "it.mlpackage"), "exact") as executor:
        got = executor.run({"image": image})
        assert executor.labels_of_last_run == (LABELS[int(expected.argmax())],)
    assert sorted(got) == ["logits", "probabilities"]
    bound = SAME if precision == "FLOAT32" else 2e-2
    assert distance(got["logits"], expected) < bound
    assert distance(got["probabilities"], torch.from_numpy(expected).softmax(1).numpy()) < bound
    other = Pictured().eval().model(preprocessed(image if color == "BGR" else image[..., ::-1])).detach().numpy()
    assert distance(got["logits"], other) > 0.02


@pytest.mark.parametrize(("release", "precision"), [("iOS16", "FLOAT32"), ("iOS18", "FLOAT16")])
def test_sizes_in_a_range(tmp_path: Path, release: str, precision: str) -> None:
    ct = coremltools()
    shape = ct.Shape((1, 3, *(ct.RangeDim(32, 160, SIZE) for _ in range(2))))
    given = ct.TensorType(name="image", shape=shape, dtype=np.float32)
    path = saved(converted(given, release, precision, open_sizes=True, **logits()), tmp_path / "it.mlpackage")
    with MilReference(path, "exact") as executor:
        for height, width in ((64, 64), (96, 160), (65, 100), (32, 32)):
            image = example(1, 3, height, width)
            bound = SAME if precision == "FLOAT32" else 2e-2
            assert distance(executor.run({"image": image})["logits"], pytorch(image)) < bound
        for height, width in ((64, 161), (31, 64)):
            with pytest.raises(UnsupportedSpec, match=f"reads image as .*32..160, not as 1 x 3 x {height} x {width}"):
                executor.run({"image": example(1, 3, height, width)})


def test_sizes_in_a_list(tmp_path: Path) -> None:
    ct = coremltools()
    sizes = [(64, 64), (96, 64), (96, 128)]
    shapes = ct.EnumeratedShapes([(1, 3, *size) for size in sizes], default=(1, 3, 64, 64))
    given = ct.ImageType(name="image", shape=shapes, scale=SCALE, bias=list(BIAS))
    path = saved(converted(given, "iOS16", "FLOAT32", open_sizes=True, **logits()), tmp_path / "it.mlpackage")
    with MilReference(path, "exact") as executor:
        for size in sizes:
            image = picture(*size)
            assert distance(executor.run({"image": image})["logits"], pytorch(preprocessed(image).numpy())) < SAME
        with pytest.raises(UnsupportedSpec, match=r"1 x 3 x 64 x 64 or 1 x 3 x 96 x 64 or .*, not as 1 x 3 x 64 x 96"):
            executor.run({"image": picture(64, 96)})


@pytest.mark.parametrize("release", ["iOS16", "iOS18"])
def test_two_at_once(tmp_path: Path, release: str) -> None:
    model = converted(tensors(2, 3, SIZE, SIZE), release, batch=2, **logits())
    image = example(2, 3, SIZE, SIZE)
    got = ran(saved(model, tmp_path / "it.mlpackage"), "exact", image)["logits"]
    assert got.shape == (2, 10)
    assert distance(got, pytorch(image)) < SAME


def int8(model: Any) -> Any:
    ct = coremltools().optimize.coreml
    return ct.linear_quantize_weights(model, ct.OptimizationConfig(ct.OpLinearQuantizerConfig(weight_threshold=64)))


def int4(model: Any) -> Any:
    ct = coremltools().optimize.coreml
    each = ct.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=16, weight_threshold=64)
    return ct.linear_quantize_weights(model, ct.OptimizationConfig(each))


def palette(model: Any) -> Any:
    ct = coremltools().optimize.coreml
    each = ct.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=64)
    return ct.palettize_weights(model, ct.OptimizationConfig(each))


def pruned(model: Any) -> Any:
    ct = coremltools().optimize.coreml
    each = ct.OpMagnitudePrunerConfig(target_sparsity=0.5, weight_threshold=64)
    return ct.prune_weights(model, ct.OptimizationConfig(each))


@pytest.mark.parametrize(
    ("release", "compress"),
    [("iOS16", int8), ("iOS18", int8), ("iOS18", int4), ("iOS16", palette), ("iOS18", palette), ("iOS16", pruned)],
)
def test_compressed_weights_are_coremltools_own(tmp_path: Path, release: str, compress: Any) -> None:
    """Nothing but the weights may differ from what coremltools decompresses, and those not in a bit."""
    model = plain(release, "FLOAT16")
    with heard():
        small = compress(model)
        large = coremltools().optimize.coreml.decompress_weights(small)
    packed, whole = (
        read_package(saved(each, tmp_path / f"{index}.mlpackage")) for index, each in enumerate((small, large))
    )
    kinds = [each.kind for each in packed.program.operations]
    assert sum(kind.startswith("constexpr") for kind in kinds) > 30
    assert not any(each.kind.startswith("constexpr") for each in whole.program.operations)
    image = example()
    got = ran(packed, "exact", image)["logits"]
    assert np.array_equal(got, ran(whole, "exact", image)["logits"])
    assert distance(got, pytorch(image)) > 1e-4


def test_overflow_is_told_and_not_computed_with(tmp_path: Path) -> None:
    """The image's numbers are times 1e5: float32 holds that, float16 does not."""
    package = read_package(saved(plain("iOS16", "FLOAT16"), tmp_path / "it.mlpackage"))
    image = np.multiply(example(), 1e5, dtype=np.float32)
    assert np.isfinite(ran(package, "exact", image)["logits"]).all()
    with pytest.raises(VerificationFailed, match=r"cast .* comes to .*, and float16 ends at 65504: keep it in float32"):
        ran(package, "emulated", image)


def test_int8_activations_pass_as_they_are_where_steps_are_left_out(tmp_path: Path) -> None:
    """Without their steps, quantize and dequantize are no operations, and the network is the one without them."""
    model, image = plain("iOS17", "FLOAT16"), example()
    quantized = read_package(saved(quantize_activations(model, [{"image": image}]), tmp_path / "int8.mlpackage"))
    assert quantized.program.count()["quantize"] > 30
    before = ran(read_package(saved(model, tmp_path / "it.mlpackage")), "exact", image)["logits"]
    assert distance(ran(quantized, "unrounded", image)["logits"], before) < SAME
    assert 1e-3 < distance(ran(quantized, "exact", image)["logits"], before) < 5e-2
