"""What in a saved package is known to leave the Neural Engine, or to slow it down.

Which unit runs an operation is decided on the device, and Apple publishes no list. Every rule here is a heuristic: it
says where it is from, and only a measurement on a phone tells whether it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from nextvit_exporters.coreml.program import (
    Constant,
    Operation,
    Package,
    Program,
    TensorType,
    modules_of,
)

APPLE_TRANSFORMERS: Final = "Apple, Deploying Transformers on the Apple Neural Engine, 2022"
APPLE_TYPES: Final = "Apple, Typed Execution in the coremltools guide"
APPLE_SHAPES: Final = "Apple, Flexible Input Shapes in the coremltools guide"
THIRD_PARTY: Final = "third-party measurements on M1 and M5"
THIRD_PARTY_A14: Final = "third-party measurements on M1 and A14"
THIRD_PARTY_M1: Final = "third-party measurements on M1"
USERS: Final = "advice among users, not Apple's"

RESHAPES: Final = 4
"""What one channel-first attention needs: in front of the token average, of queries, of keys and values, and back."""
AXES: Final = 4
LONGEST_AXIS: Final = 16384
WIDEST_POOL: Final = 31
WIDEST_KERNEL: Final = 16
CHANNELS: Final = 16
SUBNORMALS: Final = 0.05
"""Share of a weight's numbers; folded Next-ViT weights with random numbers stay below 0.0025."""
_MANY: Final = 1024
"""Numbers in a weight from which on a share is one."""
_PLACES: Final = 4
"""Modules up to which a rule names each."""
_SIZES: Final = frozenset({"shape", "gather", "gather_nd", "gather_along_axis"})
_POOLS: Final = frozenset({"avg_pool", "max_pool", "l2_pool"})
_CENTRES: Final = frozenset({"add", "sub", "mul"})
_ATTENTION: Final = frozenset({"softmax", "scaled_dot_product_attention"})
_FLOATS: Final = frozenset({"float16", "float32"})
_SMALLEST_NORMAL: Final = 0x0400
"""FP16's smallest normal number, as bits."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One heuristic that applies: ``message`` says what was found and what to do about it, in one line.

    ``module`` is the torch module, "" where none is known or the package as a whole is meant; ``operation`` is the
    first one concerned, or an input. ``source`` is where the heuristic is from.
    """

    rule: str
    module: str
    operation: str
    message: str
    source: str

    def __str__(self) -> str:
        place = f"{self.module}: " if self.module else ""
        return f"heuristic {self.rule}: {place}{self.message} ({self.source})"


def lint(package: Package) -> tuple[Finding, ...]:
    """What applies to a package: by rule, and within a rule in the order of execution.

    A rule speaks once for a module, and once in all where it would name more than four.
    """
    seen = _View(package.program, package)
    modules = modules_of(package)
    return tuple(finding for rule in _RULES for finding in _grouped(rule, seen, modules))


@dataclass(frozen=True)
class _View:
    """A program with its values by name."""

    program: Program
    package: Package

    @cached_property
    def computing(self) -> tuple[Operation, ...]:
        """Everything but constants, compressed ones included."""
        return tuple(
            each for each in self.program.operations if each.kind != "const" and not each.kind.startswith("constexpr")
        )

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """The type of every value."""
        made = {out.name: out.type for each in self.program.operations for out in each.outputs}
        return {**self.program.inputs, **made}

    @cached_property
    def constants(self) -> Mapping[str, Constant]:
        """The constants that are not compressed."""
        return {
            each.outputs[0].name: each.attributes["val"] for each in self.program.operations if each.kind == "const"
        }

    def type_of(self, operation: Operation, parameter: str) -> TensorType | None:
        """The type of what a parameter is bound to."""
        for bound in operation.inputs.get(parameter, ()):
            return bound.type if isinstance(bound, Constant) else self.types.get(bound)
        return None

    def numbers(self, operation: Operation, parameter: str) -> tuple[float, ...]:
        """A constant parameter's numbers; none where it is missing or computed."""
        for bound in operation.inputs.get(parameter, ()):
            held = bound if isinstance(bound, Constant) else self.constants.get(bound)
            return () if held is None else tuple(float(each) for each in held.data.reshape(-1))
        return ()


