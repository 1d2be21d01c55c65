"""Train the demo's weights again: ``python -m nextvit_models.demo.train --output DIR``.

The recipe is the paper's (arXiv 2207.05501, section 4.1, and the official training script where the paper is
silent), shortened to a few minutes on one CPU core: AdamW, cosine decay after a linear warm-up, stochastic depth
growing with the block, label smoothing 0.1, gradients clipped at 5. DIR gets what this folder ships: the weights,
the held-out pictures and ``demo.json``, which says how well the weights do on exactly those pictures.

The same seed on the same machine and the same torch gives the same bytes. Another CPU or torch release rounds
differently and may move the accuracy by a picture or two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from nextvit_models.checkpoint import Checkpoint, load_checkpoint, save_safetensors
from nextvit_models.config import VARIANTS
from nextvit_models.demo import digits
from nextvit_models.errors import DeployError
from nextvit_models.files import atomic_path
from nextvit_models.nextvit import NextViT
from nextvit_models.preprocessing import Preprocessing

VARIANT: Final = "nextvit_nano"
THREADS: Final = 1
"""More would split sums in another order, hardly help so small a model, and wait for each other on a busy machine."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the trained weights, besides the digits."""

    seed: int = 0
    epochs: int = 30
    warmup_epochs: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-5
    weight_decay: float = 0.1
    label_smoothing: float = 0.1
    max_gradient_norm: float = 5.0

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """Linear from zero over the warm-up, then half a cosine down to ``final_learning_rate``."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.epochs * steps_per_epoch - warmup)
        span = self.learning_rate - self.final_learning_rate
        return self.final_learning_rate + span * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, slots=True)
class Trained:
    """The model in eval mode, how its input is prepared, and the mean loss of each epoch."""

    model: NextViT
    preprocessing: Preprocessing
    losses: tuple[float, ...]


def measure_preprocessing(train: digits.Digits, seed: int) -> Preprocessing:
    """Mean and deviation per channel of the training digits as upright pictures, rounded to four decimals."""
    pictures = digits.render_upright(train, train, seed).double() / 255.0
    mean, std = (
        (round(float(values[0]), 4), round(float(values[1]), 4), round(float(values[2]), 4))
        for values in (pictures.mean((0, 2, 3)), pictures.std((0, 2, 3)))
    )
    return Preprocessing(mean=mean, std=std, interpolation="bicubic", crop_pct=1.0, image_size=digits.IMAGE_SIZE)


def normalise(pictures: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, 3, H, W) in 0..1 -> zero mean and unit deviation per channel."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (pictures - mean) / std


def fit(
    recipe: Recipe, train: digits.Digits, on_epoch: Callable[[int, float], None] = lambda _epoch, _loss: None
) -> Trained:
    """Train a nano Next-ViT; ``on_epoch`` is called with the epochs done and the last one's mean loss."""
    with _reproducible(recipe.seed):
        generator = torch.Generator().manual_seed(recipe.seed)
        preprocessing = measure_preprocessing(train, recipe.seed)
        model = NextViT(VARIANTS[VARIANT], len(digits.CLASSES)).to(memory_format=torch.channels_last).train()
        optimiser = torch.optim.AdamW(_parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
        steps_per_epoch = len(train) // recipe.batch_size
        losses: list[float] = []
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(train), generator=generator)
            total = 0.0
            for index in range(steps_per_epoch):
                batch = train.take(order[index * recipe.batch_size :][: recipe.batch_size])
                pictures = normalise(digits.render_augmented(batch, train, generator), preprocessing)
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate_at(epoch * steps_per_epoch + index, steps_per_epoch)
                total += _step(model, optimiser, recipe, pictures, batch.labels)
            losses.append(total / steps_per_epoch)
            on_epoch(epoch + 1, losses[-1])
    return Trained(model.to(memory_format=torch.contiguous_format).eval(), preprocessing, tuple(losses))


@torch.no_grad()
def logits_of(model: nn.Module, preprocessing: Preprocessing, pictures: Tensor) -> Tensor:
    """(N, 3, 64, 64) uint8 -> (N, 10) float32; the model must be in eval mode."""
    return torch.cat([model(normalise(part / 255.0, preprocessing)) for part in torch.split(pictures, 60)])


def run(recipe: Recipe, output: Path, on_epoch: Callable[[int, float], None]) -> float:
    """Train, write weights, pictures and ``demo.json`` into the folder ``output``, return the accuracy.

    Raises DeployError when ``output`` exists and is not an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DeployError(f"{output} is not an empty folder; name a new one")
    started = time.perf_counter()
    train, held_out = digits.load_split(recipe.seed)
    trained = fit(recipe, train, on_epoch)
    seconds = time.perf_counter() - started
    pictures = digits.render_upright(held_out, held_out, recipe.seed + 1)
    with atomic_path(output) as partial:
        partial.mkdir()
        digits.write_pictures(partial / "images", pictures, held_out.labels)
        saved = _write_weights(partial / f"{VARIANT}_digits.safetensors", trained)
        stored, labels = digits.read_pictures(partial / "images")
        guesses = logits_of(saved.model, saved.preprocessing, stored).argmax(1)
        accuracy = float((guesses == labels).double().mean())
        _write_record(partial / "demo.json", recipe, accuracy, seconds)
    return accuracy


def _step(
    model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, pictures: Tensor, labels: Tensor
) -> float:
    logits = model(pictures.contiguous(memory_format=torch.channels_last))
    loss = functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimiser.step()
    return loss.item()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay for the weights of convolutions and linear maps, none for biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch, fix its threads and its algorithms, and put everything back afterwards."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_num_threads(THREADS)
            torch.use_deterministic_algorithms(True)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)


def _write_weights(path: Path, trained: Trained) -> Checkpoint:
    """Write the project's own form of the weights, and read it back."""
    metadata = {
        "variant": VARIANT,
        "labels": json.dumps(digits.CLASSES),
        "preprocessing": json.dumps(trained.preprocessing.as_dict()),
    }
    tensors = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(tensors, path, metadata=metadata)  # its header lists the metadata in an order of its own
    save_safetensors(load_checkpoint(path), path)
    return load_checkpoint(path)


def _write_record(path: Path, recipe: Recipe, accuracy: float, seconds: float) -> None:
    record = {
        "accuracy": accuracy,
        "pictures": digits.HELD_OUT,
        "seed": recipe.seed,
        "epochs": recipe.epochs,
        "torch": torch.__version__,
        "train_seconds": round(seconds, 1),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _progress(epochs: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal, else a line an epoch."""
    if not sys.stderr.isatty():
        yield lambda epoch, loss: print(f"epoch {epoch}/{epochs}  loss {loss:.4f}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=epochs)
        yield lambda epoch, loss: bar.update(task, completed=epoch, description=f"training  loss {loss:.4f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    default = Recipe()
    parser = argparse.ArgumentParser(prog="python -m nextvit_models.demo.train", description="Train the demo weights.")
    parser.add_argument("--output", type=Path, required=True, help="new folder for weights, pictures and demo.json")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--epochs", type=int, default=default.epochs)
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed, epochs=options.epochs)
    try:
        with _progress(recipe.epochs) as on_epoch:
            accuracy = run(recipe, options.output, on_epoch)
    except DeployError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.output}: {accuracy:.4f} of {digits.HELD_OUT} held-out pictures recognised")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
