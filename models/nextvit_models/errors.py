"""Errors that a user can act on.

::

    DeployError                what happened, and what to do about it, in one line
    ├── MissingExtra           an optional dependency is not installed
    ├── CheckpointMismatch     the weights do not fit a Next-ViT, or not this one
    ├── UnsafeCheckpoint       the file asks to import code; it was not loaded
    └── OutputNotWritten       an output could not be written; nothing half-written is left

The exporting half of the tree is in ``nextvit_exporters.errors``. Anything that is not a ``DeployError`` is a
bug and keeps its traceback.
"""

from __future__ import annotations


class DeployError(Exception):
    """Base of all errors a user can act on; the message is one line."""


class MissingExtra(DeployError):
    """An optional dependency is not installed; the message holds the pip line that fixes it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional package; run: pip install 'nextvit-deploy[{extra}]'")


class CheckpointMismatch(DeployError):
    """The file is not a usable Next-ViT checkpoint, or not the one that was asked for."""


class UnsafeCheckpoint(DeployError):
    """The pickle asks to import something other than tensors; nothing of it was executed."""


class OutputNotWritten(DeployError):
    """An output could not be written (full disk, missing rights); nothing half-written is left behind."""
