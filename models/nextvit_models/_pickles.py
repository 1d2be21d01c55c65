"""What a pickle would import, found by reading its opcodes; nothing is unpickled here.

A pickle is a program: it may name any function of any installed package and call it. The opcodes that name one are
few (GLOBAL, STACK_GLOBAL, INST and the EXT registry), so the names can be listed without running anything.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import BinaryIO, Final

# All that torch.save needs for tensors, parameters and plain containers.
_TENSOR_IMPORTS: Final = frozenset(
    {
        "_codecs.encode",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.set",
        "__builtin__.set",
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
    }
)
_DTYPES: Final = frozenset(
    f"torch.{name}"
    for name in (
        *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
)
_STORAGES: Final = frozenset(
    f"torch.{name}Storage"
    for name in (
        *("Half", "Float", "Double", "BFloat16", "ComplexFloat", "ComplexDouble"),
        *("Bool", "Char", "Short", "Int", "Long", "Byte"),
    )
)
_ALLOWED: Final = _TENSOR_IMPORTS | _DTYPES | _STORAGES
_TEXT_OPCODES: Final = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)


def foreign_imports(stream: BinaryIO) -> tuple[str, ...]:
    """Names, sorted, that one pickle would import and that tensors do not need.

    Reads ``stream`` up to and including the pickle's STOP opcode. Damaged or truncated opcodes raise
    ``ValueError``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # an odd escape in a damaged text opcode
        return tuple(sorted(_imports(stream) - _ALLOWED))


def _imports(stream: BinaryIO) -> set[str]:
    found: set[str] = set()
    memo: dict[int, object] = {}
    recent: list[object] = [None, None]  # the last two values pushed; text where it is text, else None
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in {"GLOBAL", "INST"}:
            found.add(str(argument).replace(" ", ".", 1))
        elif name == "STACK_GLOBAL":
            found.add(".".join(str(part) if isinstance(part, str) else "<computed>" for part in recent))
        elif name in {"EXT1", "EXT2", "EXT4"}:
            found.add(f"<extension {argument}>")
        if name == "MEMOIZE":
            memo[len(memo)] = recent[-1]
        elif name in {"PUT", "BINPUT", "LONG_BINPUT"}:
            memo[int(str(argument))] = recent[-1]
        elif name in {"GET", "BINGET", "LONG_BINGET"}:
            recent = [recent[-1], memo.get(int(str(argument)))]
        elif opcode.stack_after:
            recent = [recent[-1], argument if name in _TEXT_OPCODES else None]
    return found
