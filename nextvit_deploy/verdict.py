"""What is known of an artefact."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Verdict(str, Enum):
    """Verified: executed and within its tolerance. Failed: executed and outside. Nothing else is ever said."""

    VERIFIED = "verified"
    FAILED = "failed"
    NOT_VERIFIED = "not verified"

    def __str__(self) -> str:
        return self.value


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Failed when any is, verified when all are, not verified otherwise; so too where there are none."""
    found = set(verdicts)
    if Verdict.FAILED in found:
        return Verdict.FAILED
    return Verdict.VERIFIED if found == {Verdict.VERIFIED} else Verdict.NOT_VERIFIED
