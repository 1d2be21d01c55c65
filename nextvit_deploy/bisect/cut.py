"""What lies around one parting: the artefact's own tensors on both sides of it, with the numbers on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nextvit_deploy.bisect.record import Parting
from nextvit_exporters.executors.base import Array


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The artefact between the last agreement and the first difference, enough to run that piece alone.

    Tensors go by the artefact's names. ``inputs`` are what goes in, in the types that the artefact stores them in;
    ``expected`` is what PyTorch has for what comes out, empty where nothing in PyTorch answers to it, ``got`` what
    the artefact gave. ``operations`` are the artefact's own between them, in order, constants left out.
    """

    parting: Parting
    inputs: Mapping[str, Array]
    expected: Mapping[str, Array]
    got: Mapping[str, Array]
    operations: tuple[str, ...]
