"""Which folder is which class, and one line where that can't be said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nextvit_deploy.data import find_pictures
from nextvit_deploy.evaluate.dataset import Classes, classes_of
from nextvit_exporters.errors import DeployError
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT

THREE = ("cat", "dog", "eel")


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint(DEMO_CHECKPOINT)


def checkpoint(demo: Checkpoint, labels: tuple[str, ...]) -> Checkpoint:
    """The demo, as if it had three classes."""
    model = type(demo.model)(demo.model.config, 3)
    return replace(demo, model=model, labels=labels, name="net.pth")


def folder(root: Path, *files: str, empty: str = "") -> Path:
    """None of the files is a picture that could be read: none needs to be."""
    for file in files:
        path = root / f"{file}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if empty:
        (root / empty).mkdir()
    return root


def classes(root: Path, of: Checkpoint, limit: int | None = None) -> Classes:
    return classes_of(find_pictures(root, limit, (64, 64), of.preprocessing), of)


def listed(found: Classes) -> list[int]:
    assert found.labels is not None
    return [int(label) for label in found.labels]


def test_by_the_checkpoints_labels(tmp_path: Path, demo: Checkpoint) -> None:
    root = folder(tmp_path, "eel/1", "dog/1", "dog/2")
    found = classes(root, checkpoint(demo, THREE))
    assert listed(found) == [1, 2, 1]  # in turns, and cat is missing
    assert (found.how, found.names) == ("class folders named as the checkpoint's", THREE)
    assert listed(classes(root, checkpoint(demo, ("eel", "cat", "dog")))) == [2, 0, 2]


def test_in_the_order_of_names(tmp_path: Path, demo: Checkpoint) -> None:
    """One folder a class, an empty one among them; a hidden one is none, and a limit changes nothing."""
    root = folder(tmp_path, "n03/1", "n01/x/1", "n01/y/2", ".git/1", empty="n02")
    found = classes(root, checkpoint(demo, THREE))
    assert listed(found) == [0, 0, 2]
    assert (found.how, found.names) == ("class folders in the order of their names", THREE)
    assert listed(classes(root, checkpoint(demo, THREE), limit=1)) == [0]
    assert classes(root, checkpoint(demo, ())).names == ("n01", "n02", "n03")


def test_labels_that_are_there_twice_name_nothing(tmp_path: Path, demo: Checkpoint) -> None:
    """As ImageNet has two kinds of crane."""
    of = checkpoint(demo, ("crane", "crane", "eel"))
    assert listed(classes(folder(tmp_path / "a", "b/1", "a/1", "c/1"), of)) == [0, 1, 2]
    with pytest.raises(DeployError, match=r"crane in .* are no classes of net.pth, which others are"):
        classes(folder(tmp_path / "b", "crane/1", "eel/1"), of)


def test_without_class_folders(tmp_path: Path, demo: Checkpoint) -> None:
    found = classes(folder(tmp_path, "1", "2"), checkpoint(demo, ()))
    assert (found.labels, found.names) == (None, ("0", "1", "2"))
    assert found.how == "no class folders: agreement with PyTorch only"


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (
            ("cat/1", "dog/1", "fox/1"),
            THREE,
            "fox in {} are no classes of net.pth, .* classes are cat, dog, eel; rename",
        ),
        (
            ("a/1", "b/1"),
            THREE,
            r"{} holds 2 class folders \(a, b\), net.pth has 3 classes and calls its classes cat, ",
        ),
        (
            ("a/1", "b/1", "c/1", "d/1"),
            (),
            r"{} holds 4 class folders \(a, b, c, ...\), net.pth has 3 classes and names none; give one folder a class",
        ),
        (("a/1",), (), r"{} holds 1 class folder \(a\), net.pth has 3 classes"),
        (("cat/1", "1"), THREE, r"1 images of {} are in no class folder \(1.png\), others are; move"),
    ],
)
def test_what_can_not_be_told(
    tmp_path: Path, demo: Checkpoint, files: tuple[str, ...], labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DeployError, match=message.format(tmp_path)):
        classes(folder(tmp_path, *files), checkpoint(demo, labels))
