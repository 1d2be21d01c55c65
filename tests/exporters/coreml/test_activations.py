from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.coreml import activations
from nextvit_exporters.coreml.activations import last_maps, quantize_activations, ranges
from nextvit_exporters.coreml.compression import compress_weights, maps_of
from nextvit_exporters.coreml.program import Operation, Package
from nextvit_exporters.errors import BuildFailed, InvariantError, UnsupportedSpec
from nextvit_exporters.executors.mil import MilReference, Mode
from nextvit_exporters.precision.compress import THRESHOLD, compress_graph, for_conversion
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.quantize import histograms
from nextvit_exporters.quantize.placement import block_of
from tests import harness
from tests.exporters.coreml.conversions import SIZE, altered, converted, folded, module_of, parameters, saved

IMAGES: Final = tuple(harness.images(1, 3, SIZE, SIZE, seed=20 + seed) * size for seed, size in enumerate((1, 3, 0.5)))
SAMPLES: Final = tuple({"image": image.numpy()} for image in IMAGES)
CLEAN: Final = 1e-6
"""Unrounded mode against PyTorch: 1.6e-7 measured, from dividing by scales and multiplying again."""


KEEP: Final = ("features.0", "features.4")


class Quantized(NamedTuple):
    model: Any
    activations_only: Any
    package: Package
    graph: fx.GraphModule
    carried: fx.GraphModule
    modules: Mapping[str, str]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    graph = folded()
    carried, _ = compress_graph(graph, "int8")
    found = converted(for_conversion(graph, carried, "int8"), ios=17)
    model = quantize_activations(found.model, SAMPLES)
    package = saved(compress_weights(model, "int8"), tmp_path_factory.mktemp("w8a8") / "model.mlpackage")
    return Quantized(found.model, model, package, graph, carried, found.modules)


