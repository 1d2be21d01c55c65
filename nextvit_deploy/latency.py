"""How long a saved artefact takes on this machine's CPU, as a ratio to PyTorch: measured in turns, in one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime as ort
import torch

from nextvit_deploy.pipeline import open_checkpoint, open_images
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.request import Request
from nextvit_exporters import to_onnx
from nextvit_exporters.errors import NotExecutable
from nextvit_exporters.executors.base import Array
from nextvit_exporters.spec import ExportSpec

_SECONDS: Final = 2.0
_ROUNDS: Final = (8, 200)
"""At least and at most."""
_BEST_OF: Final = 3
"""A time is the best of a few calls in a row: on a shared machine single calls are now and then twice as slow."""


def cpu_ratio(spec: ExportSpec, path: Path, request: Request) -> float:
    """The median of the artefact's latency over that of float32 PyTorch, round by round, at the spec's batch.

    The artefact runs in ONNX Runtime with its default optimisations, PyTorch eagerly, both on torch's threads. Raises
    NotExecutable for artefacts that have no runtime on a CPU, which is all but ONNX files.
    """
    if spec.target != "onnx":
        raise NotExecutable(f"{path.name} has no runtime on this machine's CPU, so its latency can't be measured here")
    checkpoint = open_checkpoint(request.checkpoint, ema=request.ema)
    images = open_images(request.images, 1, (spec.height, spec.width), checkpoint)
    inputs = np.repeat(artefact_inputs(spec, images), spec.batch, axis=0)
    tensor = torch.tensor(np.repeat(images.normalised(), spec.batch, axis=0))
    session = _session(path)

    def pytorch() -> None:
        with torch.inference_mode():
            checkpoint.model(tensor)

    return interleaved(pytorch, lambda: _run(session, inputs))


def interleaved(baseline: Callable[[], None], candidate: Callable[[], None]) -> float:
    """The median of candidate over baseline, timed in turns in a new order each round, after one to warm up."""
    order, ratios = random.Random(0), list[float]()  # noqa: S311 - an order keeps no secret
    for call in (baseline, candidate):
        call()
    begun = time.perf_counter()
    while len(ratios) < _ROUNDS[0] or (time.perf_counter() - begun < _SECONDS and len(ratios) < _ROUNDS[1]):
        taken = {}
        for call in order.sample([baseline, candidate], 2):
            taken[call] = min(_seconds(call) for _ in range(_BEST_OF))
        ratios.append(taken[candidate] / taken[baseline])
    return round(statistics.median(ratios), 4)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: ort.InferenceSession, inputs: Array) -> None:
    session.run(None, {to_onnx.INPUT: inputs})


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
