"""What INT8 costs and saves on a T4, estimated from a Q/DQ file: counted by hand, and monotonic where it must be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

from nextvit_exporters import graph as g
from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.tensorrt.int8_advice import DOUBTFUL, GO, NO_GO, advise
from nextvit_exporters.tensorrt.int8_cost import BANDWIDTH, HALF, INT8, LABEL, LEAST, Int8Cost, estimate
from tests.exporters.exports import NANO, Export, probe

HALVES, SINGLES, WHOLE = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8


@dataclass(slots=True)
class Net:
    """A graph that grows by one operation at a time; tensors are (N, C, H, W)."""

    shape: tuple[int | str, ...]
    kind: int = HALVES
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in {each.name for each in self.constants}:
            self.constants.append(numpy_helper.from_array(values, name))
        return name

    def op(self, kind: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}.{kind}"], f"{name}/{kind}", **attributes))
        return f"{name}.{kind}"

    def steps(self, tensor: str, scale: str = "step", size: float = 0.1) -> str:
        """``tensor`` quantized and dequantized, once under each name of a scale."""
        made = f"{tensor}.{scale}.read"
        if not any(made in node.output for node in self.nodes):
            dtype = helper.tensor_dtype_to_np_dtype(self.kind)
            ends = self.constant(scale, np.array(size, dtype)), self.constant("zero", np.zeros((), np.int8))
            self.nodes.append(helper.make_node("QuantizeLinear", [tensor, *ends], [f"{made}.q"]))
            self.nodes.append(helper.make_node("DequantizeLinear", [f"{made}.q", *ends], [made]))
        return made

    def conv(
        self, name: str, tensor: str, channels: tuple[int, int], *, int8: bool, size: int = 1, groups: int = 1
    ) -> str:
        """A convolution without a bias; in INT8 its weights are stored as int8, and ``tensor`` must be on steps."""
        dtype = helper.tensor_dtype_to_np_dtype(self.kind)
        weights = np.zeros((channels[1], channels[0] // groups, size, size), np.int8 if int8 else dtype)
        read = self.constant(f"{name}.weight", weights)
        if int8:
            scale = self.constant(f"{name}.scale", np.full(channels[1], 0.1, dtype))
            zero = self.constant(f"{name}.zero", np.zeros(channels[1], np.int8))
            self.nodes.append(helper.make_node("DequantizeLinear", [read, scale, zero], [f"{name}.w"], axis=0))
            read = f"{name}.w"
        return self.op("Conv", name, [tensor, read], group=groups, pads=[size // 2] * 4)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", self.kind, self.shape)],
            [helper.make_tensor_value_info(each, self.kind, None) for each in outputs],
            self.constants,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        made = onnx.shape_inference.infer_shapes(made, strict_mode=True)
        onnx.checker.check_model(made, full_check=True)
        return made

    def cost(self, *outputs: str) -> Int8Cost:
        return estimate(self.model(*outputs))


def total(cost: Int8Cost, case: str) -> tuple[float, float]:
    (found,) = (each for each in cost.totals if each.case == case)
    return found.fp16_us, found.int8_us


def chain(*, int8: bool, side: int = 256, groups: int = 1, channels: int = 64, size: int = 1, depth: int = 6) -> Net:
    """Convolutions and ReLUs in a row; the last result is ``depth - 1``'s."""
    net, tensor = Net((1, channels, side, side)), "x"
    for index in range(depth):
        read = net.steps(tensor, f"step{index}") if int8 else tensor
        tensor = net.conv(f"m{index}", read, (channels, channels), int8=int8, size=size, groups=groups)
        tensor = net.op("Relu", f"m{index}", [tensor])
    return net


def test_one_convolution_by_hand() -> None:
    """64 to 128 channels, 3 by 3, at 2 x 32 x 32 positions."""
    net = Net((2, 64, 32, 32))
    out = net.op("Relu", "m", [net.conv("m", net.steps("x"), (64, 128), int8=True, size=3)])
    cost = net.cost(out)
    (layer,) = cost.layers
    macs, weights, given, made = 2 * 1024 * 128 * 64 * 9, 128 * 64 * 9, 2 * 64 * 1024, 2 * 128 * 1024
    assert (layer.module, layer.kind, layer.macs, layer.int8, layer.fused) == ("m", "Conv", macs, True, 1)
    assert (layer.groups, layer.channels) == (1, 64)
    half = max(2 * macs / HALF, 2 * (weights + given + made) / BANDWIDTH)
    whole = max(2 * macs / INT8, (weights + given + 2 * made) / BANDWIDTH)
    assert total(cost, "best") == pytest.approx((half * 1e6, whole * 1e6))
    (conversion,) = cost.conversions
    assert (conversion.kind, conversion.tensor, conversion.numbers) == ("quantize", "x", given)
    assert conversion.microseconds == pytest.approx(max(3 * given / BANDWIDTH, LEAST) * 1e6, abs=1e-3)
    expected = max(whole, LEAST) * 1e6 + conversion.microseconds
    assert total(cost, "expected") == pytest.approx((max(half, LEAST) * 1e6, expected))
    assert total(cost, "worst")[1] == pytest.approx(max(2 * macs / HALF, whole) * 1e6 + conversion.microseconds)
    assert cost.others == 0


