"""Run the piece of a model beside this script, and say how far it is from PyTorch.

::

    python repro.py

Stands alone: Python 3.8 or newer, numpy, and what runs the piece (onnxruntime; coremltools on a Mac; TensorRT to parse
it). Exit status: 0 it agrees, 1 it differs or breaks down, 2 a file or a package is missing, 4 it can't be executed
here.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

try:
    import numpy as np
except ImportError:
    sys.stdout.write("repro.py: numpy is not installed; run: python -m pip install numpy\n")
    sys.exit(2)  # what an error that nobody catches exits with would say that the piece differs

HERE = Path(__file__).resolve().parent
AGREES, DIFFERS, MISSING, NOT_HERE = 0, 1, 2, 4


class Stop(Exception):
    """There is nothing to say of the piece; the exit status, and why in one line."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def main() -> int:
    """Run what ``bundle.json`` describes; returns the exit status."""
    try:
        return show(json.loads((HERE / "bundle.json").read_text(encoding="utf-8")))
    except Stop as stop:
        say(f"repro.py: {stop}")
        return stop.status
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        say(f"repro.py: {error}; unpack the whole bundle")
        return MISSING


def show(told: dict[str, Any]) -> int:
    """Run the piece that ``bundle.json`` tells of; Stop where nothing can be said of it."""
    inputs, expected = arrays("inputs.npz"), arrays("expected.npz")
    if not expected and told["kind"] != "tensorrt":
        raise Stop(NOT_HERE, "nothing in PyTorch answers to what comes out; got.npz is what the artefact gave")
    say(f"{told['artefact']}, {told['module']}: {', '.join(told['operations'])}")
    return {"onnx": on_onnx, "coreml": on_coreml, "tensorrt": on_tensorrt}[told["kind"]](told, inputs, expected)


def on_onnx(told: dict[str, Any], inputs: dict[str, Any], expected: dict[str, Any]) -> int:
    """ONNX Runtime on the CPU with every optimisation off; the verdict is that of the first reading."""
    ort = load("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    say(f"onnxruntime {ort.__version__}, all optimisations off")
    found = []
    for reading in told["readings"]:
        what = f"{reading['file']} ({reading['what']})"
        try:
            session = ort.InferenceSession(str(HERE / reading["file"]), options, providers=["CPUExecutionProvider"])
            got = split_and_run(functools.partial(run_session, session), inputs, told["times"])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions share no base class
            say(f"{what}: it breaks down: {str(error).splitlines()[0]}")
            found.append(DIFFERS)
        else:
            found.append(judge(told, what, got, expected))
    return found[0]


def run_session(session: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name, for inputs of any type that holds the same numbers."""
    fed = {each.name: given[each.name].astype(NUMPY[each.type]) for each in session.get_inputs()}
    return {each.name: session.run([each.name], fed)[0] for each in session.get_outputs()}


def on_coreml(told: dict[str, Any], inputs: dict[str, Any], expected: dict[str, Any]) -> int:
    """Core ML on the CPU, then on everything there is; on a Mac."""
    if platform.system() != "Darwin":
        raise Stop(NOT_HERE, "Core ML runs on macOS only; run this on a Mac, with coremltools and numpy")
    tools = load("coremltools")
    status = AGREES
    for units in ("CPU_ONLY", "ALL"):
        what = f"{told['readings'][0]['file']}, coremltools {tools.__version__}, {units}"
        try:
            model = tools.models.MLModel(
                str(HERE / told["readings"][0]["file"]), compute_units=getattr(tools.ComputeUnit, units)
            )
            got = split_and_run(model.predict, inputs, told["times"])
        except Exception as error:  # noqa: BLE001 - Core ML's own errors come as any kind
            say(f"{what}: it breaks down: {str(error).splitlines()[0]}")
            status = DIFFERS
            continue
        status = max(status, judge(told, what, got, expected))
    return status


def on_tensorrt(told: dict[str, Any], inputs: dict[str, Any], expected: dict[str, Any]) -> int:
    """What TensorRT parses out of the piece; executing it takes a GPU, and is not done here."""
    del inputs, expected
    trt = load(told["tensorrt"])
    logger = trt.Logger(trt.Logger.ERROR)
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    builder = trt.Builder(logger)
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    say(f"{told['tensorrt']} {trt.__version__} reads {told['readings'][0]['file']}")
    if not parser.parse((HERE / told["readings"][0]["file"]).read_bytes()):
        say(f"it refuses it: {'; '.join(parser.get_error(each).desc() for each in range(parser.num_errors))}")
        return DIFFERS
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        read = [layer.get_input(each) for each in range(layer.num_inputs)]
        given = [layer.get_output(each) for each in range(layer.num_outputs)]
        say(f"  {layer.type.name} {layer.name}: {tensors(read)} -> {tensors(given)}")
    raise Stop(NOT_HERE, "parsed and shown, not executed: TensorRT executes engines on a GPU; see issue.md for figures")


def tensors(found: list[Any]) -> str:
    """Names, types and shapes of tensors."""
    return ", ".join(f"{each.name} {each.dtype.name}{list(each.shape)}" for each in found if each is not None) or "-"


def split_and_run(run: Any, inputs: dict[str, Any], times: int) -> dict[str, Any]:
    """Run on equal shares of the inputs, and join what comes out."""
    split = {name: np.split(values, times) if times > 1 else [values] for name, values in inputs.items()}
    parts = [run({name: split[name][number] for name in split}) for number in range(times)]
    return {name: np.concatenate([part[name] for part in parts]) if times > 1 else parts[0][name] for name in parts[0]}


def judge(told: dict[str, Any], what: str, got: dict[str, Any], expected: dict[str, Any]) -> int:
    """Print the error of every output; returns the exit status."""
    status = AGREES
    for name, wanted in expected.items():
        error = relative_rms(np.asarray(got[name]), wanted)
        differs = not error <= told["limit"]
        word, sign = ("DIFFERS", ">") if differs else ("agrees", "<=")
        say(f"{what}: {name} {word}: relative rms {error:.3e} {sign} {told['limit']:.3e}")
        status = DIFFERS if differs else status
    return status


def relative_rms(got: Any, wanted: Any) -> float:
    """Root mean square of the difference over that of what is wanted; infinite where they can't be compared."""
    if got.shape != wanted.shape:
        return float("inf")
    actual, right = got.astype(np.float64), wanted.astype(np.float64)
    if not (np.isfinite(actual).all() and np.isfinite(right).all()):
        return float("inf")
    difference, size = float(np.sqrt(np.mean((actual - right) ** 2))), float(np.sqrt(np.mean(right**2)))
    return 0.0 if not difference else difference / size if size else float("inf")


def arrays(name: str) -> dict[str, Any]:
    """What a file beside this script holds."""
    with np.load(str(HERE / name), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def load(name: str) -> Any:
    """A package; Stop where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise Stop(MISSING, f"{name} is not installed; run: python -m pip install {PIP.get(name, name)}") from error


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")


PIP = {"tensorrt": "tensorrt-cu12", "tensorrt_rtx": "tensorrt-rtx-cu12"}
NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

if __name__ == "__main__":
    sys.exit(main())
