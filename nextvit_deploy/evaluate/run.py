"""An artefact and the checkpoint behind it, over a whole folder of pictures: how often they decide alike.

Nothing is judged here: an evaluation is figures. The pictures are read a few at a time by whoever works, and a few
numbers of each are kept, so memory doesn't grow with the pictures' size; finished shards outlive an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from nextvit_deploy import __version__
from nextvit_deploy.data import Pictures, find_pictures, readable
from nextvit_deploy.evaluate.dataset import classes_of
from nextvit_deploy.evaluate.evaluation import SCHEMA, Dataset, Evaluation, Run, worst_images
from nextvit_deploy.evaluate.report import page, thumbnails
from nextvit_deploy.evaluate.results import ROW, Rows, figures
from nextvit_deploy.evaluate.shards import Shard, Store, shards_of
from nextvit_deploy.evaluate.work import Evaluate, executor_of
from nextvit_deploy.manifest import versions
from nextvit_deploy.origin import other_source, read
from nextvit_deploy.outputs import check_writable, published
from nextvit_deploy.pipeline import describe, identify, open_checkpoint
from nextvit_deploy.pool.pool import pool
from nextvit_deploy.request import Request, notes_for
from nextvit_exporters import targets
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.spec import Artifact
from nextvit_models.checkpoint import Checkpoint
from nextvit_models.demo import DEMO_IMAGES

Tell = Callable[[str, int, int], None]
"""Told the step, and how many images are done of how many; of 0 where that isn't known."""
_WORTHWHILE: Final = 4
"""Shards that make it worth to start one more process, where nobody says how many."""


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """What the user typed.

    None means: the demo's pictures, its checkpoint, beside the artefact, all pictures, as many workers as pay. ``ray``
    is a cluster's address; ``workers`` then bounds the tasks at a time.
    """

    artefact: Path
    dataset: Path | None = None
    checkpoint: str | None = None
    ema: bool = False
    output: Path | None = None
    limit: int | None = None
    workers: int | None = None
    ray: str | None = None

    @property
    def places(self) -> tuple[Path, Path]:
        """Where the JSON and the page go."""
        folder = self.artefact.parent if self.output is None else self.output
        return folder / f"{self.artefact.name}.evaluation.json", folder / f"{self.artefact.name}.evaluation.html"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be done, found out before any of it is."""

    artefact: Artifact
    work: Evaluate
    checkpoint: Checkpoint
    pictures: Pictures
    notes: tuple[str, ...]


def evaluate(request: EvaluateRequest, tell: Tell) -> Evaluation:
    """Run the artefact and PyTorch over the pictures; write the JSON and the page, both or neither.

    The figures, and both files, are the same bits however many workers there are, as far as their processors round
    alike. Raises a DeployError for anything the user can mend; finished shards are then kept, and not done again.
    """
    start = time.perf_counter()
    for place in request.places:
        check_writable(place)
    tell("load the checkpoint", 0, 0)
    asked = _asked(request)
    pictures, work = asked.pictures, asked.work
    tell("find the classes", 0, 0)
    classes = classes_of(pictures, asked.checkpoint)
    tell("read the pictures' bytes", 0, 0)
    fingerprint, executor = pictures.fingerprint, executor_of(work.spec, work.artefact)
    folder = readable(pictures.folder.resolve().name)
    told = versions(work.spec.target) | {"nextvit-deploy": __version__, "pillow": version("pillow")}
    store = Store(_key(asked, fingerprint, executor.name, told))
    rows, run = _rows(request, asked, store, tell)
    tell("write the report", 0, 0)
    by_margin, by_error = worst_images(rows, pictures.names, classes)
    found = Evaluation(
        artefact=asked.artefact,
        checkpoint=describe(asked.checkpoint),
        spec=work.spec,
        executor=executor.name,
        mode=executor.mode,
        dataset=Dataset(folder, len(pictures), pictures.total, fingerprint, classes.how),
        classes=classes.names,
        figures=figures(rows, classes.labels),
        by_margin=by_margin,
        by_error=by_error,
        thumbnails=thumbnails([*by_margin, *by_error], pictures),
        notes=asked.notes,
        versions=told,
        run=replace(run, seconds=round(time.perf_counter() - start, 3)),
    )
    _write(request, found)
    store.remove()
    return replace(found, notes=(*found.notes, *_on_run(store, run)))


def _asked(request: EvaluateRequest) -> _Asked:
    path, target, folder = request.artefact, targets.of_file(request.artefact), _folder(request)
    saved = read(target, path)
    checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
    like = Request(output=path.parent, checkpoint=request.checkpoint, ema=request.ema)
    made, names = identify(path, saved, like, checkpoint)
    spec = target.adopt(made, path)
    if spec.coreml is not None and spec.coreml.head == "features":
        raise UnsupportedSpec(f"{path.name} returns feature maps, which decide nothing; evaluate a classifier")
    notes = notes_for(like, spec, checkpoint)
    if saved.provenance:
        notes = (*notes, *other_source(saved.provenance, made, checkpoint))
    if request.dataset is None:
        notes = (*notes, "no folder given: evaluated on the demo's digits, on some of which its INT8 is calibrated")
    pictures = find_pictures(folder, request.limit, (spec.height, spec.width), checkpoint.preprocessing)
    artefact = Artifact.of(path)
    work = Evaluate(
        artefact=path.absolute(),
        sha256=artefact.sha256,
        checkpoint=_absolute(request.checkpoint),
        fingerprint=checkpoint.fingerprint,
        ema=request.ema,
        spec=spec,
        names=names,
        folder=pictures.folder.absolute(),
    )
    pictures = replace(
        pictures, folder=work.folder, paths=tuple(each.absolute() for each in pictures.paths)
    )  # a cluster's workers have another working directory
    return _Asked(artefact, work, checkpoint, pictures, notes)


def _folder(request: EvaluateRequest) -> Path:
    """The pictures' folder; raises DeployError where none is given and it isn't clear that it is the demo's."""
    if request.dataset is not None:
        return request.dataset
    if request.checkpoint is not None:
        raise DeployError("the demo's digits say nothing of another checkpoint; name a folder of images to evaluate on")
    if not DEMO_IMAGES.is_dir():
        raise DeployError("the demo's images are not installed here; name a folder of images to evaluate on")
    return DEMO_IMAGES


