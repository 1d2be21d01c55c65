"""Reading a weights file that nobody vouches for.

The kind of file is told by its first bytes, its sizes are checked before anything is allocated, and a pickle is
searched for imports before an unpickler sees it. What cannot be used is a ``CheckpointMismatch``, what asks to
import code an ``UnsafeCheckpoint``; both say in one line what the file is.
"""

from __future__ import annotations

import mmap
import shlex
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, cast

import torch
from safetensors import SafetensorError, safe_open

from nextvit_models._pickles import foreign_imports
from nextvit_models.errors import CheckpointMismatch, UnsafeCheckpoint

_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch.save's magic number
_LEGACY_PICKLES: Final = 5  # magic number, protocol, system, the object, the storages' keys
_TAR: Final = (257, b"ustar")
_MAX_PICKLE: Final = 16 << 20  # bytes; a Next-ViT with its optimizer needs less than one MiB
_MAX_HEADER: Final = 100_000_000  # bytes; safetensors' own limit
_KNOWN: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run: git lfs pull",
    b"<!DOCTYPE": "a web page, not weights; the download did not get the file",
    b"<html": "a web page, not weights; the download did not get the file",
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a weights file held: tensors or containers of them, and the text metadata of a safetensors header.

    Tensors may still be mapped to the file: clone what is to be kept.
    """

    value: object
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights(path: Path) -> Contents:
    """Read a ``.pth`` (zip or older) or ``.safetensors`` file, told apart by content, without running any of it."""
    start = _first_bytes(path)
    for magic, what in _KNOWN.items():
        if start.startswith(magic):
            raise CheckpointMismatch(f"{path}: {what}")
    if start[_TAR[0] :].startswith(_TAR[1]):
        raise CheckpointMismatch(f"{path}: a tar archive of PyTorch before 0.4; load it there and save it again")
    if start.startswith(_ZIP):
        return _read_zip(path)
    if start.startswith(_LEGACY):
        return _read_legacy(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    raise _unknown(path)


def _first_bytes(path: Path) -> bytes:
    """Up to 512 bytes of a regular file, at least one."""
    if path.is_dir():
        raise CheckpointMismatch(f"{path}: a folder; name the weights file inside it")
    if not path.exists():
        raise CheckpointMismatch(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointMismatch(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error.strerror or error}") from error
    if not start:
        raise CheckpointMismatch(f"{path}: the file is empty")
    return start


def one_line(error: BaseException) -> str:
    """The message of a foreign exception on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _read_zip(path: Path) -> Contents:
    """torch.save since 1.6: a zip of uncompressed entries, one of them a pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickle = _checked_entries(path, archive)
            program = archive.read(pickle)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError, RuntimeError) as error:
        raise CheckpointMismatch(f"{path}: a truncated or damaged archive: {one_line(error)}") from error
    _refuse_imports(path, BytesIO(program))
    return Contents(_torch_load(path, mapped=True))


def _checked_entries(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The pickle among the entries, once all of them are what torch.save writes."""
    entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointMismatch(
            f"{path}: a TorchScript archive, which holds a program; save the state dict of the model instead"
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointMismatch(
                f"{path}: entry {entry.filename!r} is compressed ({entry.compress_size} to {entry.file_size} bytes); "
                "torch.save stores entries uncompressed, so this is not a checkpoint of PyTorch"
            )
    declared, held = sum(entry.file_size for entry in entries), path.stat().st_size
    if declared > held:
        raise CheckpointMismatch(f"{path}: its entries declare {declared} bytes, the file holds {held}")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointMismatch(f"{path}: a zip archive, but not one that torch.save wrote")
    if pickles[0].file_size > _MAX_PICKLE:
        raise CheckpointMismatch(f"{path}: its pickle of {pickles[0].file_size} bytes is no state dict's")
    return pickles[0]


def _read_legacy(path: Path) -> Contents:
    """torch.save before 1.6: five pickles, then the storages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        for _ in range(_LEGACY_PICKLES):
            _refuse_imports(path, cast("BinaryIO", view))
    return Contents(_torch_load(path, mapped=False))


def _torch_load(path: Path, *, mapped: bool) -> object:
    try:
        contents: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        # Damaged bytes can raise nearly anything inside the unpickler; all of it means the same to the user.
        raise CheckpointMismatch(f"{path}: PyTorch cannot read it: {one_line(error)}") from error
    return contents


def _read_safetensors(path: Path) -> Contents:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size - 8, _MAX_HEADER):
        raise CheckpointMismatch(
            f"{path}: a truncated or damaged safetensors file: it declares a header of {header} bytes in {size}"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return Contents({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatch(f"{path}: a truncated or damaged safetensors file: {one_line(error)}") from error


def _refuse_imports(path: Path, stream: BinaryIO) -> None:
    try:
        wanted = foreign_imports(stream)
    except (ValueError, OverflowError, MemoryError) as error:
        raise CheckpointMismatch(f"{path}: a truncated or damaged pickle: {one_line(error)}") from error
    if wanted:
        raise _unsafe(path, wanted)


def _unsafe(path: Path, wanted: tuple[str, ...]) -> UnsafeCheckpoint:
    """The refusal, with the line that saves the state dict alone."""
    names = ", ".join(name[:100] if name.isprintable() else ascii(name)[:100] for name in wanted[:5])
    names += f" and {len(wanted) - 5} more" if len(wanted) > 5 else ""
    harmless = set(wanted) == {"argparse.Namespace"}
    load = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        "c = torch.load({0!r}, map_location='cpu', weights_only=True)"
        if harmless
        else "import torch; c = torch.load({0!r}, map_location='cpu', weights_only=False)"
    )
    save = "torch.save(c.get('model', c.get('state_dict', c)), {1!r})"
    command = f"{load}; {save}".format(str(path), str(path.with_name(f"{path.stem}-weights.pth")))
    advice = "save the state dict alone" if harmless else "only if you trust its origin, save the state dict alone"
    return UnsafeCheckpoint(
        f"{path}: loading it would import {names}; nothing was executed; {advice}: python -c {shlex.quote(command)}"
    )


def _unknown(path: Path) -> CheckpointMismatch | UnsafeCheckpoint:
    """A file of no known kind: it may still be a bare pickle, and then its imports matter most."""
    with path.open("rb") as file:
        head = file.read(_MAX_PICKLE)
    try:
        wanted = foreign_imports(BytesIO(head))
    except (ValueError, OverflowError, MemoryError):
        return CheckpointMismatch(f"{path}: neither a checkpoint of PyTorch nor a safetensors file")
    if wanted:
        return _unsafe(path, wanted)
    return CheckpointMismatch(f"{path}: a bare pickle, not written by torch.save; save the state dict with torch.save")
