"""Latency of an exported Next-ViT-S on ONNX Runtime's CPU, against the usual route, and against the arithmetic floor.

The usual route is timm's own: norms merged by ``reparameterize()``, ``torch.onnx.export``, onnx-simplifier. Both files
hold the same weights and run with ONNX Runtime's default optimisations. The floor is what the file's
multiply-accumulates would take at the best rate ONNX Runtime's own MatMul reaches on this machine, now.

    python -m benchmarks.onnx_latency [--rounds 100] [--size 224]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxsim
import timm
import torch
from numpy.typing import NDArray

from benchmarks.pairs import interleave, seconds
from nextvit_deploy.pipeline import export
from nextvit_deploy.request import Request
from tests.harness import randomise

BOUND = 0.94
BATCHES = (1, 8)


@dataclass(frozen=True, slots=True)
class Session:
    """An ONNX file ready to be timed on one input."""

    session: ort.InferenceSession
    inputs: dict[str, NDArray[np.float32]]

    def __call__(self) -> object:
        """Run once."""
        return self.session.run(None, self.inputs)


def main() -> None:
    """Build both files at each batch, time them interleaved, print ratios and floors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="pairs at batch 1; a third, at least 30, at 8")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels")
    arguments = parser.parse_args()
    print(f"onnxruntime {ort.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = randomise(timm.create_model("nextvit_small"), seed=0)
        torch.save(model.state_dict(), folder / "nextvit_small.pth")
        _merge_norms(model)
        for batch in BATCHES:
            _compare(model, folder, batch, arguments.size, max(30, arguments.rounds // (1 if batch == 1 else 3)))


def _compare(model: torch.nn.Module, folder: Path, batch: int, size: int, rounds: int) -> None:
    baseline = _usual_route(model, folder / f"usual_b{batch}.onnx", batch, size)
    request = Request(
        output=folder, checkpoint=str(folder / "nextvit_small.pth"), size=(size, size), batch=batch, count=1
    )
    manifest = export(request, lambda _: None)
    ours = _session(manifest.artifact.path, batch, size)
    pairs = interleave(baseline, ours, rounds, warmup=3, best_of=5)
    verdict = "met" if pairs.ratio <= BOUND else "MISSED"
    print(f"\nNext-ViT-S {size}, batch {batch}, {manifest.verdict}: {pairs}; bound {BOUND}: {verdict}")
    rate = _best_rate()
    for name, macs, taken in (
        ("usual route", manifest.passes[-1].macs[0], pairs.baseline),
        ("rewritten", manifest.passes[-1].macs[1], pairs.candidate),
    ):
        floor = 2 * macs * batch / rate
        print(
            f"  {name}: {macs / 1e9:.3f} GMACs an image, floor {1e3 * floor:.1f} ms at "
            f"{rate / 1e9:.0f} GFLOP/s (best MatMul), best run at {floor / min(taken):.0%} of it"
        )


def _merge_norms(model: torch.nn.Module) -> None:
    """What timm's users call before an export."""
    for module in model.modules():
        merge = getattr(module, "reparameterize", None)
        if callable(merge):
            merge()


def _usual_route(model: torch.nn.Module, path: Path, batch: int, size: int) -> Session:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (torch.randn(batch, 3, size, size),), dynamo=True, verbose=False, input_names=["image"]
        )
    if program is None:
        raise SystemExit("torch.onnx.export returned nothing")
    simplified, _ = onnxsim.simplify(program.model_proto)
    onnx.save(simplified, str(path))
    return _session(path, batch, size)


def _session(path: Path, batch: int, size: int) -> Session:
    image = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
    return Session(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]), {"image": image})


def _best_rate() -> float:
    """The best FLOP/s of ONNX Runtime's own MatMul over a few shapes that suit it."""
    best = 0.0
    for m, k, n in ((1024, 1024, 1024), (2048, 1024, 1024), (768, 768, 3072), (3136, 288, 96)):
        shape = {"a": (m, k), "b": (k, n)}
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])],
            "matmul",
            [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, s) for x, s in shape.items()],
            [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, (m, n))],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = {x: np.random.default_rng(1).standard_normal(s).astype(np.float32) for x, s in shape.items()}
        run = Session(session, values)
        best = max(best, 2.0 * m * k * n / min(seconds(run) for _ in range(30)))
    return best


if __name__ == "__main__":
    main()
