"""What an ONNX file or a Core ML package holds, in one form, and how two of them differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_deploy.data import readable

if TYPE_CHECKING:
    from onnx import AttributeProto, ModelProto

    from nextvit_exporters.coreml.program import Binding, Operation, Package

_MANIFEST: Final = "nextvit_deploy.manifest"
_TOLD_APART: Final = tuple(f"{_MANIFEST}.{part}." for part in ("versions", "passes", "checkpoint"))
"""Entries that are compared as causes of a difference, so that they are not told twice."""
_FOLLOWS: Final = frozenset({"nextvit_deploy.weights_sha256"})
"""Entries that differ wherever a constant does."""
_LONGEST: Final = 80
"""Characters of a value that is quoted."""


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """An artefact taken apart.

    ``operations`` holds the kind of each by its name, ``wiring`` what it reads, writes and is set to, ``modules`` the
    module that each constant belongs to, ``entries`` everything beside the network.
    """

    operations: Mapping[str, str]
    wiring: Mapping[str, Mapping[str, str]]
    constants: Mapping[str, NDArray[Any]]
    modules: Mapping[str, str]
    entries: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs: its kind, what it is in words, and particulars where there are many."""

    cause: str
    what: str
    details: tuple[str, ...] = ()


def contents_of(path: Path) -> Contents:
    """Take an ``.onnx`` file or an ``.mlpackage`` apart; raises BuildFailed where a package is damaged."""
    if path.is_dir():
        from nextvit_exporters.coreml.reader import read_package

        return _of_package(read_package(path))
    import onnx

    return _of_onnx(onnx.load(str(path)))


def compare(before: Contents, after: Contents) -> tuple[Difference, ...]:
    """How ``after``, which is built here, differs from ``before``, which is given: structure, constants, entries."""
    constants = _constants(before, after)
    found = (*_structure(before, after), *constants, *_entries(before, after, skip=_FOLLOWS if constants else ()))
    return tuple(Difference(each.cause, readable(each.what), tuple(map(readable, each.details))) for each in found)


def other_entries(
    cause: str, what: str, before: Mapping[str, object], after: Mapping[str, object]
) -> tuple[Difference, ...]:
    """One difference that lists what two records say of the same names, none where they agree."""
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    if not names:
        return ()
    details = tuple(f"{name}: {_quoted(before.get(name))}, here {_quoted(after.get(name))}" for name in names)
    return (Difference(cause, what, details),)


def _structure(before: Contents, after: Contents) -> tuple[Difference, ...]:
    """Operations by kind; where their numbers agree, those that are wired or set otherwise."""
    kinds = Counter(before.operations.values()), Counter(after.operations.values())
    if kinds[0] != kinds[1]:
        return other_entries("structure", "it holds other operations, counted by kind", *kinds)
    nothing: Mapping[str, str] = {}
    told = []
    for name in {**before.wiring, **after.wiring}:
        first, second = before.wiring.get(name, nothing), after.wiring.get(name, nothing)
        parts = (part for part in {**first, **second} if first.get(part) != second.get(part))
        told += [f"{name}, {part}: {_quoted(first.get(part))}, here {_quoted(second.get(part))}" for part in parts]
    if not told:
        return ()
    return (Difference("structure", "the same operations are wired or set in another way", tuple(told)),)


def _constants(before: Contents, after: Contents) -> tuple[Difference, ...]:
    """Constants that only one holds, that have another form, and that hold other values."""
    found: list[tuple[float, str]] = []
    where: list[str] = []
    for name in {**before.constants, **after.constants}:
        first, second = before.constants.get(name), after.constants.get(name)
        if first is not None and second is not None and _same(first, second):
            continue
        module = before.modules.get(name) or after.modules.get(name) or "no module"
        where.append(module)
        size, apart = _difference(first, second)
        found.append((size, f"{name} ({module}): {apart}"))
    if not found:
        return ()
    modules = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in Counter(where).most_common(5))
    more = f" and {len(set(where)) - 5} other modules" if len(set(where)) > 5 else ""
    total = len({**before.constants, **after.constants})
    told = tuple(text for _, text in sorted(found, key=lambda each: -each[0]))
    return (Difference("constants", f"{len(found)} of {total} constants differ, in {modules}{more}", told),)


