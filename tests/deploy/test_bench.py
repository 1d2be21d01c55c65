"""A bench times what it says it times, on a GPU that is not there, and says so in a table and in JSON."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from nextvit_deploy.bench import BenchRequest, BenchResult, Timing, bench
from nextvit_deploy.render_bench import show_bench
from nextvit_exporters.cuda.driver import Driver, NoDevice
from nextvit_exporters.errors import BuildFailed, UnsupportedSpec
from tests.exporters.cuda.fake_cuda import Clock, FakeGpu
from tests.exporters.cuda.fake_tensorrt import Net, install, write_engine
from tests.exporters.cuda.surfaces import VERSIONS

TRT = "10.13.3.9"
THROUGH = Clock.UPLOAD + Clock.EXECUTE + Clock.DOWNLOAD


def quiet(_step: str) -> None:
    pass


def timed(folder: Path, monkeypatch: pytest.MonkeyPatch, net: Net, request: BenchRequest) -> BenchResult:
    install(monkeypatch, net)
    return bench(replace(request, engine=write_engine(folder, net.version)), quiet)


@pytest.mark.parametrize("version", VERSIONS)
def test_times_are_the_gpu_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    net = Net(version, FakeGpu())
    found = timed(tmp_path, monkeypatch, net, BenchRequest(Path(), warmup=3, iterations=10))
    assert found.without_transfers == Timing.of([Clock.EXECUTE] * 10, 2)
    assert found.with_transfers == Timing.of([THROUGH] * 10, 2)
    assert found.with_transfers.images_per_second == pytest.approx(2 * 1000 / THROUGH)
    assert (found.batch, found.shapes) == (2, {"image": (2, 3, 32, 32), "logits": (2, 5)})
    assert found.dtypes == {"image": "float32", "logits": "float32"}
    assert found.copied == (2 * 3 * 32 * 32 * 4, 2 * 5 * 4)
    assert found.memory == 4 * 3 * 32 * 32 * 4 + 256
    assert found.executor.endswith(f" {version} on Tesla T4")
    assert found.cuda == "fake-cuda 1.0"
    assert net.gpu.count("execute") == 1 + 3 + 2 * 10
    assert net.gpu.count("download") == 1 + 3 + 10
    assert net.gpu.count("allocate") == net.gpu.count("pin") == 1
    assert net.gpu.count("event") == 2
    assert net.gpu.journal[-1] == "freed"


def test_a_graph_is_captured_once_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    found = timed(tmp_path, monkeypatch, net, BenchRequest(Path(), graph=True, warmup=3, iterations=10))
    assert found.graph
    assert found.without_transfers.p50 == Clock.LAUNCH
    assert found.with_transfers.p50 == Clock.UPLOAD + Clock.LAUNCH + Clock.DOWNLOAD
    assert (net.gpu.count("capture"), net.gpu.count("launch")) == (1, 1 + 3 + 2 * 10)
    assert net.gpu.graphs == 0


def test_batch_and_size_are_those_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = (((1, 32, 32, 3), (2, 64, 64, 3), (4, 96, 96, 3)),)
    net = Net(TRT, FakeGpu(), (-1, -1, -1, 3), ranges, reads="UINT8")
    request = BenchRequest(Path(), warmup=0, iterations=1, batch=3, size=(32, 48))
    found = timed(tmp_path, monkeypatch, net, request)
    assert (found.batch, found.shapes["image"], found.dtypes["image"]) == (3, (3, 32, 48, 3), "uint8")
    assert found.without_transfers.images_per_second == pytest.approx(3 * 1000 / Clock.EXECUTE)
    with pytest.raises(UnsupportedSpec, match="doesn't take image 5x32x48x3; it takes image 1x32x32x3 to 4x96x96x3"):
        timed(tmp_path, monkeypatch, net, replace(request, batch=5))
    assert net.gpu.journal[-1] == "freed"


def test_it_tells_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)
    steps: list[str] = []

    def on_step(step: str) -> None:
        steps.append(step)
        assert not net.gpu.queue, "what was done before must not run into what is timed"

    bench(BenchRequest(write_engine(tmp_path, TRT), warmup=1, iterations=100), on_step)
    assert steps[:4] == ["load small.engine", "warm up", "run 1 of 100", "run 6 of 100"]
    assert len(steps) == 22


def test_what_fails_frees_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("event", "launch", "download"):
        net = Net(TRT, FakeGpu(fails={step}))
        with pytest.raises(BuildFailed, match=f"CUDA fails: {step}"):
            timed(tmp_path, monkeypatch, net, BenchRequest(Path(), graph=True))
        assert net.gpu.journal[-1] == "freed"
        assert not net.gpu.memory


def test_an_interruption_frees_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net)

    def interrupt(step: str) -> None:
        if step.startswith("run 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(BenchRequest(write_engine(tmp_path, TRT), iterations=100), interrupt)
    assert net.gpu.journal[-1] == "freed"


def test_without_a_driver_nothing_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    install(monkeypatch, net, Driver(None))
    with pytest.raises(NoDevice, match=r"^no CUDA driver"):
        bench(BenchRequest(write_engine(tmp_path, TRT)), quiet)
    assert net.gpu.journal == []


@pytest.mark.parametrize("counts", [{"iterations": 0}, {"warmup": -1}])
def test_counts_that_measure_nothing(counts: dict[str, int]) -> None:
    with pytest.raises(UnsupportedSpec, match="nothing is measured"):
        replace(BenchRequest(Path()), **counts)  # type: ignore[arg-type]  # fields by name


def test_statistics_of_known_times() -> None:
    found = Timing.of([float(each) for each in range(101, 0, -1)], batch=4)
    assert (found.mean, found.p50, found.p90, found.p99) == (51.0, 51.0, 91.0, 100.0)
    assert (found.least, found.most) == (1.0, 101.0)
    assert found.images_per_second == pytest.approx(4 * 1000 / 51)
    assert Timing.of([1.0, 2.0], batch=1).p90 == pytest.approx(1.9)
    assert Timing.of([3.0], batch=1) == Timing(3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 1000 / 3)


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=50), st.integers(1, 64))
def test_statistics_are_in_order(times: list[float], batch: int) -> None:
    found = Timing.of(times, batch)
    ordered = [found.least, found.p50, found.p90, found.p99, found.most]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(ordered))
    assert found.least * (1 - 1e-12) <= found.mean <= found.most * (1 + 1e-12)
    assert math.isclose(found.images_per_second * found.mean, batch * 1000)


@pytest.mark.parametrize("times", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf")]])
def test_a_clock_that_tells_nothing(times: list[float]) -> None:
    with pytest.raises(BuildFailed, match="tell no time"):
        Timing.of(times, 1)


def test_json_holds_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    found = timed(tmp_path, monkeypatch, net, BenchRequest(Path(), warmup=2, iterations=5))
    told = json.loads(json.dumps(found.as_dict()))
    assert set(told["milliseconds"]) == {"without_transfers", "with_transfers"}
    assert told["milliseconds"]["with_transfers"]["p99"] == THROUGH
    assert told["shapes"] == {"image": [2, 3, 32, 32], "logits": [2, 5]}
    assert told["copied_bytes"] == {"to_gpu": 24576, "from_gpu": 40}
    assert (told["warmup"], told["iterations"], told["batch"], told["graph"]) == (2, 5, 2, False)
    assert told["engine"].endswith("small.engine")


def test_the_table_fits_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(TRT, FakeGpu())
    found = timed(tmp_path, monkeypatch, net, BenchRequest(Path(), iterations=5, warmup=2))
    slow = Timing.of([1234.5678, 4321.0], batch=1)
    for result in (found, replace(found, without_transfers=slow, with_transfers=slow, graph=True)):
        out = io.StringIO()
        show_bench(Console(file=out, width=80), result)
        lines = out.getvalue().splitlines()
        assert max(map(len, lines[3:])) <= 80
        assert "…" not in out.getvalue()
    out = io.StringIO()
    show_bench(Console(file=out, width=80), found)
    text = out.getvalue()
    assert "tensorrt 10.13.3.9 on Tesla T4, fake-cuda 1.0" in text
    assert "image: 2x3x32x32 float32, 24576 B" in text
    assert "5 runs without a CUDA graph, after 2 to warm up" in text
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1] in (["with"], ["without"])
    }
    assert rows["without"] == ["4.000"] * 6 + ["500"]
    assert rows["with"] == ["5.500"] * 6 + ["364"]


def test_torch_is_not_imported() -> None:
    code = "import sys\nimport nextvit_deploy.bench, nextvit_deploy.render_bench\n"
    code += "print(sorted({'torch', 'onnx', 'onnxruntime', 'cuda', 'pycuda', 'tensorrt_rtx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
