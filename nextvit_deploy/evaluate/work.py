"""One shard of an evaluation: read the pictures, ask the artefact and PyTorch, keep a few numbers of each answer."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextvit_deploy import __version__
from nextvit_deploy.data import ImageSet, Pictures
from nextvit_deploy.evaluate.results import Rows, rows_of
from nextvit_deploy.evaluate.shards import Shard, at_a_time
from nextvit_deploy.pipeline import open_checkpoint, original_outputs
from nextvit_deploy.pool.pool import keep
from nextvit_deploy.references import artefact_inputs
from nextvit_deploy.verify import Names, run_batched
from nextvit_exporters import targets
from nextvit_exporters.errors import DeployError, UnsupportedSpec
from nextvit_exporters.executors.base import LOGITS, PROBABILITIES, Array, Arrays, Executor
from nextvit_exporters.files import sha256_of
from nextvit_exporters.spec import ExportSpec
from nextvit_models.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Pair:
    """What is compared, opened."""

    checkpoint: Checkpoint
    executor: Executor


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Work for a pool; paths are absolute. ``sha256`` and ``fingerprint`` are the artefact's and the weights'.

    Files that are others where a worker reads them are a DeployError, and so is another version of this tool.
    """

    artefact: Path
    sha256: str
    checkpoint: str | None
    fingerprint: str
    ema: bool
    spec: ExportSpec
    names: Names
    folder: Path
    version: str = __version__

    def __call__(self, shard: Shard) -> Rows:
        """The rows of the shard's images."""
        pair = keep((self.artefact, self.sha256, self.fingerprint), self.opened)
        size, steps = (self.spec.height, self.spec.width), pair.checkpoint.preprocessing
        images = Pictures(self.folder, shard.paths, len(shard), size, steps).read()
        pytorch = original_outputs(self.spec, pair.checkpoint, [(str(shard), images)]).outputs[0]
        artefact = self._artefact(pair.executor, images)
        name = compared(artefact, pytorch)
        return rows_of(artefact[name], pytorch[name])

    @contextmanager
    def opened(self) -> Iterator[Pair]:
        """The artefact's executor and the checkpoint, known to be those that were asked about."""
        host = platform.node() or "a worker"
        if self.version != __version__:
            raise DeployError(f"{host} has nextvit-deploy {__version__}, not {self.version}; install the same there")
        if not self.artefact.exists() or sha256_of(self.artefact) != self.sha256:
            raise DeployError(f"{self.artefact} on {host} is not the file that was asked about; share one folder")
        checkpoint = open_checkpoint(self.checkpoint, ema=self.ema)
        if checkpoint.fingerprint != self.fingerprint:
            raise DeployError(f"{checkpoint.name} on {host} holds other weights than were asked about")
        with executor_of(self.spec, self.artefact) as executor:
            yield Pair(checkpoint, executor)

    def _artefact(self, executor: Executor, images: ImageSet) -> dict[str, Array]:
        inputs, size = artefact_inputs(self.spec, images), at_a_time(self.spec)
        parts = [
            run_batched(self.spec, executor, inputs[start : start + size], self.names)
            for start in range(0, len(inputs), size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def executor_of(spec: ExportSpec, artefact: Path) -> Executor:
    """What answers how much the precision costs: stored precision, rounding included, on the CPU."""
    return targets.load(spec.target).executors(spec, artefact)[targets.PRECISION_COST]


def compared(artefact: Arrays, pytorch: Arrays) -> str:
    """The output to compare: logits, or probabilities where an artefact shows nothing else."""
    for name in (LOGITS, PROBABILITIES):
        if name in artefact and name in pytorch:
            return name
    raise UnsupportedSpec(f"the file returns {', '.join(artefact)}; only a classifier can be evaluated")
