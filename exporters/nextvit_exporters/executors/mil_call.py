"""One operation of an ML program with what it reads; parameters that nobody asked for are an error, not a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextvit_exporters.coreml.program import Binding, Constant, Operation, Output, Program
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from nextvit_exporters.executors.mil_constexpr import CONSTANT_EXPRESSIONS, decompress
from nextvit_exporters.executors.mil_rounding import Arithmetic

Array = NDArray[Any]
IOS17: Final = 7
"""The opset (``CoreML7``) from which reshape and gather mean something else."""
_MAY_BE_INFINITE: Final = frozenset({"select", "fill", "fill_like", "const"})
"""What puts a mask together: there -inf stands for what must not be seen."""


def where(operation: Operation, modules: Mapping[str, str]) -> str:
    """An operation as errors name it, with the torch module it comes from where that is known."""
    first = operation.outputs[0].name if operation.outputs else operation.name
    module = modules.get(first)
    return f"{operation.kind} {operation.name}" + (f" (of {module})" if module else "")


class Constants:
    """What a program holds: plain and compressed constants, made whole and widened when they are first read.

    ``observe`` sees each float16 array once, as it is first computed with, and the name of who reads it.
    """

    def __init__(
        self,
        program: Program,
        modules: Mapping[str, str],
        arithmetic: Arithmetic,
        observe: Callable[[str, Array], None] = lambda _where, _values: None,
    ) -> None:
        self._modules, self._arithmetic, self._observe = modules, arithmetic, observe
        self._arrays: dict[str, Array] = {}
        self._tensors: dict[str, Tensor] = {}
        self._expressions: dict[str, Operation] = {}
        for operation in program.operations:
            if operation.kind == "const":
                if "val" not in operation.attributes or len(operation.outputs) != 1:
                    raise VerificationFailed(f"{where(operation, modules)} holds no value")
                self._arrays[operation.outputs[0].name] = operation.attributes["val"].data
            elif operation.kind in CONSTANT_EXPRESSIONS:
                self._expressions.update({output.name: operation for output in operation.outputs})

    def __contains__(self, name: str) -> bool:
        return name in self._arrays or name in self._expressions

    def array(self, name: str) -> Array:
        """A constant as it is in the package, or decompressed, in its declared type."""
        if name not in self._arrays:
            self._decompress(self._expressions[name])
        return self._arrays[name]

    def tensor(self, name: str, reader: str) -> Tensor:
        """A constant as it is computed with; ``reader`` says for whom, and is named where a weight is infinite."""
        if name not in self._tensors:
            self._tensors[name] = self.widened(self.array(name), reader)
        return self._tensors[name]

    def widened(self, values: Array, reader: str) -> Tensor:
        """Real numbers in the arithmetic's type, whole ones as int32, all of them copied.

        Raises VerificationFailed for a float16 that is infinite or no number, save where a mask is put together.
        """
        if values.dtype.kind == "f":
            if values.dtype == np.float16:
                self._observe(reader, values)
            wide = torch.from_numpy(np.array(values)).to(self._arithmetic.dtype)
            if reader.split(maxsplit=1)[0] not in _MAY_BE_INFINITE and not _finite(wide):
                raise VerificationFailed(
                    f"{reader} has weights that are infinite or no number in {values.dtype}: "
                    "keep this module in float32"
                )
            return wide
        if values.dtype.kind in "iu":
            return torch.from_numpy(values.astype(np.int32))
        if values.dtype.kind == "b":
            return torch.from_numpy(np.array(values))
        raise VerificationFailed(f"{reader} computes with values of type {values.dtype}")

    def _decompress(self, operation: Operation) -> None:
        given: dict[str, Array] = {}
        for name, bindings in operation.inputs.items():
            (binding,) = bindings
            if isinstance(binding, str) and binding not in self:
                raise VerificationFailed(f"{where(operation, self._modules)} reads {binding}, which is no constant")
            given[name] = self.array(binding) if isinstance(binding, str) else binding.data
        given |= {name: each.data for name, each in operation.attributes.items() if name != "name"}
        name = where(operation, self._modules)
        found = decompress(operation.kind, name, given)
        if len(found) != len(operation.outputs):
            raise VerificationFailed(f"{name} gives {len(found)} results, {len(operation.outputs)} are declared")
        for output, values in zip(operation.outputs, found, strict=True):
            agrees(name, tuple(values.shape), output)
            if output.type.dtype in {"float16", "float32"} and values.dtype != output.type.dtype:
                raise VerificationFailed(f"{name} is declared {output.type.dtype}, and {values.dtype} was computed")
            self._arrays[output.name] = values


def _finite(values: Tensor) -> bool:
    return not values.numel() or all(bool(each.isfinite()) for each in torch.aminmax(values))


def agrees(name: str, shape: tuple[int, ...], output: Output) -> None:
    """Nothing, where a shape is the declared one; raises VerificationFailed otherwise. None is any size."""
    declared = output.type.shape
    if len(declared) != len(shape) or any(size not in {None, got} for size, got in zip(declared, shape, strict=True)):
        wanted = ", ".join("?" if size is None else str(size) for size in declared)
        raise VerificationFailed(f"{name} is declared ({wanted}), and {shape} was computed")


class Call:
    """One operation, the tensors it reads, and the arithmetic.

    A parameter is taken by the method that says what it is; ``finish`` raises NotExecutable where one was not taken.
    Without a default, a missing parameter is a VerificationFailed.
    """

    def __init__(
        self,
        operation: Operation,
        name: str,
        opset: int,
        constants: Constants,
        values: Mapping[str, Tensor],
        arithmetic: Arithmetic,
    ) -> None:
        self.operation, self.where, self.opset, self.arithmetic = operation, name, opset, arithmetic
        self._constants, self._values = constants, values
        self._left = set(operation.inputs) | (set(operation.attributes) - {"name"})

    def unknown(self, what: str) -> NotExecutable:
        """The error that says that something of this operation can't be executed here."""
        return NotExecutable(f"{self.where} has {what}, which can't be executed here")

    def wrong(self, what: str) -> VerificationFailed:
        """The error that says that this operation can't be right."""
        return VerificationFailed(f"{self.where} {what}")

    def finish(self) -> None:
        """Nothing, where every parameter was taken; raises NotExecutable otherwise."""
        if self._left:
            raise self.unknown(f"parameters {', '.join(sorted(self._left))}")

    def has(self, name: str) -> bool:
        """Whether a parameter is bound."""
        return name in self.operation.inputs

    def optional(self, name: str) -> Tensor | None:
        """A tensor, or None where the parameter is not bound."""
        return self.tensor(name) if self.has(name) else None

    def tensor(self, name: str) -> Tensor:
        """A tensor that has to be there."""
        return self._as_tensor(self._only(name))

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        """A list of tensors, as concat takes it."""
        return tuple(self._as_tensor(each) for each in self._bindings(name))

    def integers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Whole numbers: a constant, or computed in the program."""
        if default is not None and not self.has(name):
            return default
        values = self._as_array(self._only(name))
        if values.dtype.kind not in "iub":
            raise self.wrong(f"takes {name} as {values.dtype}, and whole numbers were expected")
        return tuple(int(each) for each in values.reshape(-1))

    def integer(self, name: str, default: int | None = None) -> int:
        """One whole number."""
        found = self.integers(name, None if default is None else (default,))
        if len(found) != 1:
            raise self.wrong(f"takes {len(found)} numbers as {name}, and one was expected")
        return found[0]

    def flags(self, name: str, default: tuple[bool, ...] | None = None) -> tuple[bool, ...]:
        """Truth values."""
        return tuple(bool(each) for each in self.integers(name, default))

    def flag(self, name: str, *, default: bool) -> bool:
        """One truth value."""
        return bool(self.integer(name, int(default)))

    def number(self, name: str, default: float | None = None) -> float:
        """One real number, as it is stored."""
        if default is not None and not self.has(name):
            return default
        values = self._as_array(self._only(name))
        if values.size != 1 or values.dtype.kind not in "fiub":
            raise self.wrong(f"takes {name} as {values.dtype} {values.shape}, and one number was expected")
        return float(values.reshape(-1)[0])

    def text(self, name: str, default: str | None = None) -> str:
        """One string."""
        if default is not None and not self.has(name):
            return default
        values = self._as_array(self._only(name))
        if values.size != 1 or values.dtype.kind not in "OU":
            raise self.wrong(f"takes {name} as {values.dtype} {values.shape}, and a string was expected")
        return str(values.reshape(-1)[0])

    def _bindings(self, name: str) -> tuple[Binding, ...]:
        self._left.discard(name)
        if name not in self.operation.inputs:
            raise self.wrong(f"lacks its {name}")
        return self.operation.inputs[name]

    def _only(self, name: str) -> Binding:
        bindings = self._bindings(name)
        if len(bindings) != 1:
            raise self.wrong(f"takes {len(bindings)} values as {name}, and one was expected")
        return bindings[0]

    def _as_tensor(self, binding: Binding) -> Tensor:
        if isinstance(binding, Constant):
            return self._constants.widened(binding.data, self.where)
        if binding in self._values:
            return self._values[binding]
        return self._constants.tensor(binding, self.where)

    def _as_array(self, binding: Binding) -> Array:
        if isinstance(binding, Constant):
            return binding.data
        if binding in self._values:
            computed: Array = self._values[binding].numpy()
            return computed
        return self._constants.array(binding)
