"""Folds broken on purpose, one mistake at a time: certification must see it and roll the pass back.

Each mistake is planted into the function a pass calls; the graph the pass is handed is sound. A mistake nobody
sees would mean that the models or the inputs hide it, and with it the same mistake made by accident.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nextvit_exporters.passes import algebra
from nextvit_exporters.passes.algebra import Affine, Linear, Norm
from tests.exporters.mutations import Plant, assert_caught

AFFINE, BEHIND, BEFORE = algebra.affine_of_norm, algebra.fold_behind, algebra.fold_before
WITH_WEIGHTS = algebra.with_weights


def affine(change: Callable[[Norm, Affine], Affine]) -> Plant:
    return lambda patch: patch.setattr(algebra, "affine_of_norm", lambda norm: change(norm, AFFINE(norm)))


def numbers(norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.weight.detach(), norm.bias.detach(), norm.running_mean, norm.running_var


def with_eps(norm: Norm, eps: float) -> Affine:
    gamma, beta, mean, var = numbers(norm)
    scale = gamma / torch.sqrt(var + eps)
    return Affine(scale, beta - mean * scale)


def without_root(norm: Norm, _: Affine) -> Affine:
    gamma, beta, mean, var = numbers(norm)
    scale = gamma / (var + norm.eps)
    return Affine(scale, beta - mean * scale)


NORM_MISTAKES: dict[str, Callable[[Norm, Affine], Affine]] = {
    "eps left out": lambda norm, _: with_eps(norm, 0.0),
    "another eps": lambda norm, _: with_eps(norm, 1e-3),
    "variance not rooted": without_root,
    "gamma left out": lambda norm, a: Affine(a.scale / norm.weight.detach(), a.shift),
    "gamma without sign": lambda _, a: Affine(a.scale.abs(), a.shift),
    "beta left out": lambda norm, a: Affine(a.scale, a.shift - norm.bias.detach()),
    "mean left out": lambda norm, a: Affine(a.scale, norm.bias.detach()),
    "mean added": lambda norm, a: Affine(a.scale, 2.0 * norm.bias.detach() - a.shift),
    "mean not scaled": lambda norm, a: Affine(a.scale, norm.bias.detach() - numbers(norm)[2]),
    "shift left out": lambda _, a: Affine(a.scale, torch.zeros_like(a.shift)),
    "scale left out": lambda _, a: Affine(torch.ones_like(a.scale), a.shift),
    "norm dropped": lambda _, a: Affine(torch.ones_like(a.scale), torch.zeros_like(a.shift)),
    "channels in another order": lambda _, a: Affine(a.scale.flip(0), a.shift.flip(0)),
    "in float32": lambda _, a: Affine(a.scale.float().double(), a.shift.float().double()),
}
NORM_PASSES = ("fold-conv-norm", "fold-pre-norm", "fold-head-norm")


@pytest.mark.parametrize("mistake", NORM_MISTAKES)
@pytest.mark.parametrize("pass_name", NORM_PASSES)
def test_a_wrong_norm_is_caught(pass_name: str, mistake: str) -> None:
    error = assert_caught("nano", pass_name, affine(NORM_MISTAKES[mistake]))
    assert error > (1e-9 if mistake == "in float32" else 1e-7)


def in_one_norm(change: Callable[[Norm, Affine], Affine]) -> Plant:
    """The mistake in the first norm that is folded, all others right: the mildest there is."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        seen: list[Norm] = []

        def once(norm: Norm) -> Affine:
            seen.append(norm)
            return change(norm, AFFINE(norm)) if len(seen) == 1 else AFFINE(norm)

        patch.setattr(algebra, "affine_of_norm", once)

    return plant


@pytest.mark.parametrize("model", ["nano", "small"])
@pytest.mark.parametrize("pass_name", NORM_PASSES)
def test_one_eps_is_enough(model: str, pass_name: str) -> None:
    assert assert_caught(model, pass_name, in_one_norm(NORM_MISTAKES["eps left out"])) > 1e-8


