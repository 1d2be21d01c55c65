"""coremltools is imported when it is needed, missing in one line, and heard by the log alone."""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import warnings

import pytest

from nextvit_exporters.coreml import loading
from nextvit_exporters.coreml.loading import LOG, coremltools, heard, part
from nextvit_exporters.errors import BuildFailed, MissingExtra


def test_missing_is_one_line_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)  # importing it now fails
    coremltools.cache_clear()
    try:
        with pytest.raises(MissingExtra, match=r"pip install 'nextvit-deploy\[coreml\]'$"):
            coremltools()
    finally:
        coremltools.cache_clear()


def test_what_is_said_goes_to_the_log_and_to_every_listener(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    coremltools()
    with caplog.at_level(logging.DEBUG, LOG.name), heard() as outer:
        with heard() as inner:
            logging.getLogger("coremltools").warning("untested")
            print("printed")  # noqa: T201 - as coremltools does
            warnings.warn("deprecated", FutureWarning, stacklevel=1)
        logging.getLogger("coremltools").warning("later")
    assert inner == ["untested", "FutureWarning: deprecated", "printed"]
    assert outer == [*inner, "later"]
    assert [record.getMessage() for record in caplog.records if record.name == LOG.name] == outer
    assert capfd.readouterr() == ("", "")
    with heard() as again:
        part("proto.Model_pb2")
    assert "untested" not in again, "heard once"


def test_an_error_holds_no_temporary_folder() -> None:
    def fails() -> None:
        folder = tempfile.TemporaryDirectory()
        raise ValueError(folder.name)

    def refuses() -> None:
        with heard():
            try:
                fails()
            except ValueError as error:
                raise BuildFailed("refused") from error

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also those that Python can't raise, which pytest does
        with pytest.raises(BuildFailed) as refusal:
            refuses()
        assert refusal.value.__cause__ is not None
        tracebacks = [refusal.value.__traceback__, refusal.value.__cause__.__traceback__]
        held = []
        for each in tracebacks:
            step = each
            while step is not None:
                held += [value for value in step.tb_frame.f_locals.values() if value is not refusal]
                step = step.tb_next
        assert not [value for value in held if isinstance(value, tempfile.TemporaryDirectory)]
        gc.collect()
    assert loading.LOG.name == "nextvit_exporters.coreml"
