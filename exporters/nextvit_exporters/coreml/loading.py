"""coremltools, imported when it is needed and kept quiet.

Importing it on Linux tells of native libraries that only macOS has, and of versions of torch and scikit-learn that it
was not tested with; converting shows progress bars. None of that is the user's: it goes to the log ``LOG`` at debug
level, and to whoever listens with ``heard``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Final

from nextvit_exporters.errors import MissingExtra

LOG: Final = logging.getLogger("nextvit_exporters.coreml")
"""Everything coremltools says, at debug level."""
_BARS: Final = (
    ("coremltools.converters.mil.frontend.torch.ops", "_tqdm"),
    ("coremltools.converters.mil.mil.passes.pass_pipeline", "tqdm"),
)


class _Listener(logging.Handler):
    """Hands each line on, to the debug log and to the list of whoever is listening."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.listeners = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.hear(record.getMessage())

    def hear(self, line: str) -> None:
        self.lines.append(line)
        LOG.debug("%s", line)


_LISTENER: Final = _Listener()


@functools.cache
def coremltools() -> ModuleType:
    """The package; raises MissingExtra where it is not installed."""
    with heard():
        try:
            package = importlib.import_module("coremltools")
        except ModuleNotFoundError as error:
            if error.name != "coremltools":
                raise
            raise MissingExtra("the Core ML lane", "coreml") from error
        for module, name in _BARS:
            bar = importlib.import_module(module)
            setattr(bar, name, functools.partial(getattr(bar, name), disable=True))
    return package


def part(name: str) -> ModuleType:
    """A module of coremltools, by its path below the package: ``proto.Model_pb2``."""
    coremltools()
    with heard():
        return importlib.import_module(f"coremltools.{name}")


def _let_go(error: BaseException) -> None:
    """Drop what the frames of an error, and of what caused it, hold.

    coremltools' frames hold temporary folders, and Python warns of those that go without a word, whenever that is.
    """
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


@contextmanager
def heard() -> Iterator[list[str]]:
    """Everything coremltools says in the block, line by line, in place of the terminal."""
    logger = logging.getLogger("coremltools")
    logger.handlers, logger.propagate = [_LISTENER], False
    start, printed = len(_LISTENER.lines), StringIO()
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # Python's own, of temporary folders: by name, and by chance
        _LISTENER.listeners += 1
        try:
            yield lines
        except Exception as error:
            _let_go(error)
            raise
        finally:
            for warning in caught:
                _LISTENER.hear(f"{warning.category.__name__}: {warning.message}")
            for line in printed.getvalue().splitlines():
                _LISTENER.hear(line)
            lines += _LISTENER.lines[start:]
            _LISTENER.listeners -= 1
            if not _LISTENER.listeners:  # who listens further out hears it too
                _LISTENER.lines.clear()