_Hit = tuple[str, str]
"""An operation's first output, or an input's name; and the message."""


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    source: str
    check: Callable[[_View], Iterator[_Hit]]


def _grouped(rule: _Rule, seen: _View, modules: Mapping[str, str]) -> Iterator[Finding]:
    places: dict[str, list[_Hit]] = {}
    for name, message in rule.check(seen):
        places.setdefault(modules.get(name, ""), []).append((name, message))
    if len(places) > _PLACES:
        hits = [hit for each in places.values() for hit in each]
        name, message = hits[0]
        more = f" ({len(hits)} operations in {len(places)} modules, this the first)"
        yield Finding(rule.name, modules.get(name, ""), name, message + more, rule.source)
        return
    for module, hits in places.items():
        name, message = hits[0]
        more = f" ({len(hits)} operations)" if len(hits) > 1 else ""
        yield Finding(rule.name, module, name, message + more, rule.source)


def _single_precision(seen: _View) -> Iterator[_Hit]:
    """Float32 operations, but for a picture's mean and scale, which coremltools has no other type for."""
    images = {each.name for each in seen.package.inputs if each.kind == "image"}
    for each in seen.computing:
        read = {bound for values in each.inputs.values() for bound in values if isinstance(bound, str)}
        if each.kind in _CENTRES and read & images and read - images <= seen.constants.keys():
            images.add(each.outputs[0].name)
        elif each.kind not in {"cast", "classify"} and _is_tensor(each.outputs[0].type, "float32"):
            yield (
                each.outputs[0].name,
                f"{each.kind} in float32 never runs on the Neural Engine; export in FP16, but for what overflows there",
            )


def _is_tensor(kind: TensorType, dtype: str) -> bool:
    """Whether it is of that type and more than a number: sizes of open axes are computed in floats too."""
    return kind.dtype == dtype and kind.shape != ()


def _ranks(seen: _View) -> Iterator[_Hit]:
    for name, shape in _shapes(seen):
        if len(shape) > AXES:
            yield name, f"{_text(shape)} has {len(shape)} axes; the Neural Engine works on (B, C, 1, S): merge some"


def _ranges(seen: _View) -> Iterator[_Hit]:
    for each in seen.package.inputs:
        if any(low != high for low, high in each.ranges):
            yield (
                each.name,
                f"'{each.name}' takes a range of shapes, which can't be prepared for; enumerate the sizes you need",
            )


