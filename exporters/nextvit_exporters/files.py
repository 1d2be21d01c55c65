"""Whole files or none, as in ``nextvit_models.files``; here for everything above the models."""

from __future__ import annotations

from nextvit_models.files import atomic_path, atomic_write, not_written, sha256_of, size_of

__all__ = ["atomic_path", "atomic_write", "not_written", "sha256_of", "size_of"]
