"""Graphs in INT8 are what their definition says, to the last bit, and their constants are those of the file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import InvariantError
from nextvit_exporters.quantize.bias import corrected_bias
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.identity import graph_hash
from nextvit_exporters.quantize.placement import Map, placement
from nextvit_exporters.quantize.quantized import (
    Quantizer,
    clipped,
    map_steps,
    quantize_graph,
    quantized_maps,
    take_quantizers,
)
from nextvit_exporters.quantize.weights import nearest_codes, weight_steps
from nextvit_exporters.quantize_spec import QuantizeSpec
from tests.exporters.quantize.int8_files import BESIDE_FP32, INT8, Residual, calibrated, observed
from tests.harness import images, randomise

Rows = NDArray[np.float64]
SEEN = images(8, 3, 8, 8, seed=1, dtype=torch.float64)
RESTS = pytest.mark.parametrize("rest", ["fp16", "fp32"])
DTYPES = {"fp16": np.float16, "fp32": np.float32}


@cache
def toy() -> tuple[fx.GraphModule, Calibration]:
    graph = g.trace(randomise(Residual(), seed=0))
    return graph, observed(graph, SEEN)


def weight_of(graph: fx.GraphModule, name: str) -> Rows:
    weight = graph.get_submodule(name).get_parameter("weight").detach().double().numpy()
    return weight.reshape(len(weight), -1)


def values_of(graph: fx.GraphModule, inputs: Tensor) -> dict[str, Tensor]:
    """Every node's result by name."""
    found: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n.name] = value = super().run_node(n)
            return value

    with torch.no_grad():
        Keep(graph).run(inputs)
    return found


def test_steps_are_rounded_half_to_even_and_clipped() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75, 0.3, 63.5, 63.9, 1e9, -64.0, -64.3, -1e9], dtype=torch.float64)
    wanted = torch.tensor([0.0, 1.0, 1.0, 0.0, -1.0, 0.5, 63.5, 63.5, 63.5, -64.0, -64.0, -64.0], dtype=torch.float64)
    assert torch.equal(Quantizer(0.5)(x).abs(), wanted.abs())
    assert torch.equal(Quantizer(0.5)(x), wanted)


def test_unrounded_it_clips_alone() -> None:
    x = torch.tensor([0.3, -0.3, 63.5, 63.6, 1e9, -64.0, -64.1], dtype=torch.float64)
    wanted = torch.tensor([0.3, -0.3, 63.5, 63.5, 63.5, -64.0, -64.0], dtype=torch.float64)
    assert torch.equal(Quantizer(0.5, rounds=False)(x), wanted)


def off_definition(rest: str, *, correct: bool) -> float:
    """How far a quantized graph is from what is written out by hand here, relative.

    Every tensor on its step, every weight on its own, everything else as it was.
    """
    graph, found = toy()
    spec = QuantizeSpec(rest=rest, correct_bias=correct)
    quantized = quantize_graph(graph, spec, found)
    x = images(2, 3, 8, 8, seed=5, dtype=torch.float64) * 1.5  # beyond what was seen, so that something clips

    def on(name: str, value: Tensor) -> Tensor:
        step = weight_steps(np.array([[127 * found.steps[name]]]), rest)[0]
        assert float(step) == float(np.asarray(step, DTYPES[rest]))
        assert abs(step / found.steps[name] - 1.0) <= 2.0**-10
        whole = np.clip(np.rint(value.detach().numpy() / step), -128, 127)
        return torch.from_numpy(whole * step)

    def weights(name: str) -> Tensor:
        rows = weight_of(graph, name)
        steps = weight_steps(rows, rest)
        codes = nearest_codes(rows, steps)
        shape = graph.get_submodule(name).get_parameter("weight").shape
        return torch.from_numpy(codes * steps[:, None]).reshape(shape)

    def bias(name: str) -> Tensor:
        own = graph.get_submodule(name).get_parameter("bias").detach()
        if not correct:
            return own
        lost = weights(name).flatten(1) - torch.from_numpy(weight_of(graph, name))
        means = torch.from_numpy(np.asarray(found.means[name]))
        runs = lost.reshape(len(means), -1, lost.shape[1])
        return own - torch.stack([run @ mean for run, mean in zip(runs, means, strict=True)]).flatten()

    conv, linear = nn.functional.conv2d, nn.functional.linear
    a = on("act", torch.relu(conv(on("x", x), weights("stem"), bias("stem"), stride=2, padding=1)))
    grouped = conv(a, weights("grouped"), bias("grouped"), padding=1, groups=2)
    total = on("add_1", a + grouped + conv(a, weights("plain")))
    t = total.flatten(2).transpose(1, 2)
    t = linear(on("relu", torch.relu(linear(t, weights("tokens"), bias("tokens")))), weights("back"), bias("back")) + t
    head = graph.get_submodule("head")
    wanted = linear(t.mean(1), head.get_parameter("weight"), head.get_parameter("bias")).detach()
    inside = 127 * found.steps["x"]
    assert not torch.equal(x.clamp(-inside, inside), x), "something clips"
    (got,) = g.execute(quantized, x)
    assert got.dtype == torch.float64
    return float((got - wanted).abs().max() / wanted.abs().max())


