"""Ten random faults a format, each in one layer of the saved file: nine at least have to be named right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nextvit_deploy.bisect.record import Bisection
from nextvit_deploy.bisect.run import layers_of
from nextvit_deploy.request import Request
from tests.deploy import support_coreml as mil
from tests.deploy import support_trt as trt
from tests.deploy.support import Exported, tamper

SEEDS: Final = range(10)
ENOUGH: Final = 9


def bisected(path: Path) -> Bisection:
    return layers_of(path, Request(output=path.parent), lambda _: None)


def module_of(path: Path) -> str:
    first = bisected(path).parting
    return "nothing" if first is None else first.module


def spoiled(values: mil.Values, how: str, channel: int) -> mil.Values:
    """One weight or bias of a map, off in one of three ways."""
    result = values.astype(np.float64)
    if how == "scaled":
        result *= 1.05
    elif how == "one channel":
        result[channel % len(result)] += 0.1 * np.abs(result).max() + 0.01
    else:
        result = np.roll(result, 1, axis=0)
    return result.astype(values.dtype)


class OnnxFault:
    """A random layer of an ONNX file: numbers of a map, or an activation that is dropped."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - faults keep no secret
        self.module = ""

    def __call__(self, model: onnx.ModelProto) -> None:
        chosen = self._random
        if chosen.random() < 0.2:
            node = chosen.choice([each for each in model.graph.node if each.op_type == "Relu"])
            node.op_type, self.module = "Identity", node.name.rpartition("/")[0]
            return
        maps = {t.name: t for t in model.graph.initializer if t.name.endswith((".weight", ".bias")) and t.dims}
        tensor = maps[chosen.choice(sorted(maps))]
        self.module = tensor.name.rpartition(".")[0]
        how = chosen.choice(("scaled", "one channel", "rolled"))
        values = spoiled(numpy_helper.to_array(tensor), how, chosen.randrange(64))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def score(named: Callable[[int], tuple[str, str]]) -> list[str]:
    """What was named wrong, in words."""
    found = {seed: named(seed) for seed in SEEDS}
    return [f"{seed}: {got} for {wanted}" for seed, (wanted, got) in found.items() if got != wanted]


def test_of_an_onnx_file(demo: Exported, tmp_path: Path) -> None:
    def named(seed: int) -> tuple[str, str]:
        fault, folder = OnnxFault(seed), tmp_path / str(seed)
        folder.mkdir()
        path = tamper(demo.copied(folder), fault)
        return fault.module, module_of(path)

    wrong = score(named)
    assert len(SEEDS) - len(wrong) >= ENOUGH, wrong


def test_of_an_engine(engine: Exported, tmp_path: Path) -> None:
    def named(seed: int) -> tuple[str, str]:
        fault, folder = OnnxFault(seed), tmp_path / str(seed)
        folder.mkdir()
        path = trt.damaged(engine, folder, fault)
        return fault.module, module_of(path)

    wrong = score(named)
    assert len(SEEDS) - len(wrong) >= ENOUGH, wrong


@mil.needs_coremltools
def test_of_a_package(package: Exported, tmp_path: Path) -> None:
    wrong = score(lambda seed: named_after(package, tmp_path, seed))
    assert len(SEEDS) - len(wrong) >= ENOUGH, wrong


def named_after(package: Exported, tmp_path: Path, seed: int) -> tuple[str, str]:
    """The module that was spoiled in a package, and the one that was named."""
    chosen = random.Random(seed)  # noqa: S311 - faults keep no secret
    told: list[str] = []

    def fault(draft: mil.Draft) -> None:
        maps: list[Any] = [each for each in draft.operations if each.type in {"conv", "linear"}]
        operation = chosen.choice(maps)
        told.append(draft._modules[operation.outputs[0].name])
        how, channel = chosen.choice(("scaled", "one channel", "rolled")), chosen.randrange(64)
        parameter = chosen.choice([each for each in ("weight", "bias") if each in operation.inputs])
        draft.change(operation, parameter, lambda values: spoiled(values, how, channel))

    folder = tmp_path / str(seed)
    folder.mkdir()
    path = mil.planted(package, folder, fault)
    return told[0], module_of(path)


@pytest.mark.parametrize("kind", ["demo", "engine", "package"])
def test_what_is_sound_does_not_part(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "package":
        pytest.importorskip("coremltools")
    made: Exported = request.getfixturevalue(kind)
    found = bisected(made.path)
    assert found.parting is None
    assert [series.question for series in found.series] == ["same network", "precision cost"]
    assert all(len(series.layers) > 30 for series in found.series)
    assert Bisection.from_dict(found.as_dict()) == found
