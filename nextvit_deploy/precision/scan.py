"""What choices of blocks in INT8 cost on pictures: by this process, by several, or by a Ray cluster.

Every few pictures are one task, wherever it is done, and sums are taken in the order of the pictures: any number of
workers gives the same figures to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import platform
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_deploy import __version__
from nextvit_deploy.cache import cache_folder
from nextvit_deploy.data import Pictures
from nextvit_deploy.pool.pool import keep, pool
from nextvit_exporters.errors import DeployError, InvariantError
from nextvit_exporters.files import not_written
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.spec import ExportSpec, quantize_of

if TYPE_CHECKING:
    from nextvit_exporters.quantize.sensitivity import BlockwiseInt8

Float = NDArray[np.float64]
OnStep = Callable[[str], None]
_AT_A_TIME: Final = 4
"""Pictures per task and per batch: enough to be quick, little enough to share."""


@dataclass(frozen=True, slots=True)
class ScanRequest:
    """Where the weights come from, for other processes to load again, and how many of them.

    None is the demo's checkpoint. ``ray`` is the address of a cluster, with at most ``workers`` tasks at a time; None
    leaves that to the cluster's processors, and without a cluster all the work to this process.
    """

    checkpoint: str | None = None
    ema: bool = False
    workers: int | None = None
    ray: str | None = None

    @property
    def alone(self) -> bool:
        """Whether this process does all the work."""
        return self.ray is None and self.workers in {None, 1}

    @property
    def elsewhere(self) -> str | None:
        """The checkpoint as a process with another working directory finds it; a hub id as it is."""
        source = self.checkpoint
        return str(Path(source).absolute()) if source is not None and Path(source).exists() else source


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one choice of blocks: the sum of squared differences of the logits, and how many answers are right."""

    noise: float
    right: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Over some pictures: the float graph's sum of squared logits and right answers, and each choice's cost."""

    count: int
    signal: float
    right: int
    choices: tuple[Cost, ...]

    def __add__(self, other: Costs) -> Costs:
        pairs = zip(self.choices, other.choices, strict=True)
        return Costs(
            self.count + other.count,
            self.signal + other.signal,
            self.right + other.right,
            tuple(Cost(a.noise + b.noise, a.right + b.right) for a, b in pairs),
        )


Answers = Generator[tuple[int, Costs], None, None]
"""Costs of batches by their number, as they finish."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures from ``start`` to before ``stop``, and the choices of blocks to try on them."""

    start: int
    stop: int
    choices: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return f"the sensitivity on images {self.start + 1} to {self.stop}"


@dataclass(frozen=True, slots=True)
class Judged:
    """Pictures, and their classes where these are known."""

    pictures: Pictures
    answers: tuple[int, ...] | None

    def absolute(self) -> Judged:
        """The same for a process with another working directory."""
        here = self.pictures
        paths = tuple(each.absolute() for each in here.paths)
        return replace(self, pictures=replace(here, folder=here.folder.absolute(), paths=paths))


