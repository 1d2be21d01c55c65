"""Tensors never overlap, and the profile is the one that fits best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextvit_exporters.cuda.plan import (
    ALIGNMENT,
    Profile,
    Shape,
    Tensor,
    choose_profile,
    dtype_of,
    image_shape,
    plan_buffers,
)
from nextvit_exporters.errors import UnsupportedSpec

SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=6)


def tensor(name: str, shape: Shape, dtype: str = "f4") -> Tensor:
    return Tensor(name, np.dtype(dtype), is_input=True, largest=shape)


def batches(index: int, low: int, best: int, high: int) -> Profile:
    return Profile(index, {"image": ((low, 3, 64, 64), (best, 3, 64, 64), (high, 3, 64, 64))})


@given(SHAPES, st.sampled_from(["f4", "f2", "u1"]))
def test_no_two_tensors_overlap(shapes: list[tuple[int, int]], dtype: str) -> None:
    tensors = [tensor(str(index), shape, dtype) for index, shape in enumerate(shapes)]
    plan = plan_buffers(tensors)
    places = [(slot.offset, slot.offset + slot.tensor.size) for slot in plan.slots.values()]
    assert [slot.tensor for slot in plan.slots.values()] == tensors
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert len({start for start, _ in places}) == len(places)
    assert plan.size >= max((end for _, end in places), default=0)
    assert plan.size <= sum(end - start + ALIGNMENT for start, end in places)


def test_sizes_are_bytes() -> None:
    plan = plan_buffers([tensor("a", (2, 3), "f2"), tensor("b", (64,)), tensor("c", (65,)), tensor("d", ())])
    assert [slot.offset for slot in plan.slots.values()] == [0, 256, 512, 1024]
    assert plan.size == 1280
    assert plan_buffers([]).size == 0
    assert plan_buffers([tensor("a", (5,), "u1"), tensor("b", (1,), "u1")], alignment=4).slots["b"].offset == 8


def test_a_size_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedSpec, match="size of 'boxes' depends on what is in the input"):
        plan_buffers([tensor("boxes", (-1, 4))])


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (2, 0), (3, 1), (15, 1), (17, 2), (32, 2)])
def test_the_nearest_profile_is_chosen(batch: int, index: int) -> None:
    profiles = [batches(0, 1, 1, 8), batches(1, 1, 8, 32), batches(2, 1, 32, 32)]
    assert choose_profile(profiles, {"image": (batch, 3, 64, 64)}).index == index
    assert choose_profile(profiles[::-1], {"image": (batch, 3, 64, 64)}).index == index
    assert choose_profile([batches(1, 1, 2, 64), batches(0, 1, 2, 64)], {"image": (batch, 3, 64, 64)}).index == 0


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (9, 3, 64, 64), (1, 3, 64, 65), (1, 4, 64, 64), (1, 3, 64)])
def test_no_profile_takes_it(shape: Shape) -> None:
    with pytest.raises(UnsupportedSpec, match="it takes image 1x3x64x64 to 4x3x64x64 or image 8x3x64x64 to 8x3x64x64"):
        choose_profile([batches(0, 1, 2, 4), batches(1, 8, 8, 8)], {"image": shape})


@pytest.mark.parametrize(
    ("best", "batch", "size", "shape"),
    [
        ((2, 3, 64, 96), None, None, (2, 3, 64, 96)),
        ((2, 3, 64, 96), 5, None, (5, 3, 64, 96)),
        ((2, 3, 64, 96), None, (32, 48), (2, 3, 32, 48)),
        ((2, 64, 96, 3), 1, None, (1, 64, 96, 3)),
        ((2, 64, 96, 3), 1, (32, 48), (1, 32, 48, 3)),
    ],
)
def test_images_of_another_size(best: Shape, batch: int | None, size: tuple[int, int] | None, shape: Shape) -> None:
    assert image_shape(best, batch, size) == shape


@pytest.mark.parametrize("best", [(3, 64, 64), (1, 4, 64, 64), (10,), ()])
def test_what_is_no_image(best: Shape) -> None:
    with pytest.raises(UnsupportedSpec, match="no batch of images"):
        image_shape(best, 1, None)


def test_types_of_tensorrt() -> None:
    kinds = ("FLOAT", "HALF", "INT8", "UINT8", "INT32", "INT64", "BOOL")
    assert [dtype_of("x", kind).str for kind in kinds] == ["<f4", "<f2", "|i1", "|u1", "<i4", "<i8", "|b1"]
    with pytest.raises(UnsupportedSpec, match="'x' is FP8"):
        dtype_of("x", "FP8")
