from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nextvit_deploy.folders import check_replaceable, published_folder
from nextvit_exporters.errors import OutputNotWritten
from tests.deploy.support import contents


def ours(folder: Path) -> bool:
    return (folder / "mark").exists()


def write(folder: Path, text: str) -> None:
    with published_folder(folder, "thing", ours) as sibling:
        (sibling / "mark").write_text(text, encoding="utf-8")


def test_a_folder_appears_whole_and_replaces_its_earlier_self(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "one")
    (tmp_path / "a" / "b" / "more").mkdir()
    write(tmp_path / "a" / "b", "two")
    assert contents(tmp_path) == {"a/b/mark": b"two"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_refused_rename_puts_the_earlier_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "one")
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError(errno.EACCES, "Permission denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputNotWritten, match="no permission"):
        write(tmp_path / "a", "two")
    assert contents(tmp_path) == {"a/mark": b"one"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), published_folder(tmp_path / "a" / "b", "thing", ours) as sibling:
        (sibling / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    check_replaceable(tmp_path / "a", "thing", ours)
    (tmp_path / "a" / "mine").write_bytes(b"x")
    with pytest.raises(OutputNotWritten, match="a is there and is no thing of this program"):
        write(tmp_path / "a", "one")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputNotWritten, match="link is there and is no folder"):
        write(tmp_path / "link", "one")
    assert contents(tmp_path) == {"a/mine": b"x"}
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputNotWritten, match="not a folder"):
        write(tmp_path / "file" / "a", "one")
