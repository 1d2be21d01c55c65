"""The text of an issue about one layer, filled in: figures, places, versions, and how to see it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nextvit_deploy.bisect.bundle_trial import Trial, Way
from nextvit_deploy.bisect.record import Parting, Series
from nextvit_deploy.doctor import installed_versions

_MODES: Final = {
    "exact": "exact: saved constants, float32 everywhere between",
    "unrounded": "unrounded: exact, and int8 steps are not rounded to",
    "emulated": "emulated: FP16 is rounded to wherever it is stored",
    "pessimistic": "pessimistic: running sums are rounded to FP16 too",
}
_NEEDS: Final = {"onnx": "onnxruntime", "coreml": "coremltools", "tensorrt": "tensorrt-cu12"}
_FORMATS: Final = {"onnx": "ONNX", "coreml": "Core ML", "tensorrt": "TensorRT"}
_TELLING: Final = (
    "nextvit-deploy",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "coremltools",
    "tensorrt-cu12",
    "tensorrt-rtx-cu12",
)
_PRIVATE: Final = """\
`inputs.npz`, `expected.npz` and `got.npz` hold activations: numbers that were computed from the pictures the bisection
ran on, and something of these pictures can be made out in them. The piece holds the model's weights of its operations.
Attach the bundle only where both may be seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Everything that the issue and ``bundle.json`` tell of a bundle."""

    artefact: str
    sha256: str
    way: Way
    series: Series
    parting: Parting
    trial: Trial
    limit: float
    fails: bool
    readings: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]
    """Of the piece."""
    remarks: tuple[str, ...] = ()
    """Of the whole artefact."""

    @property
    def mode(self) -> str:
        """The mode that the piece was executed in; exact where nothing in it is quantized."""
        quantized = any("quantize" in each.kind.lower() for each in self.trial.piece.operations)
        return "exact" if self.way.mode == "unrounded" and not quantized else self.way.mode


def versions() -> dict[str, str]:
    """Python, the platform, and the version of each package that has a say; nothing that tells whose machine it is."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    return found | {name: version for name, version in installed_versions(_TELLING).items() if version}


def issue(told: Told, hashes: Mapping[str, str]) -> str:
    """The whole text, in Markdown; ``hashes`` are of the bundle's files by their path in it."""
    parts = [
        f"# {told.parting.module or told.parting.kind}: {title(told)}",
        "## What was expected\n\n" + _expected(told),
        "## What happened\n\n" + _happened(told),
        "## Where\n\n" + _where(told),
        "## To reproduce\n\n" + _steps(told),
    ]
    if told.remarks or told.notes:
        parts.append("## Notes\n\n" + _list((*told.remarks, *told.notes)))
    parts += [
        "## Versions\n\n" + _table(("what", "version"), versions().items()),
        "## Files\n\n" + _table(("file", "SHA-256"), [(told.artefact, told.sha256), *hashes.items()]),
        "## Before you attach it\n\n" + _PRIVATE,
    ]
    return "\n\n".join(parts) + "\n"


def title(told: Told) -> str:
    """What is wrong, in a few words."""
    what = _FORMATS[told.way.kind]
    if told.trial.broken and told.fails:
        return f"{what} can't be executed from here on"
    if told.fails:
        return f"{what} differs from PyTorch by {told.trial.error:.1e}"
    return f"{what} parts from PyTorch by {told.parting.error:.1e}, and not in this piece alone"


def _expected(told: Told) -> str:
    names = ", ".join(f"`{name}`" for name in told.trial.expected) or "The outputs"
    return (
        f"{names} within a relative root mean square of {told.series.tolerance:.1e} of {told.series.against} "
        "(`expected.npz`), for the inputs in `inputs.npz`."
    )


def _happened(told: Told) -> str:
    error = told.trial.error
    alone = "nothing to hold it against" if error is None else told.trial.broken or f"{error:.3e}"
    rows = [
        (f"what goes in, in the whole of {told.artefact}", f"{told.parting.input_error:.3e}"),
        (f"what comes out, in the whole of {told.artefact}", f"{told.parting.error:.3e}"),
        ("what comes out of this piece alone, executed from its file", alone),
    ]
    seen = f"\n\n{told.parting.why}" if told.parting.why else ""
    verdict = "The piece alone shows it." if told.fails else "The piece alone does not show it; see the notes."
    return f"{verdict}\n\n{_table(('relative root mean square error', ''), rows)}{seen}"


def _where(told: Told) -> str:
    lines = [
        f"module: `{told.parting.module or '-'}`",
        f"question: {told.series.question}, {told.series.executor}",
        f"executed: {_MODES[told.mode]}",
    ]
    if told.parting.carries:
        lines.append("folded into it: " + ", ".join(f"`{each}`" for each in told.parting.carries))
    lines += [f"operation: `{each.name}` ({each.kind})" for each in told.trial.piece.operations]
    for what, edges in (("input", told.trial.piece.inputs), ("output", told.trial.piece.outputs)):
        lines += [f"{what}: `{edge.name}` {edge.dtype} {_shape(edge.shape)}" for edge in edges]
    return _list(lines)


def _steps(told: Told) -> str:
    needs = "tensorrt-rtx-cu12" if told.way.module == "tensorrt_rtx" else _NEEDS[told.way.kind]
    version = versions().get(needs)
    pinned = f"{needs}=={version}" if version else needs
    text = f"Unpack `bundle.zip`, and in its folder:\n\n```console\n$ python -m pip install numpy {pinned}\n"
    text += "$ python repro.py\n```\n\n"
    if told.way.kind == "tensorrt":
        return text + (
            "It shows what TensorRT parses out of the piece, and exits with 4: executing it takes a GPU. The figures "
            "above are of TensorRT's parsed network, executed layer by layer on the CPU."
        )
    if told.way.kind == "coreml":
        text += "It needs a Mac, where Core ML executes the piece; the figures above are of the package's program, "
        text += "executed operation by operation in PyTorch. "
    status = 1 if told.fails else 0
    return text + f"Exit status 1: it differs by more than {told.limit:.1e}; 0: it agrees. Here it is {status}."


def _shape(shape: Sequence[int | None] | None) -> str:
    return "(?)" if shape is None else "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    body = [f"| {left} | {right} |" for left, right in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| --- | --- |", *body])