def test_matrix_products_by_hand() -> None:
    """In FP16: (2, 7, 48) by (48, 80), and (14, 48) by (32, 48) transposed, moved about in between."""
    net = Net((2, 7, 48))
    product = net.op("MatMul", "a", ["x", net.constant("w", np.zeros((48, 80), np.float16))])
    flat = net.op("Reshape", "r", ["x", net.constant("size", np.array([14, 48]))])
    second = net.op("Gemm", "b", [flat, net.constant("v", np.zeros((32, 48), np.float16))], transB=1)
    by_name = {each.module: each for each in net.cost(product, second).layers}
    assert by_name["a"].macs == 2 * 7 * 80 * 48
    assert by_name["b"].macs == 14 * 32 * 48
    assert {each.channels for each in by_name.values()} == {48}


def test_macs_are_those_of_the_traced_graph(exported: Export) -> None:
    made = exported(NANO)
    g.measure(made.graph, probe(NANO))
    assert sum(layer.macs for layer in estimate(made.proto).layers) == g.count_macs(made.graph)


@pytest.mark.parametrize("kind", [HALVES, SINGLES])
def test_without_steps_nothing_is_int8(kind: int) -> None:
    net = Net((1, 64, 64, 64), kind)
    cost = net.cost(net.conv("m", "x", (64, 64), int8=False))
    assert (cost.recommendation, cost.conversions, cost.islands) == (NO_GO, (), ())
    assert cost.sentence == f"nothing is INT8 (0 of 1 convolutions): no-go, build FP16 ({LABEL})"
    if kind == HALVES:
        assert cost.ratio == 1
        assert cost.band == (1, 1)


def test_everything_in_int8_is_clearly_faster() -> None:
    net = chain(int8=True)
    cost = net.cost("m5.Relu")
    assert all(each.int8 and each.limit == "memory" for each in cost.layers)
    assert cost.ratio < 0.75
    assert cost.recommendation == GO
    assert cost.sentence.startswith("quantized 6 of 6 convolutions; expected 0.6")
    assert cost.sentence.endswith(f": go, build it and measure with the kit ({LABEL})")
    assert [each.tensor for each in cost.conversions] == ["x"]


def test_arithmetic_is_only_sure_at_best() -> None:
    """Where INT8's gain is in its peak, the worst case has none."""
    cost = chain(int8=True, channels=512, side=32, size=3).cost("m5.Relu")
    assert all(each.limit == "compute" for each in cost.layers)
    assert cost.band[0] == pytest.approx(0.5, abs=1e-3)
    assert 0.98 < cost.band[1] < 1.1
    assert cost.recommendation == DOUBTFUL


def test_groups_take_the_gain_away() -> None:
    """As many multiplications; with groups they are at FP16's peak, and at worst one kernel for each group."""
    whole = chain(int8=True, channels=512, side=16, size=3).cost("m5.Relu")
    grouped = chain(int8=True, channels=512, side=16, size=3, groups=16).cost("m5.Relu")
    assert {(each.groups, each.channels) for each in grouped.layers} == {(16, 32)}
    assert whole.ratio < 0.8 < grouped.ratio
    assert total(grouped, "worst")[1] > 6 * 16 * LEAST * 1e6
    assert total(grouped, "worst")[0] == total(grouped, "expected")[0]


def test_groups_have_fp16s_peak() -> None:
    """Enough arithmetic for it to count; 32 channels a group would fill a tensor core."""
    cost = chain(int8=True, channels=64, side=64, size=9, depth=1, groups=2).cost("m0.Relu")
    (layer,) = cost.layers
    assert layer.limit == "compute"
    assert layer.int8_us == layer.fp16_us


def test_a_sum_of_two_layers_joins_the_later_one() -> None:
    net = Net((1, 64, 8, 8))
    both = [net.conv(name, "x", (64, 64), int8=False) for name in ("early", "late")]
    cost = net.cost(net.op("Add", "sum", both))
    assert {each.module: each.fused for each in cost.layers} == {"early": 0, "late": 1}


