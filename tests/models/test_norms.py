from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.demo import DEMO_CHECKPOINT
from nextvit_models.nextvit import NextViT
from nextvit_models.norms import fold_evidence, foldable_maps, foldable_norms
from tests.harness import images, randomise, relative_error

NANO = VARIANTS["nextvit_nano"]
State = dict[str, Tensor]


def folded(state: State) -> State:
    """Every foldable norm folded into the map behind it, in float64; the norms' own tensors stay as they were."""
    out = dict(state)
    for foldable in foldable_maps(NANO):
        scale, shift = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for norm in foldable.norms:
            mean, variance, gamma, beta = (
                state[f"{norm}.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")
            )
            s = gamma / (variance + 1e-5).sqrt()
            scale, shift = scale * s, (shift - mean) * s + beta
        weight = state[f"{foldable.map}.weight"].double()
        columns = weight.flatten(1)
        out[f"{foldable.map}.weight"] = (columns * scale).reshape(weight.shape).float()
        out[f"{foldable.map}.bias"] = (state[f"{foldable.map}.bias"].double() + columns @ shift).float()
    return out


def without_norms(state: State) -> State:
    norms = tuple(f"{norm}." for norm in foldable_norms(NANO))
    return {name: tensor for name, tensor in state.items() if not name.startswith(norms)}


def saved(tmp_path: Path, state: State) -> Path:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    return path


@pytest.fixture
def model() -> NextViT:
    return randomise(NextViT(NANO, 6), seed=40)


def test_foldable_norms_of_nano() -> None:
    assert foldable_norms(NANO) == (
        "features.0.norm",
        "features.1.norm",
        "features.2.norm1",
        "features.2.e_mhsa.norm",
        "features.2.norm2",
        "features.3.norm",
        "features.4.norm1",
        "features.4.e_mhsa.norm",
        "features.4.norm2",
        "features.5.norm",
        "features.6.norm1",
        "features.6.norm2",
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_foldable_maps_are_in_the_model(variant: str) -> None:
    with torch.device("meta"):
        model = NextViT(VARIANTS[variant])
    for foldable in foldable_maps(VARIANTS[variant]):
        weight = model.get_parameter(f"{foldable.map}.weight")
        for norm in foldable.norms:
            assert model.get_parameter(f"{norm}.weight").shape == weight.shape[1:2]


def test_norms_folded_and_taken_out_change_nothing(tmp_path: Path, model: NextViT) -> None:
    image = images(2, 3, 64, 64, seed=41)
    checkpoint = load_checkpoint(saved(tmp_path, without_norms(folded(model.state_dict()))))
    assert checkpoint.norms_merged
    with torch.no_grad():
        assert relative_error(checkpoint.model(image), model(image)) <= 1e-5


def test_norms_folded_and_left_in_place_are_suspect(tmp_path: Path, model: NextViT) -> None:
    image = images(2, 3, 64, 64, seed=42)
    checkpoint = load_checkpoint(saved(tmp_path, folded(model.state_dict())))
    assert checkpoint.norms_suspect
    assert not checkpoint.norms_merged
    assert sum(line.startswith("norms suspect: ") for line in checkpoint.found) == 1
    with torch.no_grad():  # the suspicion matters: this is another function
        assert relative_error(checkpoint.model(image), model(image)) > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_folding_is_seen_and_its_absence_too(seed: int) -> None:
    state = randomise(NextViT(NANO, 6), seed=seed).state_dict()
    before, after = fold_evidence(state, NANO), fold_evidence(folded(state), NANO)
    assert not before.suspect
    assert abs(before.slope) < 0.1
    assert after.suspect
    assert after.slope == pytest.approx(before.slope + 1, abs=1e-3)


def test_trained_weights(tmp_path: Path) -> None:
    """The demo was trained in earnest, and its scales hardly left 1: the hardest case at hand."""
    checkpoint = load_checkpoint(DEMO_CHECKPOINT)
    state = checkpoint.model.state_dict()
    before, after = fold_evidence(state, NANO), fold_evidence(folded(state), NANO)
    assert (before.slope, before.correlation) == pytest.approx((0.26, 0.23), abs=0.1)
    assert (after.slope, after.correlation) == pytest.approx((1.26, 0.75), abs=0.1)
    assert not checkpoint.norms_suspect
    assert load_checkpoint(saved(tmp_path, folded(state))).norms_suspect


def test_untrained_norms_are_not_suspect() -> None:
    """All scales alike: nothing to see, and nothing to divide by."""
    evidence = fold_evidence(NextViT(NANO, 6).state_dict(), NANO)
    assert (evidence.slope, evidence.correlation, evidence.suspect) == (0.0, 0.0, False)


def test_dead_channels_do_not_decide(model: NextViT) -> None:
    """A channel with gamma zero and no weights left, as long decay makes them, is not evidence of folding."""
    state = model.state_dict()
    for foldable in foldable_maps(NANO):
        for norm in foldable.norms:
            state[f"{norm}.weight"][:3] = 0
        state[f"{foldable.map}.weight"][:, :3] = 0
    assert not fold_evidence(state, NANO).suspect
    assert fold_evidence(folded(state), NANO).suspect


def test_norms_are_identities_after_loading(tmp_path: Path, model: NextViT) -> None:
    loaded = load_checkpoint(saved(tmp_path, without_norms(model.state_dict()))).model
    kept = [n for n, m in loaded.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert not set(kept) & set(foldable_norms(NANO))
    assert "norm" in kept
    assert "stem.0.norm" in kept
