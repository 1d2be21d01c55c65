"""What a checkpoint or an artefact is, without converting anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nextvit_deploy.origin import read
from nextvit_exporters import targets
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.files import sha256_of, size_of
from nextvit_exporters.spec import MIN_SIDE
from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.complexity import count_macs, count_parameters, count_published_flops
from nextvit_models.demo import DEMO_CHECKPOINT


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts by name, in the order they are shown: text, lists of lines, counts and records by name; JSON-ready."""

    name: str
    facts: Mapping[str, object]


def inspect(source: str | None, size: tuple[int, int] | None, *, ema: bool) -> Inspection:
    """Look at an artefact or a checkpoint (the demo's when none is given).

    ``size`` is what the work is counted at, (height, width) in pixels; ``ema`` takes averaged weights. Raises a
    DeployError when it is neither.
    """
    suffixes = tuple(targets.load(name).SUFFIX for name in targets.names())
    if source is not None and source.rstrip(os.sep).endswith(suffixes):  # shells put a slash behind a package
        if size or ema:
            raise UnsupportedSpec(f"--size and --ema are for checkpoints; leave them out for {source}")
        return _artefact(Path(source))
    checkpoint = load_checkpoint(DEMO_CHECKPOINT if source is None else source, ema=ema)
    return _checkpoint(checkpoint, size, demo=source is None)


def _checkpoint(checkpoint: Checkpoint, size: tuple[int, int] | None, *, demo: bool) -> Inspection:
    model, wanted = checkpoint.model, checkpoint.preprocessing
    height, width = size or (wanted.image_size, wanted.image_size)
    if min(height, width) < MIN_SIDE:
        raise UnsupportedSpec(f"{height}x{width} is too small; use {MIN_SIDE} or more")
    macs, published = count_macs(model, (height, width)), count_published_flops(model, (height, width))
    facts: dict[str, object] = {
        "variant": model.config.name,
        "classes": f"{checkpoint.num_classes}" + (f": {_some(checkpoint.labels)}" if checkpoint.labels else ""),
        "parameters": f"{count_parameters(model) / 1e6:.2f} M",
        "work": f"{macs / 1e9:.3f} GMACs at {height}x{width} ({published / 1e9:.3f} as the paper counts, with norms)",
        "preprocessing": (
            f"short side to {wanted.cover(wanted.image_size)} ({wanted.interpolation}), "
            f"centre {wanted.image_size}, mean {wanted.mean}, std {wanted.std}"
        ),
        "layout": checkpoint.layout,
        "found": list(checkpoint.found),
        "file sha256": checkpoint.sha256,
        "weights": checkpoint.fingerprint,
    }
    dropped = model.config.dropped_tokens(height, width)
    if dropped:
        facts["unread tokens"] = {f"stage {stage}": count for stage, count in dropped.items()}
    if demo:
        facts["note"] = "no file given: this is the bundled demo (nextvit_nano trained on digits)"
    return Inspection(checkpoint.name, facts)


def _artefact(path: Path) -> Inspection:
    saved = read(targets.of_file(path), path)
    facts: dict[str, object] = {
        "size": f"{size_of(path) / 1e6:.1f} MB",
        "sha256": sha256_of(path),
        **({saved.unit: sum(saved.ops.values()), "op table": dict(saved.ops)} if saved.ops else {}),
        "computes in": saved.dtypes,
        **saved.facts,
    }
    if saved.provenance is None:
        return Inspection(path.name, facts | {"provenance": saved.without_provenance})
    return Inspection(path.name, facts | {key: value for key, value in saved.provenance.items() if key != "schema"})


def _some(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
