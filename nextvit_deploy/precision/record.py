"""A precision plan: which blocks stay in floating point, why, and what was measured on the way there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from nextvit_deploy.manifest import plain
from nextvit_exporters.spec import Precision

SCHEMA: Final = 1
_PRECISIONS: Final = frozenset(map(str, Precision))


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block: what INT8 in it alone costs, how much of it there is, and what it computes in.

    ``sqnr_db`` is that of the logits with this block alone in INT8, ``share`` its part of all blocks' summed noise.
    ``macs`` are multiply-accumulates of its ``maps`` on one image.
    """

    block: str
    sqnr_db: float
    share: float
    maps: int
    macs: int
    precision: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """A network in INT8 but for the ``kept`` blocks that are first in the ranking, measured as a whole."""

    kept: int
    predicted_db: float
    sqnr_db: float
    top1: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """What was decided for one network within one budget.

    ``size`` is (height, width) in pixels, ``method`` how activations were calibrated, ``images`` the fingerprint of the
    ``count`` pictures it was measured on, ``blocks`` are in the order of the graph. ``predicted_db`` is what the
    noises of the blocks in INT8 add up to, ``sqnr_db`` what was measured. ``top1`` and ``float_top1`` are shares of
    right answers, None where the pictures have no classes. ``steps`` are all measurements, in the order they were made.
    """

    model: str
    size: tuple[int, int]
    budget: str
    method: str
    images: str
    count: int
    blocks: tuple[BlockPlan, ...]
    predicted_db: float
    sqnr_db: float
    float_top1: float | None
    top1: float | None
    steps: tuple[Measurement, ...]
    notes: tuple[str, ...] = ()

    @property
    def keep(self) -> tuple[str, ...]:
        """The blocks that stay in floating point, in the order of the graph."""
        return tuple(each.block for each in self.blocks if each.precision != str(Precision.INT8))

    def as_dict(self) -> dict[str, object]:
        """JSON-ready; ``from_dict`` reads it back."""
        return {"schema": SCHEMA} | {key: plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> PrecisionPlan:
        """Read what ``as_dict`` wrote; raises ValueError, in words that end a sentence, when it is something else."""
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {str(fields.get('schema'))[:20]}, this version reads {SCHEMA}")
        blocks = tuple(_block(each) for each in _list(fields, "blocks"))
        if not blocks or len({each.block for each in blocks}) != len(blocks):
            raise ValueError("it names no block, or one twice")
        height, width = (_whole({"size": each}, "size") for each in _pair(fields, "size"))
        return cls(
            model=_text(fields, "model"),
            size=(height, width),
            budget=_text(fields, "budget"),
            method=_text(fields, "method"),
            images=_text(fields, "images"),
            count=_whole(fields, "count"),
            blocks=blocks,
            predicted_db=_number(fields, "predicted_db"),
            sqnr_db=_number(fields, "sqnr_db"),
            float_top1=_share(fields, "float_top1"),
            top1=_share(fields, "top1"),
            steps=tuple(_measurement(each) for each in _list(fields, "steps")),
            notes=tuple(_text({"notes": each}, "notes") for each in _list(fields, "notes")),
        )


def _block(fields: object) -> BlockPlan:
    if not isinstance(fields, Mapping):
        raise ValueError("one of its blocks is no object")  # noqa: TRY004 - one kind of error for one kind of reader
    precision = _text(fields, "precision")
    if precision not in _PRECISIONS:
        raise ValueError(f"'{precision[:20]}' is no precision")
    return BlockPlan(
        block=_text(fields, "block"),
        sqnr_db=_number(fields, "sqnr_db"),
        share=_number(fields, "share"),
        maps=_whole(fields, "maps"),
        macs=_whole(fields, "macs"),
        precision=precision,
    )


def _measurement(fields: object) -> Measurement:
    if not isinstance(fields, Mapping):
        raise ValueError("one of its steps is no object")  # noqa: TRY004 - as above
    return Measurement(
        kept=_whole(fields, "kept"),
        predicted_db=_number(fields, "predicted_db"),
        sqnr_db=_number(fields, "sqnr_db"),
        top1=_share(fields, "top1"),
        met=fields.get("met") is True,
    )


def _list(fields: Mapping[str, object], name: str) -> list[object]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise ValueError(f"its {name} are no list")  # noqa: TRY004 - as above
    return value


def _pair(fields: Mapping[str, object], name: str) -> list[object]:
    value = _list(fields, name)
    if len(value) != 2:
        raise ValueError(f"its {name} is no pair")
    return value


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"its {name} is no text")
    return value


def _whole(fields: Mapping[str, object], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"its {name} is no whole number")
    return value


def _number(fields: Mapping[str, object], name: str) -> float:
    """A number; one that JSON has no word for is a string."""
    value = fields.get(name)
    if value in ("inf", "-inf"):
        return float(str(value))
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"its {name} is no number")
    return float(value)


def _share(fields: Mapping[str, object], name: str) -> float | None:
    """A part of one, or None."""
    if fields.get(name) is None:
        return None
    value = _number(fields, name)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"its {name} is no share")
    return value
