"""Whatever is wrong with what the user gave: one line that says so, the right status, and nothing written."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18  # type: ignore[import-untyped]  # it ships no types

from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT, DEMO_IMAGES
from tests.deploy.support import call, contents, one_line, refusal, run

CONSUMER = "no consumer is called"


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"echo boom > {self.canary}",)


def weights() -> dict[str, Tensor]:
    return dict(load_checkpoint(DEMO_CHECKPOINT).model.state_dict())


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


def missing_file(folder: Path) -> Path:
    return folder / "absent.pth"


def empty_file(folder: Path) -> Path:
    path = folder / "empty.pth"
    path.touch()
    return path


def random_bytes(folder: Path) -> Path:
    path = folder / "random.pth"
    path.write_bytes(random.Random(0).randbytes(100_000))  # noqa: S311 - any bytes will do
    return path


def truncated_safetensors(folder: Path) -> Path:
    path = folder / "truncated.safetensors"
    path.write_bytes(DEMO_CHECKPOINT.read_bytes()[:1_000_000])
    return path


def truncated_pickle(folder: Path) -> Path:
    path = saved(folder / "truncated.pth", weights())
    path.write_bytes(path.read_bytes()[:1_000_000])
    return path


def zip_bomb(folder: Path) -> Path:
    path = folder / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("w/data/0", bytes(50_000_000))
    return path


def hostile_pickle(folder: Path) -> Path:
    return saved(folder / "hostile.pth", {"model": weights(), "extra": Bomb(folder / "canary")})


def another_network(folder: Path) -> Path:
    return saved(folder / "resnet.pth", resnet18().state_dict())


def tensor_missing(folder: Path) -> Path:
    kept = weights()
    del kept["features.3.mlp.conv1.weight"]
    return saved(folder / "missing.pth", kept)


def wrong_shape(folder: Path) -> Path:
    values = weights()
    return saved(folder / "shape.pth", values | {"features.3.mlp.conv1.bias": torch.ones(7)})


def nan_weights(folder: Path) -> Path:
    values = weights()
    values["features.3.mlp.conv1.weight"][0, 0] = torch.nan
    return saved(folder / "nan.pth", values)


def not_weights(folder: Path) -> Path:
    return saved(folder / "list.pth", [1, 2, 3])


def line_break(folder: Path) -> Path:
    return folder / "two\nlines.pth"


CHECKPOINTS: dict[Callable[[Path], Path], str] = {
    missing_file: "no such file",
    empty_file: "the file is empty",
    random_bytes: "neither a checkpoint of PyTorch nor a safetensors file",
    truncated_safetensors: "truncated or damaged",
    truncated_pickle: "truncated or damaged",
    zip_bomb: "is compressed",
    hostile_pickle: "nothing was executed",
    another_network: "not a Next-ViT",
    tensor_missing: "features.3.mlp.conv1.weight",
    wrong_shape: "features.3.mlp.conv1.bias",
    nan_weights: "features.3.mlp.conv1.weight holds NaN or infinity",
    not_weights: "not a state dict",
    line_break: "two lines.pth: no such file",
}


@pytest.mark.parametrize("make", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    before = contents(tmp_path)
    line = refusal("onnx", path, "--output", tmp_path / "out")
    assert CHECKPOINTS[make] in line
    assert " ".join(path.name.split()) in line
    assert contents(tmp_path) == before  # no output, and no canary
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("onnx", "{}", "--output", "out"),
        ("passes", "{}"),
        ("inspect", "{}"),
        ("convert", "{}", "w.safetensors"),
        ("onnx", "{}", "--output", "out", "--json"),
        ("inspect", "{}", "--json"),
    ],
)
def test_every_command_refuses_alike(tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = hostile_pickle(tmp_path)
    before = contents(tmp_path)
    line = refusal(*(argument.format(path) for argument in command))
    assert line.startswith(f"{path}: loading it would import ")
    assert contents(tmp_path) == before


def test_a_hostile_checkpoint_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What a user sees: one unwrapped line, however long, and no traceback."""
    ran = run("onnx", hostile_pickle(tmp_path), "--output", tmp_path / "out", COLUMNS="40")
    assert (ran.status, ran.out) == (1, "")
    line = one_line(ran.err)
    assert len(line) > 200
    assert "nothing was executed; only if you trust its origin, save the state dict alone: python -c " in line
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow(tmp_path: Path) -> None:
    """Finite weights, but PyTorch's own answer is not: no export of it could be proven."""
    values = weights()
    values |= {name: tensor * 1e15 for name, tensor in values.items() if name.endswith("conv1.weight")}
    line = refusal("onnx", saved(tmp_path / "w.pth", values), "--output", tmp_path / "out")
    assert line.startswith("w.pth: PyTorch itself answers NaN or infinity on these images")
    assert not (tmp_path / "out").exists()


