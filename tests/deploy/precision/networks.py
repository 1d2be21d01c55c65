"""A network to plan for, and one that a block is ruined in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from torch import fx, nn

from nextvit_deploy import pipeline
from nextvit_deploy.data import Pictures, find_pictures
from nextvit_deploy.precision.budget import Budget
from nextvit_deploy.precision.plan import PrecisionPlan, ScanRequest, plan_precision
from nextvit_deploy.precision.scan import Judged, Scanner
from nextvit_deploy.request import QuantizeRequest, Request, spec_for, with_quantize
from nextvit_exporters import graph as g
from nextvit_exporters.passes import algebra
from nextvit_exporters.quantize.calibration import Calibration
from nextvit_exporters.quantize.identity import graph_hash
from nextvit_exporters.quantize.observe import Observer
from nextvit_exporters.quantize.placement import placement
from nextvit_exporters.quantize.sensitivity import BlockwiseInt8
from nextvit_exporters.spec import ExportSpec
from nextvit_models.demo import DEMO_IMAGES

WRITER: Final = "stem.1"
SENSITIVE: Final = "stem.2"
"""The block that reads what dwarfs the rest."""
CALIBRATED, JUDGED = 32, 20
ALONE = ScanRequest()


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A graph behind its passes, and what was found on pictures that ``judged`` has none of."""

    spec: ExportSpec
    graph: fx.GraphModule
    found: Calibration
    judged: Pictures

    def plan(self, budget: str, request: ScanRequest = ALONE) -> PrecisionPlan:
        steps: list[str] = []
        plan = plan_precision(
            self.spec, self.graph, self.found, self.judged, Budget.parse(budget), request, steps.append
        )
        assert any(step.startswith("sensitivity, block ") for step in steps) == request.alone
        return plan

    def scanner(self, request: ScanRequest = ALONE) -> Scanner:
        assert self.spec.quantize is not None
        blockwise = BlockwiseInt8(self.graph, self.spec.quantize, self.found)
        return Scanner(self.spec, blockwise, self.found, Judged(self.judged, None), request)


def of_the_demo() -> Network:
    """The demo's network without equalized channels, so that what is planted stays."""
    checkpoint = pipeline.open_checkpoint(None, ema=False)
    asked = QuantizeRequest(equalize=False, method="minmax", size=CALIBRATED)
    spec = spec_for(with_quantize(Request(output=Path()), asked), checkpoint)
    graph, _ = pipeline.rewrite(spec, checkpoint, lambda _: None)
    pictures = find_pictures(DEMO_IMAGES, CALIBRATED + JUDGED, (spec.height, spec.width), spec.preprocessing)
    judged = replace(pictures, paths=pictures.paths[CALIBRATED:])
    return Network(spec, graph, calibrated(graph, pictures), judged)


def ruined(network: Network) -> Network:
    """The same function, with one block that INT8 ruins: a few of the channels it reads dwarf the others."""
    graph = g.clone(network.graph)
    first, second = (linear(graph, f"{block}.conv") for block in (WRITER, SENSITIVE))
    scale = torch.ones(first.out_channels, dtype=torch.float64)
    scale[::16] = 2.0**9
    rows = first.weight * scale.view(-1, 1, 1, 1)
    bias = None if first.bias is None else first.bias * scale
    graph.set_submodule(f"{WRITER}.conv", algebra.with_weights(first, rows, bias))
    columns = second.weight / scale.view(1, -1, 1, 1)
    graph.set_submodule(f"{SENSITIVE}.conv", algebra.with_weights(second, columns, second.bias))
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(g.execute(graph, image), g.execute(network.graph, image), rtol=1e-12, atol=1e-12)
    pictures = find_pictures(DEMO_IMAGES, CALIBRATED, (64, 64), network.spec.preprocessing)
    return Network(network.spec, graph, calibrated(graph, pictures), network.judged)


def linear(graph: fx.GraphModule, name: str) -> nn.Conv2d:
    module = graph.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def calibrated(graph: fx.GraphModule, pictures: Pictures) -> Calibration:
    some = replace(pictures, paths=pictures.paths[:CALIBRATED])
    observer = Observer(graph, placement(graph), grams=False)
    for start in range(0, CALIBRATED, 8):
        observer.see(torch.from_numpy(some.read(start, start + 8).normalised()))
    return observer.result("minmax", some.fingerprint, graph_hash(graph))
