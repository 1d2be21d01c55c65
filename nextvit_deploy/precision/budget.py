"""How much INT8 may cost: right answers, or noise in the logits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from nextvit_exporters.errors import UnsupportedSpec

_TEXT: Final = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(|pt|db)\s*", re.IGNORECASE)
_ROUNDING: Final = 1e-9
"""Images: 0.29 points of 100 are 28.999999999999996 thousandths to a computer."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be lost against PyTorch in float32.

    ``amount`` is a drop of top-1 in percentage points, or with ``in_db`` the least signal to noise of the logits in
    decibel.
    """

    amount: float
    in_db: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``0.5``, ``0.5pt`` or ``30dB``; raises UnsupportedSpec for anything else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise UnsupportedSpec(
                f"'{text}' is no accuracy budget; write points of top-1 as in 0.5, or decibels of the logits as in 30dB"
            )
        amount, in_db = float(found[1]), found[2].lower() == "db"
        if not math.isfinite(amount) or (not in_db and amount > 100.0):
            raise UnsupportedSpec(f"an accuracy budget of {text.strip()} is beyond all there is; try 0.5 or 30dB")
        return cls(amount, in_db)

    def __str__(self) -> str:
        return f"{self.amount:g}dB" if self.in_db else f"{self.amount:g}pt"

    def allows(self, sqnr_db: float, lost: int | None, count: int) -> bool:
        """Whether so much noise is little enough, or ``lost`` right answers of ``count`` images are few enough.

        Raises ValueError for points where right answers were not counted.
        """
        if self.in_db:
            return sqnr_db >= self.amount
        if lost is None:
            raise ValueError("points are counted on labelled images")
        return 100 * lost <= self.amount * count + _ROUNDING

    def notes(self, count: int) -> tuple[str, ...]:
        """What so many images can't show."""
        if self.in_db or self.amount * count >= 100.0:
            return ()
        one = f"on {count} images one image is {100 / count:.2g} points"
        return (f"{one}, so a budget of {self} allows none to be lost; more images tell finer",)


def decibels(signal: float, noise: float) -> float:
    """Signal to noise, from their powers or sums of squares, the signal's above zero; infinite without noise."""
    return math.inf if noise == 0.0 else 10.0 * math.log10(signal / noise)