def test_what_leaves_the_network_is_written() -> None:
    """A ReLU behind an output has a kernel of its own: what it reads must be in memory anyway."""
    net = Net((1, 64, 8, 8))
    made = net.conv("m", "x", (64, 64), int8=False)
    last = net.op("Relu", "m", [made])
    assert (net.cost(last).others, net.cost(made, last).others) == (0, 1)


def test_channels_that_fill_no_tensor_core() -> None:
    """Enough arithmetic for its peak to count, on 33 channels and on 32."""
    at = {size: chain(int8=True, channels=size, side=64, size=9, depth=2).cost("m1.Relu") for size in (32, 33)}
    assert {each.limit for cost in at.values() for each in cost.layers} == {"compute"}
    assert at[32].ratio < 0.75 < at[33].ratio


def residual(*, shared: bool, name: str = "step0", size: float = 0.1) -> Int8Cost:
    """x + conv(relu(conv(x))) on a tensor that an INT8 layer made; unshared, the sum reads it unquantized."""
    net = Net((1, 64, 56, 56))
    made = net.conv("stem", net.steps("x", "step"), (64, 64), int8=True)
    on_steps = net.steps(made, "step0")
    inner = net.op("Relu", "a", [net.conv("a", on_steps, (64, 64), int8=True)])
    branch = net.conv("b", net.steps(inner, "step1"), (64, 64), int8=True)
    summed = net.op("Add", "sum", [net.steps(made, name, size) if shared else made, branch])
    return net.cost(net.conv("last", net.steps(summed, "step2"), (64, 64), int8=True))


def test_a_residual_that_is_not_shared_adds_a_conversion() -> None:
    shared, apart = residual(shared=True), residual(shared=False)
    assert [each.tensor for each in shared.conversions] == ["x"]
    assert sorted(each.tensor for each in apart.conversions) == ["stem.Conv", "x"]
    assert {each.fused for each in shared.layers if each.module == "b"} == {1}, "the sum joins its branch"
    assert apart.ratio > shared.ratio
    assert total(apart, "best")[1] > total(shared, "best")[1]
    assert total(apart, "best")[0] == total(shared, "best")[0]


def test_steps_of_one_size_are_the_same_steps() -> None:
    assert residual(shared=True, name="again") == residual(shared=True)
    other = residual(shared=True, name="other", size=0.2)
    assert len([each for each in other.conversions if each.tensor == "stem.Conv"]) == 2


def test_a_layer_kept_in_floating_point_is_an_island() -> None:
    net = Net((1, 64, 56, 56))
    first = net.conv("a", net.steps("x"), (64, 64), int8=True)
    kept = net.op("Relu", "kept", [net.conv("kept", net.steps(first, "step0"), (64, 64), int8=False)])
    last = net.conv("c", net.steps(kept, "step1"), (64, 64), int8=True)
    cost = net.cost(last)
    assert [(each.kind, each.module) for each in cost.conversions if each.tensor != "x"] == [
        ("dequantize", "kept"),
        ("quantize", "kept"),
    ]
    (island,) = cost.islands
    assert (island.modules, island.kernels, island.layers) == (("kept",), 1, 1)
    assert island.macs == 64 * 64 * 56 * 56
    assert {each.module: each.int8 for each in cost.layers} == {"a": True, "kept": False, "c": True}


def test_both_factors_must_be_on_steps() -> None:
    for on_steps, int8 in ((True, False), (False, True)):
        net = Net((1, 64, 8, 8))
        cost = net.cost(net.conv("m", net.steps("x") if on_steps else "x", (64, 64), int8=int8))
        assert not cost.layers[0].int8


def test_weights_that_the_file_quantizes_itself_are_int8() -> None:
    net = Net((1, 64, 8, 8))
    weight = net.constant("w", np.zeros((64, 64, 1, 1), np.float16))
    cost = net.cost(net.op("Conv", "m", [net.steps("x"), net.steps(weight, "w.step")]))
    assert [each.int8 for each in cost.layers] == [True]
    assert [each.tensor for each in cost.conversions] == ["x"], "weights are converted when the engine is built"


def test_what_only_moves_numbers_is_passed_over() -> None:
    net = Net((2, 7, 64))
    moved = net.op("Transpose", "t", [net.steps("x")], perm=[0, 2, 1])
    moved = net.op("Transpose", "u", [moved], perm=[0, 2, 1])
    weight = net.constant("w", np.zeros((64, 64), np.float16))
    cost = net.cost(net.op("MatMul", "m", [moved, net.steps(weight, "w.step")]))
    assert [(each.kind, each.int8) for each in cost.layers] == [("MatMul", True)]
    assert cost.others == 0


