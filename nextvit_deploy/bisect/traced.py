"""The artefact's side of a bisection: every tensor that executing it gives, and where it broke down."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from nextvit_exporters.errors import DeployError
from nextvit_exporters.executors.base import Array, Executor, Step, Traceable
from nextvit_exporters.executors.onnx_runtime import OnnxRuntime


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """An artefact's operations in order, and its tensors by name, (runs, ...) each; those behind a failure lack.

    ``given`` are what it reads. ``readers`` holds the operations that read a tensor, ``moving`` every tensor that
    depends on the input.
    """

    executor: str
    steps: tuple[Step, ...]
    values: dict[str, Array]
    given: AbstractSet[str]
    failure: DeployError | None
    readers: dict[str, list[Step]] = field(default_factory=dict)
    makers: dict[str, Step] = field(default_factory=dict)
    moving: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.moving.update(self.given)
        for step in self.steps:
            for name in step.outputs:
                self.makers[name] = step
            if self.moving.isdisjoint(step.inputs):
                continue
            self.moving.update(step.outputs)
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)

    @property
    def runs(self) -> int:
        """How many runs the tensors are of: where one fails those behind it are not made."""
        return min((len(values) for values in self.values.values()), default=0)

    def read(self, step: Step) -> tuple[str, ...]:
        """What an operation reads that is not constant."""
        return tuple(name for name in step.inputs if name in self.moving)

    def is_real(self, name: str) -> bool:
        """Whether a tensor is there and holds real numbers."""
        return name in self.values and self.values[name].dtype.kind == "f"

    def stored(self, name: str) -> np.dtype[np.generic]:
        """The type that the artefact stores a tensor in; that of the numbers where it doesn't say."""
        maker = self.makers.get(name)
        if maker is None or not maker.stored:
            return self.values[name].dtype
        return np.dtype(maker.stored[maker.outputs.index(name)])


def trace(executor: Executor, name: str, runs: Sequence[Array]) -> Traced:
    """Execute an artefact on each of ``runs``, which its input ``name`` reads, and keep every tensor.

    Raises what entering the executor raises, where there is nothing to trace.
    """
    if not isinstance(executor, Traceable):
        raise TypeError(f"{executor.name} shows no tensors")
    seen: dict[str, list[Array]] = {}
    failure: DeployError | None = None
    # a file that ONNX Runtime can't load as a whole is traced as far as it goes
    opened = nullcontext() if isinstance(executor, OnnxRuntime) else cast("AbstractContextManager[object]", executor)
    with opened:
        steps = executor.steps()
        for each in runs:
            try:
                executor.trace({name: each}, lambda tensor, values: seen.setdefault(tensor, []).append(values))
            except DeployError as error:
                failure = error
                break
    count = max(1, len(seen.get(name, ())))
    whole = {tensor: values for tensor, values in seen.items() if len(values) == count}
    stacked = {tensor: values[0][None] if count == 1 else np.stack(values) for tensor, values in whole.items()}
    return Traced(executor.name, steps, stacked, {name}, failure)
