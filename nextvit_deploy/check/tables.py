"""Tables of a TOML file, read so that whatever is wrong in them is one line with the place where it is."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final, TypeVar

from nextvit_deploy.check.lines import KeyPath, line_at, lines_of
from nextvit_models.errors import DeployError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_KINDS: Final = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a table",
}
_PLACE: Final = re.compile(r"(.*?) \(at (?:line (\d+), column (\d+)|end of document)\)")


class BadConfig(DeployError):
    """A configuration says what can't be done; the message begins with its file and line."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table of a file; every method that reads raises BadConfig for what it can't take.

    ``at`` is where the table is in the file, ``lines`` are the file's.
    """

    file: Path
    lines: Mapping[KeyPath, int]
    values: Mapping[str, object]
    at: KeyPath = ()

    def bad(self, message: str, *place: str | int) -> BadConfig:
        """The error about what is at ``place`` in this table, about the table itself where none is given."""
        return BadConfig(f"{self.file}:{line_at(self.lines, (*self.at, *place))}: {' '.join(message.split())}")

    def only(self, what: str, known: Sequence[str], hint: Callable[[str], str] = lambda _: "") -> None:
        """Raise for a key that isn't known; ``hint`` may say better what to do about it than that."""
        for key in self.values:
            if key not in known:
                raise self.bad(f"there is no {what} '{key}'; {hint(key) or choose(key, known)}", key)

    def text(self, key: str, example: str) -> str | None:
        """A text that isn't empty."""
        value = self._taken(key, str, f'"{example}"')
        if value is not None and not value.strip():
            raise self.bad(f'{key} is empty; write for example {key} = "{example}", or leave it out', key)
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._taken(key, bool, str(not default).lower())
        return default if value is None else value

    def whole(self, key: str, example: int, most: int, least: int = 1) -> int | None:
        """A whole number from ``least`` to ``most``."""
        value = self._taken(key, int, str(example))
        if value is not None and not least <= value <= most:
            raise self.bad(f"{key} is {shown(value)}; give {least} to {most}", key)
        return value

    def ratio(self, key: str, example: float, least: float, why: str) -> float | None:
        """A finite number of ``least`` or more, or above 0 where ``least`` is 0; ``why`` says so."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(
                f"{key} is {kind(value)}, where a number is needed; write for example {key} = {example}", key
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number < least or number <= 0:
            raise self.bad(f"{key} is {shown(value)}; {why}", key)
        return number

    def items(self, key: str, example: str) -> tuple[object, ...]:
        """The elements of a list that isn't empty; nothing where there is no such key."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.bad(f"{key} is {kind(value)}, where a list is needed; write for example {key} = {example}", key)
        if not value:
            raise self.bad(f"{key} is empty; write for example {key} = {example}", key)
        return tuple(value)

    def each(self, key: str, example: str, read: Callable[[object, int], T]) -> tuple[T, ...]:
        """The elements of a list, each as ``read`` makes it of its value and its place; no two the same."""
        found: list[T] = []
        for place, value in enumerate(self.items(key, example)):
            made = read(value, place)
            if made in found:
                raise self.bad(f"{key} has {shown(value)} twice; leave one out", key, place)
            found.append(made)
        return tuple(found)

    def choices(self, key: str, what: str, known: Sequence[str]) -> tuple[str, ...]:
        """A list of names out of ``known``."""

        def read(value: object, place: int) -> str:
            if not isinstance(value, str) or value not in known:
                raise self.bad(f"there is no {what} {shown(value)}; {choose(str(value), known)}", key, place)
            return value

        return self.each(key, f'["{known[0]}"]', read)

    def table(self, key: str) -> Table | None:
        """A table in this one."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            header = ".".join(str(each) for each in (*self.at, key) if isinstance(each, str))
            raise self.bad(f"{key} is {kind(value)}, where a table is needed; begin it with [{header}]", key)
        return Table(self.file, self.lines, value, (*self.at, key))

    def tables(self, key: str) -> tuple[Table, ...]:
        """The tables of an array of tables."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.bad(f"{key} is {kind(value)}, where there may be several; begin each with [[{key}]]", key)
        return tuple(Table(self.file, self.lines, each, (*self.at, key, i)) for i, each in enumerate(value))

    def _taken(self, key: str, wanted: type[T], example: str) -> T | None:
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not wanted:  # a bool is no whole number here
            needed = f"{kind(value)}, where {_KINDS[wanted]} is needed"
            raise self.bad(f"{key} is {needed}; write for example {key} = {example}", key)
        return value


def read_tables(path: Path) -> Table:
    """The root table of a file; raises BadConfig where it can't be read or isn't TOML."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadConfig(f"there is no {path}; write one with: nextvit-export init") from None
    except OSError as error:
        raise BadConfig(f"{path} can't be read: {error.strerror}; give a TOML file") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadConfig(f"{path}:{line}: not text in UTF-8; save it so") from error
    try:
        values = tomllib.loads(text)
        return Table(path, lines_of(text), values)
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(_not_toml(path, text, str(error))) from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise BadConfig(f"{path}:1: nested too deeply, or a number too long; write it plainer") from error


def choose(name: str, known: Sequence[str]) -> str:
    """What to do about a name that isn't known."""
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choose one of {', '.join(known)}"


def kind(value: object) -> str:
    """What a value is, in words."""
    return _KINDS.get(type(value), "a date or a time")


def shown(value: object) -> str:
    """A value as an error quotes it, in one line and not too long: both ends, as a path's end names its file."""
    if isinstance(value, bool):
        return str(value).lower()
    text = f"'{value}'" if isinstance(value, str) else str(value) if not _huge(value) else "a number too long to print"
    return text if len(text) <= 80 else f"{text[:38]}...{text[-39:]}"


def _huge(value: object) -> bool:
    return isinstance(value, int) and value.bit_length() > 4096  # beyond some digits Python refuses to print


def _not_toml(path: Path, text: str, message: str) -> str:
    """The parser's own message, with its line in front as everywhere else."""
    found = _PLACE.fullmatch(message.strip())
    what, line, column = (found[1], found[2], found[3]) if found else (message, None, None)
    line = line or str(text.rstrip("\n").count("\n") + 1)
    where = f" in column {column}" if column else " at the end of the file"
    return f"{path}:{line}: not TOML{where}: {what[:1].lower()}{what[1:]}; see https://toml.io for how it is written"
