"""Build, read back, run, compare and time a TensorRT engine on the GPU it is for, and write the verdict.

::

    python check.py

Stands alone with device.py beside it: Python 3.8 or newer, tensorrt (10.0 to 11), numpy and cuda-bindings. Exit
status: 0 verified, 1 an error that one line explains, 2 wrong usage, 3 failed, 4 not verified.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
if TYPE_CHECKING or __package__:
    from nextvit_deploy.kit import device
else:  # on its own in a kit, with the module beside it
    sys.path.insert(0, str(HERE))
    sys.dont_write_bytecode = True  # a kit holds what it was made with, and the verdict
    device = import_module("device")

VERDICT = "verdict.json"
STATUS = {"verified": 0, "failed": 3, "not verified": 4}
ERROR = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(prog="check.py", description="Prove this kit's model on the GPU at hand.")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="keep the engine in this file")
    parser.add_argument("--iterations", type=int, default=200, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="memory that TensorRT may try kernels with")
    parser.add_argument("--verbose", action="store_true", help="show everything that TensorRT logs")
    options = parser.parse_args(arguments)
    if options.iterations < 1 or (options.workspace is not None and options.workspace < 1):
        parser.error("--iterations and --workspace must be 1 or more")
    try:
        found = check(HERE, options)
    except device.Stop as error:
        sys.stderr.write(f"check.py: {error}\n")
        return ERROR
    sys.stdout.write("\n".join(table(found)) + "\n")
    return STATUS[found["verdict"]]


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The verdict on the kit in ``folder``, which is also written there; raises Stop where there can be none."""
    kit, identity = read_kit(folder)
    with suppress(FileNotFoundError):
        (folder / VERDICT).unlink()  # an earlier verdict must not outlive a failed run
    found = {
        "schema": 1,
        "kit": identity,
        "files": kit["files"],
        "model": f"{kit['model']} {kit['precision']}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "verdict": "not verified",
        "why": device.no_driver(),
    }
    if not found["why"]:
        found.update(prove(folder, kit, options))
    write(folder / VERDICT, (json.dumps(found, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    return found


def read_kit(folder: Path) -> tuple[dict[str, Any], str]:
    """kit.json and its SHA-256; raises Stop where a file isn't the one that the kit was made with."""
    try:
        data = (folder / "kit.json").read_bytes()
        kit = json.loads(data)
        for name, expected in kit["files"].items():
            if sha256(folder / name) != expected:
                raise device.Stop(f"{name} is not the file this kit was made with; copy the whole kit again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise device.Stop(f"the kit is not whole ({error}); copy the whole kit again") from error
    return kit, hashlib.sha256(data).hexdigest()


def prove(folder: Path, kit: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is found out on the GPU; raises Stop where TensorRT builds or runs nothing."""
    import numpy as np

    trt, cuda = device.load("tensorrt"), device.Cuda(device.load("cuda.bindings.runtime"))
    if not device.OLDEST <= int(trt.__version__.split(".")[0]) <= device.NEWEST:
        raise device.Stop(
            f"TensorRT {trt.__version__} is not {device.OLDEST}.0 to {device.NEWEST}; run: {device.INSTALL}"
        )
    gpu = device.describe_gpu(cuda)
    errors: list[str] = []
    logger = device.listener(trt, errors, verbose=options.verbose)
    data, network = device.build(trt, logger, errors, (folder / "model.onnx").read_bytes(), kit, options.workspace)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise device.Stop(f"TensorRT can't load the engine it built: {device.reasons(errors)}")
    if options.engine:
        write(options.engine, data)
    kernels = device.inspect(trt, engine)
    dtypes = device.read_types(kit, network, engine, kernels)
    with np.load(str(folder / "golden.npz"), allow_pickle=False) as golden:
        images, expected = golden["inputs"], golden["outputs"]
    actual, latency = device.execute(cuda, engine, kit, images, options.iterations)
    comparison = compare(actual, expected)
    verdict, why = judge(kit, gpu, dtypes, comparison)
    return {
        "verdict": verdict,
        "why": why,
        "gpu": gpu,
        "tensorrt": trt.__version__,
        "engine": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
        "kernels": len(kernels),
        "dtypes": dtypes,
        "comparison": comparison,
        "tolerance": kit["tolerance"],
        "latency_ms": latency,
    }


def judge(
    kit: dict[str, Any], gpu: dict[str, Any], dtypes: dict[str, Any], comparison: dict[str, Any]
) -> tuple[str, str]:
    """The verdict that follows from what was read and measured, and why it isn't ``verified``."""
    wrong = device.wrong_types(kit, dtypes) + misses(comparison, kit["tolerance"])
    if wrong:
        return "failed", "; ".join(wrong)
    wanted, missing = kit["gpu"], device.unseen_type(kit, dtypes)
    reasons = [missing] if missing else []
    if gpu["capability"] != wanted["capability"]:
        told = f"this is {gpu['name']} ({gpu['capability']})"
        reasons.append(f"{told}, the kit is for {wanted['name']} ({wanted['capability']})")
    return "not verified" if reasons else "verified", "; ".join(reasons)


def compare(actual: Any, expected: Any) -> dict[str, Any]:
    """How far the GPU's outputs are from PyTorch's in float32, both (N, classes)."""
    import numpy as np

    if actual.shape != expected.shape:
        return {"shape": list(actual.shape), "expected shape": list(expected.shape)}
    got, want = actual.astype(np.float64), expected.astype(np.float64)
    finite = bool(np.isfinite(got).all())
    found: dict[str, Any] = {"images": len(want), "finite": finite}
    if finite:
        error = np.abs(got - want)
        found["relative_rms"] = float(np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(want**2)))
        found["max_abs"] = float(error.max())
        found["top1"] = float((got.argmax(axis=1) == want.argmax(axis=1)).mean())
    return found


def misses(comparison: dict[str, Any], tolerance: dict[str, Any]) -> list[str]:
    """In what the outputs are outside the tolerance."""
    if "shape" in comparison:
        return [f"the engine returns shape {comparison['shape']}, PyTorch {comparison['expected shape']}"]
    if not comparison["finite"]:
        return ["NaN or infinity in the output"]
    error, bound = comparison["relative_rms"], tolerance["relative_rms"]
    return [] if error <= bound else [f"relative rms {error:.1e} > {bound:.0e}"]


def table(found: dict[str, Any]) -> list[str]:
    """The verdict in a few lines for people."""
    lines = [f"{found['verdict']}: {found['why'] or found['model']}"]
    if "comparison" in found:
        gpu, seen, types, times = (found[each] for each in ("gpu", "comparison", "dtypes", "latency_ms"))
        lines.append(f"  on       {gpu['name']} ({gpu['capability']}), {gpu['driver']}, TensorRT {found['tensorrt']}")
        if "relative_rms" in seen:
            error, bound = seen["relative_rms"], found["tolerance"]["relative_rms"]
            figures = f"max|d| {seen['max_abs']:.1e}, top-1 {seen['top1']:.0%} of {seen['images']} images"
            lines.append(f"  outputs  relative rms {error:.1e} (at most {bound:.0e}), {figures}")
        told = ", ".join(types["engine"]) or f"{', '.join(types['network'])} (the network's; no kernel tells its own)"
        lines.append(f"  types    {told}, in {found['kernels']} kernels")
        for how in ("without transfers", "with transfers"):
            figures = ", ".join(f"{name} {value:.3f} ms" for name, value in times[how].items())
            lines.append(f"  latency  {figures}, {how}, shape {'x'.join(map(str, times['shape']))}")
    return lines


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; raises Stop where the system refuses."""
    sibling = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        sibling.write_bytes(data)
        sibling.replace(path)
    except OSError as error:
        raise device.Stop(f"{path} can't be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            sibling.unlink()


if __name__ == "__main__":
    sys.exit(main())
