"""What was cut out of an artefact, and finding what lies between named tensors in any format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from nextvit_exporters.errors import UnsupportedSpec


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor that goes into a piece or comes out of it: NumPy's name of its type, None for an open axis.

    ``shape`` is None where even the number of axes is not known.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a piece, by the artefact's own name for it, with the tensors it reads and writes.

    Constants are not among ``reads``, and operations that only make constants are no operations here.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a cut file holds. ``inputs`` are those asked for that something in it reads."""

    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True, slots=True)
class Links:
    """How an artefact's operations hang together, by their number in the order of execution.

    ``makers`` are the operations by what they write, ``reads`` what each reads, constants included; ``given`` are the
    artefact's own inputs, ``constants`` the names of what it holds.
    """

    where: str
    makers: Mapping[str, int]
    reads: Callable[[int], Collection[str]]
    given: Collection[str]
    constants: Collection[str]

    def check(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise UnsupportedSpec where a name is unknown, there twice, or names what the artefact holds."""
        for what, names in (("input", inputs), ("output", outputs)):
            if not names:
                raise UnsupportedSpec(f"nothing can be cut out of {self.where} without an {what}; name one")
            for name in names:
                if name in self.constants:
                    raise UnsupportedSpec(f"{name} is a constant of {self.where}; name a tensor that is computed")
                if name not in self.makers and name not in self.given:
                    raise UnsupportedSpec(f"{self.where} has no tensor {name}; name one that it computes")
            if len(set(names)) != len(names):
                raise UnsupportedSpec(f"an {what} of the cut is named twice; name each once")

    def between(self, inputs: Sequence[str], outputs: Sequence[str]) -> tuple[list[int], set[str]]:
        """The operations that the outputs need behind the inputs, in order, and the inputs that one of them reads.

        Raises UnsupportedSpec where nothing lies between, or an output needs more than the inputs.
        """
        self.check(inputs, outputs)
        stops, needed, seen, read = set(inputs), set[int](), set[str](), set[str]()
        for output in outputs:
            if output in stops or output in self.given:
                raise UnsupportedSpec(f"nothing lies between {', '.join(inputs)} and {output}; name a later output")
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in stops:
                read.add(name)
            elif name in self.makers:
                needed.add(self.makers[name])
                waiting += [each for each in self.reads(self.makers[name]) if each]
            elif name in self.given:
                raise UnsupportedSpec(
                    f"{', '.join(outputs)} of {self.where} needs {name} as well as {', '.join(inputs)}; "
                    "name an input on every way"
                )
        if not read:
            raise UnsupportedSpec(
                f"nothing lies between {', '.join(inputs)} and {', '.join(outputs)}; name an input that they depend on"
            )
        return sorted(needed), read