@dataclass(frozen=True, slots=True, eq=False)
class Here:
    """Work on a graph that is there already."""

    spec: ExportSpec
    blockwise: BlockwiseInt8
    judged: Judged
    on_choice: Callable[[Batch, int], None]

    def __call__(self, batch: Batch) -> Costs:
        """The costs of a batch; tells which of its choices was tried."""
        return _costs(self.blockwise, self.spec, self.judged, batch, self.on_choice)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Work of another process, which makes the graph again from the checkpoint and the calibration in a file.

    Paths are absolute. Another version of this tool there is a DeployError.
    """

    spec: ExportSpec
    checkpoint: str | None
    ema: bool
    calibration: Path
    judged: Judged
    version: str = __version__

    def __call__(self, batch: Batch) -> Costs:
        """The costs of a batch; raises InvariantError where the checkpoint now makes another graph."""
        return _costs(keep(self, self._opened), self.spec, self.judged, batch, lambda *_: None)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BlockwiseInt8]:
        from nextvit_deploy.pipeline import open_checkpoint, rewrite
        from nextvit_exporters import graph as g
        from nextvit_exporters.quantize.identity import graph_hash
        from nextvit_exporters.quantize.sensitivity import BlockwiseInt8

        host = platform.node() or "a worker"
        if self.version != __version__:
            raise DeployError(f"{host} has nextvit-deploy {__version__}, not {self.version}; install the same there")
        graph, _ = rewrite(self.spec, open_checkpoint(self.checkpoint, ema=self.ema), lambda _: None)
        found = Calibration.load(self.calibration)
        if graph_hash(graph) != found.graph:
            raise InvariantError(f"the checkpoint on {host} is not the one that was calibrated; start again")
        blockwise = BlockwiseInt8(graph, quantize_of(self.spec), found)
        g.release(graph)
        yield blockwise


@dataclass(frozen=True, slots=True, eq=False)
class Scanner:
    """Tries choices of blocks on pictures; what it computes on is the same for all of them."""

    spec: ExportSpec
    blockwise: BlockwiseInt8
    found: Calibration
    judged: Judged
    request: ScanRequest

    def costs(self, choices: Mapping[str, Collection[str]], on_step: OnStep) -> Costs:
        """What each choice of blocks costs over all pictures, in the order given; by the name to show at progress.

        Raises InvariantError where PyTorch answers nothing or INT8 no numbers, and what workers raise.
        """
        named, count = tuple(tuple(sorted(each)) for each in choices.values()), len(self.judged.pictures)
        batches = [Batch(i, min(i + _AT_A_TIME, count), named) for i in range(0, count, _AT_A_TIME)]
        run = self._here if self.request.alone else self._elsewhere
        parts: dict[int, Costs] = {}
        total: Costs | None = None
        added = 0
        with contextlib.closing(run(batches, list(choices), on_step)) as answers:
            for index, part in answers:
                parts[index] = part
                while added in parts:  # in the order of the pictures, whoever is first
                    total = parts.pop(added) if total is None else total + parts.pop(added)
                    added += 1
        if total is None or not math.isfinite(total.signal) or total.signal == 0.0:
            raise InvariantError("PyTorch's logits are zero or not finite on these images; nothing can be compared")
        if not all(math.isfinite(each.noise) for each in total.choices):
            raise InvariantError("logits in INT8 are not finite on these images; calibrate on images like them")
        return total

    def _here(self, batches: Sequence[Batch], names: Sequence[str], on_step: OnStep) -> Answers:
        """By this process, on the graph it has."""

        def tell(batch: Batch, index: int) -> None:
            on_step(f"{names[index]}, image {batch.start + 1} of {len(self.judged.pictures)}")

        work = Here(self.spec, self.blockwise, self.judged, tell)
        yield from pool(1).run(work, batches)

    def _elsewhere(self, batches: Sequence[Batch], names: Sequence[str], on_step: OnStep) -> Answers:
        """By other processes, which begin with making the graph."""
        what, done = names[0] if len(names) == 1 else "sensitivity of all blocks", 0
        asked = self.request
        with _saved(self.found) as path:
            work = Elsewhere(self.spec, asked.elsewhere, asked.ema, path, self.judged.absolute())
            with contextlib.closing(pool(asked.workers or 0, asked.ray).run(work, batches)) as answers:
                for index, part in answers:
                    done += part.count
                    on_step(f"{what}, {done} of {len(self.judged.pictures)} images done")
                    yield index, part


@contextlib.contextmanager
def _saved(found: Calibration) -> Iterator[Path]:
    """A calibration in a file that other processes can read, on other machines as well where they share a home."""
    folder = cache_folder("plans")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise not_written(folder, error) from error
    with place as name:
        path = Path(name).absolute() / "calibration.safetensors"
        found.save(path)
        yield path


def _costs(
    blockwise: BlockwiseInt8, spec: ExportSpec, judged: Judged, batch: Batch, on_choice: Callable[[Batch, int], None]
) -> Costs:
    import torch

    from nextvit_deploy.references import graph_inputs

    inputs = torch.tensor(graph_inputs(spec, judged.pictures.read(batch.start, batch.stop)))
    logits: dict[int | None, Float] = {}
    for index, some in blockwise.logits(inputs, batch.choices):
        logits[index] = some.double().numpy()
        if index is not None:
            on_choice(batch, index)
    right = logits.pop(None)
    answers = None if judged.answers is None else np.array(judged.answers[batch.start : batch.stop], np.int64)
    return Costs(
        count=batch.stop - batch.start,
        signal=float((right**2).sum()),
        right=_right(right, answers),
        choices=tuple(
            Cost(float(((logits[i] - right) ** 2).sum()), _right(logits[i], answers)) for i in range(len(batch.choices))
        ),
    )


def _right(logits: Float, answers: NDArray[np.int64] | None) -> int:
    return 0 if answers is None else int((logits.argmax(1) == answers).sum())
