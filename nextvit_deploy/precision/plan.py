"""The smallest set of blocks that stays in floating point so that INT8 costs no more than a budget.

Blocks are ranked by the noise that each adds to the logits when it alone is in INT8. Noises of blocks nearly add up in
a network that was trained. What is kept is a prefix of that ranking: begun where the sums meet the budget, then
measured as a whole, with more blocks and with fewer, until one meets it that with a block less would not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nextvit_deploy.data import Pictures
from nextvit_deploy.precision.answers import right_answers
from nextvit_deploy.precision.budget import Budget, decibels
from nextvit_deploy.precision.record import BlockPlan, Measurement, PrecisionPlan
from nextvit_deploy.precision.scan import Cost, Costs, Judged, OnStep, Scanner, ScanRequest
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.files import atomic_write
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.spec import ExportSpec, Precision, quantize_of

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Budget", "PrecisionPlan", "ScanRequest", "plan_precision", "read_plan", "smallest", "write_plan"]

KEY: Final = "precision_plan"
"""Of a plan in a manifest."""


def plan_precision(
    spec: ExportSpec,
    graph: fx.GraphModule,
    found: Calibration,
    pictures: Pictures,
    budget: Budget,
    request: ScanRequest,
    on_step: OnStep,
) -> PrecisionPlan:
    """Decide which blocks of ``graph`` stay in floating point, measured on ``pictures``.

    ``graph`` is the float64 graph behind the passes of ``spec``; what ``spec.quantize.keep`` names is kept in any case.
    The figures are those of float32 arithmetic. Raises DeployError for a budget in points where the pictures have no
    classes, and where nothing could be in INT8.
    """
    from nextvit_exporters.quantize.sensitivity import BlockwiseInt8

    answers = right_answers(pictures, spec, budget)
    on_step("sensitivity")
    blockwise = BlockwiseInt8(graph, quantize_of(spec), found)
    scanner = Scanner(spec, blockwise, found, Judged(pictures, answers), request)
    search = _search(scanner, budget, on_step)
    kept = search.smallest()
    if kept == len(search.ranking):
        alone = decibels(search.seen.signal, search.noises[search.ranking[-1]])
        raise UnsupportedSpec(
            f"no block can be in INT8 within {budget}: the one that costs least leaves {alone:.1f} dB; "
            "allow more, or export in fp16"
        )
    return _plan(scanner, search, kept)


def read_plan(path: Path, spec: ExportSpec, graph: fx.GraphModule) -> PrecisionPlan:
    """The plan in a JSON file, or in a manifest that holds one.

    ``graph`` is the float64 graph behind the passes of ``spec``. Raises UnsupportedSpec where the plan is damaged, of
    another network, names blocks that the graph doesn't have, or leaves nothing in INT8.
    """
    from nextvit_exporters.quantize.placement import blocks, placement

    try:
        plan = PrecisionPlan.from_dict(_fields(path))
    except OSError as error:
        raise UnsupportedSpec(f"{path} can't be read: {error.strerror}; give a plan or a manifest") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedSpec(f"{path} holds no precision plan: {reason}; plan again with --accuracy-budget") from error
    if plan.model != spec.model:
        raise UnsupportedSpec(f"{path} is a plan for {plan.model[:40]}, not for {spec.model}; give its own")
    known = blocks(placement(graph))
    if unknown := [each.block for each in plan.blocks if each.block not in known]:
        raise UnsupportedSpec(f"{path} names a block '{unknown[0][:40]}', which {spec.model} doesn't quantize here")
    if set(known) <= set(plan.keep):
        raise UnsupportedSpec(f"{path} leaves no block in INT8; plan again with --accuracy-budget, or export in fp16")
    return plan


def write_plan(path: Path, plan: PrecisionPlan) -> None:
    """Write a plan as JSON, whole or not at all; raises OutputNotWritten."""
    atomic_write(path, (json.dumps(plan.as_dict(), indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def smallest(met: Callable[[int], bool], start: int, least: int, most: int) -> int:
    """A number from ``least`` to ``most`` that meets where one less doesn't, looked for from ``start`` on.

    ``most`` is taken to meet. Steps double until the answer lies between two that were asked, and are halved then; each
    number is asked at most once.
    """
    low, high, place, stride = least - 1, most, start, 1
    failed = passed = False
    while high - low > 1:
        place = (low + high) // 2 if failed and passed else min(max(place, low + 1), high - 1)
        if met(place):
            high, passed, place = place, True, place - stride
        else:
            low, failed, place = place, True, place + stride
        stride *= 2
    return high


@dataclass(frozen=True, slots=True, eq=False)
class _Search:
    """Prefixes of a ranking, measured as they are asked for."""

    scanner: Scanner
    budget: Budget
    on_step: OnStep
    ranking: Sequence[str]
    """Blocks that are kept in any case, then the noisiest first."""
    least: int
    """How many are kept in any case."""
    noises: Mapping[str, float]
    seen: Costs
    """Of the scan."""
    measured: dict[int, Cost]
    """By the number of blocks kept."""
    steps: list[Measurement] = field(default_factory=list)

    def predicted(self, kept: int) -> float:
        """The signal to noise that the noises of the blocks in INT8 add up to, in decibel."""
        return decibels(self.seen.signal, sum(self.noises[block] for block in self.ranking[kept:]))

    def met(self, kept: int) -> bool:
        """Whether the budget is met as measured."""
        if kept not in self.measured:
            what = f"INT8 with {kept} of {len(self.ranking)} blocks kept"
            self.measured[kept] = self.scanner.costs({what: self.ranking[kept:]}, self.on_step).choices[0]
        cost, labelled = self.measured[kept], self.scanner.judged.answers is not None
        sqnr = decibels(self.seen.signal, cost.noise)
        lost = self.seen.right - cost.right if labelled else None
        is_met = self.budget.allows(sqnr, lost, self.seen.count)
        top1 = cost.right / self.seen.count if labelled else None
        self.steps.append(Measurement(kept, self.predicted(kept), sqnr, top1, is_met))
        return is_met

    def smallest(self) -> int:
        """How many blocks to keep."""
        least, most = self.least, len(self.ranking)
        if least == most or self.met(least):
            return least
        start = least + 1
        while self.budget.in_db and start < most and self.predicted(start) < self.budget.amount:
            start += 1
        return smallest(self.met, start, least + 1, most)


def _search(scanner: Scanner, budget: Budget, on_step: OnStep) -> _Search:
    """Try every block alone, and all that may be together, on one walk through the graph for every few pictures."""
    blocks, forced = scanner.blockwise.blocks, quantize_of(scanner.spec).keep
    alone = {f"sensitivity, block {i} of {len(blocks)}": (block,) for i, block in enumerate(blocks, 1)}
    together = tuple(block for block in blocks if block not in forced)
    seen = scanner.costs(alone | {"sensitivity, all blocks": together}, on_step)
    noises = {block: cost.noise for block, cost in zip(blocks, seen.choices, strict=False)}
    least = len(blocks) - len(together)
    return _Search(scanner, budget, on_step, ranked(noises, forced), least, noises, seen, {least: seen.choices[-1]})


def ranked(noises: Mapping[str, float], forced: Collection[str]) -> list[str]:
    """Blocks in the order in which they are kept: those that are in any case, then the noisiest first."""
    return sorted(noises, key=lambda block: (block not in forced, -noises[block]))


def _plan(scanner: Scanner, search: _Search, kept: int) -> PrecisionPlan:
    spec, pictures, seen = scanner.spec, scanner.judged.pictures, search.seen
    chosen = next(step for step in search.steps if step.kept == kept)
    labelled = scanner.judged.answers is not None
    return PrecisionPlan(
        model=spec.model,
        size=(spec.height, spec.width),
        budget=str(search.budget),
        method=scanner.found.method,
        images=pictures.fingerprint,
        count=seen.count,
        blocks=_blocks(scanner, search, kept),
        predicted_db=chosen.predicted_db,
        sqnr_db=chosen.sqnr_db,
        float_top1=seen.right / seen.count if labelled else None,
        top1=chosen.top1,
        steps=tuple(search.steps),
        notes=(*search.budget.notes(seen.count), *_saturated(search.budget, chosen, seen)),
    )


def _blocks(scanner: Scanner, search: _Search, kept: int) -> tuple[BlockPlan, ...]:
    import torch

    from nextvit_deploy.references import graph_inputs

    first = torch.tensor(graph_inputs(scanner.spec, scanner.judged.pictures.read(0, 1)))
    sizes = scanner.blockwise.sizes(first)
    beside, total = quantize_of(scanner.spec).rest, sum(search.noises.values())
    floats = set(search.ranking[:kept])
    return tuple(
        BlockPlan(
            block=block,
            sqnr_db=decibels(search.seen.signal, noise),
            share=noise / total if total else 0.0,
            maps=sizes[block].maps,
            macs=sizes[block].macs,
            precision=beside if block in floats else str(Precision.INT8),
        )
        for block, noise in search.noises.items()
    )


def _saturated(budget: Budget, chosen: Measurement, seen: Costs) -> tuple[str, ...]:
    """A budget that is met because the pictures don't tell."""
    if budget.in_db or chosen.top1 is None or chosen.top1 < seen.right / seen.count:
        return ()
    note = (
        f"INT8 loses no answer on these {seen.count} images, of which PyTorch has {seen.right} right, so they can't "
        f"tell what it costs; the logits are {chosen.sqnr_db:.1f} dB above its noise"
    )
    return (note,)


def _fields(path: Path) -> Mapping[str, object]:
    """The plan's own object; raises OSError or ValueError."""
    value: object = json.loads(path.read_bytes(), parse_constant=_refuse)
    if isinstance(value, Mapping) and "artifact" in value and KEY not in value:
        raise ValueError("it is the manifest of an artefact that was made without one")
    inner = value.get(KEY, value) if isinstance(value, Mapping) else value
    if not isinstance(inner, Mapping):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - the file is wrong, not a type in the program
    return inner


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")
