"""The exception tree of the whole project, re-exported from one place.

::

    DeployError                what happened, and what to do about it, in one line
    ├── MissingExtra           an optional dependency is not installed
    ├── CheckpointMismatch     the weights do not fit a Next-ViT, or not this one
    ├── UnsafeCheckpoint       the file asks to import code; it was not loaded
    ├── OutputNotWritten       an output could not be written; nothing half-written is left
    ├── UnsupportedSpec        the target can't build what was asked; the message names the alternatives
    ├── InvariantError         a pass was handed, or produced, a graph it must not
    ├── BuildFailed            the target's own tool refused the graph
    ├── VerificationFailed     built, but further from PyTorch than its tolerance allows
    └── NotExecutable          can't be executed here, so nothing is known of it: neither right nor wrong
        └── NoDevice           there is no CUDA driver with a GPU (``cuda.driver``)
"""

from __future__ import annotations

from nextvit_models.errors import (
    CheckpointMismatch,
    DeployError,
    MissingExtra,
    OutputNotWritten,
    UnsafeCheckpoint,
)

__all__ = [
    "BuildFailed",
    "CheckpointMismatch",
    "DeployError",
    "InvariantError",
    "MissingExtra",
    "NotExecutable",
    "OutputNotWritten",
    "UnsafeCheckpoint",
    "UnsupportedSpec",
    "VerificationFailed",
    "first_line",
]


class UnsupportedSpec(DeployError):
    """The target can't build what was asked; the message names what it can."""


class InvariantError(DeployError):
    """A pass was handed, or produced, a graph that breaks its contract."""


class BuildFailed(DeployError):
    """The target's own tool refused the graph."""


class VerificationFailed(DeployError):
    """The artefact was built and executed, and is further from PyTorch than its tolerance allows."""


class NotExecutable(DeployError):
    """What would have to be executed can't be here; the verdict is ``not verified``, with this message."""


def first_line(error: Exception) -> str:
    """What an error says first, for a message of one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
