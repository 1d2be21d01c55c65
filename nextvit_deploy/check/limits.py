"""What a user allows: tolerances, budgets, how far figures may move from a baseline; None where nothing is stated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that an artefact may take.

    ``size`` is in bytes. ``kernels`` counts kernels of an engine, nodes of an ONNX file, operations of a package.
    ``latency_ratio`` is the artefact's median latency over that of PyTorch in float32, measured in turns on one CPU.
    """

    size: int | None = None
    kernels: int | None = None
    latency_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Regression:
    """How far figures may move from the baseline's, as ratios: 1.0 allows no growth.

    ``error_ratio`` is of the relative root mean square error of each question. An error below ``error_floor`` is
    noise, whatever its ratio.
    """

    error_ratio: float | None = None
    error_floor: float = 0.0
    size_ratio: float | None = None
    kernels_ratio: float | None = None
    latency_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """All that is stated, by (lane, precision); questions are called as in ``nextvit_exporters.targets``.

    ``tolerances`` hold the worst relative root mean square error by question; a target's own tolerance stays in force
    beside them, so that these can only be tighter.
    """

    tolerances: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    budgets: Mapping[tuple[str, str], Budget] = field(default_factory=dict)
    regression: Regression = field(default_factory=Regression)