def behind(change: Callable[[Linear, Affine], Linear]) -> Plant:
    return lambda patch: patch.setattr(algebra, "fold_behind", change)


def before(change: Callable[[Linear, Affine], Linear]) -> Plant:
    return lambda patch: patch.setattr(algebra, "fold_before", change)


def drop_bias(linear: Linear, a: Affine, fold: Callable[[Linear, Affine], Linear]) -> Linear:
    folded = fold(linear, a)
    return WITH_WEIGHTS(folded, folded.weight, linear.bias)


def twice(linear: Linear, a: Affine, fold: Callable[[Linear, Affine], Linear]) -> Linear:
    return fold(fold(linear, a), Affine(a.scale, torch.zeros_like(a.shift)))


def scaled_shift(linear: Linear, a: Affine) -> Linear:
    """b + W' t, with the weights that are scaled already."""
    folded = BEFORE(linear, a)
    shift = folded.weight.detach().flatten(1) @ a.shift
    return WITH_WEIGHTS(folded, folded.weight, algebra.bias_of(linear) + shift)


def transposed(linear: Linear, a: Affine) -> Linear:
    folded = BEFORE(linear, a)
    square = folded.weight.shape[0] == folded.weight.shape[1]
    return WITH_WEIGHTS(folded, folded.weight.transpose(0, 1), folded.bias) if square else folded


FOLD_MISTAKES: dict[str, tuple[str, Plant]] = {
    "conv: shift missed": ("fold-conv-norm", behind(lambda m, a: drop_bias(m, a, BEHIND))),
    "conv: scale twice": ("fold-conv-norm", behind(lambda m, a: twice(m, a, BEHIND))),
    "conv: weights not scaled": ("fold-conv-norm", behind(lambda m, a: WITH_WEIGHTS(m, m.weight, BEHIND(m, a).bias))),
    "pre: W t missed": ("fold-pre-norm", before(lambda m, a: drop_bias(m, a, BEFORE))),
    "pre: W' t": ("fold-pre-norm", before(scaled_shift)),
    "pre: scale twice": ("fold-pre-norm", before(lambda m, a: twice(m, a, BEFORE))),
    "pre: transposed": ("fold-pre-norm", before(transposed)),
    "pre: old bias lost": ("fold-pre-norm", before(lambda m, a: BEFORE(WITH_WEIGHTS(m, m.weight, None), a))),
    "head: W t missed": ("fold-head-norm", before(lambda m, a: drop_bias(m, a, BEFORE))),
    "head: W' t": ("fold-head-norm", before(scaled_shift)),
    "value: P c missed": ("move-value-bias", before(lambda m, a: drop_bias(m, a, BEFORE))),
    "value: c itself": (
        "move-value-bias",
        before(lambda m, a: WITH_WEIGHTS(m, m.weight, algebra.bias_of(m) + a.shift)),
    ),
    "value: P transposed": ("move-value-bias", before(transposed)),
    "value: subtracted": ("move-value-bias", before(lambda m, a: BEFORE(m, Affine(a.scale, -a.shift)))),
    "value: bias kept": (
        "move-value-bias",
        lambda patch: patch.setattr(
            algebra, "with_weights", lambda m, w, b: WITH_WEIGHTS(m, w, m.bias if b is None else b)
        ),
    ),
}


@pytest.mark.parametrize("mistake", FOLD_MISTAKES)
def test_a_wrong_fold_is_caught(mistake: str) -> None:
    assert assert_caught("nano", *FOLD_MISTAKES[mistake]) > 1e-4


@pytest.mark.parametrize(
    "mistake",
    ["conv: shift missed", "pre: W t missed", "pre: scale twice", "value: P c missed"],
)
def test_wrong_folds_are_caught_at_full_size(mistake: str) -> None:
    assert assert_caught("small", *FOLD_MISTAKES[mistake]) > 1e-4
