"""A manifest as the page tells it; raises Unreadable for what is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

from nextvit_deploy.precision.record import PrecisionPlan
from nextvit_deploy.report.facts import Check, Headroom, Latency, Made, Pass, Reach
from nextvit_deploy.report.fields import Fields, Unreadable, clean
from nextvit_deploy.verdict import Verdict, worst

_LANES: Final[Mapping[str, str]] = {"onnx": "onnx", "tensorrt": "trt", "coreml": "coreml"}
"""By the spec's target."""
_TRANSFERS: Final = ("without transfers", "with transfers")


def made_of(fields: Fields) -> Made:
    """A manifest's content.

    Its verdict is the worst of what it says, what its checks say and what a device said. A part that is damaged is
    left out and noted; without artefact, spec or checks it is no manifest.
    """
    artifact, spec = fields.one("artifact"), fields.one("spec")
    checks = tuple(_check(each) for each in fields.many("checks"))
    device = fields.one_or_none("device")
    said = [verdict_of(fields), worst(each.verdict for each in checks)]
    notes = list(fields.texts("notes"))
    if device is not None:
        told = verdict_of(device)
        said += [told] if told is Verdict.FAILED else []
        checks = (*checks, _on_device(device))
    return Made(
        file=artifact.text("file"),
        sha256=artifact.sha256("sha256"),
        size=artifact.whole("bytes"),
        lane=_lane(spec),
        precision=spec.text("precision", 20),
        model=spec.text("model", 80),
        verdict=worst(said),
        checks=checks,
        passes=tuple(_pass(each) for each in fields.many("passes")),
        headroom=_headroom(fields),
        plan=_plan(fields, notes),
        latencies=(*_device_latency(device, notes), *_estimate(fields, notes)),
        dtypes=fields.text_or("dtypes"),
        notes=tuple(notes),
        provenance=tuple(_provenance(fields, artifact, spec)),
        ops=fields.one("ops").plain() if fields.values.get("ops") is not None else (),
        unit=fields.text_or("unit", "nodes"),
    )


def verdict_of(fields: Fields) -> Verdict:
    """What it says it is; raises Unreadable for a word that is no verdict."""
    word = fields.text("verdict", 40)
    try:
        return Verdict(word)
    except ValueError as error:
        raise Unreadable(f"'{word}' is no verdict") from error


def _lane(spec: Fields) -> str:
    target = spec.text("target", 40)
    if target not in _LANES:
        raise Unreadable(f"its target '{target}' is unknown")
    return _LANES[target]


def _check(fields: Fields) -> Check:
    blank = Check(
        question=fields.text("question"),
        executor=fields.text("executor"),
        mode=fields.text("mode"),
        against=fields.text("against"),
        inputs=fields.text("inputs"),
        verdict=verdict_of(fields),
        why=fields.text_or("why"),
    )
    compared = fields.many("comparisons")
    if not compared:
        return blank
    worst_one = max(compared, key=lambda each: _infinite(each.number("relative_rms")))
    flips = worst_one.number_or_none("can_flip")
    return Check(
        **{name: getattr(blank, name) for name in ("question", "executor", "mode", "against", "inputs")},
        verdict=blank.verdict,
        why=blank.why,
        error=_infinite(worst_one.number("relative_rms")),
        allowed=worst_one.one("tolerance").number("relative_rms"),
        max_abs=worst_one.number("max_abs"),
        sqnr_db=worst_one.number("sqnr_db"),
        top1=worst_one.number_or_none("top1"),
        can_flip=None if flips is None else worst_one.whole("can_flip"),
        count=worst_one.whole("count"),
    )


def _infinite(value: float) -> float:
    """NaN is as far as can be."""
    return math.inf if math.isnan(value) else value


def _on_device(device: Fields) -> Check:
    """What a kit's machine found, as one more question."""
    gpu, seen, allowed = (device.one_or_none(name) for name in ("gpu", "comparison", "tolerance"))
    executor = "no GPU" if gpu is None else f"TensorRT {device.text_or('tensorrt')} on {gpu.text('name')}"
    error = None if seen is None else seen.number_or_none("relative_rms")
    return Check(
        question="on the device",
        executor=executor,
        mode="kit",
        against="the kit's golden outputs",
        inputs="the kit's golden inputs",
        verdict=verdict_of(device),
        why=device.text_or("why"),
        error=error,
        allowed=None if allowed is None else allowed.number("relative_rms"),
        max_abs=None if seen is None else seen.number_or_none("max_abs"),
        sqnr_db=-20 * math.log10(error) if error else None,
        top1=None if seen is None else seen.number_or_none("top1"),
        count=None if seen is None or seen.values.get("images") is None else seen.whole("images"),
    )


