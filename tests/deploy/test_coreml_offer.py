"""What a package says that no number shows: the sizes and releases it offers, its records, its reader's own tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from nextvit_exporters.coreml.program import MANIFEST, MODULES
from tests.deploy.support import Exported, call, one_line, refusal
from tests.deploy.support_coreml import Draft, copied, exported, needs_coremltools

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
DEEP: Final = "[" * 100_000
Change = Callable[[Any], object]


def changed(made: Exported, folder: Path, change: Change) -> Path:
    """A copy whose description is another; every hash in it is right."""
    path = copied(made, folder)
    draft = Draft(path)
    change(draft.model.description)
    draft.save()
    return path


def spec_of(description: Any, **fields: object) -> None:
    """Another record of what was asked of Core ML."""
    record = json.loads(description.metadata.userDefined[MANIFEST])
    record["spec"]["coreml"] |= fields
    description.metadata.userDefined[MANIFEST] = json.dumps(record)


def widen(description: Any) -> None:
    """Widths beyond the range that was asked for."""
    description.input[0].type.imageType.imageSizeRange.widthRange.upperBound = 4096


def one_more(description: Any) -> None:
    """A size that nobody asked for and nothing was verified at."""
    size = description.input[0].type.imageType.enumeratedSizes.sizes.add()
    size.height = size.width = 200


def one_less(description: Any) -> None:
    """A size that was asked for is not offered."""
    del description.input[0].type.imageType.enumeratedSizes.sizes[-1]


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        (("--flexible", "64:96"), widen, "takes image 1 x 3 x 64:96 x 64:4096, and image 1 x 3 x 64:96 x 64:96 was"),
        (("--enumerated-sizes", "64,96"), one_more, "or 1x3x96x96 or 1x3x200x200, and image 1x3x64x64 or"),
        (("--enumerated-sizes", "64,96"), one_less, "takes image 1x3x64x64, and image 1x3x64x64 or 1x3x96x96 was"),
        ((), lambda told: spec_of(told, ios=26), "is of specification 7, and iOS 26 was asked for, which is 10"),
        ((), lambda told: spec_of(told, flexible=["a", "b"]), "the manifest's spec is not one this version reads"),
        ((), lambda told: told.metadata.userDefined.__setitem__(MANIFEST, DEEP), "the manifest inside"),
    ],
    ids=["a wider range", "one size more", "one size less", "another release", "no range", "a record without end"],
)
def test_another_offer_than_was_asked_for(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, options: tuple[str, ...], change: Change, says: str
) -> None:
    made = exported(tmp_path_factory.getbasetemp(), "--count", "4", *options)
    assert call("verify", copied(made, tmp_path / "whole"), "-q").status == 0
    assert says in refusal("verify", changed(made, tmp_path, change))


def test_a_record_of_modules_without_end_is_none(package: Exported, tmp_path: Path) -> None:
    path = changed(package, tmp_path, lambda told: told.metadata.userDefined.__setitem__(MODULES, "{}"))
    draft = Draft(path)
    draft.model.description.metadata.userDefined[MODULES] = DEEP
    draft.save()
    for command in ("verify", "lint", "inspect"):
        ran = call(command, path)
        assert (ran.status, ran.err) == (0, ""), ran


def test_labels_for_what_has_none_are_refused(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefghij"))
    asked = ("coreml", "--output", tmp_path / "exports", "--labels", labels)
    assert "feature maps have no labels" in refusal(*asked, "--features")
    labels.write_text("a\nb")
    assert "2 labels for 10 classes" in refusal(*asked, "--logits")


def test_without_coremltools_nothing_is_verified(
    package: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nextvit_exporters.coreml import loading

    for name in [name for name in sys.modules if name.partition(".")[0] == "coremltools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "coremltools", None)
    loading.coremltools.cache_clear()
    try:
        ran = call("verify", package.path)
        assert (ran.status, ran.out) == (4, "")
        assert one_line(ran.err).startswith("not verified: the Core ML lane needs an optional package")
        for command in (("lint", package.path), ("inspect", package.path), ("coreml", "--output", tmp_path)):
            assert "pip install 'nextvit-deploy[coreml]'" in refusal(*command)
    finally:
        loading.coremltools.cache_clear()
