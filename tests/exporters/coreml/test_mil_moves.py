"""Operations that move numbers, by themselves, against NumPy and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nextvit_exporters.coreml.program import TensorType
from nextvit_exporters.errors import NotExecutable, VerificationFailed
from tests.exporters.coreml.small_programs import Array, execute, floats, ints, normal, one, program, typed

X = normal(2, 3, 4, 5)


def moved(kind: str, expected: Array, inputs: dict[str, Array] | None = None, **parameters: Any) -> None:
    """The operation gives exactly the expected array."""
    inputs = {"x": X} if inputs is None else inputs
    got = one(kind, inputs, torch.from_numpy(np.array(expected)), **parameters)
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("opset", [5, 6, 7, 8, 9])
def test_reshape_copies_and_infers(opset: int) -> None:
    moved("reshape", X.reshape(2, 3, 20), shape=[2, 3, 20], opset=opset)
    moved("reshape", X.reshape(6, 20), shape=[6, -1], opset=opset)
    moved("reshape", X.reshape(2, 12, 1, 5), shape=[0, -1, 1, 0], opset=opset)


def test_a_zero_counts_from_the_back_since_ios_17() -> None:
    """The two examples of the documentation, and one where front and back differ."""
    x = normal(2, 50)
    moved("reshape", x.reshape(1, 1, 2, 50), {"x": x}, shape=[1, 0, -1, 0], opset=7)
    moved("reshape", X.reshape(24, 5), shape=[-1, 0], opset=7)
    with pytest.raises(VerificationFailed, match="copies sizes of 2 axes into 4"):
        moved("reshape", x.reshape(1, 1, 2, 50), {"x": x}, shape=[1, 0, -1, 0], opset=6)


def test_a_shape_may_be_computed() -> None:
    moved("reshape", X.reshape(6, 20), {"x": X, "shape": ints([6, -1])})


def test_reshape_refuses_another_number_of_entries() -> None:
    with pytest.raises(VerificationFailed, match="reshape it can't be executed"):
        moved("reshape", X.reshape(6, 20), shape=[7, 20])
    with pytest.raises(VerificationFailed, match="takes shape as float32"):
        moved("reshape", X.reshape(6, 20), shape=[6.0, 20.0])


@pytest.mark.parametrize("perm", [[0, 2, 3, 1], [3, 2, 1, 0], [0, 2, -3, -1], [0, 1, -1, -2]])
def test_transpose_counts_from_the_end_too(perm: list[int]) -> None:
    moved("transpose", X.transpose(perm), perm=perm)


def test_axes_of_one_come_and_go() -> None:
    moved("expand_dims", X[:, None, :, :, :, None], axes=[1, -1])
    moved("expand_dims", X[None, None], axes=[1, 0])
    x = normal(1, 3, 1, 2)
    moved("squeeze", x.reshape(3, 2), {"x": x})
    moved("squeeze", x.reshape(1, 3, 2), {"x": x}, axes=[-2])
    moved("squeeze", x.reshape(3, 1, 2), {"x": x}, axes=[0, 1])  # the second is 3 and stays


def test_concat() -> None:
    a, b, c = normal(2, 3, 4), normal(2, 1, 4, seed=1), normal(2, 3, 4, seed=2)
    values = {"values": ("a", "b")}
    moved("concat", np.concatenate([a, b], 1), {"a": a, "b": b}, lists=values, axis=1)
    moved("concat", np.concatenate([b, a], -2), {"a": a, "b": b}, lists={"values": ("b", "a")}, axis=-2)
    moved("concat", np.concatenate([a, c], 1), {"a": a, "b": c}, lists=values, axis=1, interleave=False)


def test_concat_interleaves() -> None:
    """The example of the documentation, and another axis."""
    a, b = floats([[1, 2], [3, 4], [5, 6]]), floats([[7, 8], [9, 10], [11, 12]])
    given, values = {"a": a, "b": b}, {"values": ("a", "b")}
    expected = floats([[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]])
    moved("concat", expected, given, lists=values, axis=0, interleave=True)
    expected = floats([[1, 7, 2, 8], [3, 9, 4, 10], [5, 11, 6, 12]])
    moved("concat", expected, given, lists=values, axis=-1, interleave=True)


def test_concat_makes_a_vector_of_single_numbers() -> None:
    given = {"a": np.array(3, np.int32), "b": np.array(4, np.int32)}
    moved("concat", ints([3, 4]), given, lists={"values": ("a", "b")}, axis=0)


def parts(sizes: list[int], axis: int, **parameters: Any) -> tuple[Array, ...]:
    expected = np.split(X, np.cumsum(sizes)[:-1], axis)
    made = program("split", {"x": X}, [typed(each) for each in expected], axis=axis, **parameters)
    got = execute(made, {"x": X})
    assert all(np.array_equal(*pair) for pair in zip(got, expected, strict=True))
    return got


def test_split() -> None:
    assert len(parts([2, 2], 2, num_splits=2)) == 2
    assert len(parts([1, 4], -1, split_sizes=[1, 4])) == 2
    assert len(parts([1, 4], -1, split_sizes=[1, 4], num_splits=2)) == 2
    for wrong in ({"num_splits": 3}, {"split_sizes": [1, 1]}, {"split_sizes": [1, 3], "num_splits": 3}, {}):
        with pytest.raises(VerificationFailed, match="split it splits 4 entries into"):
            parts([1, 3], 2, **wrong)


def test_split_has_as_many_outputs_as_it_says() -> None:
    made = program("split", {"x": X}, [typed(X[:1])], axis=0, num_splits=2)
    with pytest.raises(VerificationFailed, match="gives 2 results, 1 are declared"):
        execute(made, {"x": X})


ALL: dict[str, Any] = {"begin": [0] * 4, "end": [0] * 4, "begin_mask": [True] * 4, "end_mask": [True] * 4}


def test_slice_by_index() -> None:
    moved("slice_by_index", X[1:2, 0:2, 1:4, 2:5], begin=[1, 0, 1, 2], end=[2, 2, 4, 5])
    moved("slice_by_index", X[:, :, -3:-1, -2:], begin=[0, 0, -3, -2], end=[2, 3, -1, 5])
    moved("slice_by_index", X[:, ::2, 1::2, :], begin=[0, 0, 1, 0], end=[2, 3, 4, 5], stride=[1, 2, 2, 1])
    moved("slice_by_index", X, **ALL)
    moved("slice_by_index", X[::-1, :, ::-2, :], **ALL, stride=[-1, 1, -2, 1])
    moved("slice_by_index", X[:, :, 3:0:-2, :], begin=[0, 0, 3, 0], end=[2, 3, 0, 5], stride=[1, 1, -2, 1])
    moved("slice_by_index", X[:, 1:99], begin=[0, 1, 0, 0], end=[2, 99, 4, 5])
    masks: dict[str, Any] = {"begin_mask": [False, True, False, False], "end_mask": [False, False, True, False]}
    moved("slice_by_index", X[1:2, :2, 1:, 2:4], begin=[1, 7, 1, 2], end=[2, 2, 0, 4], **masks)


def test_slice_by_index_drops_axes() -> None:
    moved(
        "slice_by_index",
        X[1, :, :, -1],
        begin=[1, 0, 0, -1],
        end=[0, 3, 4, 0],
        squeeze_mask=[True, False, False, True],
    )
    sizes = ints([4, 5, 6])
    moved("slice_by_index", np.array(6, np.int32), {"x": sizes}, begin=[2], end=[3], squeeze_mask=[True])


def test_slices_give_a_place_for_each_axis() -> None:
    with pytest.raises(VerificationFailed, match="a place for each of 4 axes"):
        moved("slice_by_index", X, begin=[0, 0], end=[1, 1])
    with pytest.raises(VerificationFailed, match="a place for each of 4 axes"):
        moved("slice_by_size", X, begin=[0, 0], size=[1, 1])


def test_slice_by_size() -> None:
    moved("slice_by_size", X[1:2, 0:3, 1:3, 2:5], begin=[1, 0, 1, 2], size=[1, 3, 2, -1])


def test_gather() -> None:
    moved("gather", X[[1, 0, 1]], {"x": X, "indices": ints([1, 0, 1])})
    moved("gather", X[:, :, [[3, 0], [1, 2]]], {"x": X, "indices": ints([[3, 0], [1, 2]])}, axis=-2)
    moved("gather", X[:, 2], {"x": X}, indices=2, axis=1)
    moved("gather", np.array(5, np.int32), {"x": ints([4, 5, 6])}, indices=1, axis=0, batch_dims=0)


def test_gather_counts_from_the_end_until_ios_16() -> None:
    moved("gather", X[:, :, :, [4, 1]], {"x": X}, indices=[-1, 1], axis=3, opset=6)
    with pytest.raises(VerificationFailed, match=r"reads \[-1, 1\] of the 5 entries of axis 3"):
        moved("gather", X[:, :, :, [4, 1]], {"x": X}, indices=[-1, 1], axis=3, opset=7, validate_indices=False)
    with pytest.raises(VerificationFailed, match=r"reads \[5\] of the 5 entries"):
        moved("gather", X[:, :, :, [4]], {"x": X}, indices=[5], axis=3)
    with pytest.raises(NotExecutable, match="batch_dims"):
        moved("gather", X, {"x": X}, indices=[[0, 1], [1, 0]], axis=1, batch_dims=1)


def test_shape_identity_tile_and_select() -> None:
    moved("shape", ints([2, 3, 4, 5]))
    moved("identity", X)
    moved("tile", np.tile(X, (1, 2, 1, 3)), reps=[1, 2, 1, 3])
    with pytest.raises(VerificationFailed, match="repeats 2 of 4 axes"):
        moved("tile", X, reps=[1, 2])
    kept = np.random.default_rng(0).random((4, 1)) < 0.5
    other = normal(5, seed=1)
    moved("select", np.where(kept, X, other), {"cond": kept, "a": X, "b": other})


def test_masks_may_be_infinite() -> None:
    kept = np.array([[True], [False]])
    expected = floats([[1, 2], [-np.inf, -np.inf]])
    moved("select", expected, {"cond": kept, "a": floats([[1, 2]])}, b=np.float32(-np.inf))


def test_fill() -> None:
    moved("fill", np.full((2, 3), 0.5, np.float32), {}, shape=[2, 3], value=0.5)
    moved("fill", np.zeros((2, 3), np.float32), {"shape": ints([2, 3])})
    moved("fill", np.full(2, 7, np.int32), {}, shape=[2], value=7)
    moved("fill", np.array([True, True]), {}, shape=[2], value=True)
    moved("fill_like", np.full(X.shape, -np.inf, np.float32), {"ref_tensor": X}, value=np.float32(-np.inf))


def test_pad() -> None:
    expected = np.pad(X, ((0, 0), (0, 0), (1, 2), (0, 3)), constant_values=0.5)
    moved("pad", expected, pad=[1, 2, 0, 3], constant_val=0.5)
    moved("pad", np.pad(X, ((1, 0), (0, 0), (0, 0), (0, 1))), pad=[1, 0, 0, 0, 0, 0, 0, 1], mode="constant")
    with pytest.raises(NotExecutable, match="pad it has mode reflect"):
        moved("pad", expected, pad=[1, 2, 0, 3], mode="reflect")
    with pytest.raises(VerificationFailed, match="pads 4 axes by"):
        moved("pad", expected, pad=[1, 2, -1, 3])


def test_what_is_declared_is_what_has_to_come_out() -> None:
    shapes = [((2, 3, 20), "float32"), ((1, 60), "float32"), ((2, 60), "int32"), ((2, 60), "bool"), ((2, 60), "string")]
    for shape, dtype in shapes:
        made = program("reshape", {"x": X}, [TensorType(dtype, shape)], shape=[2, 60])
        with pytest.raises(VerificationFailed, match="reshape it is declared"):
            execute(made, {"x": X})
    made = program("reshape", {"x": X}, [TensorType("float32", (None, 60))], shape=[2, 60])
    assert execute(made, {"x": X})[0].shape == (2, 60)