def _device_latency(device: Fields | None, notes: list[str]) -> Iterator[Latency]:
    """The median that a kit measured, without transfers first."""
    if device is None or device.values.get("latency_ms") is None:
        return
    try:
        times, gpu = device.one("latency_ms"), device.one("gpu").text("name", 80)
        shape = "x".join(map(str, times.wholes("shape")))
        for which in _TRANSFERS:
            told = times.one(which)
            p50, p90, p99 = (told.number(name) for name in ("p50", "p90", "p99"))
            yield Latency(
                "measured",
                f"{p50:.3g} ms" if which == _TRANSFERS[0] else f"{p50:.3g} ms {which}",
                f"{p50:.3f} ms {which} on {gpu} (p90 {p90:.3f}, p99 {p99:.3f}; shape {shape})",
            )
    except Unreadable as error:
        notes.append(f"the device's latency can't be read: {error}")


def _estimate(fields: Fields, notes: list[str]) -> Iterator[Latency]:
    """Whether INT8 pays, as the manifest has it: measured by two kits, or an estimate."""
    built = fields.one_or_none("built")
    int8 = None if built is None or not isinstance(built.values.get("int8"), Mapping) else built.one("int8")
    if int8 is None:
        return
    try:
        basis = "measured" if int8.text("basis", 20) == "measured" else "estimate"
        ratio, sentence = int8.one(basis).number("ratio"), int8.text("sentence")
    except Unreadable as error:
        notes.append(f"what it says of INT8's time can't be read: {error}")
    else:
        yield Latency(basis, f"{ratio:.2f}x FP16", sentence)


def _pass(fields: Fields) -> Pass:
    return Pass(
        name=fields.text("name", 80),
        certified=fields.flag("certified"),
        rewrites=fields.whole("rewrites"),
        refused=tuple((each.text("where"), each.text("reason")) for each in fields.many("refused")),
        nodes=fields.pair("nodes"),
        parameters=fields.pair("parameters"),
        macs=fields.pair("macs"),
        error_float64=fields.number("error_float64"),
        error_float32=fields.number("error_float32"),
    )


def _headroom(fields: Fields) -> Headroom | None:
    """That of the first check that has one."""
    for check in fields.many("checks"):
        found = check.one_or_none("findings")
        if found is not None and found.values.get("headroom") is not None:
            told = found.one("headroom")
            layers = (
                Reach(each.text_or("module") or each.text("operation"), each.text("kind", 40), *_reach(each))
                for each in told.many("layers")
            )
            return Headroom(
                limit=told.number("limit"),
                accumulator_limit=told.number("accumulator_limit"),
                remark=told.text_or("remark"),
                operations=told.whole("operations"),
                weights_subnormal=told.number("weights_subnormal"),
                layers=tuple(layers),
            )
    return None


def _reach(fields: Fields) -> tuple[float, float]:
    return fields.number("largest"), fields.number("subnormal")


def _plan(fields: Fields, notes: list[str]) -> PrecisionPlan | None:
    told = fields.one_or_none("precision_plan")
    if told is None:
        return None
    try:
        return PrecisionPlan.from_dict(told.values)
    except ValueError as error:
        notes.append(f"its precision plan can't be read: {clean(str(error))}")
        return None


def _provenance(fields: Fields, artifact: Fields, spec: Fields) -> Iterator[tuple[str, str]]:
    """What is needed to build it again, by name."""
    checkpoint = fields.one("checkpoint")
    yield "artefact sha256", artifact.sha256("sha256")
    yield "checkpoint", f"{checkpoint.text('name')}, {checkpoint.text('layout', 40)} layout"
    yield "checkpoint sha256", checkpoint.text("sha256", 64)
    yield "weights' fingerprint", checkpoint.text("fingerprint", 64)
    yield "task", f"{spec.text('model', 80)}, {spec.text('task', 40)}, {spec.whole('num_classes')} classes"
    yield "input", f"{spec.whole('batch')}x3x{spec.whole('height')}x{spec.whole('width')}, {spec.text('input', 40)}"
    for part in ("engine", "coreml", "quantize"):
        if told := spec.one_or_none(part):
            listed = [f"{key} {value}" for key, value in told.plain() if value not in {"", "None", "False"}]
            yield part, ", ".join(listed)
    if spec.values.get("skip"):
        yield "passes left out", ", ".join(spec.texts("skip"))
    if built := fields.one_or_none("built"):
        yield from built.plain()
    yield "versions", ", ".join(f"{key} {value}" for key, value in fields.one("versions").plain())
