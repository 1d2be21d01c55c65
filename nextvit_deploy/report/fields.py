"""Read JSON that anybody may have written: strict about what is needed, and text is text whatever is in it."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LARGEST: Final = 32 << 20
"""Bytes of one file; a check of thirty large artefacts has about a third of it."""
_LONG: Final = 400
"""Characters of a text that is shown."""
_MOST: Final = 20_000
"""Entries of one list; the largest Next-ViT has some thousand operations."""
_MORE: Final = 1e300
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Unreadable(Exception):
    """Why a file can't be used, in words that end a sentence."""


@dataclass(frozen=True, slots=True)
class Fields:
    """One JSON object; every reader raises Unreadable where the field is missing or of another kind."""

    values: Mapping[str, object]

    def text(self, name: str, long: int = _LONG) -> str:
        """Printable text, cut to ``long`` characters."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise Unreadable(f"its '{name}' is no text")
        return clean(value, long)

    def text_or(self, name: str, default: str = "") -> str:
        """The same, or ``default`` where there is none."""
        return self.text(name) if self.values.get(name) is not None else default

    def sha256(self, name: str) -> str:
        """64 hexadecimal digits."""
        value = self.values.get(name)
        if not isinstance(value, str) or _SHA256.fullmatch(value) is None:
            raise Unreadable(f"its '{name}' is no SHA-256")
        return value

    def number(self, name: str) -> float:
        """A number; what JSON has no word for is a string."""
        value = self.values.get(name)
        if isinstance(value, str) and value in {"inf", "-inf", "nan"}:
            return float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MORE:
            raise Unreadable(f"its '{name}' is no number")
        return float(value)

    def number_or_none(self, name: str) -> float | None:
        """The same, or None where there is none."""
        return None if self.values.get(name) is None else self.number(name)

    def whole(self, name: str) -> int:
        """A whole number, none negative."""
        value = self.number(name)
        if not math.isfinite(value) or value < 0 or value != int(value):
            raise Unreadable(f"its '{name}' is no whole number")
        return int(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise Unreadable(f"its '{name}' is neither true nor false")
        return value

    def one(self, name: str) -> Fields:
        """An object in it."""
        return as_fields(self.values.get(name), name)

    def one_or_none(self, name: str) -> Fields | None:
        """The same, or None where there is none."""
        return None if self.values.get(name) is None else self.one(name)

    def many(self, name: str) -> tuple[Fields, ...]:
        """The objects of a list in it."""
        return tuple(as_fields(each, name) for each in self._list(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a list in it."""
        return tuple(Fields({name: each}).text(name) for each in self._list(name))

    def wholes(self, name: str) -> tuple[int, ...]:
        """The whole numbers of a list in it."""
        return tuple(Fields({name: each}).whole(name) for each in self._list(name))

    def pair(self, name: str) -> tuple[int, int]:
        """Two whole numbers."""
        found = self.wholes(name)
        if len(found) != 2:
            raise Unreadable(f"its '{name}' is no pair")
        return found[0], found[1]

    def plain(self) -> tuple[tuple[str, str], ...]:
        """Its names and values as text, by name; what is no text, number or word is left out."""
        return tuple(
            (clean(key, 80), clean(str(value), 200))
            for key, value in sorted(self.values.items())
            if isinstance(value, str | int | float)
        )

    def _list(self, name: str) -> list[object]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise Unreadable(f"its '{name}' is no list")
        if len(value) > _MOST:
            raise Unreadable(f"its '{name}' has {len(value)} entries, more than a Next-ViT has of anything")
        return value


def as_fields(value: object, name: str) -> Fields:
    """An object; raises Unreadable for anything else."""
    if not isinstance(value, Mapping):
        raise Unreadable(f"its '{name}' is no object")
    return Fields(value)


def read(path: Path) -> Fields:
    """The one JSON object that a file holds; raises Unreadable."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe must not keep us waiting
        with open(handle, "rb") as file:  # noqa: PTH123 - of a handle
            told = os.fstat(handle)
            if not stat.S_ISREG(told.st_mode):
                raise Unreadable("it is no file")
            if told.st_size > LARGEST:
                raise Unreadable(f"it has {told.st_size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f} MB")
            value = json.loads(file.read(LARGEST))
    except OSError as error:
        raise Unreadable(f"it can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable("it is no JSON") from error
    if not isinstance(value, dict):
        raise Unreadable("it holds no JSON object")
    return Fields(value)


def clean(text: str, long: int = _LONG) -> str:
    """One line of printable characters: what turns text around or hides in it is spelt out, what is long is cut."""
    line = " ".join(text[: 4 * long].split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return shown if len(shown) <= long else f"{shown[: long - 1]}…"
