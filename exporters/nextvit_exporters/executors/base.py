"""The contract of everything that executes an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Arrays = Mapping[str, Array]


class Executor(Protocol):
    """Runs a saved artefact on named inputs; a context manager that frees what it holds on exit."""

    @property
    def name(self) -> str:
        """What it is, with version and device: ``onnxruntime 1.32.0 cpu``."""
        ...

    @property
    def mode(self) -> str:
        """``exact``: the saved constants in float32 arithmetic. ``emulated``: the stored precision, rounding included."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name for inputs by name."""
        ...
