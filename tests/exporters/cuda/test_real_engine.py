"""A real engine: on a machine without a driver it is refused, never crashed on; with one it is run and timed."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nextvit_deploy.bench import BenchRequest, bench
from nextvit_exporters.cuda.driver import probe_driver
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice
from nextvit_exporters.tensorrt.listening import BuildLog, logger

DRIVER = probe_driver()
WEIGHTS = np.random.default_rng(1).standard_normal((4, 3, 1, 1)).astype(np.float16)
ENTER = """
import sys
from pathlib import Path
from nextvit_exporters.cuda.driver import NoDevice
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice

executor = TensorRTDevice(Path(sys.argv[1]), "tensorrt-rtx", sys.argv[2])
print(executor.name)
try:
    executor.__enter__()
except NoDevice as error:
    print(error)
    sys.exit(4)
"""
rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


def tiny() -> bytes:
    """A 1x1 convolution in FP16 with float32 inputs and outputs, (B, 3, 8, 8) to (B, 4, 8, 8)."""
    shapes = {"image": ("batch", 3, 8, 8), "logits": ("batch", 4, 8, 8)}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "weights"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "tiny", values[:1], values[1:], [numpy_helper.from_array(WEIGHTS, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build(module: Any, folder: Path, sm: str) -> Path:
    """An engine for that compute capability, one to four images at a time."""
    listener = logger(module, BuildLog())
    builder = module.Builder(listener)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, listener)
    assert parser.parse(tiny())
    config = builder.create_builder_config()
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(getattr(module.ComputeCapability, sm), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    config.add_optimization_profile(profile)
    path = folder / "tiny.engine"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return path


@rtx
@pytest.mark.skipif(bool(DRIVER.devices), reason=f"a GPU is here: {DRIVER}")
@pytest.mark.parametrize("cuda", ["cuda-bindings", "pycuda"])
def test_without_a_driver_it_is_refused(tmp_path: Path, cuda: str) -> None:
    path = build(importlib.import_module("tensorrt_rtx"), tmp_path, "SM75")
    done = subprocess.run([sys.executable, "-c", ENTER, str(path), cuda], capture_output=True, text=True, check=False)
    assert done.returncode not in {-signal.SIGSEGV, 128 + signal.SIGSEGV}, "the runtime was touched without a driver"
    assert done.returncode == 4, done.stderr
    name, told = done.stdout.splitlines()
    assert name.endswith(" on no GPU")
    assert told.startswith("no CUDA driver with a GPU is here (")


@pytest.mark.gpu
@pytest.mark.skipif(not DRIVER.devices, reason=f"no CUDA driver with a GPU: {DRIVER}")
@pytest.mark.parametrize("cuda", ["cuda-bindings", "pycuda"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_on_a_gpu_it_is_run_and_timed(tmp_path: Path, backend: str, cuda: str) -> None:
    module = pytest.importorskip(backend.replace("-", "_"))
    pytest.importorskip(
        {"cuda-bindings": "cuda.bindings.runtime", "pycuda": "pycuda.driver"}[cuda], exc_type=ImportError
    )
    path = build(module, tmp_path, DRIVER.first().sm)
    graphs = [False, True] if cuda == "cuda-bindings" else [False]
    for graph in graphs:
        with TensorRTDevice(path, backend, cuda, graph=graph) as device:
            for count in (1, 4, 3, 3):
                image = np.random.default_rng(count).standard_normal((count, 3, 8, 8)).astype(np.float32)
                wanted = np.einsum("bchw,oc->bohw", image.astype(np.float16).astype(np.float32), WEIGHTS[:, :, 0, 0])
                found = np.asarray(device.run({"image": image})["logits"], np.float32)
                np.testing.assert_allclose(found, wanted, atol=2e-2)
        timed = bench(BenchRequest(path, cuda, graph=graph, iterations=50), lambda _: None)
        assert 0 < timed.without_transfers.p50 < timed.with_transfers.p50
        assert timed.executor.endswith(DRIVER.first().name)
