"""What an evaluation found, as data: read by the tables, the JSON and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from nextvit_deploy.evaluate.dataset import Classes
from nextvit_deploy.evaluate.results import NOTHING, Figures, Rows, margins, relative_errors, worst
from nextvit_deploy.manifest import CheckpointInfo, plain
from nextvit_exporters.spec import Artifact, ExportSpec

SCHEMA: Final = 1
SHOWN: Final = 12
"""Images named as the worst."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """The pictures: ``count`` of ``total`` in ``folder``; ``classes`` says how their classes were found."""

    folder: str
    count: int
    total: int
    fingerprint: str
    classes: str


@dataclass(frozen=True, slots=True)
class Image:
    """One of the worst images; classes by name, ``label`` None without labels.

    ``margin`` is twice the largest difference over the gap between PyTorch's first two classes, ``relative_rms`` the
    image's own.
    """

    index: int
    name: str
    label: str | None
    pytorch: str
    artefact: str
    margin: float
    relative_rms: float


@dataclass(frozen=True, slots=True)
class Run:
    """How it was done, which the figures don't hang on; ``resumed`` images were done by an earlier command."""

    seconds: float
    workers: int
    ray: str | None
    resumed: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An artefact and PyTorch over a folder of pictures."""

    artefact: Artifact
    checkpoint: CheckpointInfo
    spec: ExportSpec
    executor: str
    mode: str
    dataset: Dataset
    classes: tuple[str, ...]
    figures: Figures
    by_margin: tuple[Image, ...]
    by_error: tuple[Image, ...]
    thumbnails: Mapping[int, str]
    """Of those images by their numbers: small JPEGs in base64."""
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    run: Run

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, and the same however the work was shared; infinite numbers are strings."""
        figures, points = asdict(self.figures), self.figures.points
        figures["flips"] = [
            each | {"pytorch": self.called(each["pytorch"]), "artefact": self.called(each["artefact"])}
            for each in figures["flips"]
        ]
        fields = {
            "schema": SCHEMA,
            "artefact": {"file": self.artefact.path.name, "sha256": self.artefact.sha256, "bytes": self.artefact.size},
            "checkpoint": asdict(self.checkpoint),
            "spec": self.spec.as_dict(),
            "executor": {"name": self.executor, "mode": self.mode},
            "dataset": asdict(self.dataset),
            "classes": list(self.classes),
            "figures": figures | {"points": points and {"top1": points[0], "top5": points[1]}},
            "worst": {
                "by_margin": [asdict(each) for each in self.by_margin],
                "by_error": [asdict(each) for each in self.by_error],
            },
            "thumbnails": self.thumbnails,
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }
        return {key: plain(value) for key, value in fields.items()}

    def called(self, number: int) -> str:
        """A class by its name."""
        return called(self.classes, number)


def called(names: tuple[str, ...], number: int) -> str:
    """A class by its name; no class is what an artefact names that answers NaN."""
    return "no number" if number == NOTHING else names[number]


def worst_images(rows: Rows, names: tuple[str, ...], classes: Classes) -> tuple[tuple[Image, ...], tuple[Image, ...]]:
    """Those with the largest margin and those with the largest error, worst first; ``names`` are the pictures'."""
    margin, error = margins(rows), relative_errors(rows)

    def image(index: int) -> Image:
        truth = None if classes.labels is None else called(classes.names, int(classes.labels[index]))
        return Image(
            index=index,
            name=names[index],
            label=truth,
            pytorch=called(classes.names, int(rows["pytorch"][index, 0])),
            artefact=called(classes.names, int(rows["artefact"][index, 0])),
            margin=float(margin[index]),
            relative_rms=float(error[index]),
        )

    by_margin, by_error = ([image(index) for index in worst(values, SHOWN)] for values in (margin, error))
    return tuple(by_margin), tuple(by_error)
