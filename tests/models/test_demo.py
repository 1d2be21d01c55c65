"""The bundled demo: what is shipped is what was measured, and training it again works."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nextvit_models.checkpoint import Checkpoint, load_checkpoint
from nextvit_models.config import VARIANTS
from nextvit_models.demo import DEMO_ACCURACY, DEMO_CHECKPOINT, DEMO_IMAGES, digits, train
from nextvit_models.errors import DeployError, MissingExtra
from nextvit_models.layouts import COUNTER
from nextvit_models.preprocessing import Preprocessing

SHORT = train.Recipe(epochs=3, warmup_epochs=1, batch_size=16, label_smoothing=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is no faster with more, and much slower where other tests run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint(DEMO_CHECKPOINT)


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor]:
    return digits.read_pictures(DEMO_IMAGES)


@pytest.fixture(scope="module")
def split() -> tuple[digits.Digits, digits.Digits]:
    return digits.load_split(train.Recipe().seed)


@pytest.fixture
def few(split: tuple[digits.Digits, digits.Digits]) -> digits.Digits:
    return split[0].take(torch.arange(64))


def accuracy(demo: Checkpoint, preprocessing: Preprocessing, shown: Tensor, labels: Tensor) -> float:
    guesses = train.logits_of(demo.model, preprocessing, shown).argmax(1)
    return float((guesses == labels).double().mean())


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def test_stated_accuracy_is_the_accuracy_on_the_shipped_pictures(
    demo: Checkpoint, pictures: tuple[Tensor, Tensor]
) -> None:
    assert accuracy(demo, demo.preprocessing, *pictures) == DEMO_ACCURACY
    assert DEMO_ACCURACY >= 0.98
    assert json.loads((DEMO_IMAGES.parent / "demo.json").read_text())["accuracy"] == DEMO_ACCURACY


def test_accuracy_tells_wrong_channel_order_and_missing_scaling(
    demo: Checkpoint, pictures: tuple[Tensor, Tensor]
) -> None:
    shown, labels = pictures[0][::4], pictures[1][::4]
    assert accuracy(demo, demo.preprocessing, shown, labels) > 0.9
    assert accuracy(demo, demo.preprocessing, shown.flip(1), labels) < 0.3
    unscaled = replace(demo.preprocessing, mean=(0.0, 0.0, 0.0), std=(1 / 255.0,) * 3)
    assert accuracy(demo, unscaled, shown, labels) < 0.3


def test_file_holds_every_tensor_of_the_model_as_float32(demo: Checkpoint) -> None:
    tensors = load_file(DEMO_CHECKPOINT)
    wanted = {name: value for name, value in demo.model.state_dict().items() if not name.endswith(COUNTER)}
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_model_is_small_and_has_every_kind_of_block(demo: Checkpoint) -> None:
    assert sum(parameter.numel() for parameter in demo.model.parameters()) <= 1_500_000
    assert [stage[-1].kind for stage in demo.model.config.stages] == ["ncb", "ntb", "ntb", "ntb"]
    assert not demo.norms_merged
    assert not demo.norms_suspect


def without(module: torch.nn.Module, demo: Checkpoint, shown: Tensor, stand_in: Callable[..., Tensor]) -> Tensor:
    handle = module.register_forward_hook(stand_in)
    logits = train.logits_of(demo.model, demo.preprocessing, shown)
    handle.remove()
    return logits


def test_every_norm_and_residual_branch_matters(demo: Checkpoint, pictures: tuple[Tensor, Tensor]) -> None:
    shown = pictures[0][::36]
    logits = train.logits_of(demo.model, demo.preprocessing, shown)
    moved: dict[str, list[float]] = {"norm": [], "branch": []}
    for name, module in demo.model.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            skipped = without(module, demo, shown, lambda _module, inputs, _output: inputs[0])
            moved["norm"].append(relative(skipped, logits))
        elif name.split(".")[-1] in {"mhca", "e_mhsa", "mlp"}:
            cut = without(module, demo, shown, lambda _module, _inputs, output: torch.zeros_like(output))
            moved["branch"].append(relative(cut, logits))
    assert len(moved["norm"]) == 32
    assert len(moved["branch"]) == 17
    assert min(moved["norm"]) > 1e-3  # far above what an exact comparison lets pass
    assert min(moved["branch"]) > 0.01


def test_header_says_how_to_run_the_weights(demo: Checkpoint) -> None:
    assert demo.model.config is VARIANTS["nextvit_nano"]
    assert demo.labels == digits.CLASSES
    assert demo.preprocessing.image_size == digits.IMAGE_SIZE == demo.model.config.image_size
    assert demo.preprocessing.crop_pct == 1.0
    assert len(set(demo.preprocessing.mean)) == len(set(demo.preprocessing.std)) == 3


def test_pictures_are_whole_and_different() -> None:
    assert sorted(folder.name for folder in DEMO_IMAGES.iterdir()) == list(digits.CLASSES)
    paths = sorted(DEMO_IMAGES.glob("*/*"))
    assert len(paths) == digits.HELD_OUT
    assert sum(path.stat().st_size for path in paths) < 2_500_000
    seen = set()
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64)), path
            seen.add(hashlib.sha256(image.tobytes()).digest())
    assert len(seen) == len(paths)
    assert all(sum(path.parent.name == name for path in paths) >= 30 for name in digits.CLASSES)


def test_shipped_pictures_are_the_held_out_digits(
    split: tuple[digits.Digits, digits.Digits], pictures: tuple[Tensor, Tensor]
) -> None:
    training, held_out = split
    assert (len(training), len(held_out)) == (1437, digits.HELD_OUT)
    known = {row.numpy().tobytes() for row in training.pixels}
    assert not any(row.numpy().tobytes() in known for row in held_out.pixels)
    order = torch.argsort(held_out.labels, stable=True)
    drawn = digits.render_upright(held_out, held_out, train.Recipe().seed + 1)[order]
    assert torch.equal(held_out.labels[order], pictures[1])
    # One level of 255: another CPU may round the enlargement differently.
    assert int((drawn.int() - pictures[0].int()).abs().max()) <= 1


def test_ghosts_are_of_another_class_and_only_blue(few: digits.Digits) -> None:
    pool = replace(few, pixels=few.labels.float().view(-1, 1, 1).expand(-1, 8, 8))  # every pixel tells its class
    scenes = digits.draw_scenes(few, pool, torch.Generator().manual_seed(3))
    assert bool((scenes.ghosts[:, 0, 0] != few.labels).all())
    with_ghost = digits.render(scenes)
    without = digits.render(replace(scenes, ghosts=torch.zeros_like(scenes.ghosts)))
    assert torch.equal(with_ghost[:, :2], without[:, :2])
    assert float((with_ghost[:, 2] - without[:, 2]).abs().mean()) > 0.05


def test_augmentation_follows_its_generator(few: digits.Digits) -> None:
    first, again, other = (digits.render_augmented(few, few, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.min()) >= 0.0
    assert float(first.max()) <= 1.0


def test_training_lowers_the_loss_and_leaves_torch_as_it_was(split: tuple[digits.Digits, digits.Digits]) -> None:
    zeros_and_ones = split[0].take((split[0].labels < 2).nonzero()[:64, 0])
    torch.set_num_threads(2)
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state())
    heard: list[int] = []
    trained = train.fit(SHORT, zeros_and_ones, lambda epoch, _loss: heard.append(epoch))
    assert trained.losses[-1] < trained.losses[0] - 0.1
    assert heard == [1, 2, 3]
    assert not trained.model.training
    after = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = train.Recipe(epochs=10, warmup_epochs=2, learning_rate=1.0, final_learning_rate=0.0)
    rates = [recipe.learning_rate_at(step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[30] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_same_seed_writes_the_same_files(
    few: digits.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(digits, "load_split", lambda _seed: (few, few.take(torch.arange(20))))
    monkeypatch.setattr(digits, "HELD_OUT", 20)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert train.main(["--output", str(tmp_path / name), "--seed", str(seed), "--epochs", "1"]) == 0
    first, again, other = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).glob("**/*.*")}
        for name in "abc"
    )
    weights = Path(DEMO_CHECKPOINT.name)
    assert len(first) == 22
    assert first.keys() == again.keys()
    assert all(first[path] == again[path] for path in first if path.name != "demo.json")
    assert first[weights] != other[weights]
    assert "epoch 1/1" in capsys.readouterr().err


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_text("mine")
    assert train.main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"{tmp_path} is not an empty folder; name a new one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_training_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"nextvit-deploy\[dev\]"):
        digits.load_split(0)
    assert issubclass(MissingExtra, DeployError)


def test_naming_the_files_does_not_import_torch() -> None:
    code = "import sys, nextvit_models.demo; sys.exit('torch' in sys.modules)"
    path = str(Path(train.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], check=False, env={"PYTHONPATH": path}).returncode == 0