def no_folder(folder: Path) -> Path:
    return folder / "absent"


def empty_folder(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def a_picture(_: Path) -> Path:
    return next(DEMO_IMAGES.rglob("*.png"))


def unreadable_picture(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for number, picture in enumerate(sorted(DEMO_IMAGES.rglob("*.png"))[:3]):
        (folder / "pictures" / f"{number}.png").write_bytes(picture.read_bytes()[: 100 if number == 1 else None])
    return folder / "pictures"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (no_folder, "is not a folder; name one that holds images"),
        (empty_folder, "no image in "),
        (a_picture, "is not a folder; name one that holds images"),
        (unreadable_picture, "cannot be read: 1.png; repair or remove them"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    folder = make(tmp_path)
    assert says in refusal("onnx", "--images", folder, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "31"), "31x31 is too small; "),
        (("--size", "64x16"), "64x16 is too small; "),
        (("--size", "0"), "0x0 is too small; "),
        (("--opset", "5"), "opset 5 can't be written; choose 17 to "),
        (("--opset", "99"), "opset 99 can't be written; choose 17 to "),
        (("--for", "tensorrt-8.6", "--opset", "20"), "tensorrt-8.6 reads up to opset 17, not 20; drop --opset"),
        (("--for", "tensorrt10"), f"{CONSUMER} 'tensorrt10'; did you mean 'tensorrt-10'? choose one of tensorrt-8.6, "),
        (("--for", "TensorRT-10"), f"{CONSUMER} 'TensorRT-10'; did you mean 'tensorrt-10'? choose one of "),
        (("--for", "?"), f"{CONSUMER} '?'; choose one of tensorrt-8.6, "),
        (("--skip-pass", "fold-conv"), "no pass is called 'fold-conv'; did you mean 'fold-conv-norm'? choose one of "),
        (
            ("--skip-pass", "drop-key-bias", "--skip-pass", "all"),
            "no pass is called 'all'; choose one of average-early, ",
        ),
    ],
)
def test_options_that_cannot_be_met(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert refusal("onnx", *options, "--output", tmp_path / "out").startswith(says)
    assert not (tmp_path / "out").exists()


def test_names_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    for command in (("onnx", "--output", tmp_path / "out"), ("passes",)):
        line = refusal(*command, tmp_path / "absent.pth", "--skip-pass", "fold-norms")
        assert line.startswith("no pass is called 'fold-norms'; did you mean ")


@pytest.mark.parametrize(
    ("command", "says", "where"),
    [
        (("onnx", "--size", "abc"), "Invalid value for '--size': 'abc' is not a size; write 224 or ", "onnx"),
        (("passes", "--size", "32x"), "'32x' is not a size", "passes"),
        (("inspect", "--size", "32x32x32"), "'32x32x32' is not a size", "inspect"),
        (("onnx", "--size", "-64"), "'-64' is not a size", "onnx"),
        (("onnx", "--size", "6.4"), "'6.4' is not a size", "onnx"),
        (("onnx", "--size", "\u0666\u0664"), "is not a size", "onnx"),
        (("onnx", "--size", "16385"), "'16385' is larger than 16384 pixels a side", "onnx"),
        (("onnx", "--opset", "new"), "Invalid value for '--opset'", "onnx"),
        (("onnx", "--opset", "0"), "Invalid value for '--opset'", "onnx"),
        (("onnx", "--batch", "0"), "Invalid value for '--batch'", "onnx"),
        (("onnx", "--count", "0"), "Invalid value for '--count'", "onnx"),
        (("onnx", "--input", "bgr"), "'bgr' is not one of 'normalized', 'float', 'uint8'", "onnx"),
        (("onnx", "a.pth", "b.pth"), "Got unexpected extra argument", "onnx"),
        (("onnx", "--output"), "--output", None),
        (("onnx", "--ray", "auto"), "what INT8 is told needs --int8", "onnx"),
        (("onnx", "--int8", "--workers", "2"), "--workers, --ray and --plan-images look for", "onnx"),
        (("onnx", "--int8", "--plan-images", "9"), "--workers, --ray and --plan-images look for", "onnx"),
        (("onnx", "--int8", "--accuracy-budget", "1", "--precision-plan", "p"), "exclude each other; give one", "onnx"),
        (("verify",), "Missing argument", "verify"),
        (("convert", "a.pth"), "Missing argument", "convert"),
        (("onnx", "--bacth", "3"), "--batch", "onnx"),
        (("--versoin",), "--version", None),
        (("onyx",), "No such command 'onyx'", None),
    ],
)
def test_wrong_usage(command: tuple[str, ...], says: str, where: str | None) -> None:
    line = refusal(*command, status=2)
    assert says in line
    assert line.endswith(f" See: nextvit-export{f' {where}' if where else ''} --help")


def test_an_unknown_command_is_met_with_the_nearest() -> None:
    assert "'onnx'" in refusal("onyx", status=2)
    assert "'passes'" in refusal("pases", status=2)


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "there is no file"), (b"", "is not an ONNX file"), (bytes(range(256)), "not an ONNX file")],
)
def test_an_artefact_that_is_none(tmp_path: Path, command: str, data: bytes | None, says: str) -> None:
    path = tmp_path / "model.onnx"
    if data is not None:
        path.write_bytes(data)
    assert says in refusal(command, path)


