"""An ML program executed operation by operation, each result held against what the program declares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from nextvit_exporters.coreml.headroom import LIMIT, Meter
from nextvit_exporters.coreml.program import Binding, Operation, Output, Program
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from nextvit_exporters.executors import base
from nextvit_exporters.executors.mil_call import Call, Constants, agrees, where
from nextvit_exporters.executors.mil_constexpr import CONSTANT_EXPRESSIONS
from nextvit_exporters.executors.mil_ops import OPERATIONS, STORED_BEFORE
from nextvit_exporters.executors.mil_rounding import FLOATS, INTEGERS, Arithmetic

CLASSIFY: Final = "classify"
See = Callable[[str, Tensor], None]
_LOGITS_THROUGH: Final = frozenset({"cast", "reshape", "squeeze", "expand_dims", "identity"})


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """An operation, its name in errors, and the tensors that nobody reads any more after it."""

    operation: Operation
    where: str
    done: tuple[str, ...]


class ProgramReference:
    """Executes a program on tensors.

    ``meter``, if there is one, sees everything that is stored as float16, and more than float16 holds is then a
    VerificationFailed. Raises NotExecutable for an operation that is not known, VerificationFailed for one that reads
    what is not there.
    """

    def __init__(
        self,
        program: Program,
        arithmetic: Arithmetic,
        modules: Mapping[str, str] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.program, self.arithmetic, self.meter = program, arithmetic, meter
        self._wide = replace(arithmetic, chunk=0)  # what is kept in float32 has its sums in float32 too
        self._modules = modules or {}
        self._opset = _number(program.opset)
        observe = (lambda _where, _values: None) if meter is None else meter.see_weights
        self.constants = Constants(program, self._modules, arithmetic, observe)
        self.classifier = next((each for each in program.operations if each.kind == CLASSIFY), None)
        self.logits = None if self.classifier is None else logits_of(program, self.classifier)
        self.outputs = _tensors(program, self.classifier, self.logits)
        self._steps = self._schedule()

    @property
    def steps(self) -> tuple[base.Step, ...]:
        """Every operation that is executed, in order, with the torch module it comes from."""
        return tuple(
            base.Step(
                operation=each.operation.name,
                kind=each.operation.kind,
                module=self._modules.get(each.operation.outputs[0].name, "") if each.operation.outputs else "",
                inputs=tuple(dict.fromkeys(n for bound in each.operation.inputs.values() for n in _names(bound))),
                outputs=tuple(output.name for output in each.operation.outputs),
                stored=tuple(output.type.dtype for output in each.operation.outputs),
            )
            for each in self._steps
        )

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor], see: See | None = None) -> dict[str, Tensor]:
        """The tensors of ``outputs``, by name, for the program's inputs; real ones in the arithmetic's type.

        ``see`` is called with the name and value of each input and each result, as soon as it is there.
        Raises VerificationFailed where a result is not what is declared, where an operation can't be executed on what
        it reads, or where float16 overflows; NotExecutable where an operation has a parameter that is not known.
        """
        values: dict[str, Tensor] = {}
        for name, kind in self.program.inputs.items():
            if name not in inputs:
                raise VerificationFailed(f"the program reads {name}, which was not given")
            agrees(f"input {name}", tuple(inputs[name].shape), Output(name, kind))
            values[name] = self._read_in(name, inputs[name], kind.dtype)
            if see is not None:
                see(name, values[name])
        for step in self._steps:
            self._execute(step, values)
            if see is not None:
                for output in step.operation.outputs:
                    see(output.name, values[output.name])
            for gone in step.done:
                del values[gone]
        return {name: self._kept(name, values) for name in self.outputs}

    def _read_in(self, name: str, values: Tensor, declared: str) -> Tensor:
        stored = self.arithmetic.store(values, declared)
        if stored is not values and bool((stored.isinf() & values.isfinite()).any()):
            raise VerificationFailed(
                f"input {name} does not fit float16, which ends at {LIMIT:.0f}: declare it float32"
            )
        return stored

    def _kept(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        return values[name] if name in values else self.constants.tensor(name, f"output {name}")

    def _schedule(self) -> tuple[Step, ...]:
        operations = [
            each
            for each in self.program.operations
            if each.kind not in {"const", CLASSIFY} and each.kind not in CONSTANT_EXPRESSIONS
        ]
        written = set(self.program.inputs)
        for each in operations:
            if each.kind not in OPERATIONS:
                raise NotExecutable(f"{where(each, self._modules)} is of a kind that can't be executed here")
            for name in _read(each):
                if name not in written and name not in self.constants:
                    raise VerificationFailed(f"{where(each, self._modules)} reads {name}, which is not there")
            written |= {output.name for output in each.outputs}
        for name in self.outputs:
            if name not in written and name not in self.constants:
                raise VerificationFailed(f"the program gives {name}, which is never written")
        return self._with_ends(operations)

    def _with_ends(self, operations: list[Operation]) -> tuple[Step, ...]:
        readers = Counter(name for each in operations for name in _read(each) if name not in self.constants)
        steps = []
        for each in operations:
            done = [output.name for output in each.outputs if not readers[output.name]]
            for name in _read(each):
                readers[name] -= 1
                done += [name] if readers[name] == 0 else []
            steps.append(Step(each, where(each, self._modules), tuple(sorted(set(done) - set(self.outputs)))))
        return tuple(steps)

    def _execute(self, step: Step, values: dict[str, Tensor]) -> None:
        operation = step.operation
        half = any(output.type.dtype == "float16" for output in operation.outputs)
        arithmetic = self.arithmetic if half else self._wide
        call = Call(operation, step.where, self._opset, self.constants, values, arithmetic)
        try:
            found = OPERATIONS[operation.kind](call)
        except (RuntimeError, IndexError) as error:  # PyTorch's, where shapes do not fit
            raise VerificationFailed(f"{step.where} can't be executed: {str(error).splitlines()[0]}") from error
        call.finish()
        results = found if isinstance(found, tuple) else (found,)
        if len(results) != len(operation.outputs):
            raise call.wrong(f"gives {len(results)} results, {len(operation.outputs)} are declared")
        for output, result in zip(operation.outputs, results, strict=True):
            self._hold(step, output, result)
            values[output.name] = self._store(step, output, result, values)

    def _hold(self, step: Step, output: Output, result: Tensor) -> None:
        """The result against the declaration."""
        agrees(step.where, tuple(result.shape), output)
        declared = output.type.dtype
        if declared in FLOATS:
            fits = result.is_floating_point()
        elif declared in INTEGERS:
            stepless = not self.arithmetic.steps and declared in {"int8", "uint8"}
            fits = result.dtype is torch.int32 or (stepless and result.is_floating_point())
        else:
            fits = declared == "bool" and result.dtype is torch.bool
        if not fits:
            raise VerificationFailed(f"{step.where} is declared {declared}, and {result.dtype} was computed")

    def _store(self, step: Step, output: Output, result: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        if output.type.dtype != "float16" or not self.arithmetic.rounds or step.operation.kind in STORED_BEFORE:
            return result
        if self.meter is not None:
            largest = self.meter.see(output.name, step.operation.kind, result.contiguous().numpy())
            if largest > LIMIT and not self._was_infinite(step.operation, result, values):
                raise VerificationFailed(
                    f"{step.where} comes to {largest:.6g}, and float16 ends at {LIMIT:.0f}: "
                    "keep it in float32, or scale what goes into it"
                )
        return self.arithmetic.half(result)

    @staticmethod
    def _was_infinite(operation: Operation, result: Tensor, values: Mapping[str, Tensor]) -> bool:
        """Whether what is infinite in the result was so in what the operation read, as a mask is."""
        read = (values[name] for name in _read(operation) if name in values)
        infinite = any(each.is_floating_point() and bool(each.isinf().any()) for each in read)
        finite = result[result.isfinite()]
        return infinite and (not finite.numel() or float(finite.abs().max()) <= LIMIT)


def logits_of(program: Program, classifier: Operation) -> str | None:
    """The tensor whose softmax a classifier's probabilities are; None where there is no softmax in between."""
    producers = {output.name: each for each in program.operations for output in each.outputs}
    name = _one(classifier, "probabilities")
    while name is not None and name in producers:
        producer = producers[name]
        if producer.kind == "softmax":
            return _one(producer, "x")
        if producer.kind not in _LOGITS_THROUGH:
            return None
        name = _one(producer, "x")
    return None


def _tensors(program: Program, classifier: Operation | None, logits: str | None) -> tuple[str, ...]:
    """What has to be kept: a classifier's own outputs are its probabilities and logits."""
    if classifier is None:
        return program.outputs
    own = {output.name for output in classifier.outputs}
    kept = [name for name in program.outputs if name not in own]
    probabilities = _one(classifier, "probabilities")
    if probabilities is None:
        raise VerificationFailed(f"classify {classifier.name} lacks its probabilities")
    return tuple(dict.fromkeys([*kept, probabilities, *([] if logits is None else [logits])]))


def _one(operation: Operation, name: str) -> str | None:
    bindings = operation.inputs.get(name, ())
    return bindings[0] if len(bindings) == 1 and isinstance(bindings[0], str) else None


def _names(bound: Iterable[Binding]) -> tuple[str, ...]:
    return tuple(each for each in bound if isinstance(each, str))


def _read(operation: Operation) -> set[str]:
    return {name for bound in operation.inputs.values() for name in _names(bound)}


def _number(opset: str) -> int:
    digits = opset.removeprefix("CoreML")
    if not digits.isdigit():
        raise NotExecutable(f"the program is of opset {opset}, which is not known here")
    return int(digits)
