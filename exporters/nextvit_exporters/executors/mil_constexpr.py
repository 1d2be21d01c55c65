"""Compressed weights made whole again, bit for bit as coremltools does it.

``constexpr`` operations are those of ``coremltools.converters.mil.mil.ops.defs`` (iOS16 and iOS18). Each computes in
the type of its scale: float16 where the weights are stored for float16. iOS 16's keep what they take in attributes,
iOS 18's in inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nextvit_exporters.errors import NotExecutable, VerificationFailed

Array = NDArray[Any]
Parameters = dict[str, Array]
"""What an operation takes, by name; each function takes out what it knows."""


def affine_dequantize(given: Parameters) -> tuple[Array, ...]:
    """(data - zero point) * scale, each one number or one for each entry of ``axis``."""
    data, scale, zero = given.pop("quantized_data"), given.pop("scale"), given.pop("zero_point")
    shape = [1] * data.ndim
    shape[int(given.pop("axis"))] = -1
    scale, zero = (each.reshape(shape if each.ndim else ()) for each in (scale, zero))
    steps = data.astype(np.float32) - zero.astype(np.float32)
    return ((steps * scale).astype(scale.dtype),)


def blockwise_shift_scale(given: Parameters) -> tuple[Array, ...]:
    """(data - offset) * scale, with one scale and offset for each block of the data."""
    data, scale, offset = given.pop("data"), given.pop("scale"), given.pop("offset", None)
    return (_shifted(data, scale, offset),)


def lut_to_dense(given: Parameters) -> tuple[Array, ...]:
    """Entries of a table by their numbers; one table, or one for each block."""
    indices, table = given.pop("indices"), given.pop("lut")
    if "shape" in given:  # iOS 16: one table, numbers packed into bytes
        shape = tuple(int(size) for size in given.pop("shape"))
        bits = int(table.size).bit_length() - 1
        return (table[_unpacked(indices, bits, int(np.prod(shape)))].reshape(shape),)
    return (_looked_up(indices, table, _axis(given)),)


def sparse_to_dense(given: Parameters) -> tuple[Array, ...]:
    """The stored numbers where the mask has a one, in the order of rows, else zero."""
    numbers, mask = given.pop("nonzero_data"), given.pop("mask")
    if "shape" in given:  # iOS 16: a bit for each place
        shape = tuple(int(size) for size in given.pop("shape"))
        mask = _unpacked(mask, 1, int(np.prod(shape))).reshape(shape)
    return (_spread(numbers, mask),)


def cast(given: Parameters) -> tuple[Array, ...]:
    """float16 weights as float32."""
    given.pop("output_dtype")
    return (given.pop("source_val").astype(np.float32),)


def lut_to_sparse(given: Parameters) -> tuple[Array, ...]:
    """A mask, and the table's entries for its ones."""
    mask, indices = given.pop("indices_mask"), given.pop("indices_nonzero_data")
    table, axis = given.pop("lut"), _axis(given)
    dense = _looked_up(_spread(indices, mask), table, axis)
    mask = mask if axis is None else np.repeat(mask, table.shape[-1], axis)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(given: Parameters) -> tuple[Array, ...]:
    """A mask, and the scaled numbers for its ones."""
    mask, numbers = given.pop("data_mask"), given.pop("nonzero_data")
    scale, offset = given.pop("scale"), given.pop("offset", None)
    return mask, _shifted(_spread(numbers, mask), scale, offset)[mask != 0]


CONSTANT_EXPRESSIONS: Final[Mapping[str, Callable[[Parameters], tuple[Array, ...]]]] = MappingProxyType(
    {
        "constexpr_affine_dequantize": affine_dequantize,
        "constexpr_blockwise_shift_scale": blockwise_shift_scale,
        "constexpr_cast": cast,
        "constexpr_lut_to_dense": lut_to_dense,
        "constexpr_lut_to_sparse": lut_to_sparse,
        "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
        "constexpr_sparse_to_dense": sparse_to_dense,
    }
)


def decompress(kind: str, where: str, given: Parameters) -> tuple[Array, ...]:
    """What a ``constexpr`` operation gives, one array for each of its outputs.

    ``where`` names it in errors: NotExecutable for a parameter that is not known here, VerificationFailed where one is
    missing or the parameters do not fit together.
    """
    try:
        found = CONSTANT_EXPRESSIONS[kind](given)
    except KeyError as error:
        raise VerificationFailed(f"{where} lacks its {error.args[0]}") from error
    except (ValueError, IndexError) as error:  # NumPy's, where shapes do not fit
        raise VerificationFailed(f"{where} can't be decompressed: {error}") from error
    if given:
        raise NotExecutable(f"{where} has parameters that can't be executed here: {', '.join(sorted(given))}")
    return found


def _shifted(data: Array, scale: Array, offset: Array | None) -> Array:
    steps = data.astype(scale.dtype)
    if offset is not None:
        steps = steps - _repeated(offset, data.shape)
    scaled: Array = (_repeated(scale, data.shape) * steps).astype(scale.dtype)
    return scaled


def _looked_up(indices: Array, table: Array, axis: int | None) -> Array:
    """Table (blocks by axis, entries, length of one entry); an entry of several numbers lies along ``axis``."""
    entries, length = table.shape[-2:]
    place = _repeated(np.arange(table[..., 0, 0].size).reshape(table.shape[:-2]), indices.shape)
    found: Array = table.reshape(-1, entries, length)[place, indices.astype(np.int64)]
    if axis is None:
        if length != 1:
            raise ValueError("entries of several numbers need vector_axis")
        return found[..., 0]
    axis %= indices.ndim
    shape = [size * length if each == axis else size for each, size in enumerate(indices.shape)]
    return np.moveaxis(found, -1, axis + 1).reshape(shape)


def _repeated(values: Array, shape: tuple[int, ...]) -> Array:
    """Each number for a whole block, so that there is one for each place of ``shape``."""
    if values.ndim != len(shape) or any(size % blocks for size, blocks in zip(shape, values.shape, strict=True)):
        raise ValueError(f"{values.shape} does not divide {shape}")
    for axis, size in enumerate(shape):
        values = values if values.shape[axis] in {1, size} else np.repeat(values, size // values.shape[axis], axis)
    return values


def _spread(numbers: Array, mask: Array) -> Array:
    dense = np.zeros(mask.shape, numbers.dtype)
    dense[mask != 0] = numbers
    return dense


def _unpacked(packed: Array, bits: int, count: int) -> Array:
    """``count`` whole numbers of so many bits, the lowest bit first."""
    flat = np.unpackbits(packed.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    numbers: Array = (flat << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    return numbers


def _axis(given: Parameters) -> int | None:
    return int(given.pop("vector_axis")) if "vector_axis" in given else None
