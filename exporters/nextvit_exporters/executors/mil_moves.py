"""MIL operations that move numbers and compute none: views, cuts, joins, and tensors full of one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from nextvit_exporters.executors.mil_call import IOS17, Call
from nextvit_exporters.executors.mil_rounding import FLOATS

Operation = Callable[[Call], "Tensor | tuple[Tensor, ...]"]


def identity(call: Call) -> Tensor:
    """The input."""
    return call.tensor("x")


def reshape(call: Call) -> Tensor:
    """0 copies the input's size, -1 is what is left.

    Up to iOS 16 a 0 means the size at the same place from the front, from iOS 17 on from the back, and 1 before the
    first.
    """
    x, shape = call.tensor("x"), list(call.integers("shape"))
    sizes = list(x.shape)
    if call.opset >= IOS17:
        sizes = [1] * max(len(shape) - len(sizes), 0) + sizes[max(len(sizes) - len(shape), 0) :]
    elif 0 in shape and len(shape) != len(sizes):
        raise call.wrong(f"copies sizes of {len(sizes)} axes into {len(shape)}")
    return x.reshape([sizes[axis] if size == 0 else size for axis, size in enumerate(shape)])


def transpose(call: Call) -> Tensor:
    """Axes in another order; negative ones count from the end."""
    return call.tensor("x").permute(call.integers("perm"))


def expand_dims(call: Call) -> Tensor:
    """With new axes of size one where, in the result, ``axes`` names them."""
    x, axes = call.tensor("x"), call.integers("axes")
    for axis in sorted(each % (x.ndim + len(axes)) for each in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(call: Call) -> Tensor:
    """Without those of ``axes``, by default of all, that have size one."""
    x = call.tensor("x")
    return x.squeeze(call.integers("axes", tuple(range(x.ndim))))


def concat(call: Call) -> Tensor:
    """The inputs behind each other along one axis, or, interleaved, first of each, second of each and so on."""
    values, axis = call.tensors("values"), call.integer("axis")
    values = tuple(each.reshape(1) if each.ndim == 0 else each for each in values)  # single numbers become a vector
    if not call.flag("interleave", default=False):
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def split(call: Call) -> tuple[Tensor, ...]:
    """Parts along one axis, of ``split_sizes`` or all of one size."""
    x, axis, count = call.tensor("x"), call.integer("axis"), call.integer("num_splits", 0)
    sizes = call.integers("split_sizes", ())
    if not sizes:
        if not count or x.shape[axis] % count:
            raise call.wrong(f"splits {x.shape[axis]} entries into {count} equal parts")
        sizes = (x.shape[axis] // count,) * count
    if count not in {0, len(sizes)} or sum(sizes) != x.shape[axis]:
        raise call.wrong(f"splits {x.shape[axis]} entries into {list(sizes)}")
    return torch.split_with_sizes(x, sizes, axis)


def slice_by_index(call: Call) -> Tensor:
    """Places begin, begin + stride and so on before end of each axis.

    ``begin_mask`` and ``end_mask`` say where to go from and to the end of the axis, ``squeeze_mask`` where to take one
    place and drop the axis.
    """
    x = call.tensor("x")
    begin, end = call.integers("begin"), call.integers("end")
    stride = call.integers("stride", (1,) * x.ndim)
    none = (False,) * x.ndim
    from_start, to_end, drop = (call.flags(f"{name}_mask", none) for name in ("begin", "end", "squeeze"))
    if any(len(each) != x.ndim for each in (begin, end, stride, from_start, to_end, drop)):
        raise call.wrong(f"does not give a place for each of {x.ndim} axes")
    for axis in reversed(range(x.ndim)):
        first = None if from_start[axis] else begin[axis]
        if drop[axis]:
            x = x.select(axis, first or 0)
            continue
        last = None if to_end[axis] else end[axis]
        places = range(x.shape[axis])[first : last : stride[axis]]
        if places.step == 1:
            x = x.narrow(axis, places.start, len(places))
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


def slice_by_size(call: Call) -> Tensor:
    """``size`` places of each axis from ``begin`` on; -1 is all that are left."""
    x, begin, sizes = call.tensor("x"), call.integers("begin"), call.integers("size")
    if len(begin) != x.ndim or len(sizes) != x.ndim:
        raise call.wrong(f"does not give a place for each of {x.ndim} axes")
    for axis, (first, size) in enumerate(zip(begin, sizes, strict=True)):
        start = first % x.shape[axis] if first else 0
        x = x.narrow(axis, start, x.shape[axis] - start if size == -1 else size)
    return x


def gather(call: Call) -> Tensor:
    """Entries of one axis by their numbers; up to iOS 16 negative ones count from the end, later there are none.

    With ``validate_indices`` or without, a number beyond the axis is an error here; a device may do anything.
    """
    x, index, axis = call.tensor("x"), call.tensor("indices").long(), call.integer("axis", 0)
    if call.integer("batch_dims", 0):
        raise call.unknown("batch_dims")
    call.flag("validate_indices", default=False)
    axis %= x.ndim
    size = x.shape[axis]
    lowest = 0 if call.opset >= IOS17 else -size
    if bool(((index < lowest) | (index >= size)).any()):
        raise call.wrong(f"reads {index.flatten().tolist()[:8]} of the {size} entries of axis {axis}")
    picked = x.index_select(axis, index.flatten() % size)
    return picked.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def shape(call: Call) -> Tensor:
    """The sizes of the axes."""
    return torch.tensor(call.tensor("x").shape, dtype=torch.int32)


def tile(call: Call) -> Tensor:
    """Each axis repeated as a whole."""
    x, repeats = call.tensor("x"), call.integers("reps")
    if len(repeats) != x.ndim:
        raise call.wrong(f"repeats {len(repeats)} of {x.ndim} axes")
    return x.repeat(repeats)


def select(call: Call) -> Tensor:
    """A where the condition holds, else b."""
    return torch.where(call.tensor("cond"), call.tensor("a"), call.tensor("b"))


def fill(call: Call) -> Tensor:
    """A tensor full of one number."""
    return _full(call, call.integers("shape"))


def fill_like(call: Call) -> Tensor:
    """A tensor full of one number, as large as another."""
    return _full(call, tuple(call.tensor("ref_tensor").shape))


def _full(call: Call, sizes: tuple[int, ...]) -> Tensor:
    value, declared = call.number("value", 0.0), call.operation.outputs[0].type.dtype
    if declared in FLOATS:
        return torch.full(sizes, value, dtype=call.arithmetic.dtype)
    return torch.full(sizes, int(value), dtype=torch.bool if declared == "bool" else torch.int32)


def pad(call: Call) -> Tensor:
    """The last axes with so many numbers in front and behind, axis by axis."""
    x, amounts, mode = call.tensor("x"), call.integers("pad"), call.text("mode", "constant")
    if mode != "constant":
        raise call.unknown(f"mode {mode}")
    if len(amounts) % 2 or len(amounts) > 2 * x.ndim or any(each < 0 for each in amounts):
        raise call.wrong(f"pads {x.ndim} axes by {list(amounts)}")
    by_axis = [amounts[place : place + 2] for place in range(0, len(amounts), 2)]
    turned = [each for pair in reversed(by_axis) for each in pair]
    return functional.pad(x, turned, value=call.number("constant_val", 0.0))


MOVES: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        "concat": concat,
        "expand_dims": expand_dims,
        "fill": fill,
        "fill_like": fill_like,
        "gather": gather,
        "identity": identity,
        "pad": pad,
        "reshape": reshape,
        "select": select,
        "shape": shape,
        "slice_by_index": slice_by_index,
        "slice_by_size": slice_by_size,
        "split": split,
        "squeeze": squeeze,
        "tile": tile,
        "transpose": transpose,
    }
)
"""Operations whose numbers are all there before."""
