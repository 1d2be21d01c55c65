"""The executor asks of each TensorRT what that version has, in the right order, and frees all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextvit_exporters.cuda.driver import Device, Driver, NoDevice
from nextvit_exporters.errors import BuildFailed, MissingExtra, UnsupportedSpec
from nextvit_exporters.executors import tensorrt_device
from nextvit_exporters.executors.tensorrt_device import TensorRTDevice
from tests.exporters.cuda.fake_cuda import FakeGpu
from tests.exporters.cuda.fake_tensorrt import NUMPY, Net, backend_of, install, write_engine
from tests.exporters.cuda.surfaces import VERSIONS

TRT, RTX = "10.13.3.9", "1.7.1.116"
NOWHERE = Driver(None, problem="none (libcuda.so.1 is not on this machine)")
each_version = pytest.mark.parametrize("version", VERSIONS)


def images(count: int, dtype: str = "f4", size: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(seed).uniform(0, 100, (count, 3, size, size))
    return values.astype(dtype)


def device(folder: Path, net: Net, *, graph: bool = False) -> TensorRTDevice:
    return TensorRTDevice(write_engine(folder, net.version), backend_of(net.version), "cuda-bindings", graph=graph)


@each_version
def test_it_runs_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    net = Net(version, FakeGpu())
    install(monkeypatch, net)
    with device(tmp_path, net) as running:
        assert running.name == f"{backend_of(version)} {version} on Tesla T4"
        assert running.mode == "device"
        before = len(net.gpu.journal)
        for count in (1, 4, 3, 3):
            given = images(count, seed=count)
            found = running.run({"image": given})
            assert list(found) == ["logits"]
            np.testing.assert_array_equal(found["logits"], net.scores(given))
        asked = net.gpu.journal[before:]
    size = 4 * 3 * 32 * 32 * 4
    first = ["shape 1x3x32x32", "upload 20", f"upload {size // 4}", "execute", "download 20", "synchronize"]
    assert asked[:8] == ["address image", "address logits", *first]
    assert asked[-5:] == ["upload 60", f"upload {size * 3 // 4}", "execute", "download 60", "synchronize"]
    assert net.gpu.count("allocate") == net.gpu.count("pin") == 1
    assert f"allocate {size + 256}" in net.gpu.journal
    assert f"pin {size + 256}" in net.gpu.journal
    assert freed(net.gpu)


@each_version
def test_what_it_returned_outlives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    net = Net(version, FakeGpu())
    install(monkeypatch, net)
    with device(tmp_path, net) as running:
        first = running.run({"image": images(2, seed=1)})["logits"]
        kept = first.copy()
        running.run({"image": images(2, seed=2)})
    np.testing.assert_array_equal(first, kept)


@each_version
def test_a_graph_is_captured_once_and_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    net = Net(version, FakeGpu())
    install(monkeypatch, net)
    with device(tmp_path, net, graph=True) as running:
        for seed in range(5):
            given = images(2, seed=seed)
            np.testing.assert_array_equal(running.run({"image": given})["logits"], net.scores(given))
        assert (net.gpu.count("capture"), net.gpu.count("launch"), net.gpu.count("execute")) == (1, 5, 2)
        given = images(3)
        np.testing.assert_array_equal(running.run({"image": given})["logits"], net.scores(given))
        assert (net.gpu.count("capture"), net.gpu.count("launch")) == (2, 6)
        assert net.gpu.graphs == 1  # the first shape's is gone
        captured = net.gpu.journal.index("capture")
        assert net.gpu.journal[captured - 2 : captured] == ["execute", "synchronize"]
    assert freed(net.gpu)


def test_without_a_graph_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)
    with device(tmp_path, net) as running:
        running.run({"image": images(1)})
    assert net.gpu.count("capture") == net.gpu.count("launch") == 0


def test_an_engine_that_cannot_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(RTX, FakeGpu(), capturable=False)
    install(monkeypatch, net)
    with device(tmp_path, net, graph=True) as running, pytest.raises(UnsupportedSpec, match="drop --graph"):
        running.run({"image": images(1)})
    assert freed(net.gpu)


def test_tensorrt_rtx_finishes_its_kernels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, asked in ((RTX, "context EAGER"), (TRT, "context")):
        net = Net(version, FakeGpu())
        install(monkeypatch, net)
        with device(tmp_path, net):
            assert asked in net.gpu.journal


@each_version
def test_of_several_profiles_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    small = ((1, 3, 32, 32), (1, 3, 32, 32), (2, 3, 32, 32))
    large = ((1, 3, 32, 32), (8, 3, 64, 64), (8, 3, 64, 64))
    net = Net(version, FakeGpu(), (-1, 3, -1, -1), (small, large))
    install(monkeypatch, net)
    executor = device(tmp_path, net)
    with executor as running:
        assert f"allocate {8 * 3 * 64 * 64 * 4 + 256}" in net.gpu.journal
        assert running.profiles[1].shapes["image"] == large
        for count, size in ((8, 64), (1, 32), (2, 32), (1, 33)):
            given = images(count, size=size)
            np.testing.assert_array_equal(running.run({"image": given})["logits"], net.scores(given))
        assert [each for each in net.gpu.journal if each.startswith("profile")] == [
            "profile 1",
            "profile 0",
            "profile 1",
        ]
        with pytest.raises(UnsupportedSpec, match=r"doesn't take image 9x3x32x32; it takes image 1x3x32x32 to 2x3"):
            running.run({"image": images(9)})
        running.run({"image": images(8, size=64)})  # and ends in the second
    assert freed(net.gpu)
    with executor as running:  # which a new context does not begin in
        given = images(8, size=64)
        np.testing.assert_array_equal(running.run({"image": given})["logits"], net.scores(given))


@pytest.mark.parametrize(("reads", "writes"), [("HALF", "HALF"), ("UINT8", "FLOAT"), ("INT8", "INT32")])
def test_types_are_the_engine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str, writes: str) -> None:
    net = Net(TRT, FakeGpu(), (2, 3, 32, 32), reads=reads, writes=writes)
    install(monkeypatch, net)
    with device(tmp_path, net) as running:
        given = images(2, NUMPY[reads])
        found = running.run({"image": given})["logits"]
        assert found.dtype == np.dtype(NUMPY[writes])
        np.testing.assert_array_equal(found, net.scores(given))
        with pytest.raises(BuildFailed, match=r"'image' of small\.engine is \w+, not float64"):
            running.run({"image": given.astype(np.float64)})
        with pytest.raises(BuildFailed, match=r"small\.engine reads image, not picture"):
            running.run({"picture": given})


@pytest.mark.parametrize("kind", ["FLOAT", "HALF"])
def test_what_the_engine_does_not_write_is_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    net = Net(TRT, FakeGpu(), writes=kind)
    install(monkeypatch, net)
    with device(tmp_path, net) as running:
        assert np.isfinite(running.run({"image": images(2)})["logits"]).all()
        net.silent = True
        assert np.isnan(running.run({"image": images(2)})["logits"]).all()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"reads": "BF16"}, "'image' is BF16, which can't be filled here"),
        ({"location": "HOST"}, "'image' is a shape, which has to lie in host memory"),
        ({"layout": "CHW4"}, "'image' is not stored row by row"),
    ],
)
def test_tensors_that_cannot_be_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, str], says: str
) -> None:
    net = Net(TRT, FakeGpu(), **broken)  # type: ignore[arg-type]  # fields by name
    install(monkeypatch, net)
    with pytest.raises(UnsupportedSpec, match=says), device(tmp_path, net):
        pass
    assert freed(net.gpu)


@pytest.mark.parametrize("step", ["allocate", "pin", "context", "runtime"])
def test_what_fails_on_the_way_in_frees_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    net = Net(TRT, FakeGpu(fails={step}))
    install(monkeypatch, net)
    with pytest.raises(BuildFailed, match=f"CUDA fails: {step}"), device(tmp_path, net):
        pass
    assert freed(net.gpu)


@pytest.mark.parametrize("step", ["upload", "execute", "download", "synchronize", "address", "shape"])
def test_what_fails_while_it_runs_frees_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)
    with pytest.raises(BuildFailed, match=f"CUDA fails: {step}"), device(tmp_path, net) as running:
        net.gpu.fails.add(step)
        running.run({"image": images(1)})
    assert freed(net.gpu)


@pytest.mark.parametrize("step", ["execute", "address", "shape", "profile"])
def test_what_tensorrt_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    best = ((1, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))
    net = Net(TRT, FakeGpu(), ranges=(best, best), refuses=frozenset({step}))
    install(monkeypatch, net)
    with pytest.raises(BuildFailed, match="TensorRT refuses "), device(tmp_path, net) as running:
        running.run({"image": images(1)})
    assert freed(net.gpu)


def test_an_engine_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu(), loads=False)
    install(monkeypatch, net)
    with pytest.raises(BuildFailed, match=r"can't load small\.engine: the plan is broken$"), device(tmp_path, net):
        pass
    assert freed(net.gpu)


def test_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(RTX, FakeGpu(), contexts=False)
    install(monkeypatch, net)
    with pytest.raises(BuildFailed, match="makes no execution context"), device(tmp_path, net):
        pass
    assert freed(net.gpu)


def test_closed_means_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)
    executor = device(tmp_path, net)
    with pytest.raises(RuntimeError, match="with statement"):
        executor.run({"image": images(1)})
    for _ in range(2):  # and it can be opened again
        with executor as running:
            running.run({"image": images(1)})
    with pytest.raises(RuntimeError, match="with statement"):
        executor.run({"image": images(1)})
    assert net.gpu.count("allocate") == net.gpu.count("freed") == 2


@each_version
def test_without_a_driver_the_runtime_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    net = Net(version, FakeGpu())
    install(monkeypatch, net, NOWHERE)
    executor = device(tmp_path, net)
    assert executor.name == f"{backend_of(version)} {version} on no GPU"
    with pytest.raises(NoDevice, match=r"^no CUDA driver"), executor:
        pass
    assert net.gpu.journal == []


def test_the_file_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(RTX, FakeGpu())
    install(monkeypatch, net, NOWHERE)
    other = write_engine(tmp_path, "1.6.0.1")
    with pytest.raises(BuildFailed, match=r"built by tensorrt-rtx 1\.6\.0\.1, and 1\.7\.1\.116 is installed"):
        TensorRTDevice(other, "tensorrt-rtx").__enter__()
    with pytest.raises(BuildFailed, match=r"small\.engine was built by tensorrt-rtx, and tensorrt can't run it"):
        TensorRTDevice(other, "tensorrt").__enter__()
    other.write_bytes(b"no engine")
    with pytest.raises(BuildFailed, match="not a TensorRT engine"):
        TensorRTDevice(other, "tensorrt").__enter__()
    assert net.gpu.journal == []


def test_a_version_is_compared_as_far_as_both_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("10.0.1", FakeGpu())
    install(monkeypatch, net)
    with device(tmp_path, net):  # its file says 10.0.1.9
        pass
    with pytest.raises(BuildFailed, match=r"built by tensorrt 10\.13\.3\.9, and 10\.0\.1 is installed"):
        TensorRTDevice(write_engine(tmp_path, TRT), "tensorrt").__enter__()


def test_an_engine_for_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(RTX, FakeGpu())
    install(monkeypatch, net, Driver((12, 8), (Device("NVIDIA L4", (8, 9)),)))
    with pytest.raises(BuildFailed, match=r"small\.engine was built for SM75, and NVIDIA L4 is SM89; build it again"):
        device(tmp_path, net).__enter__()
    assert net.gpu.journal == []
    with TensorRTDevice(write_engine(tmp_path, RTX, bits=9), "tensorrt-rtx"):
        pass


def test_a_missing_package_is_told_where_a_gpu_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)
    executor = device(tmp_path, net)
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr(tensorrt_device, "find_spec", lambda _name: None)
    monkeypatch.setattr("nextvit_exporters.tensorrt.backends.importlib.import_module", missing)
    assert executor.name == "tensorrt (not installed) on Tesla T4"
    with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[trt\]'"), executor:
        pass
    monkeypatch.setattr(tensorrt_device, "probe_driver", lambda: NOWHERE)
    with pytest.raises(NoDevice), executor:
        pass


def missing(name: str) -> object:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def freed(gpu: FakeGpu) -> bool:
    """Whether all that was opened is closed, by the last thing that happened."""
    return gpu.journal[-1] == "freed" and not gpu.memory and not gpu.pinned and gpu.graphs == 0
