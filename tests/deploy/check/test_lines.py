"""The line of every key, in files written in every way that TOML allows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvit_deploy.check.lines import KeyPath, line_at, lines_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def leaves(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    """Everything in a parsed file that holds nothing itself."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list) and value:
        for place, each in enumerate(value):
            yield from leaves(each, (*path, place))
    else:
        yield path, value


def check(text: str) -> dict[KeyPath, int]:
    """Every leaf has a line; one with a mark of its own has the line where the mark stands."""
    lines = lines_of(text)
    for path, value in leaves(tomllib.loads(text)):
        assert path in lines or not path, path
        marks = re.findall(r"\b\d{7}\b", str(value))
        if len(marks) == 1:
            assert text.count(marks[0]) == 1
            assert lines[path] == text[: text.index(marks[0])].count("\n") + 1, path
    for path in lines:
        assert all(path[:depth] in lines for depth in range(1, len(path)))
    return lines


TRICKY = dedent(
    r'''
    # [not.a.table] = "[[nor]]"
    top = 1000001 # comment with "quotes' and [ brackets
    "quoted \"key\" \u00e9" = 1000002
    'literal \key' . plain = 1000003
    dotted.a.b = 1000004
    dotted.a.c = 1000005
    "" = 1000006

    [table] # [other]
    text = "1000007 # no comment \" ] } ,"
    literal = '1000008 \'
    long = """1000009 "two quotes"" \""" [[matrix]]
    key = 5
    \\"""
    five = """1000010
    a"""""
    raw = \'\'\'1000011 \
    [x]
    ''quotes'\'\'\'
    when = 1979-05-27 07:32:00 # a blank inside
    empty = ""
    none = [ ]
    nothing = {}

    [table.inner . "deep er"]
    array = [
        1000012, # one, two ]
        # 3,
        [ 1000013,
          1000014 ],
        """
    1000015""",
        { a = 1000016, b.c = [1000017, {d = 1000018}] },
    ]

    [[matrix]]
    a = 1000019
    [matrix.sub]
    b = 1000020
    [[matrix.list]]
    c = 1000021
    [[matrix.list]]
    c = 1000022
    [matrix.list.deep]
    d = 1000023
    [[ "matrix" ]]
    [[matrix]]
    a = 1000024
    [[matrix.list]]
    c = 1000025
    [dotted.z] # a table made by keys above, gone on with
    a = 1000026'''
).replace("\\'\\'\\'", "'''")


def test_a_tricky_file() -> None:
    # the one mark that stands a line below its value's beginning
    lines = check(TRICKY.replace("1000015", "15"))
    where = {
        mark: TRICKY[: TRICKY.index(mark)].count("\n") + 1 for mark in ("[table]", "[[matrix]]\na", "[matrix.sub]")
    }
    assert lines["table",] == where["[table]"]
    assert lines["matrix", 0] == lines["matrix",] == where["[[matrix]]\na"]
    assert lines["matrix", 0, "sub"] == where["[matrix.sub]"]
    assert lines["matrix", 0, "list", 1, "deep", "d"] == line(TRICKY, "1000023")
    assert lines["matrix", 1] == line(TRICKY, '[[ "matrix" ]]')
    assert lines["matrix", 2, "list", 0, "c"] == line(TRICKY, "1000025")
    assert lines["table", "inner", "deep er", "array", 2] == line(TRICKY, "1000015") - 1


def line(text: str, mark: str) -> int:
    return text[: text.index(mark)].count("\n") + 1


def test_windows_line_ends() -> None:
    assert check(TRICKY.replace("1000015", "15").replace("\n", "\r\n")) == lines_of(TRICKY)


def test_what_is_not_there_has_the_line_around_it() -> None:
    lines = lines_of("\n[a]\nb = [\n1]\n")
    assert line_at(lines, ("a", "b", 0)) == 4
    assert line_at(lines, ("a", "b", 7)) == 3
    assert line_at(lines, ("a", "x", "y")) == 2
    assert line_at(lines, ("x",)) == line_at(lines, ()) == 1


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing", "[a]", "a = 1", "[[a]]\n[[a]]", "a=[[],[[]],{}]\r\nb={c=[]}"]
)
def test_small_files(text: str) -> None:
    check(text)


def test_a_header_is_where_a_table_is_even_when_its_inner_one_came_first() -> None:
    assert lines_of("[a.b]\n[a]\n")["a",] == 2


@pytest.mark.parametrize("text", ["= 1", "a", "[a", "a = ", 'a = "', "a = [1", "a = {b = 1", "?"])
def test_what_is_no_toml_comes_to_an_end(text: str) -> None:
    with suppress(ValueError):
        assert lines_of(text)


class Writer:
    """A parsed value as text, in a layout that is drawn; each number has seven digits and is there once."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.number = 1_000_000

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def space(self) -> str:
        return self.draw(st.sampled_from(["", " ", "\t"]))

    def gap(self) -> str:
        return self.draw(st.sampled_from(["", " ", "\n", " # no ] } , = [[x]]\n\n", "\n\t"]))

    def key(self, index: int) -> str:
        text = self.draw(st.text(alphabet=" abé.\"'\\#[]{}=,\t", max_size=4)) + str(index)
        return self.draw(st.sampled_from([json.dumps(text, ensure_ascii=False), f"k-{index}", f"'{index} #.='"]))

    def scalar(self) -> str:
        self.number += 1
        shapes = ["{}", '"{} # \\" ]"', "'{} \\'", '"""{} ""\n[x]\n k = 1"""', "'''{}\n'' ]\n'''", "{}.5", "[{}]"]
        return self.draw(st.sampled_from(shapes)).format(self.number)

    def value(self, depth: int) -> str:
        kind = self.draw(st.sampled_from(["scalar", "array", "inline"])) if depth else "scalar"
        if kind == "scalar":
            return self.scalar()
        count = self.draw(st.integers(0, 3))
        if kind == "array":
            inside = ",".join(self.gap() + self.value(depth - 1) + self.gap() for _ in range(count))
            return f"[{inside}{',' if count and self.chance() else ''}{self.gap()}]"
        return "{" + ",".join(self.pair(i, depth - 1) for i in range(count)) + "}"

    def pair(self, index: int, depth: int) -> str:
        dotted = "".join(f"{self.space()}.{self.space()}{self.key(index)}" for _ in range(self.draw(st.integers(0, 2))))
        return f"{self.space()}{self.key(index)}{dotted}{self.space()}={self.space()}{self.value(depth)}{self.space()}"

    def text(self) -> str:
        parts = [self.pair(index, 2) for index in range(self.draw(st.integers(0, 3)))]
        for index in range(self.draw(st.integers(0, 4))):
            name = self.draw(st.sampled_from(["t", "'t t'", '"\\u0074!"', f"t{index}"]))
            header = self.draw(st.sampled_from([f"[[{name}]]", f"[ t{index}.x{index}]", f"[[{name}.deep]]"]))
            parts += [header + self.draw(st.sampled_from(["", " # [c]", "\t"]))]
            parts += [self.pair(each, 2) for each in range(self.draw(st.integers(0, 2)))]
        return "\n".join(
            f"{part}{self.draw(st.sampled_from(['', chr(10), chr(10) + '# = ' + chr(10)]))}" for part in parts
        )


@st.composite
def texts(draw: st.DrawFn) -> str:
    return Writer(draw).text()


@given(texts())
def test_any_layout(text: str) -> None:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:  # the same table twice, or a list that was something else
        return
    check(text)