def _sizes(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        if each.kind in _SIZES or each.outputs[0].type.dtype.startswith(("int", "uint")):
            if each.kind in {"quantize", "dequantize"}:
                continue
            yield (
                each.outputs[0].name,
                f"{each.kind} works on whole numbers, which the Neural Engine doesn't; for one size they are constants",
            )


def _transposes(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        if each.kind == "transpose":
            yield (
                each.outputs[0].name,
                "transpose copies memory; let channel-first-attention compute on (B, C, N), without --skip",
            )


def _reshapes(seen: _View) -> Iterator[_Hit]:
    """More reshapes than the attentions need; the one that hands (B, C) to a head isn't counted."""
    found = [each for each in seen.computing if each.kind == "reshape" and len(each.outputs[0].type.shape) > 2]
    attentions = sum(each.kind in _ATTENTION and len(each.outputs[0].type.shape) > 2 for each in seen.computing)
    if len(found) > RESHAPES * attentions:
        yield (
            found[0].outputs[0].name,
            f"{len(found)} reshapes, and {attentions} attentions need {RESHAPES * attentions}; keep all passes",
        )


def _long_axes(seen: _View) -> Iterator[_Hit]:
    for name, shape in _shapes(seen):
        if any(size is not None and size > LONGEST_AXIS for size in shape):
            yield name, f"{_text(shape)} has an axis beyond {LONGEST_AXIS}; use a smaller --size"


def _late_slices(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        if each.outputs[0].type.dtype in _FLOATS and _begins_late(seen, each):
            yield (
                each.outputs[0].name,
                f"{each.kind} starts within the last axis, where values above 4094 become infinite; slice another",
            )


def _begins_late(seen: _View, operation: Operation) -> bool:
    if operation.kind == "split":
        given, axis = seen.type_of(operation, "x"), seen.numbers(operation, "axis")
        return given is not None and bool(axis) and int(axis[0]) % len(given.shape) == len(given.shape) - 1
    if operation.kind not in {"slice_by_index", "slice_by_size"}:
        return False
    begin, masked = seen.numbers(operation, "begin"), seen.numbers(operation, "begin_mask")
    return bool(begin) and begin[-1] != 0 and not (masked and masked[-1])


def _pools(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        if each.kind in _POOLS and (widest := max(seen.numbers(each, "kernel_sizes"), default=0.0)) > WIDEST_POOL:
            yield each.outputs[0].name, f"{each.kind} over {widest:.0f}, beyond {WIDEST_POOL}; average in two steps"


def _kernels(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        weight = seen.type_of(each, "weight") if each.kind == "conv" else None
        if weight is not None and (weight.shape[-1] or 0) > WIDEST_KERNEL:
            yield each.outputs[0].name, f"a kernel {weight.shape[-1]} wide, beyond {WIDEST_KERNEL}; use smaller ones"


def _channels(seen: _View) -> Iterator[_Hit]:
    """Convolutions; an axis of one (a depthwise one's), and the three colours in front, can't be otherwise."""
    for each in seen.computing:
        weight = seen.type_of(each, "weight") if each.kind == "conv" else None
        if weight is None:
            continue
        out, into = weight.shape[:2]
        odd = [size for size in (into, out) if size is not None and size % CHANNELS]
        if set(odd) - {1, 3}:
            yield (
                each.outputs[0].name,
                f"convolves {into} channels a group to {out}; multiples of {CHANNELS} suit it: train with those",
            )


def _thin_rows(seen: _View) -> Iterator[_Hit]:
    for name, shape in _shapes(seen):
        if len(shape) == AXES and shape[-1] == 1 and shape[-2] not in {None, 1}:
            yield (
                name,
                f"{_text(shape)} ends in an axis of one, which is padded to 64 bytes; put the positions last",
            )


def _batches(seen: _View) -> Iterator[_Hit]:
    for each in seen.package.inputs:
        largest = max((high for _, high in each.ranges[:1]), default=each.shape[0] if each.shape else 1)
        if largest > 1:
            yield (
                each.name,
                f"'{each.name}' holds up to {largest} pictures; an app that has one waits for all: time --batch 1 too",
            )


def _subnormals(seen: _View) -> Iterator[_Hit]:
    for each in seen.computing:
        for bound in each.inputs.get("weight", ()):
            held = bound if isinstance(bound, Constant) else seen.constants.get(bound)
            if held is None or held.type.dtype != "float16" or held.data.size < _MANY:
                continue
            bits = np.ascontiguousarray(held.data).view(np.uint16) & np.uint16(0x7FFF)
            share = float(np.mean((bits > 0) & (bits < _SMALLEST_NORMAL)))
            if share > SUBNORMALS:
                yield (
                    each.outputs[0].name,
                    f"{share:.0%} of the weights are below FP16's normal numbers and may count as zero; rescale them",
                )


def _shapes(seen: _View) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Every computed tensor of floating numbers."""
    for each in seen.computing:
        for out in each.outputs:
            if out.type.dtype in _FLOATS:
                yield each.outputs[0].name, out.type.shape


def _text(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if size is None else str(size) for size in shape)


_RULES: Final = (
    _Rule("float32", APPLE_TYPES, _single_precision),
    _Rule("rank", APPLE_TRANSFORMERS, _ranks),
    _Rule("shape-range", APPLE_SHAPES, _ranges),
    _Rule("whole-numbers", APPLE_TYPES, _sizes),
    _Rule("transpose", APPLE_TRANSFORMERS, _transposes),
    _Rule("reshape", APPLE_TRANSFORMERS, _reshapes),
    _Rule("axis-length", THIRD_PARTY, _long_axes),
    _Rule("last-axis-slice", THIRD_PARTY_A14, _late_slices),
    _Rule("pool-window", THIRD_PARTY_A14, _pools),
    _Rule("kernel-width", THIRD_PARTY, _kernels),
    _Rule("channels", USERS, _channels),
    _Rule("last-axis-of-one", APPLE_TRANSFORMERS, _thin_rows),
    _Rule("batch", APPLE_TRANSFORMERS, _batches),
    _Rule("subnormal-weights", THIRD_PARTY_M1, _subnormals),
)
