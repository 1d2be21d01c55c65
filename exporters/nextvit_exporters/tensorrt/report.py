"""An engine in plain words: facts by name for tables, manifests and JSON."""

from __future__ import annotations

from nextvit_exporters.tensorrt.header import EngineHeader
from nextvit_exporters.tensorrt.kernels import EngineReport


def describe(header: EngineHeader, report: EngineReport | None) -> dict[str, object]:
    """Who built it, for which GPU, and where a report is at hand its memory (bytes) and every kernel."""
    facts: dict[str, object] = {
        "built by": f"{header.backend} {header.version}",
        "for": header.gpus,
        "weight bytes": header.weights if report is None else report.weights,
    }
    if report is None:
        return facts
    return facts | {
        "activation bytes": report.activation,
        "scratch bytes": report.scratch,
        "kernel list": [
            {
                "name": kernel.name,
                "kind": kernel.kind,
                "dtypes": sorted(kernel.dtypes(report.edges)),
                "modules": list(kernel.modules),
                "layers": list(kernel.layers),
                "tactic": kernel.tactic,
            }
            for kernel in report.kernels
        ],
    }