@RESTS
@pytest.mark.parametrize("correct", [False, True])
def test_a_quantized_graph_is_its_definition(rest: str, *, correct: bool) -> None:
    assert off_definition(rest, correct=correct) < 1e-13


def rounding_down(self: Quantizer, x: Tensor) -> Tensor:
    return torch.clamp(torch.floor(x / self.step), -128, 127) * self.step


def clipping_early(self: Quantizer, x: Tensor) -> Tensor:
    return torch.clamp(torch.round(x / self.step), -64, 64) * self.step


def with_the_wrong_sign(bias: Rows, *numbers: Rows) -> tuple[Rows, Rows]:
    corrected, residual = corrected_bias(bias, *numbers)
    return 2 * bias - corrected, residual


def for_the_whole_weight(rows: Rows, rest: str) -> Rows:
    steps = weight_steps(rows, rest)
    return np.full_like(steps, steps.max())


def as_they_were_found(step: float, rest: str) -> float:
    del rest
    return step


@pytest.mark.parametrize(
    ("name", "mutation"),
    [
        ("Quantizer.forward", rounding_down),
        ("Quantizer.forward", clipping_early),
        ("corrected_bias", with_the_wrong_sign),
        ("weight_steps", for_the_whole_weight),
        ("_exact", as_they_were_found),
    ],
)
def test_another_definition_is_another_graph(monkeypatch: pytest.MonkeyPatch, name: str, mutation: object) -> None:
    monkeypatch.setattr(f"nextvit_exporters.quantize.quantized.{name}", mutation)
    monkeypatch.setattr("nextvit_exporters.quantize.quantized.certify_bias", lambda *_: None)  # which sees one earlier
    assert off_definition("fp16", correct=True) > 1e-5


def test_a_bias_of_the_wrong_sign_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvit_exporters.quantize.quantized.corrected_bias", with_the_wrong_sign)
    with pytest.raises(InvariantError, match=r"moves mean outputs by .*: --no-correct-bias"):
        off_definition("fp16", correct=True)


@RESTS
@pytest.mark.parametrize("name", ["toy", "nano"])
def test_weights_are_whole_steps_that_the_file_can_hold(rest: str, name: str) -> None:
    spec = BESIDE_FP32 if rest == "fp32" else INT8
    graph, found = toy() if name == "toy" else calibrated(spec)
    quantized = quantize_graph(graph, QuantizeSpec(rest=rest), found)
    maps = map_steps(quantized)
    assert set(maps) == set(quantized_maps(quantized)) == set(placement(graph).maps)
    for module, each in maps.items():
        assert np.array_equal(each.weights, each.weights.astype(DTYPES[rest]).astype(np.float64))
        assert each.activation == float(np.asarray(each.activation, DTYPES[rest]))
        rounded = weight_of(quantized, module)
        assert np.array_equal(rounded, each.codes.astype(np.float64) * each.weights[:, None])
        assert np.abs(each.codes.astype(int)).max() <= 127
        assert (np.abs(each.codes.astype(int)).max(axis=1) == 127).mean() > 0.9
        off = np.abs(rounded - weight_of(graph, module)) / each.weights[:, None]
        assert off.max() <= 0.5 + 1e-9
        if rest == "fp16":
            assert np.array_equal(rounded, rounded.astype(np.float32)), "exact for who multiplies in float32"


def moved_means(graph: fx.GraphModule, quantized: fx.GraphModule, inputs: Tensor) -> dict[str, float]:
    """How far each map's mean outputs moved, both forms given what the float graph gives; relative."""
    values, result = values_of(graph, inputs), {}
    for name in map_steps(quantized):
        (call,) = [node for node in graph.graph.nodes if node.target == name]
        given = values[call.all_input_nodes[0].name]
        dims = [0, 2, 3] if given.dim() == 4 else [0, 1]
        with torch.no_grad():
            before, after = (each.get_submodule(name)(given).mean(dims) for each in (graph, quantized))
        result[name] = float((after - before).abs().max() / before.abs().max())
    return result


def test_biases_keep_mean_outputs_on_the_calibration_images() -> None:
    graph, found = toy()
    spec = QuantizeSpec()
    kept = moved_means(graph, quantize_graph(graph, spec, found), SEEN)
    left = moved_means(graph, quantize_graph(graph, replace(spec, correct_bias=False), found), SEEN)
    with_bias = kept.keys() - {"plain"}
    assert all(kept[name] < 1e-12 for name in with_bias)
    assert all(left[name] > 1e-5 for name in with_bias)
    assert kept["plain"] == left["plain"], "a map without a bias stays without"
    assert graph.get_submodule("plain").get_parameter("weight").shape == (8, 8, 1, 1)


