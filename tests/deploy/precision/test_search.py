"""The smallest number that meets is found with few questions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nextvit_deploy.precision.plan import smallest


@pytest.mark.parametrize("most", range(1, 26))
def test_the_smallest_number_is_found_from_anywhere(most: int) -> None:
    for start, wanted in itertools.product(range(most + 2), range(most + 1)):
        asked: list[int] = []

        def met(number: int, wanted: int = wanted, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number >= wanted

        assert smallest(met, start, 0, most) == wanted
        assert len(set(asked)) == len(asked)
        assert most not in asked
        assert len(asked) <= 2 + 2 * math.log2(1 + abs(min(start, most) - wanted)) + 1, (start, wanted, asked)


def test_where_more_is_not_always_better_one_less_does_not_do() -> None:
    generator = np.random.default_rng(3)
    for _ in range(500):
        least, most = sorted(generator.integers(12, size=2).tolist())
        answers: list[bool] = (generator.random(13) < 0.5).tolist()
        answers[most] = True
        found = smallest(answers.__getitem__, int(generator.integers(13)), least, most)
        assert least <= found <= most
        assert answers[found]
        assert found == least or not answers[found - 1]
