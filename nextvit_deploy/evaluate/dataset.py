"""Which class each picture of a folder belongs to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from nextvit_deploy.data import Pictures, readable
from nextvit_deploy.evaluate.results import Labels
from nextvit_exporters.errors import DeployError

_NAMED: Final = 3
"""How many of many names a message tells."""


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """The classes of a folder's pictures, (N,), or None; and in words how they were found."""

    labels: Labels | None
    how: str
    names: tuple[str, ...]
    """What to call the classes."""


class Classifier(Protocol):
    """What is asked of a checkpoint, or of an artefact's spec, to tell classes."""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        ...

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What it calls them; empty where it doesn't say."""
        ...


def classes_of(pictures: Pictures, classifier: Classifier) -> Classes:
    """The class of every picture, by the name of the folder below ``pictures.folder`` that it is in.

    Folders are classes by the classifier's labels where they are called so, else in the order of their names where
    there is one for each class, empty ones counted. Where no picture is in a folder of its own there are no classes.
    Raises DeployError for anything else.
    """
    count, called = classifier.num_classes, classifier.labels
    names = called or tuple(map(str, range(count)))
    folders = pictures.labels
    if not any(folders):
        return Classes(None, "no class folders: agreement with PyTorch only", names)
    if outside := [name for name, folder in zip(pictures.names, folders, strict=True) if folder is None]:
        raise DeployError(
            f"{len(outside)} images of {pictures.folder} are in no class folder ({_some(outside)}), others are; move "
            "them into one, or all out of theirs"
        )
    there = _folders(pictures.folder)
    counted = Counter(called)
    known = [folder for folder in there if counted[folder] == 1]
    if len(known) == len(there):
        index, how = {name: number for number, name in enumerate(called)}, "class folders named as the checkpoint's"
    elif known:
        strange = [folder for folder in there if counted[folder] != 1]
        raise DeployError(
            f"{_some(strange)} in {pictures.folder} are no classes of {classifier.name}, which others are; its classes "
            f"are {_some(called)}; rename or move them"
        )
    elif len(there) == count:
        index = {name: number for number, name in enumerate(there)}
        how, names = "class folders in the order of their names", called or tuple(map(readable, there))
    else:
        some = "class folder" if len(there) == 1 else "class folders"
        wanted = f"calls its classes {_some(called)}" if called else "names none"
        raise DeployError(
            f"{pictures.folder} holds {len(there)} {some} ({_some(there)}), {classifier.name} has {count} "
            f"classes and {wanted}; give one folder a class, or a folder without any"
        )
    return Classes(np.array([index[folder] for folder in folders if folder is not None], np.int64), how, names)


def _folders(folder: Path) -> list[str]:
    """Names of the folders in it, in their order; hidden ones are passed over."""
    with os.scandir(folder) as entries:
        return sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