def test_the_graph_stays_as_it_is() -> None:
    graph, found = toy()
    before, held, code = graph_hash(graph), g.fingerprint(graph), graph.code
    quantized = quantize_graph(graph, QuantizeSpec(), found)
    take_quantizers(g.cast(quantized, torch.float16))
    clipped(quantized, "fp16")
    assert (graph_hash(graph), g.fingerprint(graph), graph.code) == (before, held, code)
    assert map_steps(graph) == {}
    assert not quantized_maps(graph)


def test_kept_blocks_are_the_same_modules() -> None:
    graph, found = toy()
    quantized = quantize_graph(graph, QuantizeSpec(keep=("grouped", "stem")), found)
    assert set(map_steps(quantized)) == {"plain", "tokens", "back"}
    assert quantized.get_submodule("grouped") is graph.get_submodule("grouped")
    assert "quantize_x" not in dict(quantized.named_modules())


def other(found: Calibration, **changes: Mapping[str, Any]) -> Calibration:
    return replace(found, **changes)  # type: ignore[arg-type]  # its own fields


def test_what_was_not_calibrated_is_named() -> None:
    graph, found = toy()
    steps = {name: step for name, step in found.steps.items() if name != "relu"}
    with pytest.raises(InvariantError, match=r"^relu was not calibrated; calibrate again$"):
        quantize_graph(graph, QuantizeSpec(), other(found, steps=steps))


def test_whole_numbers_that_were_found_are_used_and_foreign_ones_refused() -> None:
    graph, found = toy()
    rows = weight_of(graph, "tokens")
    codes = nearest_codes(rows, weight_steps(rows, "fp16"))
    moved = copy.deepcopy(codes)
    moved[3, 2] += 1
    quantized = quantize_graph(graph, QuantizeSpec(), other(found, codes={"tokens": moved}))
    assert np.array_equal(map_steps(quantized)["tokens"].codes, moved)
    with pytest.raises(InvariantError, match=r"^the calibration's numbers for tokens are not those of its weights"):
        quantize_graph(graph, QuantizeSpec(), other(found, codes={"tokens": -codes}))


@pytest.mark.parametrize("shape", [(12, 7), (8, 12), (96,)])
def test_whole_numbers_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    graph, found = toy()
    codes = np.zeros(shape, np.int8)
    with pytest.raises(InvariantError, match=r"^the calibration's numbers for tokens are not those of its weights"):
        quantize_graph(graph, QuantizeSpec(), other(found, codes={"tokens": codes}))


@RESTS
def test_quantizers_are_taken_from_what_will_be_exported(rest: str) -> None:
    """Rounded to the type beside INT8, a graph still tells steps and whole numbers exactly."""
    graph, found = calibrated(BESIDE_FP32 if rest == "fp32" else INT8)
    quantized = quantize_graph(graph, QuantizeSpec(rest=rest), found)
    wanted = map_steps(quantized)
    lowered = to_onnx.lower(BESIDE_FP32 if rest == "fp32" else INT8, quantized)
    taken = take_quantizers(lowered)
    assert set(taken) == set(wanted)
    for name, each in taken.items():
        assert each.activation == wanted[name].activation
        assert np.array_equal(each.weights, wanted[name].weights)
        assert np.array_equal(each.codes, wanted[name].codes)
    assert not any(isinstance(module, Quantizer) for module in lowered.modules())
    assert not quantized_maps(lowered)
    assert map_steps(quantized).keys() == wanted.keys(), "the graph it was made from keeps its own"


def test_a_map_that_reads_no_steps_is_named() -> None:
    graph, found = toy()
    quantized = quantize_graph(graph, QuantizeSpec(), found)
    (gone,) = [node for node in quantized.graph.nodes if node.target == "quantize_relu"]
    gone.replace_all_uses_with(gone.all_input_nodes[0])
    with pytest.raises(InvariantError, match=r"^back reads what nothing brought onto steps$"):
        map_steps(quantized)


@RESTS
def test_the_reference_clips_and_does_not_round(rest: str) -> None:
    graph, found = toy()
    quantized = quantize_graph(graph, QuantizeSpec(rest=rest), found)
    reference = clipped(quantized, rest)
    assert all(p.dtype == torch.float32 for p in reference.parameters())
    kind = torch.float16 if rest == "fp16" else torch.float32
    for name, module in quantized.named_modules():
        if isinstance(module, Map):
            own = reference.get_submodule(name)
            weight = module.weight.detach() if name in map_steps(quantized) else module.weight.detach().to(kind)
            assert torch.equal(own.get_parameter("weight"), weight.float())
            if module.bias is not None:
                assert torch.equal(own.get_parameter("bias").double(), module.bias.detach().to(kind).double())
        if isinstance(module, Quantizer):
            quiet = reference.get_submodule(name)
            assert isinstance(quiet, Quantizer)
            assert (module.rounds, quiet.rounds) == (True, False)
            assert float(quiet.step) == float(module.step)
    values = values_of(reference, SEEN.float())
    inside = values["quantize_relu"]
    assert torch.allclose(inside, values["relu"], rtol=1e-6, atol=0.0), "nothing that was seen is clipped or rounded"
    assert not torch.equal(values_of(quantized, SEEN)["quantize_relu"], values_of(quantized, SEEN)["relu"])
