"""Kernels as TensorRT tells of them, in both of its ways, and what counts as the precision asked for."""

from __future__ import annotations

import json

import pytest

from nextvit_exporters.errors import BuildFailed
from nextvit_exporters.spec import Precision
from nextvit_exporters.tensorrt.kernels import EngineReport, Kernel, KernelTensor, check_dtypes, read_log


def tensor(name: str, dtype: str, shape: str = "1,8,4,4") -> str:
    count = "0," * shape.count(",") + "0"
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [{count}], StrideOrder: [{count}], Datatype: {dtype}, "
        "Format: (NHWC) Channel major format }"
    )


def line(name: str, kind: str, inputs: str, constants: str, outputs: str, layers: str) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [{constants}], Outputs: [ {outputs}], "
        f"TacticName: tactic_{name}, StreamId: 0, Metadata: {layers}"
    )


FACTOR = tensor("one", "Float", "1")
FIRST = line(
    "first", "kgen", tensor("image", "Float"), f" {tensor('mean', 'Float', '1,3,1,1')}", tensor("a", "Half"),
    "[ONNX Layer: stem.0.conv/Cast][ONNX Layer: stem.0.conv/Conv]",
)  # fmt: skip
MIDDLE = line(
    "stem.0.conv/Conv", "correlation", tensor("a", "Half"), f" {tensor('w', 'Half', '8,8,3,3')}, {FACTOR}",
    tensor("b", "Half"), "[ONNX Layer: stem.0.conv/Conv][ONNX Layer: stem.0.act/Relu]",
)  # fmt: skip
LAST = line("last", "kgen", tensor("b", "Half"), "", tensor("logits", "Float", "1,10"), "[ONNX Layer: Add]")
HEAD = [
    "INFO Max Scratch Memory: 5 bytes",
    "INFO Total Activation Memory: 7 bytes",
    "INFO Total Weights Memory: 9 bytes",
]
TAIL = [
    "",
    "I/O Tensors:",
    " Name: image, IOMode: Input, DataType: Float",
    " Name: logits, IOMode: Output, DataType: Float",
]


def report(*kernels: str) -> EngineReport:
    return read_log([*HEAD, "VERBOSE Layers:", *kernels, *TAIL])


def test_the_log_is_read() -> None:
    found = report(FIRST, MIDDLE, LAST)
    assert (found.activation, found.weights, found.scratch) == (7, 9, 5)
    assert found.edges == {"image", "logits"}
    assert found.count() == {"kgen": 2, "correlation": 1}
    middle = found.kernels[1]
    assert middle == Kernel(
        name="stem.0.conv/Conv",
        kind="correlation",
        inputs=(KernelTensor("a", (1, 8, 4, 4), "Half"),),
        constants=(KernelTensor("w", (8, 8, 3, 3), "Half"), KernelTensor("one", (1,), "Float")),
        outputs=(KernelTensor("b", (1, 8, 4, 4), "Half"),),
        tactic="tactic_stem.0.conv/Conv",
        layers=("stem.0.conv/Conv", "stem.0.act/Relu"),
    )
    assert middle.modules == ("stem.0.conv", "stem.0.act")
    assert found.kernels[2].modules == ()


def test_the_edges_and_the_factors_of_a_product_do_not_count() -> None:
    assert check_dtypes(report(FIRST, MIDDLE, LAST), Precision.FP16) == "fp16 asked, 3 of 3 computing kernels in fp16"


@pytest.mark.parametrize("where", ["input", "constant", "output"])
def test_a_float_anywhere_else_does(where: str) -> None:
    kinds = {each: "Float" if each == where else "Half" for each in ("input", "constant", "output")}
    wrong = line(
        "k", "gemm", tensor("a", kinds["input"]), f" {tensor('w', kinds['constant'], '8,8')}",
        tensor("b", kinds["output"]), "[ONNX Layer: features.2.e_mhsa.q/MatMul]",
    )  # fmt: skip
    with pytest.raises(BuildFailed) as refusal:
        check_dtypes(report(FIRST, wrong, LAST), Precision.FP16)
    assert str(refusal.value) == (
        "fp16 asked, 2 of 3 computing kernels in fp16; the first other one is k (features.2.e_mhsa.q) in fp16, fp32"
    )


