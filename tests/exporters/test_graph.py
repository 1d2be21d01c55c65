from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nextvit_exporters import graph as g
from nextvit_exporters.errors import InvariantError
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.exporters.passes_harness import nano
from tests.exporters.toys import Wired, feature_map, wired
from tests.harness import images, randomise

IMAGES = images(2, 3, 64, 64, seed=1)


def test_tracing_keeps_the_function_the_names_and_the_weights() -> None:
    model = nano()
    before = copy.deepcopy(model.state_dict())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    graph = g.trace(model)
    assert {p.dtype for p in graph.parameters()} == {torch.float64}
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not graph.training
    assert "features.4.e_mhsa.q" in {node.target for node in graph.graph.nodes}
    expected = g.execute(copy.deepcopy(model).double(), IMAGES.double())
    assert torch.equal(g.execute(graph, IMAGES.double())[0], expected[0])


def test_a_weight_that_is_also_read_by_itself_is_not_touched() -> None:
    def tied(m: Wired, x: Tensor) -> Tensor:
        out: Tensor = m.fc(functional.linear(x, m.fc.weight))
        return out

    model = wired(tied, fc=nn.Linear(10, 10))
    weight, numbers = model.fc.weight, model.fc.weight.detach().clone()
    graph = g.trace(model)
    assert model.fc.weight is weight
    assert torch.equal(weight, numbers)
    assert weight.dtype == torch.float32
    half = g.cast(graph, torch.float16)
    assert {p.dtype for p in graph.parameters()} == {torch.float64}
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    expected = tied(copy.deepcopy(model).double(), feature_map())
    assert torch.equal(g.execute(graph, feature_map())[0], expected)


def test_control_flow_on_values_can_t_be_traced() -> None:
    model = wired(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=nn.Linear(10, 10))
    with pytest.raises(InvariantError, match=r"^the model can't be traced: .*control flow.*"):
        g.trace(model)


@pytest.mark.parametrize("result", [{"logits": 1}, 3, None, "logits"])
def test_only_tensors_are_outputs(result: object) -> None:
    with pytest.raises(InvariantError, match=f"^the model returns a {type(result).__name__};"):
        g.flat((torch.ones(1), result))


def test_outputs_are_flattened_in_order() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert [t.item() for t in g.flat([a, (b, [c])])] == [0.0, 1.0, 2.0]


def test_a_clone_shares_modules_and_nothing_else() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(m.drop(x)), conv=nn.Conv2d(8, 8, 1), drop=nn.Dropout(0.5)))
    other = g.clone(graph)
    assert other.get_submodule("conv") is graph.get_submodule("conv")
    other.set_submodule("conv", nn.Conv2d(8, 4, 1).double())
    for node in list(other.graph.nodes):
        if node.target == "drop":
            node.replace_all_uses_with(node.all_input_nodes[0])
    g.finish(other)
    assert g.execute(other, feature_map())[0].shape[1] == 4
    assert g.execute(graph, feature_map())[0].shape[1] == 8
    assert "drop" in dict(graph.named_modules())
    assert "drop" not in dict(other.named_modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_cast_rounds_once_and_keeps_integers(dtype: torch.dtype) -> None:
    graph = g.trace(nano())
    result = g.cast(graph, dtype)
    norms = [(name, m) for name, m in graph.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for name, norm in norms:
        rounded = result.get_submodule(name)
        assert isinstance(rounded, nn.BatchNorm2d)
        assert norm.running_var is not None
        assert rounded.running_var is not None
        assert torch.equal(rounded.running_var, norm.running_var.to(dtype))
        assert rounded.num_batches_tracked == 1000
        assert norm.running_var.dtype == torch.float64


def test_macs_are_those_of_the_layers() -> None:
    layers = {"conv": nn.Conv2d(8, 4, 3, padding=1, groups=2), "fc": nn.Linear(10, 5)}
    graph = g.trace(wired(lambda m, x: m.fc(m.conv(x)), **layers))
    g.measure(graph, feature_map())
    assert g.count_macs(graph) == 2 * 6 * 10 * 4 * (4 * 9) + 2 * 4 * 6 * (10 * 5)


def test_macs_are_those_of_torchs_own_counter() -> None:
    model = nano()
    graph = g.trace(model)
    g.measure(graph, IMAGES.double())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IMAGES)
    assert 2 * g.count_macs(graph) == counter.get_total_flops()


def test_fused_attention_counts_as_its_two_products() -> None:
    """torch's own counter leaves the CPU's fused kernel out."""
    counted = []
    for model in (timm.create_model("nextvit_small"), NextViT(VARIANTS["nextvit_small"])):
        graph = g.trace(randomise(model, seed=0))
        g.measure(graph, IMAGES.double())
        counted.append(g.count_macs(graph))
    assert counted[0] == counted[1] > 0


def test_measure_notes_shapes_and_values() -> None:
    graph = g.trace(wired(lambda m, x: m.fc(x.reshape(x.shape[0], -1, 10)), fc=nn.Linear(10, 5)))
    (result,) = g.measure(graph, feature_map())
    noted = {node.name: node.meta.get("shape", node.meta.get("value")) for node in graph.graph.nodes}
    assert noted["fc"] == tuple(result.shape) == (2, 48, 5)
    assert noted["getitem"] == 2


def test_parameters_counts_shared_ones_once() -> None:
    def twice(m: Wired, x: Tensor) -> Tensor:
        out: Tensor = m.norm(m.conv(m.conv(x)))
        return out

    graph = g.trace(wired(twice, conv=nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d(8)))
    assert g.parameters(graph) == 8 * 8 + 8 + 4 * 8
    assert g.nodes(graph) == 3


def test_module_as_names_what_it_found() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 1)))
    (node,) = (node for node in graph.graph.nodes if node.op == "call_module")
    assert g.module_as(graph, node, nn.Conv2d) is graph.get_submodule("conv")
    with pytest.raises(TypeError, match=r"^conv is a Conv2d, not a Linear$"):
        g.module_as(graph, node, nn.Linear)
