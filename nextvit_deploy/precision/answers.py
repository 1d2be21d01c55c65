"""Right answers, from the folders that pictures are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate.dataset import classes_of
from nextvit_deploy.precision.budget import Budget
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.spec import ExportSpec

if TYPE_CHECKING:
    from nextvit_models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of a checkpoint to tell classes, from its spec."""

    name: str
    num_classes: int
    labels: tuple[str, ...]


def right_answers(pictures: Pictures, spec: ExportSpec, budget: Budget) -> tuple[int, ...] | None:
    """Each picture's class, by ``classes_of``; None where folders don't tell and ``budget`` doesn't need to know.

    Raises DeployError for a budget in points where they don't.
    """
    asked = _Asked(spec.model, spec.num_classes, spec.labels)
    try:
        found = classes_of(pictures, cast("Checkpoint", asked)).labels  # which reads no more of one than is there
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