def test_open_axes_are_told_and_may_be_given() -> None:
    net = Net(("batch", 32, "height", "width"))
    model = net.model(net.conv("m", net.steps("x"), (32, 32), int8=True))
    cost = estimate(model)
    assert cost.layers[0].macs == 32 * 32 * 224 * 224
    assert cost.notes[1:] == ("the file leaves axes open; taken as batch=1, height=224, width=224",)
    given = estimate(model, {"x": (8, 32, 64, 96)})
    assert given.layers[0].macs == 8 * 32 * 32 * 64 * 96
    assert len(given.notes) == 1
    with pytest.raises(BuildFailed, match="x has 4 axes, and 2 sizes are given"):
        estimate(model, {"x": (8, 32)})
    with pytest.raises(BuildFailed, match=r"x is \['batch', 32, 'height', 'width'\] in the file"):
        estimate(model, {"x": (8, 16, 64, 64)})


def test_json_reads_back_what_was_said() -> None:
    cost = residual(shared=False)
    told = cost.as_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["basis"], told["sentence"], told["recommendation"]) == ("estimate", cost.sentence, cost.recommendation)
    inner = told["estimate"]
    assert isinstance(inner, dict)
    assert (inner["ratio"], inner["band"]) == (cost.ratio, list(cost.band))
    assert len(inner["layers"]) == 4
    assert "T4" in inner["sources"]
    assert any("TensorRT-RTX" in note for note in cost.notes)


class Noise(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
    def __init__(self) -> None:
        self.left = [np.random.default_rng(0).standard_normal((1, 8, 6, 6)).astype(np.float32)]

    def get_next(self) -> dict[str, Any] | None:
        return {"x": self.left.pop()} if self.left else None


def test_files_of_another_tool(tmp_path: Path) -> None:
    """ONNX Runtime's own defaults: uint8, results quantized as well, int32 biases, nodes without modules."""
    net = Net((1, 8, 6, 6), SINGLES)
    tensor = net.conv("a", "x", (8, 8), int8=False, size=3)
    pooled = net.op("GlobalAveragePool", "pool", [net.op("Relu", "act", [tensor])])
    bias = net.constant("b", np.zeros(8, np.float32))
    out = net.op("Conv", "b", [pooled, net.constant("v", np.ones((8, 8, 1, 1), np.float32)), bias])
    onnx.save(net.model(out), str(tmp_path / "float.onnx"))
    quantize_static(str(tmp_path / "float.onnx"), str(tmp_path / "q.onnx"), Noise(), quant_format=QuantFormat.QDQ)
    model = onnx.load(str(tmp_path / "q.onnx"))
    for node in model.graph.node:
        node.name = ""
    cost = estimate(model)
    assert [each.int8 for each in cost.layers] == [True, True]
    assert len(cost.conversions) > 2


def shapeless(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "Mystery", "elsewhere"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))


def too_few(model: onnx.ModelProto) -> None:
    del model.graph.node[-1].input[1:]


def no_axes(model: onnx.ModelProto) -> None:
    (weight,) = (each for each in model.graph.initializer if each.name == "m.weight")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((), np.float16), "m.weight"))


def branching(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node[-1].attribute.append(helper.make_attribute("body", inner))


@pytest.mark.parametrize("damage", [shapeless, too_few, no_axes, branching])
def test_files_that_can_not_be_told(damage: Callable[[onnx.ModelProto], None]) -> None:
    net = Net((1, 32, 8, 8))
    model = net.model(net.conv("m", "x", (32, 32), int8=False))
    damage(model)
    with pytest.raises(BuildFailed) as raised:
        estimate(model)
    assert "\n" not in str(raised.value)


def test_it_is_cheap() -> None:
    """A row as long as a large network, quantized throughout."""
    model = chain(int8=True, side=14, depth=150).model("m149.Relu")
    start = time.process_time()
    cost = estimate(model)
    assert time.process_time() - start < 2  # a tenth of that alone; other tests run beside it
    assert len(cost.layers) == 150


@pytest.mark.parametrize(
    ("ratio", "highest", "advice"),
    [(0.5, 0.95, GO), (0.5, 0.96, DOUBTFUL), (0.99, 1.5, DOUBTFUL), (1.0, 1.0, NO_GO), (1.2, 1.3, NO_GO)],
)
def test_the_advice_follows_from_two_thresholds(ratio: float, highest: float, advice: str) -> None:
    assert advise(ratio, highest) == advice
