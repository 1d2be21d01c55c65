"""Right answers, from the folders that pictures are in."""

from __future__ import annotations

from dataclasses import dataclass

from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate.dataset import classes_of
from nextvit_deploy.precision.budget import Budget
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.spec import ExportSpec


@dataclass(frozen=True, slots=True)
class _Classifier:
    """Who tells classes, from an artefact's spec."""

    name: str
    num_classes: int
    labels: tuple[str, ...]


def right_answers(pictures: Pictures, spec: ExportSpec, budget: Budget) -> tuple[int, ...] | None:
    """Each picture's class, by ``classes_of``; None where folders don't tell and ``budget`` doesn't need to know.

    Raises DeployError for a budget in points where they don't.
    """
    asked = _Classifier(spec.model, spec.num_classes, spec.labels)
    try:
        found = classes_of(pictures, asked).labels
    except DeployError:
        if budget.in_db:
            return None
        raise
    if found is None and not budget.in_db:
        raise UnsupportedSpec(
            f"a budget of {budget} counts right answers, and the images of {pictures.folder} are in no class folders; "
            "put them into one folder per class, or give a budget in decibels such as 30dB"
        )
    return None if found is None else tuple(int(each) for each in found)
