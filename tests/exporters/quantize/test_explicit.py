"""Q/DQ in ONNX graphs written by hand: every form of a map, and pairs that move to where a tensor was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nextvit_exporters.errors import BuildFailed, InvariantError
from nextvit_exporters.quantize.explicit import quantize_onnx
from nextvit_exporters.quantize.quantized import MapSteps
from nextvit_exporters.quantize.read_back import int8_nodes, steps_of

make = helper.make_node
KINDS: Final = pytest.mark.parametrize("kind", [np.float16, np.float32], ids=["fp16", "fp32"])
Kind = type[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Form:
    """One way of writing a map: its node, its weight's shape in the file, and where output channels are in it."""

    node: onnx.NodeProto
    weight: tuple[int, ...]
    axis: int
    reads: tuple[int, ...]


FORMS: Final = {
    "conv": Form(make("Conv", ["x", "w", "b"], ["y"], "m/Conv", pads=[1] * 4), (6, 4, 3, 3), 0, (2, 4, 5, 5)),
    "grouped": Form(make("Conv", ["x", "w", "b"], ["y"], "m/Conv", group=2), (6, 2, 1, 1), 0, (2, 4, 5, 5)),
    "conv1d": Form(make("Conv", ["x", "w", "b"], ["y"], "m/Conv"), (6, 4, 1), 0, (2, 4, 5)),
    "gemm": Form(make("Gemm", ["x", "w", "b"], ["y"], "m/Gemm"), (4, 6), 1, (3, 4)),
    "gemm, turned": Form(make("Gemm", ["x", "w", "b"], ["y"], "m/Gemm", transB=1), (6, 4), 0, (3, 4)),
    "gemm, not turned": Form(make("Gemm", ["x", "w", "b"], ["y"], "m/Gemm", transB=0), (4, 6), 1, (3, 4)),
    "matmul": Form(make("MatMul", ["x", "w"], ["y"], "m/MatMul"), (4, 6), 1, (2, 3, 4)),
}


def steps(channels: int, inner: int, kind: Kind, seed: int = 0) -> MapSteps:
    """Random whole numbers, every one from -127 to 127 among them where there is room, and steps of all sizes."""
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (channels, inner)).astype(np.int8)
    codes[:, 0] = 127
    sizes = (10.0 ** random.uniform(-4, -1, channels)).astype(kind)
    return MapSteps(float(kind(0.037)), sizes.astype(np.float64), codes)


def products(of: MapSteps, kind: Kind) -> NDArray[np.floating[Any]]:
    """W' as the graph holds it: rounded to its own type, so no longer on the steps exactly."""
    return (of.codes * of.weights[:, None]).astype(kind)


def graph_of(
    nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], shape: tuple[int, ...], kind: Kind
) -> onnx.ModelProto:
    of_kind = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("x", of_kind, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], of_kind, None)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def single(form: Form, of: MapSteps, kind: Kind) -> onnx.ModelProto:
    """A ReLU, so that the map's input is no input of the graph, and the map."""
    shape = (form.weight[form.axis], *(size for axis, size in enumerate(form.weight) if axis != form.axis))
    weight = np.moveaxis(products(of, kind).reshape(shape), 0, form.axis)
    node = onnx.NodeProto()
    node.CopyFrom(form.node)
    node.input[0] = "r"
    bias = np.linspace(-1, 1, 6).astype(kind)
    return graph_of([make("Relu", ["x"], ["r"], "act/Relu"), node], {"w": weight, "b": bias}, form.reads, kind)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    found: onnx.NodeProto
    (found,) = [node for node in model.graph.node if tensor in node.output]
    return found


def assert_in_order(model: onnx.ModelProto) -> None:
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        assert known.issuperset(node.input), node.name
        known.update(node.output)
    onnx.checker.check_model(model, full_check=True)


