"""The emulation of FP16 is held against FP16 that torch computes itself, here on the CPU; and it can be told wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks import fp16_truth
from benchmarks.fp16_truth import FACTOR, LayerError, RoundsToHalf, compare_layers, main, show
from nextvit_exporters.cuda.driver import Device, Driver, probe_driver
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.harness import images


@pytest.fixture(scope="module")
def nano() -> nn.Module:
    return load_checkpoint(DEMO_CHECKPOINT).model


def test_emulated_and_computed_fp16_agree(nano: nn.Module) -> None:
    before = {name: value.clone() for name, value in nano.state_dict().items()}
    layers = compare_layers(nano, images(2, 3, 64, 64, seed=1), "cpu")
    watched = [name for name, module in nano.named_modules() if isinstance(module, fp16_truth.WATCHED)]
    assert sorted(layer.name for layer in layers) == sorted(watched)
    assert {layer.kind for layer in layers} == {"Conv2d", "Linear", "NCB", "NTB"}
    assert all(layer.agrees for layer in layers), [layer for layer in layers if not layer.agrees]
    assert all(1e-5 < layer.emulated < 1e-2 for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in nano.state_dict().items())


def test_an_emulation_that_forgets_to_round_is_seen(nano: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(RoundsToHalf):  # type: ignore[no-untyped-call]  # torch types it not
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
            del types
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(fp16_truth, "RoundsToHalf", Forgets)
    monkeypatch.setattr(fp16_truth, "_stored_in_half", lambda model: model)
    layers = compare_layers(nano, images(2, 3, 64, 64, seed=1), "cpu")
    assert all(layer.emulated == 0 and not layer.agrees for layer in layers)


def test_overflow_is_infinite_in_both() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(300.0)
    layers = compare_layers(model, torch.full((1, 3, 8, 8), 100.0), "cpu")
    assert [layer.emulated for layer in layers] == [math.inf] * 2
    assert [layer.measured for layer in layers] == [math.inf] * 2
    assert all(layer.agrees for layer in layers)


def test_what_fp16_holds_is_exact_and_the_inputs_are_rounded_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False)).eval()
    with torch.no_grad():
        next(model.parameters()).copy_(torch.eye(3).reshape(3, 3, 1, 1))
    (layer,) = compare_layers(model, images(1, 3, 8, 8, seed=1), "cpu")
    assert (layer.emulated, layer.measured, layer.agrees) == (0.0, 0.0, True)


def test_an_output_is_kept_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True)).eval()
    assert (fp16_truth._outputs(model, images(1, 3, 8, 8, seed=1))["0"] < 0).any()


def test_rounding_holds_for_views_and_in_place_operations() -> None:
    with RoundsToHalf():  # type: ignore[no-untyped-call]  # torch types it not
        values = torch.full((4,), 1.0) + 1e-4  # between two neighbours in FP16
        assert (values == 1.0).all()
        part = values[:2]
        part.add_(3e-4).mul_(3.0)
        assert values.tolist() == [3.0, 3.0, 1.0, 1.0]
        double = torch.full((2,), 1.0, dtype=torch.float64) + 1e-4
    assert (double != 1.0).all()


@pytest.mark.parametrize(
    ("emulated", "measured", "ratio", "agrees"),
    [
        (1e-4, 1e-4, 1.0, True),
        (1e-4, 1.9e-4, 1.9, True),
        (1e-4, 2.1e-4, 2.1, False),
        (1e-4, 0.4e-4, 0.4, False),
        (0.0, 0.0, 1.0, True),
        (0.0, 1e-4, math.inf, False),
        (math.inf, math.inf, 1.0, True),
        (1e-4, math.inf, math.inf, False),
        (math.inf, 1e-4, 0.0, False),
    ],
)
def test_when_a_layer_agrees(emulated: float, measured: float, ratio: float, *, agrees: bool) -> None:
    layer = LayerError("stem.0", "Conv2d", emulated, measured)
    assert layer.ratio == pytest.approx(ratio)
    assert layer.agrees is agrees
    assert FACTOR == 2.0


def test_the_table_says_where_they_disagree() -> None:
    lines: list[str] = []
    show([LayerError("a", "Conv2d", 1e-4, 1e-4), LayerError("long.name", "Linear", 1e-4, 3e-4)], lines.append)
    assert lines == [
        "layer      kind      emulated  measured  ratio",
        "a          Conv2d    1.00e-04  1.00e-04   1.00",
        "long.name  Linear    1.00e-04  3.00e-04   3.00  DISAGREE",
        "1 of 2 layers DISAGREE within 2x; ratios 1.00 to 3.00, median 3.00",
    ]
    show([LayerError("a", "Conv2d", 1e-4, 1e-4)], lines.append)
    assert lines[-1] == "all 1 layers agree within 2x; ratios 1.00 to 1.00, median 1.00"


def test_without_a_driver_nothing_is_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp16_truth, "probe_driver", lambda: Driver(None))
    assert main([]) == 4
    assert capsys.readouterr().out == "not verified: no CUDA driver\n"


def test_a_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fp16_truth, "probe_driver", lambda: Driver((12, 8), (Device("Tesla T4", (7, 5)),)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 4
    assert capsys.readouterr().out.startswith(f"not verified: PyTorch {torch.__version__} is built without CUDA")


@pytest.mark.parametrize("agrees", [True, False])
def test_the_status_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, agrees: bool
) -> None:
    device = Device("Tesla T4", (7, 5))
    compared: list[tuple[object, ...]] = []

    def compare(model: nn.Module, inputs: torch.Tensor, where: str) -> tuple[LayerError, ...]:
        compared.append((type(model).__name__, tuple(inputs.shape), where))
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        return (LayerError("a", "Conv2d", 1e-4, 1e-4 if agrees else 1e-3),)

    monkeypatch.setattr(fp16_truth, "probe_driver", lambda: Driver((12, 8), (device,)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device.name)
    monkeypatch.setattr(fp16_truth, "compare_layers", compare)
    assert main(["--checkpoint", str(DEMO_CHECKPOINT), "--size", "64", "--batch", "2"]) == (0 if agrees else 3)
    assert compared == [("NextViT", (2, 3, 64, 64), "cuda")]
    out = capsys.readouterr().out
    assert out.startswith(f"Tesla T4, CUDA 12.8: Tesla T4 (SM75); torch {torch.__version__}, 20")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason=f"no CUDA for torch; driver: {probe_driver()}")
def test_on_a_gpu(nano: nn.Module) -> None:
    layers = compare_layers(nano, images(2, 3, 64, 64, seed=1), "cuda")
    assert all(layer.agrees for layer in layers), [layer for layer in layers if not layer.agrees]