def test_fp32_means_all_and_int8_means_some() -> None:
    with pytest.raises(BuildFailed, match="fp32 asked, 0 of 3 computing kernels in fp32"):
        check_dtypes(report(FIRST, MIDDLE, LAST), Precision.FP32)
    with pytest.raises(BuildFailed, match=r"int8 asked, 0 of 3 computing kernels in int8$"):
        check_dtypes(report(FIRST, MIDDLE, LAST), Precision.INT8)
    quantized = line("q", "gemm", tensor("a", "Int8"), "", tensor("b", "Half"), "")
    assert (
        check_dtypes(report(FIRST, quantized, LAST), Precision.INT8) == "int8 asked, 1 of 3 computing kernels in int8"
    )
    assert report(FIRST, quantized, LAST).dtypes() == "2 kernels in fp16, 1 kernels in fp16/int8"
    single = line("s", "gemm", tensor("image", "Float"), "", tensor("c", "Float"), "")
    assert check_dtypes(report(single), Precision.FP32) == "fp32 asked, 1 of 1 computing kernels in fp32"


@pytest.mark.parametrize("how", ["Datatype", "Format/Datatype", "Format", "words"])
def test_the_inspector_says_the_same(how: str) -> None:
    """TensorRT's own JSON, of which versions spell the type differently."""
    words = {"Half": "Row major linear FP16 format", "Float": "Row major linear FP32 format"}

    def described(name: str, dtype: str, shape: list[int]) -> dict[str, object]:
        typed = {"Format/Datatype": words[dtype]} if how == "words" else {how: dtype}
        return {"Name": name, "Location": "Device", "Dimensions": shape, **typed}

    def layer(name: str, source: tuple[str, str], target: tuple[str, str], metadata: str) -> dict[str, object]:
        return {
            "Name": name,
            "LayerType": "CaskConvolution",
            "Inputs": [described(*source, [1, 8])],
            "Outputs": [described(*target, [1, 8])],
            "TacticName": "sm75_xmma",
            "Metadata": metadata,
        }

    told = {
        "Layers": [
            layer("first", ("image", "Float"), ("a", "Half"), "[ONNX Layer: stem.0.conv/Conv]\x1e[ONNX Layer: x/Relu]"),
            layer("last", ("a", "Half"), ("logits", "Float"), ""),
        ],
        "Bindings": ["image", "logits [profile 1]"],
    }
    found = read_log([*HEAD, f"INFO {json.dumps(told)}"])
    assert found.edges == {"image", "logits"}
    assert found.kernels[0].modules == ("stem.0.conv", "x")
    assert found.kernels[0].tactic == "sm75_xmma"
    assert check_dtypes(found, Precision.FP16) == "fp16 asked, 2 of 2 computing kernels in fp16"


@pytest.mark.parametrize("words", ["Row major linear BF16 format", "a format of tomorrow", "kLINEAR"])
def test_a_type_that_is_not_the_one_asked_for_counts(words: str) -> None:
    """Also one that can't be read: what isn't known is not passed over."""
    tensors = [{"Name": "a", "Dimensions": [1], "Format/Datatype": "Half"}]
    other = [{"Name": "b", "Dimensions": [1], "Format/Datatype": words}]
    layers = [{"Name": "k", "Inputs": tensors, "Outputs": tensors}, {"Name": "l", "Inputs": other, "Outputs": other}]
    report = read_log([f"INFO {json.dumps({'Layers': layers})}"])
    with pytest.raises(BuildFailed, match="fp16 asked, 1 of 2 computing kernels in fp16; the first other one is l"):
        check_dtypes(report, Precision.FP16)


@pytest.mark.parametrize("lines", [[], HEAD, ['INFO {broken "Layers"', "Layers:"], ['INFO {"Layers": 3}']])
def test_a_log_without_layers_is_one_line(lines: list[str]) -> None:
    with pytest.raises(BuildFailed, match="lists no layers"):
        read_log(lines)
