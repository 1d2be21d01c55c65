from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nextvit_exporters.passes.convolve_projection import ConvolveProjection
from nextvit_exporters.passes.strip_train_only import StripTrainOnly
from tests.exporters.passes_harness import check_pass, nano, official
from tests.exporters.tensorrt_passes import on_its_way
from tests.exporters.toys import Attend, Wired, Wiring, feature_map, wired
from tests.harness import images, randomise

PASS = ConvolveProjection()


def layers() -> dict[str, nn.Module]:
    return {"proj": nn.Linear(8, 8), "bare": nn.Linear(8, 8, bias=False), "wide": nn.Linear(8, 16)}


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def sizes_read(m: Wired, x: Tensor) -> Tensor:
    y = m.proj(tokens(x))
    turned = y.transpose(1, 2)
    out: Tensor = turned.reshape(y.shape[0], turned.shape[1], x.shape[2], -1)
    return out


@pytest.mark.parametrize(
    ("wiring", "nodes"),
    [
        (lambda m, x: m.proj(tokens(x)).transpose(1, 2).reshape(x.shape), 0),
        (lambda m, x: m.bare(tokens(x)).transpose(1, 2).reshape(x.shape), 0),
        (lambda m, x: m.proj(tokens(x)).transpose(-1, -2).unflatten(2, (6, 10)), 0),
        (lambda m, x: m.proj(tokens(x)).reshape(2, 6, 10, 8).permute(0, 3, 1, 2), 0),
        (lambda m, x: m.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 0),
        (lambda m, x: x + m.proj(tokens(x)).transpose(1, 2).reshape(x.shape), 0),
        (lambda m, x: m.proj(tokens(x)).permute(2, 1, 0).unsqueeze(0), 0),
        (sizes_read, 0),
    ],
    ids=["ours", "without bias", "unflatten", "channels last", "never flat", "residual", "batch moved", "sizes read"],
)
def test_convolves(wiring: Wiring, nodes: int) -> None:
    model = wired(wiring, **layers())
    checked = check_pass(model, (), PASS, rewrites=1, nodes=nodes, inputs=feature_map())
    assert [m for m in checked.graph.modules() if isinstance(m, nn.Conv2d)]
    assert not [m for m in checked.graph.modules() if isinstance(m, nn.Linear)]


def test_weights_are_the_same() -> None:
    model = wired(lambda m, x: m.proj(tokens(x)).transpose(1, 2).reshape(x.shape), **layers())
    conv = check_pass(model, (), PASS, rewrites=1, nodes=0, inputs=feature_map()).graph.get_submodule("proj")
    linear = model.get_submodule("proj")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(linear, nn.Linear)
    assert conv.kernel_size == (1, 1)
    assert torch.equal(conv.weight.flatten(1), linear.weight.double())


def test_in_an_attention_only_the_projection() -> None:
    checked = check_pass(randomise(Attend(), 0), (), PASS, rewrites=1, nodes=0, inputs=feature_map())
    kept = {name: type(module) for name, module in checked.graph.named_modules() if name in {"q", "k", "v", "proj"}}
    assert kept == {"q": nn.Linear, "k": nn.Linear, "v": nn.Linear, "proj": nn.Conv2d}


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.proj(tokens(x)),
        lambda m, x: m.proj(tokens(x)).transpose(1, 2),
        lambda m, x: m.proj(tokens(x)).reshape(x.shape),
        lambda m, x: m.proj(tokens(x)).relu().transpose(1, 2).reshape(x.shape),
        lambda m, x: m.proj(tokens(x)).reshape(2, 60, 2, 4).transpose(1, 2),
        lambda m, x: m.proj(tokens(x)[:, :8]).reshape(2, 8, 2, 4),
        lambda m, x: m.proj(x.mean((2, 3))),
    ],
    ids=["tokens", "turned", "mixed", "relu", "heads", "as many tokens as channels", "head"],
)
def test_nothing_to_convolve(wiring: Wiring) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map())


SHARED = "it is used, or its weight is shared, elsewhere"


def tapped(m: Wired, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.proj(tokens(x))
    return y.transpose(1, 2).reshape(x.shape), y


def turned_tapped(m: Wired, x: Tensor) -> Tensor:
    y = m.proj(tokens(x)).transpose(1, 2)
    out: Tensor = y.reshape(x.shape) * y.exp().mean()
    return out


@pytest.mark.parametrize(
    ("wiring", "reasons"),
    [
        (tapped, ["its tokens are also read by the graph's output"]),
        (turned_tapped, ["its tokens are also read by exp"]),
        (lambda m, x: m.proj(m.proj(tokens(x))).transpose(1, 2).reshape(x.shape), [SHARED]),
        (
            lambda m, x: m.proj(tokens(x)).transpose(1, 2).reshape(x.shape) * m.proj.weight.sum(),
            [SHARED],
        ),
        (
            lambda m, x: m.wide(tokens(x)).transpose(1, 2).reshape(2, 16, 6, 10),
            ["it makes 16 channels of 8, and the moves behind it name them"],
        ),
    ],
    ids=["tapped", "turned tapped", "shared", "weight read", "wider"],
)
def test_refuses(wiring: Wiring, reasons: list[str]) -> None:
    check_pass(wired(wiring, **layers()), (), PASS, rewrites=0, nodes=0, inputs=feature_map(), refused=reasons)


@pytest.mark.parametrize("model", [nano(), official()], ids=["ours", "official"])
@pytest.mark.parametrize("size", [(64, 64), (75, 97)])
def test_on_the_model(model: nn.Module, size: tuple[int, int]) -> None:
    inputs = images(2, 3, *size, seed=1).double()
    check_pass(model, (StripTrainOnly(),), PASS, rewrites=3, nodes=0, inputs=inputs)


@pytest.mark.parametrize(
    ("model", "count"),
    [("nano", 3), ("official", 3), ("own head", 3), ("conv head", 3), ("backbone", 3), ("small", 4), ("timm", 4)],
)
def test_counts(model: str, count: int) -> None:
    assert on_its_way(model).counts("convolve-projection") == (count, ())