def _difference(first: NDArray[Any] | None, second: NDArray[Any] | None) -> tuple[float, str]:
    """How far two constants are apart, relative to the larger, and that in words."""
    if first is None or second is None:
        return np.inf, "not in the file" if first is None else "not in what is built here"
    if first.shape != second.shape or first.dtype != second.dtype:
        shapes = (f"{each.dtype} {'x'.join(map(str, each.shape)) or 'scalar'}" for each in (first, second))
        return np.inf, ", here ".join(shapes)
    if not np.issubdtype(first.dtype, np.number):
        return np.inf, f"{_quoted(first.tolist())}, here {_quoted(second.tolist())}"
    with np.errstate(all="ignore"):
        one, other = first.astype(np.float64), second.astype(np.float64)
        apart = np.abs(one - other)
        count = int(np.count_nonzero(~(apart == 0)))
        most, scale = float(np.nanmax(apart, initial=0.0)), float(np.nanmax(np.abs([one, other]), initial=0.0))
    share = most / scale if scale else 0.0
    if not np.isfinite(apart).all():
        return np.inf, f"{count} of {first.size} values differ, not all of them finite"
    return share, f"{count} of {first.size} values differ, by {most:.2g} at most ({share:.1e} of the largest)"


def _same(first: NDArray[Any], second: NDArray[Any]) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype.hasobject:
        return bool(np.array_equal(first, second))
    return first.tobytes() == second.tobytes()


def _entries(before: Contents, after: Contents, skip: Iterable[str]) -> tuple[Difference, ...]:
    def told(contents: Contents) -> dict[str, str]:
        return {
            name: value
            for name, value in contents.entries.items()
            if name not in skip and not name.startswith(_TOLD_APART)
        }

    return other_entries("metadata", "what it records of itself differs", told(before), told(after))


def _of_onnx(model: ModelProto) -> Contents:
    from onnx import numpy_helper

    modules: dict[str, str] = {}
    for node in model.graph.node:
        for name in node.input:
            modules.setdefault(name, node.name.rpartition("/")[0])
    entries = {
        "ir version": str(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}",
        "graph name": model.graph.name,
        "opsets": ", ".join(f"{each.domain or 'ai.onnx'} {each.version}" for each in model.opset_import),
        "inputs and outputs": " ".join(
            f"{value.name} {value.type}".replace("\n", " ") for value in (*model.graph.input, *model.graph.output)
        ),
        **_flat((each.key, each.value) for each in model.metadata_props),
    }
    return Contents(
        {node.name: node.op_type for node in model.graph.node},
        {
            node.name: {"inputs": " ".join(node.input), "outputs": " ".join(node.output), **_attributes(node.attribute)}
            for node in model.graph.node
        },
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer},
        modules,
        entries,
    )


def _attributes(attributes: Iterable[AttributeProto]) -> dict[str, str]:
    import onnx

    return {each.name: str(onnx.helper.printable_attribute(each)).partition(" = ")[2] for each in attributes}


def _of_package(package: Package) -> Contents:
    from nextvit_exporters.coreml.program import modules_of

    told, modules = modules_of(package), dict[str, str]()
    operations = package.program.operations
    for each in reversed(operations):  # a compressed constant is read by what decompresses it, which comes later
        module = told.get(each.outputs[0].name, "") or modules.get(each.outputs[0].name, "")
        for binding in (binding for bindings in each.inputs.values() for binding in bindings):
            if isinstance(binding, str):
                modules[binding] = module
    constants: dict[str, NDArray[Any]] = {}
    for each in operations:
        for key, data in _values(each):
            constants[key] = data
            modules[key] = modules.get(each.outputs[0].name, "")
    computing = [each for each in operations if each.kind != "const"]
    return Contents(
        {each.name: each.kind for each in computing},
        {each.name: _wired(each) for each in computing},
        constants,
        modules,
        {
            "specification": str(package.specification),
            "inputs": str(package.inputs),
            "outputs": str(package.outputs),
            "labels": ", ".join(package.labels),
            **package.about,
            **_flat(package.metadata.items()),
        },
    )


def _values(operation: Operation) -> Iterable[tuple[str, NDArray[Any]]]:
    """Every value that is written into an operation, by a name of its own."""
    for name, constant in operation.attributes.items():
        yield operation.name if name == "val" else f"{operation.name}.{name}", constant.data
    for name, bindings in operation.inputs.items():
        for index, binding in enumerate(bindings):
            if not isinstance(binding, str):
                yield f"{operation.name}.{name}.{index}", binding.data


def _wired(operation: Operation) -> dict[str, str]:
    inputs = {name: ", ".join(_bound(each) for each in bindings) for name, bindings in operation.inputs.items()}
    return inputs | {"outputs": ", ".join(f"{each.name} {each.type}" for each in operation.outputs)}


def _bound(binding: Binding) -> str:
    return binding if isinstance(binding, str) else "a value"


def _flat(entries: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Texts by name; one that is JSON is taken apart, ``nextvit_deploy.manifest.spec.height``."""
    found: dict[str, str] = {}
    for key, text in entries:
        try:
            value: object = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        found.update(_leaves(key, value))
    return found


def _leaves(key: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        return {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)}
    found: dict[str, str] = {}
    for name, item in value.items():
        found.update(_leaves(f"{key}.{name}", item))
    return found


def _quoted(value: object) -> str:
    """A value in few characters: around where it is long, its ends."""
    if value is None:
        return "nothing"
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
