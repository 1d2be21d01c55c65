"""ONNX Runtime on whole and damaged files, and the float32 graphs that stand for FP16 ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters import to_onnx
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.executors.onnx_float import emulate, half_tensors, tensor_types, widen
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime
from nextvit_exporters.precision.read_back import check_precision, read_dtypes
from nextvit_exporters.spec import Precision
from tests.exporters.exports import NANO, Export, probe, relative_rms
from tests.exporters.test_planted_faults import array, node, put

HALF = replace(NANO, precision=Precision.FP16)
Damage = Callable[[onnx.ModelProto], None]


def graph(
    nodes: list[onnx.NodeProto],
    kinds: tuple[int, int] = (TensorProto.FLOAT, TensorProto.FLOAT),
    constants: dict[str, NDArray[np.generic]] | None = None,
) -> onnx.ModelProto:
    """A model of one input x and one output y, (4,) each."""
    x, y = (helper.make_tensor_value_info(n, kind, [4]) for n, kind in zip("xy", kinds, strict=True))
    tensors = [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()]
    model = helper.make_model(
        helper.make_graph(nodes, "test", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    return model


def run(model: onnx.ModelProto, x: NDArray[np.generic]) -> NDArray[np.generic]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def half_chain() -> onnx.ModelProto:
    """x to FP16, plus a constant, squared, and back."""
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "in", to=TensorProto.FLOAT16),
        helper.make_node("Add", ["h", "c"], ["s"], "add"),
        helper.make_node("Mul", ["s", "s"], ["p"], "square"),
        helper.make_node("Cast", ["p"], ["y"], "out", to=TensorProto.FLOAT),
    ]
    return graph(nodes, constants={"c": np.array([0.1, -0.2, 30.0, 1e-4], np.float16)})


X = np.array([1.0001, 3.14159, 0.3, -7.7], np.float32)


def test_exact_keeps_the_constants_and_nothing_else_of_fp16() -> None:
    model = half_chain()
    before = model.SerializeToString()
    wide = widen(model)
    assert model.SerializeToString() == before
    assert half_tensors(wide) == set()
    constant = np.array([0.1, -0.2, 30.0, 1e-4], np.float16).astype(np.float32)
    assert np.array_equal(run(wide, X), (X + constant) ** 2)


def test_emulation_rounds_wherever_fp16_is_stored() -> None:
    model = half_chain()
    before = model.SerializeToString()
    got = run(emulate(model), X)
    assert model.SerializeToString() == before
    x, constant = X.astype(np.float16), np.array([0.1, -0.2, 30.0, 1e-4], np.float16)
    assert np.array_equal(got, ((x + constant) ** 2).astype(np.float32))
    assert not np.array_equal(got, run(widen(model), X))


def test_emulation_overflows_as_fp16_does() -> None:
    large = np.array([0, 0, 0, 300], np.float32)
    assert np.isinf(run(emulate(half_chain()), large)).tolist() == [False, False, False, True]
    assert np.isfinite(run(widen(half_chain()), large)).all()


def test_an_fp16_output_that_is_also_read_is_rounded_once_and_for_all() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("Add", ["r", "r"], ["y"], "add"),
    ]
    model = graph(nodes, (TensorProto.FLOAT16, TensorProto.FLOAT16))
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT16, [4]))
    stand_in = emulate(model)
    assert {value.type.tensor_type.elem_type for value in stand_in.graph.output} == {TensorProto.FLOAT}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(stand_in.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, r = session.run(None, {"x": X})
    rounded = np.maximum(X, 0).astype(np.float16).astype(np.float32)
    assert np.array_equal(r, rounded)
    assert np.array_equal(y, 2 * rounded)


def test_constants_inside_nodes_are_widened() -> None:
    value = numpy_helper.from_array(np.array([0.1, 0.2, 0.3, 0.4], np.float16))
    fill = numpy_helper.from_array(np.array([0.7], np.float16))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "in", to=TensorProto.FLOAT16),
        helper.make_node("Constant", [], ["c"], "constant", value=value),
        helper.make_node("Shape", ["x"], ["n"], "shape"),
        helper.make_node("ConstantOfShape", ["n"], ["f"], "fill", value=fill),
        helper.make_node("Add", ["h", "c"], ["s"], "add"),
        helper.make_node("Add", ["s", "f"], ["t"], "add_2"),
        helper.make_node("Cast", ["t"], ["y"], "out", to=TensorProto.FLOAT),
    ]
    wide = widen(graph(nodes))
    assert half_tensors(wide) == set()
    expected = X + np.array([0.1, 0.2, 0.3, 0.4], np.float16).astype(np.float32) + np.float32(np.float16(0.7))
    assert np.allclose(run(wide, X), expected, rtol=1e-7)


@pytest.mark.parametrize("rewrite", [widen, emulate])
def test_a_subgraph_is_refused_by_name(rewrite: Callable[[onnx.ModelProto], onnx.ModelProto]) -> None:
    def branch(name: str) -> onnx.GraphProto:
        y = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])
        return helper.make_graph([helper.make_node("Identity", ["x"], [name])], name, [], [y])

    nodes = [helper.make_node("If", ["yes"], ["y"], "choice", then_branch=branch("a"), else_branch=branch("b"))]
    model = graph(nodes, constants={"yes": np.array([1], bool).reshape(())})
    with pytest.raises(BuildFailed, match=r"^If choice holds a subgraph; "):
        rewrite(model)


def test_types_come_from_inference() -> None:
    types = tensor_types(half_chain())
    assert (types["x"], types["h"], types["c"], types["p"], types["y"]) == (1, 10, 10, 10, 1)
    assert half_tensors(half_chain()) == {"h", "s", "p"}


def test_types_that_contradict_each_other_are_one_line() -> None:
    model = half_chain()
    node(model, "add").input[1] = "x"
    with pytest.raises(BuildFailed, match=r"^the ONNX file's types can't be inferred: ") as refusal:
        tensor_types(model)
    assert "\n" not in str(refusal.value)


def test_the_dtypes_are_counted() -> None:
    dtypes = read_dtypes(half_chain())
    assert dtypes.nodes == {"fp16": ("add", "square")}
    assert dtypes.count(Precision.FP16) == (2, 2)
    assert dtypes.count(Precision.FP32) == (0, 2)
    assert str(dtypes) == "2 of 2 operations in fp16"
    assert check_precision(half_chain(), Precision.FP16) == dtypes


def smuggled(kind: int) -> onnx.ModelProto:
    model = half_chain()
    node(model, "square").input[:] = ["w", "w"]
    nodes = list(model.graph.node)
    extra = [
        helper.make_node("Cast", ["s"], ["wide"], "there", to=kind),
        helper.make_node("Relu", ["wide"], ["wider"], "smuggled"),
        helper.make_node("Cast", ["wider"], ["w"], "back", to=TensorProto.FLOAT16),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:2], *extra, *nodes[2:]])
    return model


@pytest.mark.parametrize(("kind", "name"), [(TensorProto.FLOAT, "fp32"), (TensorProto.DOUBLE, "fp64")])
def test_an_operation_in_another_type_is_refused_by_name(kind: int, name: str) -> None:
    with pytest.raises(BuildFailed, match=rf"^asked for fp16, but 1 operations are not, first smuggled is {name}$"):
        check_precision(smuggled(kind), Precision.FP16)


def test_fp16_in_an_fp32_file_is_refused() -> None:
    with pytest.raises(BuildFailed, match=r"^asked for fp32, but 2 operations are not, first add is fp16$"):
        check_precision(half_chain(), Precision.FP32)


def test_only_the_input_s_mean_may_stay_in_float32() -> None:
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["d"], "centre"),
        helper.make_node("Cast", ["d"], ["h"], "in", to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("Cast", ["r"], ["y"], "out", to=TensorProto.FLOAT),
    ]
    model = graph(nodes, constants={"mean": np.array([1, 2, 3, 4], np.float32)})
    check_precision(model, Precision.FP16)
    later = graph(
        [
            *nodes[1:3],
            helper.make_node("Cast", ["r"], ["s"], "wide", to=1),
            helper.make_node("Sub", ["s", "mean"], ["y"], "late"),
        ],
        constants={"mean": np.array([1, 2, 3, 4], np.float32)},
    )
    later.graph.node[0].input[0] = "x"
    with pytest.raises(BuildFailed, match=r"first late is fp32$"):
        check_precision(later, Precision.FP16)


def test_an_executor_says_what_it_is(exported: Export) -> None:
    for mode in ("exact", "emulated"):
        executor = OnnxRuntime(exported(HALF).path, mode)
        assert executor.name == f"onnxruntime {ort.__version__} cpu"
        assert executor.mode == mode
    assert {q: e.mode for q, e in to_onnx.executors(HALF, exported(HALF).path).items()} == {
        "same network": "exact",
        "precision cost": "emulated",
    }


def test_an_executor_holds_its_session_only_inside_with(exported: Export) -> None:
    executor = OnnxRuntime(exported(NANO).path, "exact")
    inputs = {"image": exported(NANO).feed(probe(NANO)).numpy()}
    with pytest.raises(RuntimeError, match="use it in a with statement"):
        executor.run(inputs)
    with executor as entered:
        assert entered is executor
        first = executor.run(inputs)["logits"]
        session = weakref.ref(executor._session)
    gc.collect()
    assert session() is None
    with pytest.raises(RuntimeError, match="use it in a with statement"):
        executor.run(inputs)
    with executor:
        assert np.array_equal(executor.run(inputs)["logits"], first)


def test_an_error_inside_leaves_as_it_is_and_closes(exported: Export) -> None:
    executor = OnnxRuntime(exported(NANO).path, "exact")
    with pytest.raises(KeyError, match="mine"), executor:
        raise KeyError("mine")
    assert executor._session is None


def test_every_optimisation_is_off(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[object] = []
    session = ort.InferenceSession

    def watch(model: object, options: ort.SessionOptions, providers: list[str]) -> object:
        levels.append((options.graph_optimization_level, providers))
        return session(model, options, providers=providers)

    monkeypatch.setattr(ort, "InferenceSession", watch)
    with OnnxRuntime(exported(NANO).path, "exact"):
        assert levels == [(ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ["CPUExecutionProvider"])]


def test_onnx_runtime_hides_the_overflow_that_emulation_shows(exported: Export, tmp_path: Path) -> None:
    """One MLP scaled up in front of its ReLU and down behind it: the same network, too large for FP16 in between."""
    model, images = exported(HALF).proto, probe(HALF)
    up = np.float32(2.0**15)
    put(model, "features.4.mlp.conv1.weight", array(model, "features.4.mlp.conv1.weight") * up)
    put(model, "features.4.mlp.conv1.bias", array(model, "features.4.mlp.conv1.bias") * up)
    put(model, "features.4.mlp.conv2.weight", array(model, "features.4.mlp.conv2.weight") / up)
    path = tmp_path / "large.onnx"
    path.write_bytes(model.SerializeToString())
    for name in ("conv1.weight", "conv1.bias", "conv2.weight"):
        assert np.isfinite(array(model, f"features.4.mlp.{name}").astype(np.float16)).all()

    feed = {"image": exported(HALF).feed(images).numpy()}
    (naive,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)
    assert np.isfinite(naive).all()
    expected = exported(HALF).expected(images)
    assert relative_rms(exported(HALF).run(images, "exact", path), expected) < 0.1
    assert not np.isfinite(exported(HALF).run(images, "emulated", path)).all()
