from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nextvit_deploy.folders import Kind, check_place, check_replaceable, published_folder
from nextvit_exporters.errors import OutputNotWritten
from tests.deploy.support import contents

THING = Kind("thing", lambda folder: (folder / "mark").exists(), ("mark", "deep/more"))


def write(folder: Path, text: str) -> None:
    with published_folder(folder, THING) as sibling:
        (sibling / "mark").write_text(text, encoding="utf-8")


def test_a_folder_appears_whole_and_replaces_its_earlier_self(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "one")
    (tmp_path / "a" / "b" / "deep").mkdir()
    (tmp_path / "a" / "b" / "deep" / "more").write_bytes(b"x")
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
    with pytest.raises(KeyboardInterrupt), published_folder(tmp_path / "a" / "b", THING) as sibling:
        (sibling / "half").write_bytes(b"x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    check_replaceable(tmp_path / "a", THING)
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


@pytest.mark.parametrize("foreign", ["notes.txt", "deep/notes.txt", "deep/er/mark", "more", "mark.d/x"])
def test_what_has_come_into_ours_stays(tmp_path: Path, foreign: str) -> None:
    write(tmp_path / "a", "one")
    (tmp_path / "a" / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / foreign).write_bytes(b"x")
    named = foreign if (tmp_path / "a" / foreign).parent.name in {"a", "deep"} else str(Path(foreign).parent)
    message = rf"a holds {named} besides the thing; move it away or choose another folder"
    with pytest.raises(OutputNotWritten, match=message):
        write(tmp_path / "a", "two")
    with pytest.raises(OutputNotWritten, match=message):
        check_place(tmp_path / "a", THING)
    assert contents(tmp_path) == {"a/mark": b"one", f"a/{foreign}": b"x"}


def test_links_and_empty_folders_are_foreign_too(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    (tmp_path / "a" / "deep").symlink_to(tmp_path)
    with pytest.raises(OutputNotWritten, match="a holds deep besides the thing"):
        write(tmp_path / "a", "two")
    (tmp_path / "a" / "deep").unlink()
    (tmp_path / "a" / "empty").mkdir()
    with pytest.raises(OutputNotWritten, match="a holds empty besides the thing"):
        write(tmp_path / "a", "two")


def test_what_comes_into_it_meanwhile_stays(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    with (
        pytest.raises(OutputNotWritten, match="a holds late besides the thing"),
        published_folder(tmp_path / "a", THING) as sibling,
    ):
        (sibling / "mark").write_bytes(b"two")
        (tmp_path / "a" / "late").write_bytes(b"x")
    assert contents(tmp_path) == {"a/mark": b"one", "a/late": b"x"}


def test_a_place_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "a", THING)
    write(tmp_path / "a", "one")
    check_place(tmp_path / "a", THING)
    assert contents(tmp_path) == {"a/mark": b"one"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OutputNotWritten, match="file is there and is no folder"):
        check_place(tmp_path / "file", THING)
    with pytest.raises(OutputNotWritten, match="file can't be written"):
        check_place(tmp_path / "file" / "a", THING)
    for nameless in (Path(), tmp_path / ".."):
        with pytest.raises(OutputNotWritten, match="has no name of its own"):
            check_place(nameless, THING)


def test_a_place_that_refuses_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputNotWritten, match="Permission denied"):
        check_place(tmp_path / "deep" / "a", THING)
    assert list(tmp_path.iterdir()) == []
