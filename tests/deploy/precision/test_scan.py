"""Whoever does the work, the figures are the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nextvit_deploy import __version__
from nextvit_deploy.cache import VARIABLE
from nextvit_deploy.data import find_pictures
from nextvit_deploy.pool.pool import let_go
from nextvit_deploy.precision.scan import Batch, Cost, Costs, Elsewhere, Here, Judged, Scanner, ScanRequest
from nextvit_exporters.errors import DeployError, InvariantError
from nextvit_exporters.quantize.placement import blocks, placement
from tests.deploy.precision.networks import ALONE, SENSITIVE, Network


def test_two_processes_find_what_one_does(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    some = replace(network, judged=replace(network.judged, paths=network.judged.paths[:10]))
    assert some.plan("30dB", ScanRequest(workers=2)) == some.plan("30dB")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_sums_are_taken_in_the_order_of_the_pictures(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    scanner = network.scanner()
    last = blocks(placement(network.graph))[-1]
    before = scanner.costs({"last": (last,)}, lambda _: None)
    here = Scanner._here

    def backwards(self: Scanner, *given: Any) -> Iterator[object]:
        yield from reversed(list(here(self, *given)))

    monkeypatch.setattr(Scanner, "_here", backwards)
    assert scanner.costs({"last": (last,)}, lambda _: None) == before


def test_another_checkpoint_than_was_calibrated_is_noticed(sensitive: Network, tmp_path: Path) -> None:
    """The graph made again from the demo's checkpoint is not the one with a ruined block."""
    path = tmp_path / "calibration.safetensors"
    sensitive.found.save(path)
    work = Elsewhere(sensitive.spec, None, False, path, Judged(sensitive.judged, None))  # noqa: FBT003 - no average
    try:
        with pytest.raises(InvariantError, match="is not the one that was calibrated; start again"):
            work(Batch(0, 1, ((SENSITIVE,),)))
    finally:
        let_go()


def test_another_version_elsewhere_is_noticed(network: Network, tmp_path: Path) -> None:
    judged = Judged(network.judged, None)
    work = Elsewhere(network.spec, None, False, tmp_path, judged, "0.0")  # noqa: FBT003 - no average
    with pytest.raises(DeployError, match=f"has nextvit-deploy {__version__}, not 0.0; install the same there"):
        work(Batch(0, 1, ()))


def test_others_find_files_by_their_whole_paths(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.pth").touch()
    assert ScanRequest("own.pth").elsewhere == str(tmp_path / "own.pth")
    assert ScanRequest("timm/nextvit_small").elsewhere == "timm/nextvit_small"
    assert ScanRequest().elsewhere is None
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(network.judged.paths[0].read_bytes())
    pictures = find_pictures(Path("images"), None, (64, 64), network.spec.preprocessing)
    absolute = Judged(pictures, (3,)).absolute()
    assert absolute.answers == (3,)
    assert absolute.pictures.paths == (tmp_path / "images" / "a.png",)
    assert absolute.pictures.names == pictures.names
    assert absolute.pictures.fingerprint == pictures.fingerprint


@pytest.mark.parametrize(("workers", "ray", "alone"), [(None, None, True), (1, None, True), (2, None, False)])
def test_who_works_alone(workers: int | None, ray: str | None, alone: bool) -> None:  # noqa: FBT001 - pytest's
    assert ScanRequest(workers=workers, ray=ray).alone is alone
    assert not ScanRequest(workers=workers, ray="auto").alone


def test_a_batch_is_named_in_errors() -> None:
    assert str(Batch(4, 8, ())) == "the sensitivity on images 5 to 8"


class Silent:
    """Stands in for a network whose logits are all zero, or in INT8 not numbers."""

    def __init__(self, right: float, wrong: float) -> None:
        self.right, self.wrong = right, wrong

    def logits(self, images: torch.Tensor, choices: Sequence[object]) -> list[tuple[int | None, torch.Tensor]]:
        rows = torch.ones(len(images), 10)
        return [*((index, rows * self.wrong) for index in range(len(choices))), (None, rows * self.right)]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [(0.0, 1.0, "zero or not finite"), (math.nan, 1.0, "zero or"), (1.0, math.inf, "INT8")],
)
def test_what_is_no_number_is_refused(network: Network, right: float, wrong: float, message: str) -> None:
    silent: Any = Silent(right, wrong)
    scanner = Scanner(network.spec, silent, network.found, Judged(network.judged, None), ALONE)
    with pytest.raises(InvariantError, match=message):
        scanner.costs({"all": ()}, lambda _: None)


def test_costs_add_up_and_answers_are_counted(network: Network) -> None:
    silent: Any = Silent(2.0, 3.0)  # each answers class 0
    work = Here(network.spec, silent, Judged(network.judged, (0, 1, 0)), lambda *_: None)
    one = work(Batch(0, 3, (("a",), ("b",))))
    assert one == Costs(3, 3 * 10 * 4.0, 2, (Cost(30.0, 2), Cost(30.0, 2)))
    assert one + one == Costs(6, 240.0, 4, (Cost(60.0, 4), Cost(60.0, 4)))
