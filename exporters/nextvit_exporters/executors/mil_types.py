"""Whether the real numbers that an operation reads and writes are of one type, as Core ML demands.

An executor that widens everything to float32 would not notice a cast that is missing; on a device the package does not
load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nextvit_exporters.coreml.program import Program
from nextvit_exporters.errors import VerificationFailed
from nextvit_exporters.executors.mil_call import where
from nextvit_exporters.executors.mil_rounding import FLOATS

_CHANGE: Final = frozenset({"cast", "quantize", "dequantize"})
"""The kinds that are there to go from one type to another."""
_OPERANDS: Final = ("x", "y", "a", "b", "values", "query", "key", "value")
"""Parameters that have the type of the result, where that is real."""
_WEIGHTS: Final = ("weight", "bias")
"""Those that have it in the opsets before iOS 17's."""
_OF_ONE_TYPE: Final = ("CoreML5", "CoreML6")


def check_types(program: Program, modules: Mapping[str, str]) -> None:
    """Nothing, where each operation keeps to one real type; VerificationFailed with the first that doesn't."""
    types = {output.name: output.type.dtype for each in program.operations for output in each.outputs}
    types |= {name: kind.dtype for name, kind in program.inputs.items()}
    parameters = (*_OPERANDS, *_WEIGHTS) if program.opset in _OF_ONE_TYPE else _OPERANDS
    for each in program.operations:
        if each.kind in _CHANGE:
            continue
        read = (binding for name in parameters for binding in each.inputs.get(name, ()))
        found = {types.get(binding, "") if isinstance(binding, str) else binding.type.dtype for binding in read}
        found |= {output.type.dtype for output in each.outputs}
        if len(mixed := sorted(found & FLOATS)) > 1:
            raise VerificationFailed(f"{where(each, modules)} mixes {' and '.join(mixed)}; a cast is missing")
