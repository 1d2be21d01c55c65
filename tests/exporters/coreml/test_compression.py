from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import fx, nn

from nextvit_exporters import graph as g
from nextvit_exporters.coreml import compression
from nextvit_exporters.coreml.compression import compress_weights, packer
from nextvit_exporters.coreml.convert import to_model
from nextvit_exporters.coreml.loading import part
from nextvit_exporters.coreml.program import Operation, Package
from nextvit_exporters.coreml_spec import CoreMLSpec
from nextvit_exporters.errors import BuildFailed, InvariantError, UnsupportedSpec
from nextvit_exporters.executors.mil import MilReference
from nextvit_exporters.executors.mil_constexpr import decompress
from nextvit_exporters.precision.compress import compress_graph, compressible, for_conversion
from nextvit_exporters.precision.fp16 import round_constants
from nextvit_exporters.spec import Precision
from tests import harness
from tests.exporters.coreml.conversions import SIZE, altered, converted, folded, module_of, parameters, saved, spec_of

CASES: Final = ((16, "int8"), (16, "lut8"), (16, "lut4"), (18, "int8"), (18, "lut6"))
KINDS: Final = {
    (16, "int8"): "constexpr_affine_dequantize",
    (18, "int8"): "constexpr_blockwise_shift_scale",
}
CLEAN: Final = 1e-6
"""Exact mode against PyTorch: 0.0 measured, the same float32 kernels on the same numbers."""


class Compressed(NamedTuple):
    package: Package
    graph: fx.GraphModule
    modules: Mapping[str, str]


graph = cache(folded)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Compressed]:
    folder = tmp_path_factory.mktemp("compressed")

    @cache
    def make(ios: int, scheme: str) -> Compressed:
        carried, _ = compress_graph(graph(), scheme)
        found = converted(for_conversion(graph(), carried, scheme), ios)
        package = saved(compress_weights(found.model, scheme), folder / f"{ios}-{scheme}.mlpackage")
        return Compressed(package, carried, found.modules)

    return make


def constexprs(package: Package) -> list[Operation]:
    return [each for each in package.program.operations if each.kind.startswith("constexpr_")]


def unpacked(package: Package, operation: Operation) -> NDArray[Any]:
    (weight,) = decompress(operation.kind, operation.name, dict(parameters(package, operation)))
    return weight


def moved(package: Package, against: fx.GraphModule) -> float:
    """Root mean square of the difference in logits, relative to PyTorch's."""
    image = harness.images(1, 3, SIZE, SIZE, seed=9)
    with MilReference(package, "exact") as executor:
        found = executor.run({"image": image.numpy()})["logits"]
    expected = g.execute(against, image)[0].numpy()
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(("ios", "scheme"), CASES)
def test_every_weight_decompresses_to_what_the_graph_carries(
    compressed: Callable[[int, str], Compressed], ios: int, scheme: str
) -> None:
    package, carried, modules = compressed(ios, scheme)
    seen = []
    for each in constexprs(package):
        assert each.kind == KINDS.get((ios, scheme), "constexpr_lut_to_dense")
        module = module_of(each, modules)
        expected = carried.get_submodule(module).get_parameter("weight").detach().numpy().astype(np.float16)
        weight = unpacked(package, each)
        assert weight.dtype == np.float16
        assert np.array_equal(weight.view(np.uint16), expected.view(np.uint16))
        seen.append(module)
    assert sorted(seen) == sorted(compressible(graph()))
    assert moved(package, carried) <= CLEAN


@pytest.mark.parametrize(
    ("ios", "scheme", "parameter"),
    [
        (16, "int8", "scale"),
        (16, "int8", "quantized_data"),
        (16, "lut8", "lut"),
        (16, "lut4", "indices"),
        (18, "int8", "scale"),
        (18, "int8", "data"),
        (18, "lut6", "lut"),
        (18, "lut6", "indices"),
    ],
)
def test_a_number_that_is_off_in_the_package_is_seen(
    compressed: Callable[[int, str], Compressed], ios: int, scheme: str, parameter: str
) -> None:
    package, carried, modules = compressed(ios, scheme)
    operation = constexprs(package)[1]

    def edit(values: NDArray[Any]) -> None:
        if parameter == "scale":
            values.reshape(-1)[3] *= np.float16(1.01)
        elif parameter == "lut":
            table = values.reshape(-1)
            table[len(table) // 4] *= np.float16(1.02)
        else:
            flat = values.reshape(-1)
            other = int(np.argmax(flat != flat[0]))
            flat[0], flat[other] = flat[other], flat[0]

    damaged = altered(package, operation, parameter, edit)
    expected = carried.get_submodule(module_of(operation, modules)).get_parameter("weight").detach().numpy()
    touched = constexprs(damaged)[1]
    assert not np.array_equal(unpacked(damaged, touched), expected)
    assert moved(damaged, carried) >= 10 * CLEAN


def small(ios: int = 16, precision: Precision = Precision.FP16) -> Any:
    model = harness.randomise(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 20)), 0)
    spec = replace(spec_of(CoreMLSpec(ios=ios, head="logits"), 32), precision=precision)
    return to_model(spec, round_constants(g.trace(model))).model


def test_a_weight_that_is_on_no_table_is_refused() -> None:
    with pytest.raises(InvariantError, match=r"a weight \(20, 3072\) has \d+ values, and its table holds 16"):
        compress_weights(small(), "lut4")


def test_what_cannot_hold_compressed_weights_is_refused() -> None:
    with pytest.raises(UnsupportedSpec, match="no weight compression int2; choose one of int8, lut8, lut6, lut4"):
        compress_weights(None, "int2")
    with pytest.raises(UnsupportedSpec, match="int8 weights need iOS 16; ask for --ios 16 or more"):
        compress_weights(small(ios=15), "int8")
    with pytest.raises(UnsupportedSpec, match=r"the weight p_1_weight is in float32, and int8 decompresses to FP16"):
        compress_weights(small(precision=Precision.FP32), "int8")


def test_a_weight_that_coremltools_leaves_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _, chosen = compression._method("int8")
    monkeypatch.setattr(compression, "_method", lambda _: (lambda same, _: same, chosen))
    with pytest.raises(BuildFailed, match=r"coremltools left 1 weights out of int8, first .*: it gave no reason"):
        compress_weights(small(), "int8")

    def refuse(*_: object) -> None:
        raise ValueError("no\nway")

    monkeypatch.setattr(compression, "_method", lambda _: (refuse, chosen))
    with pytest.raises(BuildFailed, match=r"coremltools refused to compress to int8: no$"):
        compress_weights(small(), "int8")


def test_the_packer_lists_values_as_coremltools_does() -> None:
    palettizer = part("optimize.coreml._quantization_passes").palettize_weights
    weight = np.random.default_rng(0).integers(-8, 8, (40, 60)).astype(np.float16)
    table, indices = packer(16)(weight)
    expected, numbers = palettizer._get_lut_and_indices(weight, "UNIQUE", 4, None)
    assert np.array_equal(table, expected)
    assert np.array_equal(indices, numbers)


def test_a_table_with_room_left_is_filled_with_its_last_value() -> None:
    table, indices = packer(16)(np.array([[3, 1], [2, 2]], np.float16))
    assert table.tolist() == [1, 2, *[3] * 14]
    assert indices.tolist() == [2, 0, 1, 1]
