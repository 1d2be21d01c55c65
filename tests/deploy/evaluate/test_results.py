"""The figures, against logits made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nextvit_deploy.evaluate import results as r
from nextvit_exporters.errors import VerificationFailed

PYTORCH = np.array(
    [
        [9, 8, 7, 6, 5, 4, 3],
        [1, 2, 3, 4, 5, 6, 7],
        [0, 5, 0, 0, 0, 0, 1],
        [3, 0, 0, 2, 0, 0, 0],
    ],
    np.float32,
)
ARTEFACT = np.array(
    [
        [9, 8, 7, 6, 5, 4, 3],  # the same
        [1, 2, 3, 4, 5, 7, 6],  # 6 becomes 5
        [0, 5, 0, 0, 0, 0, 2],  # nearer, and no flip
        [1, 0, 0, 2, 0, 0, 0],  # 0 becomes 3
    ],
    np.float32,
)
LABELS = np.array([5, 5, 6, 0])


def test_accuracy() -> None:
    found = r.figures(r.rows_of(ARTEFACT, PYTORCH), LABELS)
    assert found.pytorch == r.Accuracy(top1=1 / 4, top5=3 / 4)  # the last; and 5 of the second, 6 of the third
    assert found.artefact == r.Accuracy(top1=1 / 4, top5=3 / 4)
    assert found.points == (0.0, 0.0)
    assert (found.count, found.agreement, found.not_finite) == (4, 0.5, 0)


def test_flips() -> None:
    rows = r.rows_of(ARTEFACT, PYTORCH)
    assert r.figures(rows, LABELS).flips == (r.Flip(0, 3, 1, 0, 1), r.Flip(6, 5, 1, 1, 0))
    assert r.figures(rows, None).flips == (r.Flip(0, 3, 1, None, None), r.Flip(6, 5, 1, None, None))
    often = r.figures(np.concatenate([rows, rows[1:2]]), None).flips
    assert [(each.pytorch, each.artefact, each.count) for each in often] == [(6, 5, 2), (0, 3, 1)]


def test_errors_and_margins() -> None:
    rows = r.rows_of(ARTEFACT, PYTORCH)
    found = r.figures(rows, None)
    power = float((PYTORCH.astype(np.float64) ** 2).sum())
    assert found.relative_rms == pytest.approx(math.sqrt(7 / power), rel=1e-15)
    assert found.sqnr_db == pytest.approx(10 * math.log10(power / 7), rel=1e-15)
    assert found.max_abs == 2.0
    np.testing.assert_allclose(r.margins(rows), [0, 2, 0.5, 4], rtol=1e-15)
    np.testing.assert_allclose(r.relative_errors(rows), np.sqrt([0, 2 / 140, 1 / 26, 4 / 13]), rtol=1e-15)
    assert found.can_flip == 2
    assert r.worst(r.margins(rows), 3) == [3, 1, 2]
    assert r.worst(np.array([1.0, 2.0, 2.0, 1.0]), 3) == [1, 2, 0]


def test_an_artefact_that_answers_no_number() -> None:
    broken = ARTEFACT.copy()
    broken[0, 6] = np.nan
    broken[1, 0] = np.inf
    rows = r.rows_of(broken, PYTORCH)
    found = r.figures(rows, LABELS)
    assert (found.not_finite, found.sqnr_db, found.relative_rms, found.max_abs) == (2, -math.inf, math.inf, math.inf)
    assert found.artefact == r.Accuracy(0.0, 0.5)  # 0 is the last one's second
    assert {(each.pytorch, each.artefact) for each in found.flips} == {(0, r.NOTHING), (6, r.NOTHING), (0, 3)}
    assert r.worst(r.margins(rows), 2) == [0, 1]


def test_few_classes() -> None:
    rows = r.rows_of(np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]))
    assert rows["artefact"].tolist() == [[1, 0, -1, -1, -1]]
    found = r.figures(rows, np.array([0]))
    assert found.pytorch == r.Accuracy(0.0, 1.0)
    assert found.sqnr_db == math.inf
    assert r.margins(r.rows_of(np.array([[1.0]]), np.array([[2.0]]))) == [0.0]


def test_a_tie_can_flip() -> None:
    assert r.margins(r.rows_of(np.array([[2.0, 2.0]]), np.array([[2.0, 2.0]]))) == [math.inf]


def test_what_can_not_be_compared() -> None:
    with pytest.raises(VerificationFailed, match=r"shape \(1, 3\), PyTorch's has \(1, 2\)"):
        r.rows_of(np.zeros((1, 3)), np.zeros((1, 2)))
    with pytest.raises(VerificationFailed, match="nothing but zeros"):
        r.figures(r.rows_of(np.zeros((1, 3)), np.zeros((1, 3))), None)
