"""Ten random faults a format, each in one layer of the saved file: nine at least have to be named right."""

from __future__ import annotations

from typing import Final

import pytest

from nextvit_deploy.bisect import run
from nextvit_deploy.bisect.record import Bisection
from nextvit_deploy.bisect.run import layers_of
from nextvit_deploy.request import Request
from tests.deploy.bisect.scores import wrong
from tests.deploy.support import Exported, rewrite_once

SEEDS: Final = range(10)
BREAKING: Final = (5000, 5001, 5010, 5015, 90002, 90004, 90011)
ENOUGH: Final = 9
KINDS: Final = ("demo", "engine", "package")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certify the passes of one artefact only once."""
    monkeypatch.setattr(run, "rewrite", rewrite_once)


@pytest.fixture
def made(kind: str, request: pytest.FixtureRequest) -> Exported:
    if kind == "package":
        pytest.importorskip("coremltools")
    found: Exported = request.getfixturevalue(kind)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_random_faults_are_named(made: Exported) -> None:
    missed = list(wrong(made, SEEDS))
    assert len(SEEDS) - len(missed) >= ENOUGH, missed


@pytest.mark.parametrize("kind", KINDS)
def test_what_breaks_down_on_one_of_several_images_is_named(made: Exported) -> None:
    """Faults behind which fewer runs come to an end than PyTorch made."""
    assert not list(wrong(made, BREAKING))


@pytest.mark.parametrize("kind", [*KINDS, "half", "dynamic", "open_batch"])
def test_what_is_sound_does_not_part(made: Exported) -> None:
    found = layers_of(made.path, Request(output=made.path.parent), lambda _: None)
    assert found.parting is None
    assert [series.question for series in found.series] == ["same network", "precision cost"]
    for series in found.series:
        assert len(series.layers) > 30
        assert all(layer.error is not None and layer.error <= series.tolerance for layer in series.layers)
    assert Bisection.from_dict(found.as_dict()) == found
