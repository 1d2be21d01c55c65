"""Real engines, built without a GPU; what TensorRT refuses, and what this builder refuses in its place."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from nextvit_exporters.engine_spec import ONE, EngineSpec, Range
from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec
from nextvit_exporters.spec import ExportSpec, Precision
from nextvit_exporters.tensorrt import backends as b
from nextvit_exporters.tensorrt.builder import BuiltEngine, build_engine, parsed
from nextvit_exporters.tensorrt.header import read_header
from nextvit_exporters.tensorrt.kernels import check_dtypes, read_log
from nextvit_models.preprocessing import Preprocessing
from tests.exporters.exports import NANO, Export
from tests.exporters.tensorrt.small_models import HALF, model

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'nextvit-deploy[trt-rtx]'")
RTX = b.BACKENDS["tensorrt-rtx"]
ENGINE = EngineSpec("tensorrt-rtx", "t4", ONE, Range.of(8), Range.of(8))
SPEC = ExportSpec("nano", 10, "tensorrt", Precision.FP16, 64, 64, 1, 20, Preprocessing(), engine=ENGINE)


def convolution(kind: int = HALF, shape: tuple[int | str, ...] = (1, 3, 8, 8)) -> bytes:
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float16 if kind == HALF else np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], "stem.0.conv/Conv", pads=[1, 1, 1, 1])
    return bytes(model([node], shape, {"w": weight}, kind).SerializeToString())


def product() -> bytes:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "q/MatMul")
    return bytes(model([node], (8, 8), {"w": np.eye(8, dtype=np.float32) + 1}).SerializeToString())


def build(data: bytes, spec: ExportSpec = SPEC, on_step: Callable[[str], None] = lambda _: None) -> BuiltEngine:
    return build_engine(RTX, b.load(RTX), data, spec, on_step)


def asked(**changes: Any) -> ExportSpec:
    return replace(SPEC, engine=replace(ENGINE, **changes))


@pytest.mark.parametrize(("name", "capability"), [("t4", (7, 5)), ("A10", (8, 6)), ("l4", (8, 9)), ("sm120", (12, 0))])
def test_the_engine_is_for_the_gpu_asked_for(tmp_path: Path, name: str, capability: tuple[int, int]) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(build(convolution(), asked(gpu=name)).data)
    header = read_header(path)
    assert (header.backend, header.capabilities) == ("tensorrt-rtx", (capability,))
    assert header.version == b.load(RTX).__version__


def test_the_same_network_gives_the_same_bytes(exported: Export, tmp_path: Path) -> None:
    """In this process, and in another that names the file differently."""
    file = exported(replace(NANO, precision=Precision.FP16, batch=1)).path
    first, second = (sha256(build(file.read_bytes()).data).hexdigest() for _ in range(2))
    code = (
        "import sys; from hashlib import sha256; from pathlib import Path\n"
        "from tests.exporters.tensorrt.test_builder import build\n"
        "print(sha256(build(Path(sys.argv[1]).read_bytes()).data).hexdigest())"
    )
    copy = tmp_path / "another.onnx"
    copy.write_bytes(file.read_bytes())
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=True, cwd=root)
    assert first == second == done.stdout.strip()


def test_what_was_built_is_read_back(exported: Export) -> None:
    report = read_log(build(exported(replace(NANO, precision=Precision.FP16, batch=1)).path.read_bytes()).log.lines())
    assert check_dtypes(report, Precision.FP16).startswith(
        f"fp16 asked, {len(report.kernels)} of {len(report.kernels)} "
    )
    assert report.edges == {"image", "logits"}
    assert report.activation is not None
    assert report.activation > 0
    modules = {module for kernel in report.kernels for module in kernel.modules}
    assert {"stem.0.conv", "features.2.e_mhsa", "proj_head.0"} <= modules


def test_float32_is_float32_and_not_tf32() -> None:
    spec = replace(asked(gpu="a10"), precision=Precision.FP32)
    report = read_log(build(convolution(TensorProto.FLOAT), spec).log.lines())
    assert check_dtypes(report, Precision.FP32).startswith("fp32 asked, ")
    with pytest.raises(BuildFailed, match="fp16 asked, 0 of "):
        check_dtypes(report, Precision.FP16)


def test_steps_are_told_and_an_interrupt_stops_the_build() -> None:
    steps: list[str] = []
    build(convolution(), SPEC, steps.append)
    assert any(step.startswith("TensorRT: ") and step.endswith(" %") for step in steps)

    class Stop(KeyboardInterrupt):
        pass

    def interrupt(step: str) -> None:
        steps.append(step)
        raise Stop

    steps.clear()
    with pytest.raises(Stop):
        build(convolution(), SPEC, interrupt)
    assert len(steps) == 1


def test_open_axes_take_the_range() -> None:
    open_batch = convolution(shape=("batch", 3, "height", "width"))
    ranged = asked(batch=Range(1, 2, 4), height=Range(8, 16, 32), width=Range.of(8))
    log = "\n".join(build(open_batch, ranged).log.lines())
    assert "MinShape: [1,3,8,8], OptShape: [2,3,16,8], MaxShape: [4,3,32,8]" in log


def test_builder_options_reach_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = b.load(RTX), list[object]()
    real = module.IBuilderConfig.set_memory_pool_limit

    def record(config: object, *given: object) -> None:
        seen.extend(given)
        real(config, *given)

    monkeypatch.setattr(module.IBuilderConfig, "set_memory_pool_limit", record)
    build(convolution(), asked(workspace=64, opt_level=2))
    assert seen == [module.MemoryPoolType.WORKSPACE, 64 << 20]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "finds no output in the file"),
        (b"hello, I am a picture", "finds no output in the file"),
        (convolution()[:-40], "TensorRT's ONNX parser refuses the file: "),
    ],
)
def test_what_the_parser_refuses_is_one_line(data: bytes, says: str) -> None:
    for how in (lambda: build(data), lambda: parsed(b.load(RTX), data).__enter__()):
        with pytest.raises(BuildFailed) as refusal:
            how()
        assert says in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_an_unknown_operation_is_named() -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], "stem.0.conv/Frobnicate", domain="com.nobody")
    made = model([node], (1, 3, 8, 8))
    made.opset_import.append(helper.make_opsetid("com.nobody", 1))
    made.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
    with pytest.raises(BuildFailed, match=r"Frobnicate stem\.0\.conv/Frobnicate: .*Plugin not found"):
        build(bytes(made.SerializeToString()))


def test_a_builder_that_builds_nothing_says_why() -> None:
    """A true one: TensorRT-RTX has no float32 matrix products for Turing."""
    with pytest.raises(
        BuildFailed, match=r"^tensorrt-rtx built nothing: .*'q/MatMul'.*FP32 GEMM is not supported"
    ) as told:
        build(product(), replace(SPEC, precision=Precision.FP32))
    assert "\n" not in str(told.value)


def test_a_range_that_does_not_fit_is_one_line() -> None:
    """The channels are fixed in the file, the range would change none of them; the height's minimum is above zero."""
    fixed_width = convolution(shape=("batch", 3, "height", 16))
    with pytest.raises(BuildFailed, match=r"Static dimension mismatch|profile"):
        build(fixed_width, asked(batch=Range(1, 1, 2), height=Range(8, 8, 8)))


