"""Where a TOML text says what: the line of every key, so that errors can name it; ``tomllib`` keeps none."""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
"""Keys from the root on, and places in arrays: ``("matrix", 0, "targets", 1)``."""

_BLANKS: Final = re.compile(r"[ \t]*")
_NOTHING: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE: Final = re.compile(r"[\w-]+")
_BASIC: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_LITERAL: Final = re.compile(r"'[^']*'")
_TEXTS: Final = {
    '"""': re.compile(r'"""(?:\\.|[^\\])*?"""(?!")', re.DOTALL),
    "'''": re.compile(r"'''.*?'''(?!')", re.DOTALL),
    '"': _BASIC,
    "'": _LITERAL,
}
"""By how they begin; the long ones first, for they begin as the short ones do."""
_SCALAR: Final = re.compile(r"[^,\]}#\n]+")


def lines_of(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every key, table and element of an array, each where it begins.

    ``text`` is what ``tomllib`` has read: anything else raises ValueError, or gives lines that mean nothing.
    """
    scanner = _Scanner(text, [place for place, letter in enumerate(text) if letter == "\n"])
    scanner.scan()
    return scanner.lines


def line_at(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of ``path``, or of what is nearest around it where it isn't there itself."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


@dataclass(slots=True)
class _Scanner:
    """Reads a text from ``at`` on.

    ``ends`` are the places of its newlines, ``counts`` how long each array of tables is so far.
    """

    text: str
    ends: list[int]
    at: int = 0
    lines: dict[KeyPath, int] = field(default_factory=dict)
    counts: dict[KeyPath, int] = field(default_factory=dict)

    @property
    def line(self) -> int:
        return bisect_left(self.ends, self.at) + 1

    def scan(self) -> None:
        table: KeyPath = ()
        while self.next_thing():
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.assignment(table)

    def header(self) -> KeyPath:
        """``[a.b]`` or ``[[a.b]]``, and the table that it opens."""
        line, brackets = self.line, 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        *parents, last = self.keys()
        self.at += brackets
        table: KeyPath = ()
        for key in parents:
            table = (*table, key)
            self.lines.setdefault(table, line)
            if table in self.counts:  # of an array, its latest table is meant
                table = (*table, self.counts[table] - 1)
        table = (*table, last)
        if brackets == 1:
            self.lines[table] = line
            return table
        self.lines.setdefault(table, line)
        place = self.counts.get(table, 0)
        self.counts[table] = place + 1
        table = (*table, place)
        self.lines[table] = line
        return table

    def assignment(self, table: KeyPath) -> None:
        """``a.b = value``."""
        line = self.line
        for key in self.keys():
            table = (*table, key)
            self.lines.setdefault(table, line)
        self.at += 1
        self.taken(_BLANKS)
        self.value(table)

    def value(self, path: KeyPath) -> None:
        """A value of any kind, with what is in it."""
        if self.text.startswith("[", self.at):
            self.array(path)
        elif self.text.startswith("{", self.at):
            self.at += 1
            while self.next_thing() and self.text[self.at] != "}":
                self.assignment(path)
                self.comma()
            self.at += 1
        else:
            opening = next((each for each in _TEXTS if self.text.startswith(each, self.at)), None)
            self.taken(_SCALAR if opening is None else _TEXTS[opening])

    def array(self, path: KeyPath) -> None:
        """``[value, value]``, over as many lines as it takes."""
        self.at += 1
        place = 0
        while self.next_thing() and self.text[self.at] != "]":
            self.lines[(*path, place)] = self.line
            self.value((*path, place))
            self.comma()
            place += 1
        self.at += 1

    def keys(self) -> tuple[str, ...]:
        """``a."b c".d``."""
        found = []
        while True:
            self.taken(_BLANKS)
            found.append(self.key())
            self.taken(_BLANKS)
            if not self.text.startswith(".", self.at):
                return tuple(found)
            self.at += 1

    def key(self) -> str:
        quote = self.text[self.at : self.at + 1]
        if quote == '"':
            return str(tomllib.loads(f"key = {self.taken(_BASIC)}")["key"])
        return self.taken(_LITERAL)[1:-1] if quote == "'" else self.taken(_BARE)

    def comma(self) -> None:
        if self.next_thing() and self.text[self.at] == ",":
            self.at += 1

    def next_thing(self) -> bool:
        """Go past blanks, newlines and comments; whether anything follows."""
        self.taken(_NOTHING)
        return self.at < len(self.text)

    def taken(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise ValueError(f"no TOML on line {self.line}")
        self.at = found.end()
        return found[0]