@KINDS
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_map(name: str, kind: Kind) -> None:
    form = FORMS[name]
    of = steps(6, int(np.prod(form.weight)) // 6, kind)
    made = quantize_onnx(single(form, of, kind), {"m": of})
    assert_in_order(made)
    assert kinds(made).count("QuantizeLinear") == 1
    assert kinds(made).count("DequantizeLinear") == 2
    assert int8_nodes(made) == ((form.node.name,), 1)
    (found,) = steps_of(made).values()
    assert found.activation == of.activation
    assert np.array_equal(found.weights, of.weights)
    assert np.array_equal(found.codes, of.codes), "whole numbers come back from products that were rounded"
    constants = {tensor.name: tensor for tensor in made.graph.initializer}
    (node,) = [node for node in made.graph.node if node.name == form.node.name]
    assert maker(made, node.input[0]).op_type == maker(made, node.input[1]).op_type == "DequantizeLinear"
    assert list(node.input[2:]) == list(form.node.input[2:]), "the bias stays as it was"
    assert list(node.output) == ["y"] == [made.graph.output[0].name], "so does the result"
    dequantize = maker(made, node.input[1])
    (axis,) = [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"]
    assert axis % len(form.weight) == form.axis
    codes, scale, zero = (numpy_helper.to_array(constants[each]) for each in dequantize.input)
    assert (codes.dtype, scale.dtype) == (np.dtype(np.int8), np.dtype(kind))
    assert (codes.shape, scale.shape) == (form.weight, (6,))
    assert zero.dtype == np.int8
    assert not zero.any()


def chain(kind: Kind) -> tuple[onnx.ModelProto, dict[str, MapSteps]]:
    """One tensor, read by a convolution, by two products of its tokens, and by a sum."""
    maps = {name: steps(4, 4, kind, seed) for seed, name in enumerate(("c", "q", "k"))}
    weights = {name: products(of, kind) for name, of in maps.items()}
    constants = {
        "wc": weights["c"].reshape(4, 4, 1, 1),
        "wq": weights["q"].T.copy(),
        "wk": weights["k"].T.copy(),
        "tokens": np.array([1, 4, 9]),
        "back": np.array([1, 4, 3, 3]),
    }
    nodes = [
        make("Relu", ["x"], ["r"], "act/Relu"),
        make("Reshape", ["r", "tokens"], ["r2"], "tokens/Reshape"),
        make("Transpose", ["r2"], ["t"], "tokens/Transpose", perm=[0, 2, 1]),
        make("MatMul", ["t", "wq"], ["q"], "q/MatMul"),
        make("MatMul", ["t", "wk"], ["k"], "k/MatMul"),
        make("Conv", ["r", "wc"], ["c"], "c/Conv"),
        make("Add", ["r", "c"], ["s"], "sum/Add"),
        make("Mul", ["q", "k"], ["qk"], "product/Mul"),
        make("Transpose", ["qk"], ["qkt"], "back/Transpose", perm=[0, 2, 1]),
        make("Reshape", ["qkt", "back"], ["qkr"], "back/Reshape"),
        make("Add", ["s", "qkr"], ["y"], "sum/Add_2"),
    ]
    return graph_of(nodes, constants, (1, 4, 3, 3), kind), maps


@KINDS
def test_pairs_move_to_where_a_tensor_was_made_and_become_one(kind: Kind) -> None:
    model, maps = chain(kind)
    made = quantize_onnx(model, maps)
    assert_in_order(made)
    (quantize,) = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert quantize.input[0] == "r"
    (dequantize,) = [node for node in made.graph.node if quantize.output[0] in node.input]
    readers = {node.name for node in made.graph.node if dequantize.output[0] in node.input}
    assert readers == {"tokens/Reshape", "c/Conv", "sum/Add"}, "everybody who reads it, and nobody else"
    assert [node.name for node in made.graph.node if "r" in node.input] == [quantize.name]
    for name in ("q/MatMul", "k/MatMul"):
        (node,) = [node for node in made.graph.node if node.name == name]
        assert node.input[0] == "t"
    found = steps_of(made)
    assert found.keys() == maps.keys()
    assert all(np.array_equal(found[name].codes, maps[name].codes) for name in maps)


@KINDS
@pytest.mark.parametrize("map_name", ["q", "c"])
def test_a_pair_moves_though_no_other_waits_there(map_name: str, kind: Kind) -> None:
    """The sum reads steps also where the one map in INT8 reads the tensor turned."""
    model, maps = chain(kind)
    made = quantize_onnx(model, {map_name: maps[map_name]})
    assert_in_order(made)
    (quantize,) = [node for node in made.graph.node if node.op_type == "QuantizeLinear"]
    assert quantize.input[0] == "r"
    assert [node.name for node in made.graph.node if "r" in node.input] == [quantize.name]
    assert int8_nodes(made)[1] == 3
    assert len(int8_nodes(made)[0]) == 1


@KINDS
def test_a_graph_s_own_input_is_brought_onto_steps(kind: Kind) -> None:
    form = FORMS["conv"]
    of = steps(6, 36, kind)
    model = single(form, of, kind)
    model.graph.node[1].input[0] = "x"
    del model.graph.node[0]
    made = quantize_onnx(model, {"m": of})
    assert_in_order(made)
    assert [node.input[0] for node in made.graph.node if node.op_type == "QuantizeLinear"] == ["x"]


def test_a_module_that_became_no_node_is_named() -> None:
    model, maps = chain(np.float32)
    with pytest.raises(InvariantError, match=r"^v became 0 nodes of the ONNX graph; it can't be quantized$"):
        quantize_onnx(model, {**maps, "v": maps["q"]})
    model, maps = chain(np.float32)
    model.graph.node[3].name = "c/MatMul"
    with pytest.raises(InvariantError, match=r"^c became 2 nodes of the ONNX graph"):
        quantize_onnx(model, {"c": maps["c"]})


def test_a_weight_that_is_computed_is_refused() -> None:
    model, maps = chain(np.float32)
    (node,) = [node for node in model.graph.node if node.name == "q/MatMul"]
    turned = make("Identity", ["wq"], ["wq2"], "q/Identity")
    node.input[1] = "wq2"
    model.graph.node.insert(0, turned)
    with pytest.raises(InvariantError, match=r"^q/MatMul does not read its weights from a constant$"):
        quantize_onnx(model, maps)


def test_what_the_quantizer_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("no\nindeed")

    monkeypatch.setattr("nextvit_exporters.quantize.explicit.QDQQuantizer.quantize_model", refuse)
    model, maps = chain(np.float32)
    with pytest.raises(BuildFailed, match=r"^ONNX Runtime's quantizer refused the graph: no$"):
        quantize_onnx(model, maps)


def test_weights_that_are_not_on_the_steps_told_are_found_out() -> None:
    """The quantizer rounds whatever it is given; what it made of it is held against what it was told."""
    model, maps = chain(np.float32)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "wc"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.9), "wc"))
    with pytest.raises(BuildFailed, match=r"^c has \d+ weights on other steps, the first in channel 0; export again$"):
        quantize_onnx(model, maps)


def test_maps_that_ask_one_tensor_for_two_steps_are_found_out() -> None:
    model, maps = chain(np.float32)
    other = MapSteps(2 * maps["k"].activation, maps["k"].weights, maps["k"].codes)
    with pytest.raises(BuildFailed, match=r"^[qk] reads its input in steps of 0.0\d+, not 0.0\d+; export again$"):
        quantize_onnx(model, {**maps, "k": other})


def test_types_are_those_of_the_graph() -> None:
    model, maps = chain(np.float16)
    made = quantize_onnx(model, maps)
    scales = {node.input[1] for node in made.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}}
    assert {tensor.data_type for tensor in made.graph.initializer if tensor.name in scales} == {TensorProto.FLOAT16}
