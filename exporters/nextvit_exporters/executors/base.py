"""The contract of everything that executes an artefact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Self

LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
FEATURES: Final = ("stage1", "stage2", "stage3", "stage4")
"""What outputs are called wherever they are compared, whatever an artefact calls them."""

Array = NDArray[np.generic]
Arrays = Mapping[str, Array]
See = Callable[[str, Array], None]
"""Called with a tensor's name and numbers."""


class Executor(Protocol):
    """Runs a saved artefact on named inputs; a context manager that frees what it holds on exit."""

    @property
    def name(self) -> str:
        """What it is, with version and device: ``onnxruntime 1.32.0 cpu``."""
        ...

    @property
    def mode(self) -> str:
        """``exact``: saved constants in float32 arithmetic. ``emulated``: the stored precision with its rounding.

        ``unrounded``: exact, with int8 steps left out too. ``pessimistic``: emulated, with running sums rounded as
        well. ``device``: the real one.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name for inputs by name."""
        ...


@runtime_checkable
class Observant(Protocol):
    """An executor that notices more than it returns."""

    @property
    def findings(self) -> Mapping[str, object]:
        """What it noticed in all its runs, by name; JSON-ready."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of an artefact, by the artefact's own names; what it reads may be constants too.

    ``module`` is the torch module it comes from, as the artefact records it, empty where it doesn't. ``stored`` names
    NumPy's types of ``outputs`` as the artefact stores them.
    """

    operation: str
    kind: str
    module: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored: tuple[str, ...] = ()


@runtime_checkable
class Traceable(Protocol):
    """An executor that shows every tensor on the way."""

    def steps(self) -> tuple[Step, ...]:
        """Every operation that is executed, in order, constants left out; the executor must have been entered."""
        ...

    def trace(self, inputs: Arrays, see: See) -> None:
        """Run, and call ``see`` with each input and each result, in order.

        Where an operation can't be executed, everything in front of it is seen, and the error of ``run`` is raised.
        """
        ...
