"""Is the emulated FP16 error the real one? Layer by layer, against FP16 on a GPU's tensor cores.

The proof of an FP16 file emulates FP16 on the CPU: every tensor rounded to FP16 where it is stored, sums inside an
operation in float32. Here the same network runs three times on the same images: in float32 on the CPU, in that
emulation, and as ``model.half()`` on the GPU. Each layer's output in the last two is held against the first; both
errors hold what the layers before it did. They agree where neither is more than twice the other, at every layer.

    python -m benchmarks.fp16_truth [--variant small] [--checkpoint FILE] [--size 224] [--batch 4]

Exit status: 0 they agree, 3 they don't, 4 there is no GPU to ask.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nextvit_exporters.cuda.driver import probe_driver
from nextvit_models.blocks import NCB, NTB
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.nextvit import NextViT
from tests.harness import images, randomise

FACTOR: Final = 2.0
WATCHED: Final = (nn.Conv2d, nn.Linear, NCB, NTB)
DISAGREE: Final = 3
NOT_VERIFIED: Final = 4


@dataclass(frozen=True, slots=True)
class LayerError:
    """A layer's relative root mean square error against float32, emulated and measured; infinite where not finite."""

    name: str
    kind: str
    emulated: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over emulated; 1 where both are exact, or neither is finite."""
        if self.emulated == self.measured:
            return 1.0
        return self.measured / self.emulated if self.emulated else math.inf

    @property
    def agrees(self) -> bool:
        """Whether neither is more than ``FACTOR`` times the other."""
        return 1 / FACTOR <= self.ratio <= FACTOR


class RoundsToHalf(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types it not
    """Every float32 tensor that an operation returns is rounded to FP16; overflow becomes infinite."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` in float32 and round what it returns, in place, so that views and in-place operations hold."""
        del types
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                value.copy_(value.half().float())
        return result


def compare_layers(model: nn.Module, inputs: Tensor, device: str) -> tuple[LayerError, ...]:
    """The errors of every convolution, linear layer and block of ``model``, which stays as it is.

    ``model`` is float32 on the CPU in eval mode, ``inputs`` (B, 3, H, W) float32 on the CPU; ``device`` is torch's
    name of what runs the real FP16. All three runs get the inputs rounded to FP16.
    """
    rounded = inputs.half().float()
    exact = _outputs(model, rounded)
    stored = _stored_in_half(model)  # not inside, where what the copy shares with the original would be rounded too
    with RoundsToHalf():  # type: ignore[no-untyped-call]  # torch types it not
        emulated = _outputs(stored, rounded)
    measured = _outputs(copy.deepcopy(model).to(device).half(), rounded.half().to(device))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    return tuple(
        LayerError(name, kinds[name], _error(emulated[name], want), _error(measured[name], want))
        for name, want in exact.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare on the GPU and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("small", "base", "large"), default="small", help="with random weights")
    parser.add_argument("--checkpoint", type=Path, help="trained weights in place of random ones")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images")
    asked = parser.parse_args(arguments)
    driver = probe_driver()
    if not driver.devices:
        print("not verified: no CUDA driver")
        return NOT_VERIFIED
    if not torch.cuda.is_available():
        print(
            f"not verified: PyTorch {torch.__version__} is built without CUDA, or doesn't see {driver.devices[0].name}"
        )
        return NOT_VERIFIED
    model = _model(asked.variant, asked.checkpoint)
    today = dt.datetime.now(dt.timezone.utc).date()
    print(f"{torch.cuda.get_device_name()}, {driver}; torch {torch.__version__}, {today}")
    with _float32_sums():
        layers = compare_layers(model, images(asked.batch, 3, asked.size, asked.size, seed=1), "cuda")
    show(layers, print)
    return 0 if all(layer.agrees for layer in layers) else DISAGREE


def show(layers: Sequence[LayerError], line: Callable[[str], None]) -> None:
    """The table, line by line, and whether they agree."""
    width = max(len(layer.name) for layer in layers)
    line(f"{'layer':{width}}  {'kind':8}{'emulated':>10}{'measured':>10}{'ratio':>7}")
    for layer in layers:
        mark = "" if layer.agrees else "  DISAGREE"
        figures = f"{layer.emulated:>10.2e}{layer.measured:>10.2e}{layer.ratio:>7.2f}"
        line(f"{layer.name:{width}}  {layer.kind:8}{figures}{mark}")
    wrong = [layer for layer in layers if not layer.agrees]
    ratios = sorted(layer.ratio for layer in layers)
    spread = f"ratios {ratios[0]:.2f} to {ratios[-1]:.2f}, median {ratios[len(ratios) // 2]:.2f}"
    verdict = f"{len(wrong)} of {len(layers)} layers DISAGREE" if wrong else f"all {len(layers)} layers agree"
    line(f"{verdict} within {FACTOR:g}x; {spread}")


def _model(variant: str, checkpoint: Path | None) -> nn.Module:
    if checkpoint is not None:
        return load_checkpoint(checkpoint).model
    return randomise(NextViT(VARIANTS[f"nextvit_{variant}"]), seed=0)


def _outputs(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every watched layer returns, by its name, in float64 on the CPU."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[name] = output.detach().cpu().double()  # a copy: what follows may work in place

        return hook

    named = [(name, module) for name, module in model.named_modules() if isinstance(module, WATCHED)]
    handles = [module.register_forward_hook(keep(name)) for name, module in named]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _stored_in_half(model: nn.Module) -> nn.Module:
    """A float32 copy whose every weight and statistic went through FP16."""
    return copy.deepcopy(model).half().float()


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square error."""
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    return error if math.isfinite(error) else math.inf


@contextmanager
def _float32_sums() -> Iterator[None]:
    """FP16 products summed up in float32, as the emulation has it; torch may otherwise split sums in FP16."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction
    settings.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_fp16_reduced_precision_reduction = before


if __name__ == "__main__":
    sys.exit(main())