def test_an_artefact_of_no_target(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.touch()
    assert refusal("verify", path) == "model.tflite is no artefact of coreml, onnx, tensorrt"
    (tmp_path / "folder.onnx").mkdir()
    assert "there is no file" in refusal("verify", tmp_path / "folder.onnx")


def test_convert_wants_its_suffix(tmp_path: Path) -> None:
    line = refusal("convert", DEMO_CHECKPOINT, tmp_path / "weights.pth")
    assert line.endswith("weights.pth does not end in .safetensors; name the output so")


def test_options_of_checkpoints_are_refused_for_artefacts(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for option in (("--size", "64"), ("--ema",)):
        assert refusal("inspect", path, *option).startswith("--size and --ema are for checkpoints; leave them out")


def test_ema_where_there_is_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", weights())
    assert "holds no averaged weights" in refusal("inspect", path, "--ema")


@pytest.mark.parametrize(("size", "dropped"), [("40x40", True), ("64x96", False)])
def test_any_size_is_allowed_and_unread_tokens_are_told(size: str, dropped: bool) -> None:  # noqa: FBT001 - a case
    """A side need not be a multiple of 32; where the attention then leaves tokens unread, a note says so."""
    notes = call("passes", "--size", size, "--json").json["notes"]
    told = [note for note in notes if note.startswith(f"at {size} the attention of stage ") and "unread" in note]
    assert bool(told) == dropped
    model = load_checkpoint(DEMO_CHECKPOINT).model
    assert len(told) == len(model.config.dropped_tokens(*map(int, size.split("x"))))
