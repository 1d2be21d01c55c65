"""What to do about INT8, from the part of FP16's time that it takes; estimated or measured alike."""

from __future__ import annotations

from typing import Final

GO: Final = "go"
DOUBTFUL: Final = "doubtful"
NO_GO: Final = "no-go"
WORTH: Final = 0.95
"""The part of FP16's time that INT8 must stay below to be worth its error and its work."""
ESTIMATE: Final = "estimate"
MEASURED: Final = "measured"


def advise(ratio: float, highest: float) -> str:
    """``go`` where INT8 saves 5 % even at its highest ratio, ``no-go`` where the expected one saves nothing."""
    if ratio >= 1:
        return NO_GO
    return GO if highest <= WORTH else DOUBTFUL