def _absolute(checkpoint: str | None) -> str | None:
    """A file's whole path; a hub id as it is."""
    return str(Path(checkpoint).absolute()) if checkpoint is not None and Path(checkpoint).exists() else checkpoint


def _key(asked: _Asked, fingerprint: str, executor: str, told: dict[str, str]) -> str:
    """What finished shards belong to: everything that their numbers hang on."""
    work = asked.work
    parts = {
        "schema": SCHEMA,
        "row": str(ROW),
        "artefact": work.sha256,
        "checkpoint": work.fingerprint,
        "pictures": fingerprint,
        "spec": work.spec.as_dict(),
        "names": [work.names.input, work.names.output],
        "executor": executor,
        "versions": told,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _rows(request: EvaluateRequest, asked: _Asked, store: Store, tell: Tell) -> tuple[Rows, Run]:
    """The rows of all images in their order, and how they were had."""
    shards = shards_of(asked.pictures, asked.work.spec)
    done = store.finished(shards)
    resumed = count = sum(map(len, done.values()))
    left = [index for index in range(len(shards)) if index not in done]
    workers = _workers(request, len(left))
    total = len(asked.pictures)
    tell(_step(resumed), count, total)
    todo: list[Shard] = [shards[index] for index in left]
    with closing(pool(workers, request.ray).run(asked.work, todo)) as answers:
        for place, rows in answers:
            index = left[place]
            done[index] = rows
            store.add(shards[index], rows)
            count += len(rows)
            tell(_step(resumed), count, total)
    return np.concatenate([done[index] for index in range(len(shards))]), Run(0.0, workers, request.ray, resumed)


def _workers(request: EvaluateRequest, shards: int) -> int:
    """As asked; else 0 with Ray, which knows its processors, or as many as this machine has and the work is worth."""
    if request.workers is not None:
        return request.workers
    if request.ray is not None:
        return 0
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(here, shards // _WORTHWHILE))


def _step(resumed: int) -> str:
    return f"evaluate, {resumed} done before" if resumed else "evaluate"


def _on_run(store: Store, run: Run) -> tuple[str, ...]:
    """Notes for people on how it went."""
    notes = []
    if run.resumed:
        notes.append(f"{run.resumed} images were done by an earlier command, and not again")
    if store.trouble:
        notes.append(f"what was finished could not be kept against an interruption: {store.trouble}")
    return tuple(notes)


def _write(request: EvaluateRequest, found: Evaluation) -> None:
    """Both files, or neither."""
    data, html = request.places
    with published(html) as draft:
        text = json.dumps(found.as_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n"
        draft.with_name(data.name).write_text(text, encoding="utf-8")
        draft.write_bytes(page(found).encode(errors="backslashreplace"))  # the artefact's own name
