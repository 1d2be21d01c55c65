"""A plan keeps what has to be kept and nothing else, and says what that costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextvit_deploy.data import find_pictures
from nextvit_deploy.precision import plan as planning
from nextvit_deploy.precision.budget import decibels
from nextvit_exporters import graph as g
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.quantize.placement import blocks, placement
from nextvit_exporters.quantize.quantized import quantize_graph
from tests.deploy.precision.networks import JUDGED, SENSITIVE, Network


def test_the_one_block_that_int8_ruins_is_kept_and_only_it(sensitive: Network) -> None:
    plan = sensitive.plan("30dB")
    ruined = next(each for each in plan.blocks if each.block == SENSITIVE)
    assert ruined.sqnr_db < 20.0
    assert ruined.share > 0.9
    assert plan.keep == (SENSITIVE,)
    assert ruined.precision == "fp32"
    assert plan.sqnr_db >= 30.0
    whole, chosen = plan.steps
    assert (whole.kept, whole.met, chosen.kept, chosen.met) == (0, False, 1, True)
    assert whole.sqnr_db < 20.0
    assert plan.sqnr_db == chosen.sqnr_db
    assert not plan.notes


def test_a_ranking_the_wrong_way_round_keeps_more(sensitive: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    right = planning.ranked
    monkeypatch.setattr(planning, "ranked", lambda *given: right(*given)[::-1])
    with pytest.raises(UnsupportedSpec, match="no block can be in INT8 within 30dB"):
        keeps_only_the_ruined(sensitive)


def test_a_ranking_by_order_keeps_more(sensitive: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "ranked", lambda noises, _: list(noises))
    with pytest.raises(AssertionError):
        keeps_only_the_ruined(sensitive)


def keeps_only_the_ruined(sensitive: Network) -> None:
    assert sensitive.plan("30dB").keep == (SENSITIVE,)


def test_noises_add_up_in_a_trained_network(network: Network) -> None:
    plan = network.plan("20dB")
    assert plan.keep == ()
    assert len(plan.steps) == 1
    total = sum(10 ** (-each.sqnr_db / 10) for each in plan.blocks)
    assert plan.predicted_db == pytest.approx(-10 * math.log10(total), abs=1e-9)
    assert abs(plan.predicted_db - plan.sqnr_db) <= 1.5
    assert sum(each.share for each in plan.blocks) == pytest.approx(1.0)
    assert all(each.sqnr_db > plan.sqnr_db for each in plan.blocks)
    assert [each.block for each in plan.blocks] == list(blocks(placement(network.graph)))


def test_a_tight_budget_is_met_and_with_a_block_less_it_is_not(network: Network) -> None:
    whole = network.plan("1dB").sqnr_db
    budget = round(whole + 4.0, 1)
    plan = network.plan(f"{budget}dB")
    seen = {step.kept: step for step in plan.steps}
    kept = len(plan.keep)
    assert 1 <= kept < len(plan.blocks)
    assert seen[kept].met
    assert not seen[kept - 1].met
    assert len(seen) == len(plan.steps) <= 6
    assert all(step.met == (step.sqnr_db >= budget) for step in plan.steps)
    noisiest = sorted(plan.blocks, key=lambda each: each.sqnr_db)[:kept]
    assert set(plan.keep) == {each.block for each in noisiest}


def test_a_plan_is_what_its_own_graph_does(network: Network) -> None:
    """The figure is that of the graph that is built with these blocks kept."""
    assert network.spec.quantize is not None
    plan = network.plan("48dB")
    made = g.cast(
        quantize_graph(network.graph, replace(network.spec.quantize, keep=plan.keep), network.found), torch.float32
    )
    plain = g.cast(network.graph, torch.float32)
    images = torch.from_numpy(network.judged.read().normalised())
    right, got = (g.execute(each, images)[0].double() for each in (plain, made))
    assert decibels(float(right.square().sum()), float((got - right).square().sum())) == pytest.approx(
        plan.sqnr_db, abs=0.05
    )


def test_saturated_pictures_are_said_to_tell_nothing(network: Network) -> None:
    plan = network.plan("0.5")
    assert (plan.budget, plan.keep, plan.top1, plan.float_top1) == ("0.5pt", (), 1.0, 1.0)
    fine, saturated = plan.notes
    assert fine == (
        f"on {JUDGED} images one image is 5 points, so a budget of 0.5pt allows none to be lost; more images tell finer"
    )
    assert saturated.startswith(f"INT8 loses no answer on these {JUDGED} images, of which PyTorch has {JUDGED} right")
    assert f"{plan.sqnr_db:.1f} dB" in saturated


def test_points_are_answers_that_are_lost(sensitive: Network) -> None:
    """INT8 in the ruined block loses answers, and nothing else does."""
    plan = sensitive.plan("0")
    assert plan.steps[0].top1 is not None
    assert plan.steps[0].top1 < 1.0
    assert plan.keep == (SENSITIVE,)
    assert plan.top1 == 1.0
    lost = round(100 * (1.0 - plan.steps[0].top1), 6)
    assert sensitive.plan(f"{lost}pt").keep == ()


def test_points_need_classes(network: Network, tmp_path: Path) -> None:
    for index, path in enumerate(network.judged.paths[:4]):
        (tmp_path / f"{index}.png").write_bytes(path.read_bytes())
    loose = find_pictures(tmp_path, None, (64, 64), network.spec.preprocessing)
    with pytest.raises(UnsupportedSpec) as refused:
        replace(network, judged=loose).plan("0.5")
    assert str(refused.value) == (
        f"a budget of 0.5pt counts right answers, and the images of {tmp_path} are in no class folders; put them into "
        "one folder per class, or give a budget in decibels such as 30dB"
    )
    plan = replace(network, judged=loose).plan("20dB")
    assert (plan.float_top1, plan.top1, plan.steps[0].top1) == (None, None, None)
    strange = tmp_path / "a class"
    strange.mkdir()
    (tmp_path / "0.png").rename(strange / "0.png")
    mixed = find_pictures(tmp_path, None, (64, 64), network.spec.preprocessing)
    with pytest.raises(DeployError, match="are in no class folder"):
        replace(network, judged=mixed).plan("0.5")
    assert replace(network, judged=mixed).plan("20dB").top1 is None


def test_what_is_kept_in_any_case_stays_kept(network: Network) -> None:
    assert network.spec.quantize is not None
    names = blocks(placement(network.graph))
    forced = replace(network, spec=replace(network.spec, quantize=replace(network.spec.quantize, keep=("stem.1",))))
    plan = forced.plan("20dB")
    assert plan.keep == ("stem.1",)
    assert [step.kept for step in plan.steps] == [1]
    more = forced.plan(f"{plan.sqnr_db + 2:.1f}dB")
    assert "stem.1" in more.keep
    assert 1 < len(more.keep) < len(names)


def test_a_budget_that_leaves_nothing_is_refused(network: Network) -> None:
    with pytest.raises(
        UnsupportedSpec, match=r"no block can be in INT8 within 200dB: .* leaves [0-9]+\.[0-9] dB; allow"
    ):
        network.plan("200dB")
