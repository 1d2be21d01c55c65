"""Write the kit: the ONNX file, golden inputs and outputs, what to expect, and the script that checks it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy.folders import Kind, check_place, published_folder
from nextvit_deploy.kit.expected import expected_types
from nextvit_deploy.tensors import Images, check_images, engine_of, input_dtype, output_dtype
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.executors.base import Array
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec, Tolerance
from nextvit_exporters.tensorrt.backends import gpu
from nextvit_exporters.to_onnx import INPUT, OUTPUT

KIND: Final = "nextvit-deploy kit"
SCHEMA: Final = 1
KIT: Final = "kit.json"
MANIFEST: Final = "manifest.json"
SCRIPTS: Final = ("check.py", "device.py")
_MODEL: Final = "model.onnx"
_GOLDEN: Final = "golden.npz"
_READ_ME: Final = "README.md"
_FIXED: Final = (_MODEL, _GOLDEN, *SCRIPTS)
"""What a verdict depends on. The manifest is not among them: a verdict is merged into it."""
_README: Final = """\
# {model}, {precision}: proof on {gpu}

On a machine with a {gpu} and its driver, in this folder:

```console
$ python -m pip install tensorrt-cu12 'cuda-bindings<13' numpy
$ python check.py
```

It builds the TensorRT engine from `{onnx}`, reads back the types it computes in, runs it on {count} golden inputs,
compares with PyTorch in float32 (relative root mean square error of at most {bound:.0e}), times it, and writes
`verdict.json`. Exit status: 0 verified, 1 an error that one line explains, 3 failed, 4 not verified.

Bring `verdict.json` back and put it into the manifest:

```console
$ nextvit-export verify {folder} --merge verdict.json
```
"""


def write_kit(
    folder: Path,
    onnx: Path,
    spec: ExportSpec,
    inputs: Images,
    expected: Array,
    tolerance: Tolerance,
    manifest: Mapping[str, object],
    manifest_path: Path,
) -> None:
    """Write the kit for the engine of ``spec`` into ``folder``, whole or not at all; an earlier kit is replaced.

    ``inputs`` are golden images as the artefact reads them, (N, 3, H, W) or (N, H, W, 3); ``expected`` is PyTorch's
    float32 answer to them, (N, classes); ``manifest`` is the engine's, JSON-ready, and lies (or will lie) at
    ``manifest_path``. Raises UnsupportedSpec where inputs, answers, spec and file don't fit together, OutputNotWritten
    where ``folder`` holds something else, and DeployError where the ONNX file is missing.
    """
    check_images(spec, inputs, "golden inputs")
    _check_expected(spec, len(inputs), expected)
    if not onnx.is_file():
        raise DeployError(f"{onnx} is no file, and the kit needs it; export again")
    dtypes = expected_types(onnx, spec.precision)
    with published_folder(folder, _KIND) as kit:
        shutil.copyfile(onnx, kit / _MODEL)
        np.savez(kit / _GOLDEN, inputs=inputs, outputs=expected)
        for script in SCRIPTS:
            shutil.copyfile(Path(__file__).with_name(script), kit / script)
        hashes = {name: sha256_of(kit / name) for name in _FIXED}
        told = _describe(folder, spec, tolerance, manifest_path, hashes, dtypes)
        (kit / KIT).write_text(_json(told), encoding="utf-8")
        (kit / MANIFEST).write_text(_json(manifest), encoding="utf-8")
        (kit / _READ_ME).write_text(_readme(folder, spec, len(inputs), tolerance), encoding="utf-8")


def check_kit_place(folder: Path) -> None:
    """Raise OutputNotWritten where ``write_kit`` could not write ``folder``, before any work; leaves nothing behind.

    That is where something else than a kit is in the way, where a kit holds something besides (a verdict that
    isn't merged yet, notes), and where the system refuses.
    """
    check_place(folder, _KIND)


def is_kit(folder: Path) -> bool:
    """Whether ``write_kit`` wrote this folder, whatever has come into it since: a verdict is put beside the kit."""
    try:
        told = json.loads((folder / KIT).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("kind") == KIND


_KIND: Final = Kind("kit", is_kit, (*_FIXED, KIT, MANIFEST, _READ_ME))


def _check_expected(spec: ExportSpec, count: int, expected: Array) -> None:
    shape = (count, spec.num_classes)
    if expected.shape != shape or expected.dtype != np.float32:
        raise UnsupportedSpec(f"golden outputs are {expected.shape} {expected.dtype}; the kit wants {shape} float32")
    if not np.isfinite(expected).all() or not expected.any():
        raise UnsupportedSpec("golden outputs hold NaN or infinity, or nothing but zeros; matching them shows nothing")


def _describe(
    folder: Path,
    spec: ExportSpec,
    tolerance: Tolerance,
    manifest_path: Path,
    hashes: Mapping[str, str],
    dtypes: Mapping[str, object],
) -> dict[str, object]:
    engine = engine_of(spec)
    wanted = gpu(engine.gpu)
    sizes = {"min": engine.minimum, "opt": engine.optimum, "max": engine.maximum}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": spec.model,
        "precision": str(spec.precision),
        "input": {"name": INPUT, "dtype": input_dtype(spec)},
        "output": {"name": OUTPUT, "dtype": output_dtype(spec)},
        "profile": {name: list(spec.shape_at(size)) for name, size in sizes.items()},
        "batch": engine.batch.optimum if engine.batch.fixed else None,
        "workspace": engine.workspace,
        "opt_level": engine.opt_level,
        "gpu": {"name": wanted.title, "capability": ".".join(map(str, wanted.capability))},
        "dtypes": dict(dtypes),
        "tolerance": {"relative_rms": tolerance.relative_rms, "measured": tolerance.measured},
        "preprocessing": spec.preprocessing.as_dict(),
        "files": dict(hashes),
        "manifest": Path(os.path.relpath(manifest_path.resolve(), folder.resolve())).as_posix(),
    }


def _readme(folder: Path, spec: ExportSpec, count: int, tolerance: Tolerance) -> str:
    return _README.format(
        model=spec.model,
        precision=spec.precision,
        gpu=gpu(engine_of(spec).gpu).title,
        onnx=_MODEL,
        count=count,
        bound=tolerance.relative_rms,
        folder=folder.name,
    )


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
