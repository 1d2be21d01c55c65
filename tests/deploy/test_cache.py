"""Where work that can be taken up again is kept, and what is told where it can't be."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from nextvit_deploy.cache import VARIABLE, cache_folder, not_kept
from nextvit_exporters.errors import DeployError, OutputNotWritten

LINUX = pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="other systems have other folders")


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@LINUX
def test_the_variable_goes_before_the_systems_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("plans") == tmp_path / ".cache" / "nextvit-deploy" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to pass over
    assert cache_folder("plans") == tmp_path / ".cache" / "nextvit-deploy" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("plans") == tmp_path / "xdg" / "nextvit-deploy" / "plans"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert cache_folder("plans") == tmp_path / "mine" / "plans"


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(DeployError, match=f"there is no home folder .*; name one in {VARIABLE}"):
        cache_folder("plans")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cache_folder("plans") == tmp_path / "plans"


def test_why_nothing_is_kept() -> None:
    full = OutputNotWritten("/c/x was not written: no space left on the disk; free some or choose another output")
    assert not_kept(Path("/c"), full) == f"{Path('/c')} can't be written: no space left on the disk"
    assert not_kept(Path("/c"), PermissionError(errno.EACCES, "Permission denied", "/c/x")).endswith(
        "can't be written: Permission denied"
    )