def test_a_tensorrt_without_strong_typing_builds_nothing() -> None:
    """No missing feature may end in an engine of another precision."""
    weak = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(), __name__="tensorrt", __version__="9.0")
    with pytest.raises(UnsupportedSpec, match=r"tensorrt 9\.0 has no strongly typed networks"):
        build_engine(b.BACKENDS["tensorrt"], weak, convolution(), SPEC, lambda _: None)


def test_a_gpu_this_version_does_not_know() -> None:
    module = b.load(RTX)
    kept = SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("__")})
    kept.ComputeCapability, kept.__name__, kept.__version__ = SimpleNamespace(), "tensorrt_rtx", "1.4"
    with pytest.raises(UnsupportedSpec, match=r"tensorrt-rtx 1.4 can't build for Tesla T4 \(SM75\)"):
        build_engine(RTX, kept, convolution(), SPEC, lambda _: None)


@pytest.mark.parametrize(("precision", "name", "right"), [
    (Precision.FP16, "t4", True), (Precision.INT8, "t4", True), (Precision.FP32, "t4", False),
    (Precision.FP32, "a10", True), (Precision.FP16, "h100", False),
])  # fmt: skip
def test_what_a_backend_cannot_do_is_refused(precision: Precision, name: str, *, right: bool) -> None:
    if right:
        b.check_precision(RTX, b.gpu(name), precision)
        return
    with pytest.raises(UnsupportedSpec, match="choose "):
        b.check_precision(RTX, b.gpu(name), precision)


def test_names_of_gpus_and_backends() -> None:
    assert b.gpu("RTX-4090") == b.gpu("rtx4090") == b.GPUS["rtx4090"]
    assert (b.gpu("SM75").capability, b.gpu("t4").sm) == ((7, 5), "SM75")
    with pytest.raises(UnsupportedSpec, match="no GPU 'gtx1080' in the list; choose one of t4, "):
        b.gpu("gtx1080")
    with pytest.raises(UnsupportedSpec, match="no backend 'trt'; choose one of auto, tensorrt, tensorrt-rtx"):
        b.backend("trt")


def test_opsets_are_those_of_the_version() -> None:
    full = b.BACKENDS["tensorrt"]
    assert [full.newest_opset(version) for version in ("10.0.1", "11.4.0.106", "12.0")] == [20, 25, 25]


@pytest.mark.parametrize("error", [OSError("libnvinfer.so.10: no such file"), ImportError("undefined symbol: x")])
def test_a_broken_installation_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(name: str) -> Any:
        assert name == "tensorrt"
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(UnsupportedSpec, match=r"tensorrt is installed but does not load: .*; run: pip install"):
        b.load(b.BACKENDS["tensorrt"])


def test_a_missing_backend_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str) -> Any:
        if name == "tensorrt":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[trt\]'"):
        b.load(b.BACKENDS["tensorrt"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(UnsupportedSpec, match=r"tensorrt 8.6.1 is older than 10.0; run: pip install --upgrade"):
        b.load(b.BACKENDS["tensorrt"])
