"""Options that commands share, and how their texts are read."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from nextvit_exporters.engine_spec import Range

_LARGEST: Final = 16384
"""Pixels a side; beyond it even counting overflows."""


class InputChoice(str, Enum):
    """What the file reads."""

    NORMALIZED = "normalized"
    FLOAT = "float"
    UINT8 = "uint8"
    UINT8_NHWC = "uint8-nhwc"


Ckpt = Annotated[
    str | None,
    typer.Argument(
        help="A .pth or .safetensors file, or a hub id; the bundled demo when left out.", show_default=False
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the file and its manifest.")]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="N|HxW", help="Input size in pixels; the checkpoint's when left out."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")]
Images = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Images to verify on; the demo's when left out.")
]
Count = Annotated[int, typer.Option("--count", min=1, help="How many images to verify on.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights where the file holds both.")]
Reads = Annotated[InputChoice, typer.Option("--input", help="Normalised float32, or raw RGB pixels from 0 to 255.")]
Skip = Annotated[
    list[str] | None, typer.Option("--skip-pass", metavar="NAME", help="Leave a pass out; may be repeated.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more: what was inferred, what was left alone.")]


def one_precision(asked: dict[str, bool]) -> str | None:
    """The one precision asked for, None where none is; raises BadParameter where two are."""
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        msg = f"--{chosen[0]} and --{chosen[1]} exclude each other; give one"
        raise typer.BadParameter(msg, param_hint="the precision")
    return chosen[0] if chosen else None


def parse_size(text: str | None, option: str = "--size") -> tuple[int, int] | None:
    """``224`` or ``224x320`` (height x width), in pixels."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII | re.IGNORECASE)
    if found is None:
        msg = f"'{text}' is not a size; write 224 or HEIGHTxWIDTH such as 224x320"
        raise typer.BadParameter(msg, param_hint=f"'{option}'")
    height, width = int(found[1]), int(found[2] or found[1])
    if max(height, width) > _LARGEST:
        msg = f"'{text}' is larger than {_LARGEST} pixels a side"
        raise typer.BadParameter(msg, param_hint=f"'{option}'")
    return height, width


def parse_sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """``224,256x320,384``: several sizes, (height, width) in pixels each, in the order given."""
    if text is None:
        return ()
    sizes = [parse_size(part.strip(), "--enumerated-sizes") for part in text.split(",")]
    return tuple(dict.fromkeys(size for size in sizes if size is not None))


def parse_sides(text: str | None) -> tuple[int, int] | None:
    """``128:384``: the smallest and the largest side, in pixels."""
    found = None if text is None else re.fullmatch(r"(\d{1,5}):(\d{1,5})", text, re.ASCII)
    if text is not None and found is None:
        msg = f"'{text}' is no range of sides; write MIN:MAX such as 128:384"
        raise typer.BadParameter(msg, param_hint="'--flexible'")
    if found is not None and max(int(found[1]), int(found[2])) > _LARGEST:
        msg = f"'{text}' is larger than {_LARGEST} pixels a side"
        raise typer.BadParameter(msg, param_hint="'--flexible'")
    return None if found is None else (int(found[1]), int(found[2]))


def parse_size_range(text: str | None) -> tuple[Range, Range] | None:
    """``224``, ``224x320`` or ``224:256:384`` (height x width each), in pixels, as ranges of height and width."""
    from nextvit_exporters.engine_spec import Range

    if text is None:
        return None
    sizes = [parse_size(part) for part in text.split(":")]
    if len(sizes) not in {1, 3}:
        msg = f"'{text}' is no range of sizes; write one size, or MIN:OPT:MAX such as 224:256:384"
        raise typer.BadParameter(msg, param_hint="'--size'")
    known = [size for size in sizes if size is not None]
    smallest, best, largest = known if len(known) == 3 else known * 3
    height, width = (Range(*sides) for sides in zip(smallest, best, largest, strict=True))
    return height, width
