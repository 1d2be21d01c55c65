"""How often bisection names the right module: ``python -m tests.deploy.bisect.scores FOLDER COUNT [FIRST]``.

FOLDER holds exported artefacts of the demo; each is given COUNT random faults, one at a time.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from nextvit_deploy.bisect.run import bisect
from nextvit_deploy.request import Request
from nextvit_exporters.errors import DeployError
from nextvit_exporters.to_tensorrt import onnx_of
from tests.deploy import support_coreml as mil
from tests.deploy import support_trt as trt
from tests.deploy.bisect import mil_faults, onnx_faults
from tests.deploy.support import Exported, Ran


def named(path: Path) -> str:
    """The first module that bisection names, on as many images as the command takes where nobody says."""
    try:
        first = bisect(path, Request(output=path.parent), lambda _: None)[0].parting
    except DeployError as error:
        return f"error: {error}"
    return "nothing" if first is None else first.module


def planted(made: Exported, folder: Path, seed: int) -> tuple[Path, str, str]:
    """A copy with the fault of this seed, the module it is in, and what was done."""
    if made.path.suffix == ".mlpackage":
        there = mil_faults.RandomFault(seed)
        return mil.planted(made, folder, there), there.module, there.kind
    fault = onnx_faults.RandomFault(seed)
    for file in made.path.parent.glob(f"{made.path.stem}.*"):
        shutil.copy(file, folder)
    path = folder / made.path.name
    source = onnx_of(path)
    model = onnx.load(str(source))
    fault(model)
    source.write_bytes(model.SerializeToString())
    return (path if path == source else trt.signed(path)), fault.module, fault.kind


def wrong(made: Exported, seeds: Iterable[int]) -> Iterator[str]:
    """What was named wrong, in words."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            path, module, kind = planted(made, Path(folder), seed)
            if (found := named(path)) != module:
                yield f"{seed}, {kind}: {found} for {module}"


def main(folder: str, count: str, first: str = "0") -> None:
    seeds = range(int(first), int(first) + int(count))
    for path in sorted(Path(folder).iterdir()):
        engines_own = path.suffix == ".onnx" and path.with_suffix(".engine").exists()
        if path.suffix not in {".onnx", ".engine", ".mlpackage"} or engines_own:
            continue
        found = list(wrong(Exported(path, Ran(0, "", "")), seeds))
        sys.stdout.write("\n".join([f"{path.name}: {len(seeds) - len(found)} of {len(seeds)}", *found, ""]))
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
