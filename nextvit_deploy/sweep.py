"""Every compression of one Core ML package, each built and verified: size against error, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from nextvit_deploy.compare import Comparison
from nextvit_deploy.manifest import Manifest, plain
from nextvit_deploy.pipeline import export
from nextvit_deploy.request import Request
from nextvit_deploy.verdict import Verdict
from nextvit_exporters.coreml_spec import OLDEST_FOR_ACTIVATIONS, OLDEST_FOR_WEIGHTS, WEIGHTS
from nextvit_exporters.errors import InvariantError, UnsupportedSpec
from nextvit_exporters.spec import Precision
from nextvit_exporters.targets import PRECISION_COST

W8A8: Final = "w8a8"
ROOM: Final = 0.5
"""How much of the way to another decision a recommended package's error may go, on any image."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One package of the sweep, or why there is none."""

    name: str
    manifest: Manifest | None
    why: str = ""

    @property
    def cost(self) -> Comparison | None:
        """What its precision costs on the images: the worst output."""
        checks = () if self.manifest is None else self.manifest.checks
        found = [each for check in checks if check.question == PRECISION_COST for each in check.comparisons[:1]]
        return max(found, key=lambda each: each.relative_rms, default=None)

    @property
    def size(self) -> int:
        """Bytes; 0 where there is no package."""
        return 0 if self.manifest is None else self.manifest.artifact.size

    @property
    def sound(self) -> bool:
        """Whether it is verified, and its error uses up no more than ``ROOM`` of what would turn a decision."""
        verified = self.manifest is not None and self.manifest.verdict is Verdict.VERIFIED
        return verified and self.cost is not None and (self.cost.margin is None or self.cost.margin <= ROOM)

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        if self.manifest is None or self.cost is None:
            return {"name": self.name, "why": self.why}
        return {
            "name": self.name,
            "file": str(self.manifest.artifact.path),
            "bytes": self.manifest.artifact.size,
            "verdict": str(self.manifest.verdict),
            "relative_rms": plain(self.cost.relative_rms),
            "sqnr_db": plain(self.cost.sqnr_db),
            "top1": self.cost.top1,
            "can_flip": self.cost.can_flip,
            "images": self.cost.count,
        }


@dataclass(frozen=True, slots=True)
class Sweep:
    """All trials, the most exact first, and the one to take."""

    trials: tuple[Trial, ...]
    recommended: Trial | None

    @property
    def because(self) -> str:
        """Why that one, in a sentence."""
        if self.recommended is None or self.recommended.cost is None:
            return "no package decides safely as PyTorch does on these images; keep float32, or look at them"
        count = self.recommended.cost.count
        return (
            f"{self.recommended.name}: the smallest verified package whose error uses up at most half of what would "
            f"turn a decision, on {count} images; ask more of your own with --images and --count before you trust it"
        )

    def as_dict(self) -> dict[str, object]:
        """JSON-ready."""
        name = None if self.recommended is None else self.recommended.name
        return {"trials": [each.as_dict() for each in self.trials], "recommended": name, "because": self.because}


def sweep(request: Request, on_step: Callable[[str], None]) -> Sweep:
    """Export ``request``, an FP16 package, in every compression; each is written and verified.

    Raises UnsupportedSpec where a compression is asked for already, and a DeployError as ``export`` does.
    """
    asked = request.coreml
    if asked is None or request.precision is not Precision.FP16 or asked.weights or asked.activations:
        raise UnsupportedSpec("--sweep builds every compression of the FP16 package; ask for none beside it")
    if asked.swift is not None:
        raise UnsupportedSpec("--swift goes with one package; ask for it with the compression that --sweep recommends")
    trials = tuple(_trial(request, name, on_step) for name in ("fp16", *WEIGHTS, W8A8))
    return Sweep(trials, recommend(trials))


def recommend(trials: Sequence[Trial]) -> Trial | None:
    """The smallest sound package; of equally large ones the first, which is the more exact."""
    return min((each for each in trials if each.sound), key=lambda each: each.size, default=None)


def _trial(request: Request, name: str, on_step: Callable[[str], None]) -> Trial:
    asked = request.coreml
    if asked is None:
        raise ValueError("the request asks for no package")
    oldest = {"fp16": 0, W8A8: OLDEST_FOR_ACTIVATIONS}.get(name, OLDEST_FOR_WEIGHTS)
    if asked.ios < oldest:
        return Trial(name, None, f"needs iOS {oldest}; ask for --ios {oldest} or more")
    wanted = replace(
        asked,
        weights=name if name in WEIGHTS else None,
        activations="int8" if name == W8A8 else None,
    )
    try:
        manifest = export(replace(request, coreml=wanted), lambda step: on_step(f"{name}: {step}"))
    except (InvariantError, UnsupportedSpec) as error:  # the scheme can't hold these weights, or not this network
        if name == "fp16":
            raise
        return Trial(name, None, str(error))
    return Trial(name, manifest)
