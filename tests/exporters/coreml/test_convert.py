"""What a converted graph holds: whose operations those are, in which types, with which picture and labels."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters import graph as g
from nextvit_exporters import to_coreml
from nextvit_exporters.coreml import convert
from nextvit_exporters.coreml.convert import SUFFIXES, known, labels_of, of_spec, shapes, to_model
from nextvit_exporters.coreml.program import Operation, Package, modules_of
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.spec import InputKind, Precision
from tests import harness
from tests.exporters.coreml.built import (
    LABELS,
    SIDE,
    SPEC,
    SPECS,
    Attends,
    Classes,
    graph,
    pictures,
    saved,
    toy,
    toy_spec,
)
from tests.exporters.coreml.conversions import constants, parameters
from tests.exporters.toys import wired

LOGITS = CoreMLSpec(16, "logits")


def computing(package: Package) -> list[Operation]:
    """All operations but constants."""
    return [op for op in package.program.operations if op.kind != "const" and not op.kind.startswith("constexpr")]


def of_kind(package: Package, *kinds: str) -> list[Operation]:
    return [op for op in package.program.operations if op.kind in kinds]


@pytest.mark.parametrize("name", SPECS)
def test_every_map_and_product_leads_back_to_its_module(packages: dict[str, Package], name: str) -> None:
    package = packages[name]
    modules, layers = modules_of(package), dict(graph().named_modules())
    named = {op.outputs[0].name: modules.get(op.outputs[0].name, "") for op in computing(package)}
    for op in of_kind(package, "conv", "linear"):
        assert isinstance(layers[named[op.outputs[0].name]], nn.Conv1d | nn.Conv2d | nn.Linear), op.name
    called = [str(node.target) for node in graph().graph.nodes if node.op == "call_module"]
    maps = {target for target in called if isinstance(layers[target], nn.Conv1d | nn.Conv2d | nn.Linear)}
    assert {named[op.outputs[0].name] for op in of_kind(package, "conv", "linear")} == maps
    assert len(of_kind(package, "conv", "linear")) == len(maps) == 50
    products = [named[op.outputs[0].name] for op in of_kind(package, "matmul")]
    assert products == [f"features.{block}.e_mhsa" for block in (2, 2, 4, 4, 6, 6)]
    *softmaxes, last = (named[op.outputs[0].name] for op in of_kind(package, "softmax"))
    assert softmaxes == [f"features.{block}.e_mhsa" for block in (2, 4, 6)]
    assert last == "proj_head.0"
    relus = {named[op.outputs[0].name] for op in of_kind(package, "relu")}
    assert all(isinstance(layers[each], nn.ReLU) for each in relus)


def test_what_leads_to_a_module_has_its_numbers(packages: dict[str, Package]) -> None:
    """A wrong name would show: no two layers have the same weights."""
    package, rounded = packages["fp16"], round_constants(graph())
    modules = modules_of(package)
    for op in of_kind(package, "conv", "linear"):
        layer: Any = rounded.get_submodule(modules[op.outputs[0].name])
        found = parameters(package, op)
        assert found["weight"].dtype == np.float16
        np.testing.assert_array_equal(found["weight"].astype(np.float32), layer.weight.detach().numpy())
        if layer.bias is not None and layer.bias.detach().any():
            np.testing.assert_array_equal(found["bias"].astype(np.float32), layer.bias.detach().numpy())


@pytest.mark.parametrize("name", SPECS)
def test_no_norm_and_no_transpose_is_left(packages: dict[str, Package], name: str) -> None:
    kinds = packages[name].program.count()
    assert {"batch_norm", "transpose"}.isdisjoint(kinds)
    assert kinds["classify"] == 1
    quantized = {"quantize", "dequantize"} & kinds.keys()
    assert quantized == ({"quantize", "dequantize"} if name == "w8a8" else set())


@pytest.mark.parametrize("name", SPECS)
def test_the_picture_is_rgb_and_its_mean_is_taken_off_in_float32(packages: dict[str, Package], name: str) -> None:
    package = packages[name]
    (image,) = package.inputs
    assert (image.name, image.kind, image.color, image.shape) == ("image", "image", "RGB", (1, 3, 64, 64))
    (first,) = [op for op in computing(package) if ("image",) in op.inputs.values()]
    assert (first.kind, first.outputs[0].type.dtype) == ("add", "float32")
    bias = parameters(package, first)["y"]
    assert bias.dtype == np.float32
    expected = -255 * np.array(SPEC.preprocessing.mean, np.float64)
    np.testing.assert_array_equal(bias.reshape(-1), expected.astype(np.float32))
    assert not of_kind(package, "mul"), "the deviation is in the first convolution"


def test_float16_begins_behind_the_mean_and_ends_at_the_probabilities(packages: dict[str, Package]) -> None:
    kinds = [(op.kind, op.outputs[0].type.dtype) for op in computing(packages["fp16"])]
    assert kinds[:2] == [("add", "float32"), ("cast", "float16")]
    assert kinds[-2:] == [("cast", "float32"), ("classify", "string")]
    assert {dtype for _, dtype in kinds[2:-2]} == {"float16"}


@pytest.mark.parametrize("name", SPECS)
def test_labels_keep_their_order(packages: dict[str, Package], name: str) -> None:
    package = packages[name]
    assert package.labels == LABELS
    with MilReference(package, "emulated") as executor:
        for picture in pictures():
            found = executor.run({"image": picture[None]})
            assert executor.labels_of_last_run == (LABELS[int(found["probabilities"].argmax())],)
            assert abs(float(found["probabilities"].sum()) - 1) < 1e-2


def test_probabilities_follow_pytorch_in_order(packages: dict[str, Package]) -> None:
    pixels = torch.from_numpy(pictures()).permute(0, 3, 1, 2).double()
    expected = g.execute(graph(), pixels)[0].softmax(-1).numpy()
    with MilReference(packages["fp16"], "exact") as executor:
        found = np.concatenate([executor.run({"image": each[None]})["probabilities"] for each in pictures()])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_array_equal(found.argsort(1)[:, -3:], expected.argsort(1)[:, -3:])


def test_labels_are_numbered_where_there_are_none() -> None:
    assert labels_of(SPEC) == LABELS
    assert labels_of(replace(SPEC, labels=(), num_classes=3)) == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    "asked",
    [
        CoreMLSpec(16, "logits", flexible=(SIDE, 65)),
        CoreMLSpec(16, "logits", sizes=((48, 40), (64, 64))),
        CoreMLSpec(18, "logits", flexible=(SIDE, 65)),
    ],
)
def test_sizes_are_never_computed_in_float16(asked: CoreMLSpec, tmp_path: Path) -> None:
    """Beyond 2048 it has no odd numbers: 224 x 224 pixels would be 50176 or 50208."""
    made = toy(Attends())
    package = saved(toy_spec(asked), made, tmp_path)
    whole = [op for op in computing(package) if len(op.outputs[0].type.shape) < 3]
    assert {op.kind for op in whole} & {"shape", "gather", "floor_div"}
    assert {op.outputs[0].type.dtype for op in whole} <= {"int32", "int16", "uint16", "float32"}
    images = [op for op in computing(package) if len(op.outputs[0].type.shape) >= 3]
    kinds = {op.kind for op in images if op.outputs[0].type.dtype == "float16"}
    assert {"conv", "relu", "matmul", "softmax", "reshape", "add"} <= kinds
    assert {op.kind for op in images if op.outputs[0].type.dtype == "float32"} == {"cast"}
    sizes = [(SIDE, SIDE), *asked.sizes] if asked.sizes else [(32, 32), (33, 65), (49, 32), (65, 65)]
    with MilReference(package, "exact") as executor:
        for height, width in sizes:
            image = harness.images(1, 3, height, width, seed=height)
            (expected,) = g.execute(round_constants(made), image)
            found = executor.run({"image": image.numpy()})["logits"]
            assert harness.relative_error(torch.from_numpy(found), expected) < 1e-5
        with pytest.raises(UnsupportedSpec):
            executor.run({"image": np.ones((1, 3, 31, 32), np.float32)})


def test_the_sizes_that_are_enumerated(tmp_path: Path) -> None:
    asked = CoreMLSpec(16, "logits", sizes=((48, 40), (SIDE, SIDE), (48, 40)))
    assert shapes(toy_spec(asked)) == ((1, 3, SIDE, SIDE), (1, 3, 48, 40))
    (image,) = saved(toy_spec(asked), toy(Attends()), tmp_path).inputs
    assert (image.shape, set(image.allowed)) == ((1, 3, SIDE, SIDE), {(1, 3, SIDE, SIDE), (1, 3, 48, 40)})


def test_what_is_kept_is_float32_and_nothing_else_is(tmp_path: Path) -> None:
    made = toy(Attends())
    kept = CoreMLSpec(16, "logits", keep_fp32=("k", "add"))
    package = saved(toy_spec(kept), made, tmp_path)
    modules = modules_of(package)
    single = [op for op in computing(package) if op.outputs[0].type.dtype == "float32" and op.kind != "cast"]
    assert [op.kind for op in single] == ["conv", "add"]
    assert modules[single[0].outputs[0].name] == "k"
    conv = single[0]
    layer: Any = made.get_submodule("k")
    weight = parameters(package, conv)["weight"]
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, layer.weight.detach().float().numpy())
    for op in of_kind(package, "conv"):
        if op is not conv:
            assert parameters(package, op)["weight"].dtype == np.float16
    image = harness.images(1, 3, SIDE, SIDE, seed=2)
    (expected,) = g.execute(to_coreml.lower(toy_spec(kept), made), image)
    with MilReference(package, "exact") as executor:
        found = torch.from_numpy(executor.run({"image": image.numpy()})["logits"])
    assert harness.relative_error(found, expected) < 1e-5


def test_float32_packages_hold_no_float16(tmp_path: Path) -> None:
    spec = replace(toy_spec(LOGITS), precision=Precision.FP32)
    package = saved(spec, toy(Attends()), tmp_path)
    assert {op.outputs[0].type.dtype for op in computing(package)} == {"float32"}
    assert {each.type.dtype for each in constants(package).values()}.isdisjoint({"float16"})


def test_the_heads_have_their_names(tmp_path: Path) -> None:
    def four(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        maps = [m.conv(x)]
        maps += [torch.relu(maps[-1]), maps[-1] * 2, maps[-1] + 1]
        return tuple(maps)

    folders = [tmp_path / each for each in ("features", "logits", "classify")]
    for folder in folders:
        folder.mkdir()
    features = saved(toy_spec(CoreMLSpec(16, "features")), toy(wired(four, conv=nn.Conv2d(3, 4, 1))), folders[0])
    assert [each.name for each in features.outputs] == ["stage1", "stage2", "stage3", "stage4"]
    logits = saved(toy_spec(LOGITS, batch=2), toy(Classes()), folders[1])
    assert [(each.name, each.shape) for each in logits.outputs] == [("logits", (2, 3))]
    classes = saved(toy_spec(CoreMLSpec(16)), toy(Classes()), folders[2])
    assert [(each.name, each.kind) for each in classes.outputs] == [
        ("classLabel", "string"),
        ("classLabel_probs", "dictionary"),
    ]
    assert classes.labels == ("class 0", "class 1", "class 2")


def test_names_that_coremltools_appended_to() -> None:
    names = {"a": "one", "a_to_fp16_b": "two"}
    assert [known(f"a{suffix}", names) for suffix in SUFFIXES] == ["one"] * len(SUFFIXES)
    assert known("a_to_fp16_cast_fp16", names) == "one"
    assert known("a_to_fp16_b_cast_fp16", names) == "two"
    assert known("cast_1", names) is None
    assert known("b_to_fp16", names) is None


def test_a_picture_without_its_mean_is_refused() -> None:
    with pytest.raises(UnsupportedSpec, match="so a picture can't be read; ask for --input tensor"):
        to_model(replace(toy_spec(LOGITS), input=InputKind.IMAGE), g.cast(toy(Classes()), torch.float32))


def test_a_spec_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedSpec, match="the spec asks for no Core ML package"):
        of_spec(replace(SPEC, coreml=None))


def test_what_coremltools_cannot_convert_is_one_line() -> None:
    made = toy(wired(lambda m, x: torch.special.bessel_j0(m.conv(x)), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(BuildFailed, match=r"^coremltools refused the graph: .*bessel_j0") as refusal:
        to_model(toy_spec(LOGITS), g.cast(made, torch.float32))
    assert str(refusal.value).isprintable()


def test_what_torch_cannot_export_is_one_line() -> None:
    made = toy(wired(lambda m, x: m.conv(x) + torch.ones(1, 1, SIDE, SIDE), conv=nn.Conv2d(3, 4, 1)))
    with pytest.raises(BuildFailed, match=r"^torch\.export refused the graph: ") as refusal:
        to_model(toy_spec(CoreMLSpec(16, "logits", flexible=(32, 64))), g.cast(made, torch.float32))
    assert str(refusal.value).isprintable()


def test_an_interruption_that_torch_swallows_is_raised_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def swallows(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AttributeError("half imported")

    monkeypatch.setattr(convert, "_export", swallows)
    with pytest.raises(KeyboardInterrupt):
        to_model(toy_spec(CoreMLSpec(16)), g.cast(toy(Classes()), torch.float32))


def test_the_graph_is_left_as_it_is() -> None:
    made = g.cast(toy(Classes()), torch.float32)
    code, mark = made.code, g.fingerprint(made)
    to_model(toy_spec(CoreMLSpec(16)), made)
    assert (made.code, g.fingerprint(made)) == (code, mark)
