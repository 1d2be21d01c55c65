"""Next-ViT checkpoints to verified deployment artefacts: what the user touches.

Importing this package imports neither PyTorch nor ONNX.
"""

from __future__ import annotations

from typing import Final

__all__ = ["__version__"]

__version__: Final = "0.1.0"