@pytest.fixture(scope="module")
def kept(quantized: Quantized, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    carried, _ = compress_graph(quantized.graph, "int8", KEEP)
    names = maps_of(quantized.model, quantized.modules, KEEP)
    model = quantize_activations(quantized.model, SAMPLES, keep=names)
    package = saved(compress_weights(model, "int8", names), tmp_path_factory.mktemp("kept") / "model.mlpackage")
    return quantized._replace(activations_only=model, package=package, carried=carried)


def logits(package: Package, mode: Mode) -> NDArray[Any]:
    with MilReference(package, mode) as executor:
        return np.concatenate([executor.run(sample)["logits"] for sample in SAMPLES])


def relative(found: NDArray[Any], graph: fx.GraphModule) -> float:
    expected = torch.cat([g.execute(graph, image)[0] for image in IMAGES]).numpy()
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


class Largest(fx.Interpreter):
    """Largest magnitude of what each module of a graph reads and writes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.read: dict[str, float] = {}
        self.written: dict[str, float] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(target, args, kwargs)
        self.read[target] = max(self.read.get(target, 0.0), float(args[0].abs().max()))
        self.written[target] = max(self.written.get(target, 0.0), float(result.abs().max()))
        return result


def largest(graph: fx.GraphModule) -> Largest:
    seen = Largest(round_constants(graph))
    with torch.no_grad():
        for image in IMAGES:
            seen.run(image)
    return seen


def steps(package: Package) -> Iterator[tuple[Operation, Operation, float]]:
    """Each dequantize, what made the tensor in front of its quantize, and their scale."""
    makers = {each.outputs[0].name: each for each in package.program.operations if each.outputs}
    for each in package.program.operations:
        if each.kind == "dequantize":
            quantize = makers[str(each.inputs["input"][0])]
            scale, again = (float(parameters(package, one)["scale"]) for one in (quantize, each))
            assert scale == again
            yield each, makers[str(quantize.inputs["input"][0])], scale


def maps(package: Package) -> list[Operation]:
    return [each for each in package.program.operations if each.kind in {"conv", "linear"}]


def test_scales_of_what_maps_read_are_those_of_pytorch_layer_by_layer(quantized: Quantized) -> None:
    seen, package = largest(quantized.graph), quantized.package
    by_output = {each.outputs[0].name: each for each in package.program.operations if each.outputs}
    checked = 0
    for each in maps(package):
        dequantize = by_output[str(each.inputs["x"][0])]
        if dequantize.kind != "dequantize":
            assert each.kind == "linear"
            continue
        scale = float(parameters(package, dequantize)["scale"])
        assert scale == pytest.approx(seen.read[module_of(each, quantized.modules)] / 127, rel=2**-10)
        checked += 1
    assert checked == len(maps(package)) - 1 == 49


def test_scales_of_what_maps_write_are_those_of_pytorch_layer_by_layer(quantized: Quantized) -> None:
    seen, checked = largest(quantized.graph), 0
    for _, maker, scale in steps(quantized.package):
        if maker.kind in {"conv", "relu"}:
            module = module_of(maker, quantized.modules)
            assert scale == pytest.approx(seen.written[module] / 127, rel=2**-10)
            checked += 1
    assert checked == 49


def test_only_what_maps_read_and_write_is_rounded(quantized: Quantized) -> None:
    operations = [each for each in quantized.package.program.operations if each.kind not in {"const", "classify"}]
    whole = {each.outputs[0].name for each in operations if each.kind == "dequantize"}
    readers: dict[str, set[str]] = {name: set() for name in whole}
    for each in operations:
        for (name,) in each.inputs.values() if each.kind != "concat" else ():
            if name in whole:
                readers[str(name)].add(each.kind)
    for dequantize, maker, _ in steps(quantized.package):
        assert maker.kind in {"conv", "relu"} or readers[dequantize.outputs[0].name] == {"conv"}
    assert not {"softmax", "linear"} & {kind for kinds in readers.values() for kind in kinds}
    count = quantized.package.program.count()
    assert count["quantize"] == count["dequantize"] == 75


def test_without_steps_it_is_the_network_with_int8_weights(quantized: Quantized) -> None:
    assert relative(logits(quantized.package, "unrounded"), quantized.carried) <= CLEAN
    cost = relative(logits(quantized.package, "emulated"), g.cast(quantized.graph, torch.float32))
    assert 1e-3 < cost < 5e-2


@pytest.mark.parametrize("kind", ["constexpr_affine_dequantize", "dequantize"])
def test_a_scale_that_is_one_percent_off_is_seen(quantized: Quantized, kind: str) -> None:
    operation = [each for each in quantized.package.program.operations if each.kind == kind][1]

    def edit(values: NDArray[Any]) -> None:
        values.reshape(-1)[-1:] *= np.float16(1.01)

    damaged = altered(quantized.package, operation, "scale", edit)
    assert relative(logits(damaged, "unrounded"), quantized.carried) >= 10 * CLEAN


def test_kept_blocks_read_fp16_and_have_fp16_weights(kept: Quantized) -> None:
    makers = {each.outputs[0].name: each.kind for each in kept.package.program.operations}
    reads: dict[bool, set[str]] = {True: set(), False: set()}
    for each in maps(kept.package)[:-1]:
        is_kept = block_of(module_of(each, kept.modules)) in KEEP
        reads[is_kept].add(makers[str(each.inputs["x"][0])])
        weight = parameters(kept.package, each).get("weight")  # None where it is compressed
        assert weight is not None if is_kept else weight is None or weight.size <= THRESHOLD
    assert "dequantize" not in reads[True]
    assert reads[False] == {"dequantize"}


def test_with_kept_blocks_it_is_the_network_that_keeps_their_weights(kept: Quantized, quantized: Quantized) -> None:
    found = logits(kept.package, "unrounded")
    assert relative(found, kept.carried) <= CLEAN
    assert relative(found, quantized.carried) >= 100 * CLEAN
    whole = g.cast(kept.graph, torch.float32)
    assert relative(logits(kept.package, "emulated"), whole) < relative(logits(quantized.package, "emulated"), whole)


def test_steps_before_a_kept_block_are_refused(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would come if the map that makes its input were quantized like any other."""
    monkeypatch.setattr(activations, "read_by", lambda *_: frozenset())
    names = maps_of(quantized.model, quantized.modules, KEEP)
    with pytest.raises(BuildFailed, match="coremltools gave features_0_patch_embed_conv_cast_fp16 int8 activations"):
        quantize_activations(quantized.model, SAMPLES[:1], keep=names)


def test_every_picture_counts_and_their_order_does_not(quantized: Quantized, tmp_path: Path) -> None:
    package = saved(quantized.model, tmp_path / "model.mlpackage")
    first, second, both = (ranges(package, each) for each in (SAMPLES[:1], SAMPLES[1:2], SAMPLES[:2]))
    assert both == ranges(package, SAMPLES[1::-1])
    assert both == {
        name: (min(low, second[name][0]), max(high, second[name][1])) for name, (low, high) in first.items()
    }
    assert both["image"] != second["image"] or both["image"] != first["image"]


def test_what_cannot_be_calibrated_is_refused(quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedSpec, match="int8 activations need pictures"):
        quantize_activations(quantized.model, [])
    with pytest.raises(InvariantError, match=r"image reaches -.* to .*; an int8 scale needs it within 32752"):
        quantize_activations(quantized.model, [{"image": SAMPLES[0]["image"] * np.float32(1e5)}])
    monkeypatch.setattr(activations, "ranges", lambda *_: {})
    with pytest.raises(BuildFailed, match="coremltools refused int8 activations: 'image_to_fp16'"):
        quantize_activations(quantized.model, SAMPLES)
    monkeypatch.setattr(activations, "_CALIBRATE", "_moved_elsewhere")
    with pytest.raises(BuildFailed, match="this coremltools has no _moved_elsewhere"):
        quantize_activations(quantized.model, SAMPLES)
    old = converted(round_constants(small()), ios=16, size=32).model
    with pytest.raises(UnsupportedSpec, match="int8 activations need iOS 17; ask for --ios 17 or more"):
        quantize_activations(old, SAMPLES)


class Dead(nn.Module):
    """Images (B, 3, 32, 32) to (B, 10); what its first convolution writes is zero behind the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 3)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(image))).mean((2, 3))
        return found


class Forks(nn.Module):
    """Images (B, 3, 32, 32) to (B, 10); two convolutions read one rectified result, and a third its moved numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.stays, self.steps, self.moved = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 10, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = torch.relu(self.first(image))
        both = self.stays(first) + self.steps(first) + self.moved(first.reshape(-1, 8, 15, 60)).reshape(first.shape)
        found: Tensor = self.last(both).mean((2, 3))
        return found


def test_a_tensor_that_int8_reads_too_is_on_steps_for_that_one_alone(tmp_path: Path) -> None:
    graph = g.trace(harness.randomise(Forks(), 0))
    found = converted(round_constants(graph), ios=17, size=32)
    names = maps_of(found.model, found.modules, ("stays", "moved"))
    sample = {"image": harness.images(1, 3, 32, 32, seed=0).numpy()}
    package = saved(quantize_activations(found.model, [sample], keep=names), tmp_path / "model.mlpackage")
    makers = {each.outputs[0].name: each for each in package.program.operations if each.outputs}
    read = {module_of(each, found.modules): makers[str(each.inputs["x"][0])].kind for each in maps(package)}
    assert read == {"first": "dequantize", "stays": "relu", "steps": "dequantize", "moved": "reshape", "last": "add"}
    whole = {module_of(maker, found.modules) for _, maker, _ in steps(package) if maker.kind == "conv"}
    assert whole == {"steps"}
    with torch.no_grad():
        first = torch.relu(round_constants(graph).get_submodule("first")(torch.tensor(sample["image"])))
    (scale,) = (scale for _, maker, scale in steps(package) if maker.kind == "relu")
    assert scale == pytest.approx(float(first.max()) / 127, rel=2**-10)


@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_another_method_clips_what_maps_read_and_write(quantized: Quantized, tmp_path: Path, method: str) -> None:
    package = saved(quantized.model, tmp_path / "model.mlpackage")
    counted = histograms.Histogram("image")
    for image in IMAGES:
        counted.add(image.half().float())  # the cast in front
    clip = histograms.step(counted, method) * 127
    most, clipped = ranges(package, SAMPLES), ranges(package, SAMPLES, method)
    assert clip < counted.largest
    assert max(-clipped["image_to_fp16"][0], clipped["image_to_fp16"][1]) == pytest.approx(clip, rel=2**-10)
    changed = {name for name in most if most[name] != clipped[name]}
    assert len(changed) > 40
    softmaxes = {each.outputs[0].name for each in package.program.operations if each.kind == "softmax"}
    assert not softmaxes & changed
    assert all(clipped[name][0] >= low and clipped[name][1] <= high for name, (low, high) in most.items())


def test_one_sample_at_a_time_is_in_memory(quantized: Quantized, tmp_path: Path) -> None:
    package = saved(quantized.model, tmp_path / "model.mlpackage")
    alive: list[weakref.ref[NDArray[Any]]] = []
    most = 0

    def streamed() -> Iterator[Mapping[str, NDArray[Any]]]:
        nonlocal most
        for image in (*IMAGES, *IMAGES):
            array = image.numpy().copy()
            alive.append(weakref.ref(array))
            most = max(most, sum(each() is not None for each in alive))
            yield {"image": array}

    assert ranges(package, streamed()) == ranges(package, SAMPLES)
    assert most <= 2


def small() -> fx.GraphModule:
    model = harness.randomise(Dead(), 0)
    with torch.no_grad():
        model.first.bias.fill_(-1e3)  # type: ignore[union-attr]  # a Conv2d has one unless told otherwise
    return g.trace(model)


def test_a_tensor_of_zeros_has_a_scale(tmp_path: Path) -> None:
    model = converted(round_constants(small()), ios=17, size=32).model
    sample = {"image": harness.images(1, 3, 32, 32, seed=0).numpy()}
    package = saved(model, tmp_path / "model.mlpackage")
    assert (0.0, 127 * 2.0**-24) in ranges(package, [sample]).values()
    assert last_maps(package.program) == (maps(package)[-1].name,)
    quantized = saved(quantize_activations(model, [sample]), tmp_path / "quantized.mlpackage")
    with MilReference(quantized, "emulated") as executor:
        assert np.isfinite(executor.run(sample)["logits"]).all()
