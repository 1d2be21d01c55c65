"""The targets: every ``to_<name>.py`` beside this file is one, found by its name and imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.spec import Artifact, ExportSpec, Precision, Tolerance

if TYPE_CHECKING:
    from torch import fx

    from nextvit_exporters.executors.base import Array, Executor
    from nextvit_exporters.passes.base import Pass

SAME_NETWORK = "same network"
"""Is it the same network? The saved constants in exact arithmetic."""
PRECISION_COST = "precision cost"
"""What does the precision cost? The stored precision, rounding included."""
COST_AT_WORST = "precision cost, at worst"
"""The same where the hardware rounds its running sums too."""
ON_DEVICE = "on the device"
"""The same question to the real runtime, where it is there."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What an artefact says of itself: its own record where this tool wrote one, operations by kind, dtypes."""

    provenance: Mapping[str, object] | None
    ops: Mapping[str, int]
    dtypes: str
    """Read back from its tensors: ``131 of 131 operations in fp16``."""
    unit: str = "nodes"
    """What ``ops`` counts."""
    without_provenance: str = "none: not written by this tool"
    """Why ``provenance`` is None, where it is."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What else there is to know, by name; JSON-ready."""


class Examples(Protocol):
    """Images as an artefact reads them, (N, ...): an array, or what reads some of them when they are asked for."""

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, some: slice, /) -> Array:
        """Those between two places, as one array."""
        ...


class Target(Protocol):
    """What a ``to_<name>.py`` module offers; see ``to_onnx`` for one."""

    @property
    def SUFFIX(self) -> str:  # noqa: N802 - a module's constant
        """Of the artefact's file name, with the dot."""
        ...

    @property
    def INPUT(self) -> str:  # noqa: N802 - a module's constant
        """Name of the artefact's input."""
        ...

    @property
    def OUTPUT(self) -> str | None:  # noqa: N802 - a module's constant
        """Name of the artefact's output, which holds logits; None where the spec decides what there is."""
        ...

    @property
    def WRITERS(self) -> Sequence[str]:  # noqa: N802 - a module's constant
        """The distributions that shape the artefact's bytes, recorded inside it with their versions."""
        ...

    @property
    def PASSES(self) -> Sequence[Pass]:  # noqa: N802 - a module's constant
        """The rewrites that pay on this target, in order, each with its measurement."""
        ...

    @property
    def PRECISIONS(self) -> Sequence[Precision]:  # noqa: N802 - a module's constant
        """What it can build."""
        ...

    @property
    def TOLERANCES(self) -> Mapping[str, Mapping[Precision, Tolerance]]:  # noqa: N802 - a module's constant
        """By question and precision, each with how it was measured."""
        ...

    def check_spec(self, spec: ExportSpec) -> None:
        """Raise UnsupportedSpec for what it can't build, with what it can."""
        ...

    def passes_for(self, spec: ExportSpec) -> tuple[Pass, ...]:
        """The passes with what ``spec`` adds and leaves out."""
        ...

    def tolerance_for(self, spec: ExportSpec, question: str) -> Tolerance:
        """The tolerance of a question that ``executors`` asks."""
        ...

    def settle(self, spec: ExportSpec, graph: fx.GraphModule, examples: Array) -> ExportSpec:
        """``spec`` with what only the graph on real images tells.

        ``graph`` is the float64 graph behind the passes, ``examples`` are images as it reads them.
        """
        ...

    def lower(self, spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
        """The float64 graph in the numbers the artefact will hold."""
        ...

    def reference(self, spec: ExportSpec, graph: fx.GraphModule) -> fx.GraphModule:
        """The float64 graph in float32 arithmetic, carrying the artefact's constants."""
        ...

    def build(
        self,
        spec: ExportSpec,
        module: fx.GraphModule,
        path: Path,
        provenance: Mapping[str, object],
        on_step: Callable[[str], None],
        examples: Examples | None = None,
    ) -> Artifact:
        """Write the artefact, whole or not at all; ``examples`` are images as it reads them, to calibrate on."""
        ...

    def source(self, path: Path) -> Path:
        """The artefact in a form that any reader takes: itself, or the ONNX file that it was made from.

        Raises NotExecutable where it isn't there, BuildFailed where it is another artefact's.
        """
        ...

    def adopt(self, spec: ExportSpec, path: Path) -> ExportSpec:
        """The spec under which this target executes the artefact, which may record one of another target."""
        ...

    def remarks(self, path: Path) -> tuple[str, ...]:
        """What to know of an artefact on this machine; notes for people."""
        ...

    def executors(self, spec: ExportSpec, path: Path) -> Mapping[str, Executor]:
        """What can execute the artefact here, by the question it answers."""
        ...

    def read(self, path: Path) -> Saved:
        """What the artefact says of itself."""
        ...


def names() -> tuple[str, ...]:
    """Every target, in order of name; imports none of them."""
    return tuple(sorted(path.stem.removeprefix("to_") for path in Path(__file__).parent.glob("to_*.py")))


def load(name: str) -> Target:
    """Import one target; raises UnsupportedSpec when there is none of that name."""
    if name not in names():
        raise UnsupportedSpec(f"there is no target '{name}'; choose one of {', '.join(names())}")
    return cast("Target", importlib.import_module(f"nextvit_exporters.to_{name}"))


def of_file(path: Path) -> Target:
    """The target whose artefacts end as ``path`` does; raises UnsupportedSpec when there is none."""
    for name in names():
        target = load(name)
        if path.suffix == target.SUFFIX:
            return target
    raise UnsupportedSpec(f"{path.name} is no artefact of {', '.join(names())}")
