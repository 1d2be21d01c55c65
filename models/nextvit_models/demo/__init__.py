"""A small Next-ViT trained to read digits, with the pictures it was tested on: no download, no GPU.

``DEMO_CHECKPOINT`` holds the weights of ``nextvit_nano`` (0.78 million parameters, 64x64 pixels) with their
preprocessing and class names in the safetensors header. ``DEMO_IMAGES`` holds the 360 digits kept out of training,
one folder a class. ``DEMO_ACCURACY`` is the share of them that the float32 weights get right. Each digit is drawn in
a warm ink over the blue ghost of another, so pictures fed as blue, green, red score near chance.

To see the accuracy::

    from nextvit_models.demo import DEMO_ACCURACY, DEMO_CHECKPOINT, DEMO_IMAGES
    from nextvit_models.demo.digits import read_pictures

    pictures, labels = read_pictures(DEMO_IMAGES)  # (360, 3, 64, 64) uint8, (360,) int64

To train the weights again, in a few minutes on one CPU core (needs the ``dev`` extra)::

    python -m nextvit_models.demo.train --output digits

Source of the digits: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, doi 10.24432/C50P49, CC BY 4.0, as shipped by scikit-learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["DEMO_ACCURACY", "DEMO_CHECKPOINT", "DEMO_IMAGES"]

_FOLDER: Final = Path(__file__).parent

DEMO_CHECKPOINT: Final = _FOLDER / "nextvit_nano_digits.safetensors"
DEMO_IMAGES: Final = _FOLDER / "images"
DEMO_ACCURACY: Final = 1.0
"""Top-1 on the pictures in ``DEMO_IMAGES``; ``demo.json`` says how the weights were trained."""
