from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nextvit_models.checkpoint import Checkpoint, load_checkpoint, save_safetensors
from nextvit_models.config import VARIANTS
from nextvit_models.errors import CheckpointMismatch
from nextvit_models.layouts import timm_name
from nextvit_models.nextvit import NextViT, NextViTBackbone
from nextvit_models.norms import foldable_norms
from nextvit_models.preprocessing import Preprocessing
from tests.harness import images, randomise, relative_error

NANO = VARIANTS["nextvit_nano"]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def nano() -> NextViT:
    return randomise(NextViT(NANO, 7), seed=20)


@pytest.fixture
def state(nano: NextViT) -> State:
    return {name: tensor.clone() for name, tensor in nano.state_dict().items()}


def in_timm_layout(state: State) -> State:
    return {timm_name(name, NANO.depths): tensor for name, tensor in state.items()}


def saved(tmp_path: Path, contents: object, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    torch.save(contents, path)
    return path


def assert_same(checkpoint: Checkpoint, model: NextViT) -> None:
    expected = model.state_dict()
    for name, tensor in checkpoint.model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(tensor, expected[name]), name


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_official_layout(tmp_path: Path, nano: NextViT, state: State) -> None:
    path = saved(tmp_path, state)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, nano)
    assert checkpoint.layout == "official"
    assert checkpoint.name == "weights.pth"
    assert checkpoint.num_classes == 7
    assert checkpoint.model.config is NANO
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not checkpoint.norms_merged
    assert not checkpoint.norms_suspect
    assert checkpoint.labels == ()
    assert checkpoint.preprocessing == replace(Preprocessing(), image_size=64)
    assert checkpoint.found == (
        "layout official: tensors are named like features.0.mlp.conv1.weight",
        "variant nextvit_nano: 7 blocks, stage 3 repeats its pattern 1 time",
        "classes 7: rows of proj_head.0.weight",
        "preprocessing not in the file: ImageNet's assumed, at 64 pixels",
    )


def test_the_model_is_ready_to_run(tmp_path: Path, state: State) -> None:
    model = load_checkpoint(str(saved(tmp_path, state))).model
    assert not any(module.training for module in model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_timm_layout(tmp_path: Path, nano: NextViT, state: State, name: str) -> None:
    path = tmp_path / name
    theirs = in_timm_layout(state)
    (save_file if name.endswith("safetensors") else torch.save)(theirs, path)
    checkpoint = load_checkpoint(path)
    assert_same(checkpoint, nano)
    assert checkpoint.layout == "timm"
    assert "layout timm: tensors are named like stages.0.blocks.0.mlp.fc1.weight" in checkpoint.found
    assert "classes 7: rows of head.fc.weight" in checkpoint.found


def test_names_decide_and_order_does_not(tmp_path: Path, nano: NextViT, state: State) -> None:
    backwards = OrderedDict(reversed(in_timm_layout(state).items()))
    assert_same(load_checkpoint(saved(tmp_path, backwards)), nano)


@pytest.mark.full_size
def test_small_of_timm_gives_the_same_logits(tmp_path: Path) -> None:
    theirs = randomise(timm.create_model("nextvit_small", num_classes=9), seed=21)
    image = images(1, 3, 96, 96, seed=22)
    with torch.no_grad():
        expected = theirs(image)
        plain = load_checkpoint(saved(tmp_path, {"state_dict": theirs.state_dict()}))
        assert relative_error(plain.model(image), expected) <= 1e-5
        assert relative_error(plain.model.double()(image.double()), theirs.double()(image.double())) <= 1e-12

        for module in theirs.float().modules():
            if callable(merge := getattr(module, "reparameterize", None)):
                merge()
        merged = load_checkpoint(saved(tmp_path, theirs.state_dict()))
        assert relative_error(merged.model(image), expected) <= 1e-4
        assert relative_error(merged.model(image), theirs(image)) <= 1e-5
    assert "variant nextvit_small: 20 blocks, stage 3 repeats its pattern 2 times" in plain.found
    assert (plain.norms_merged, merged.norms_merged) == (False, True)
    assert not merged.norms_suspect


@pytest.mark.parametrize("variant", ["nextvit_small", "nextvit_base", "nextvit_large"])
@pytest.mark.parametrize("layout", ["official", "timm"])
def test_published_variants_are_told_apart(tmp_path: Path, variant: str, layout: str) -> None:
    config = VARIANTS[variant]
    with torch.device("meta"):
        names = NextViT(config, 3).state_dict()
    # One number a tensor is enough to be told apart by name and shape, and too few to be loaded.
    hollow = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in names.items()}
    if layout == "timm":
        hollow = {timm_name(name, config.depths): tensor for name, tensor in hollow.items()}
    first = timm_name("stem.0.conv.weight", config.depths)
    assert "fewer values stored" in refusal(saved(tmp_path, hollow))
    del hollow[first]
    message = refusal(saved(tmp_path, hollow))
    assert message == f"looks like {variant}, but does not fit it: 1 missing ({first})"


@pytest.mark.parametrize(
    ("wrap", "line"),
    [
        (lambda s: {"model": s}, "weights under 'model'"),
        (lambda s: {"state_dict": s}, "weights under 'state_dict'"),
        (lambda s: {"model_ema": {"state_dict": s}}, "weights under 'model_ema' > 'state_dict'"),
        (lambda s: {"model_ema": s}, "took the averaged weights 'model_ema': there are no others"),
        (
            lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
            "ignored beside the weights: optimizer, epoch",
        ),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, "prefix 'module.' removed from all names"),
        (
            lambda s: {"model": {f"module._orig_mod.module.{n}": t for n, t in s.items()}},
            "prefix 'module._orig_mod.module.' removed from all names",
        ),
        (lambda s: {**s, "epoch": 12, "lr": 0.1}, "ignored among the weights, not tensors: epoch, lr"),
    ],
)
def test_wrappers(tmp_path: Path, nano: NextViT, state: State, wrap: object, line: str) -> None:
    assert callable(wrap)
    checkpoint = load_checkpoint(saved(tmp_path, wrap(state)))
    assert_same(checkpoint, nano)
    assert line in checkpoint.found


def test_trained_or_averaged_weights(tmp_path: Path, nano: NextViT, state: State) -> None:
    other = randomise(NextViT(NANO, 7), seed=23)
    path = saved(tmp_path, {"model_ema": {"state_dict": other.state_dict()}, "model": state})
    trained, averaged = load_checkpoint(path), load_checkpoint(path, ema=True)
    assert_same(trained, nano)
    assert_same(averaged, other)
    assert "took the trained weights 'model', not model_ema" in trained.found
    assert "took the averaged weights 'model_ema', not model" in averaged.found
    assert trained.fingerprint != averaged.fingerprint


def test_no_averaged_weights(tmp_path: Path, state: State) -> None:
    with pytest.raises(CheckpointMismatch, match="holds no averaged weights"):
        load_checkpoint(saved(tmp_path, {"model": state}), ema=True)


def test_old_files_without_zip(tmp_path: Path, nano: NextViT, state: State) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(path), nano)


def test_parameters_without_counters(tmp_path: Path, nano: NextViT, state: State) -> None:
    bare = {n: nn.Parameter(t) for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert_same(load_checkpoint(saved(tmp_path, bare)), nano)


@pytest.mark.parametrize(
    ("dtype", "verb"), [(torch.float16, "widened"), (torch.bfloat16, "widened"), (torch.float64, "rounded")]
)
def test_other_float_types(tmp_path: Path, state: State, dtype: torch.dtype, verb: str) -> None:
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    checkpoint = load_checkpoint(saved(tmp_path, cast))
    for name, tensor in checkpoint.model.named_parameters():
        assert torch.equal(tensor, cast[name].float())
    count = sum(t.is_floating_point() for t in state.values())
    kind = str(dtype).removeprefix("torch.")
    assert f"dtype: {count} of {count} tensors {verb} from {kind} to float32" in checkpoint.found


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path, state: State) -> None:
    official = load_checkpoint(saved(tmp_path, state, "a.pth"))
    theirs = load_checkpoint(saved(tmp_path, {"model": in_timm_layout(state)}, "b.pth"))
    save_safetensors(theirs, tmp_path / "c.safetensors")
    converted = load_checkpoint(tmp_path / "c.safetensors")
    assert official.fingerprint == theirs.fingerprint == converted.fingerprint
    assert len({official.sha256, theirs.sha256, converted.sha256}) == 3

    state["features.3.mlp.conv2.bias"][0] += 1e-6
    assert load_checkpoint(saved(tmp_path, state)).fingerprint != official.fingerprint


def test_the_fingerprint_by_hand(tmp_path: Path, state: State) -> None:
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {list(state[name].shape)}\n".encode() + state[name].numpy().tobytes())
    assert load_checkpoint(saved(tmp_path, state)).fingerprint == digest.hexdigest()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_the_model_does_not_follow_the_file(tmp_path: Path, nano: NextViT, state: State, name: str) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(state, path)
    checkpoint = load_checkpoint(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_same(checkpoint, nano)


def test_norms_taken_out(tmp_path: Path, state: State) -> None:
    norms = tuple(f"{norm}." for norm in foldable_norms(NANO))
    without = {n: t for n, t in state.items() if not n.startswith(norms)}
    checkpoint = load_checkpoint(saved(tmp_path, in_timm_layout(without)))
    assert checkpoint.norms_merged
    assert "norms merged: none of the 12 norms in front of linear maps is there" in checkpoint.found
    for norm in foldable_norms(NANO):
        assert isinstance(checkpoint.model.get_submodule(norm), nn.Identity)
    save_safetensors(checkpoint, tmp_path / "again.safetensors")
    again = load_checkpoint(tmp_path / "again.safetensors")
    assert again.norms_merged
    assert again.fingerprint == checkpoint.fingerprint


def test_some_norms_taken_out(tmp_path: Path, state: State) -> None:
    without = {n: t for n, t in state.items() if not n.startswith("features.2.norm2.")}
    message = refusal(saved(tmp_path, without))
    assert message.startswith("looks like nextvit_nano, but does not fit it: 4 missing (features.2.norm2.weight, ")


def test_missing_unexpected_and_misshapen(tmp_path: Path, state: State) -> None:
    broken = in_timm_layout(state)
    for name in [name for name in broken if name.startswith("stages.1.blocks.1.e_mhsa.")]:
        broken[name.replace("e_mhsa", "attn")] = broken.pop(name)
    broken["stem.0.conv.weight"] = broken["stem.0.conv.weight"][:, :1]
    message = refusal(saved(tmp_path, broken))
    prefix = "stages.1.blocks.1.e_mhsa"
    assert message.startswith(
        f"looks like nextvit_nano, but does not fit it: 12 missing ({prefix}.q.weight, {prefix}.q.bias, "
        f"{prefix}.k.weight, {prefix}.k.bias, {prefix}.v.weight, and 7 more); 13 unexpected ("
    )
    assert message.endswith("; 1 of another shape (stem.0.conv.weight (24, 1, 3, 3), not (24, 3, 3, 3))")


def test_a_resnet(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, timm.create_model("resnet18", num_classes=4).state_dict()))
    assert message.startswith("not a Next-ViT; looks like a ResNet (layer1.0.conv1.weight); against the closest")


def test_no_known_architecture(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, nn.Sequential(nn.Linear(3, 3)).state_dict()))
    assert message.startswith("not a Next-ViT; no known architecture; against the closest variant, nextvit_nano: ")
    assert message.endswith("; 2 unexpected (0.weight, 0.bias)")


def test_a_backbone(tmp_path: Path, state: State) -> None:
    head = ("proj_head.", "norm.")
    headless = {n: t for n, t in state.items() if not n.startswith("proj_head.")}
    assert refusal(saved(tmp_path, headless)) == (
        "a nextvit_nano backbone without its classifier: 2 missing (proj_head.0.weight, proj_head.0.bias)"
    )
    bare = {n: t for n, t in state.items() if not n.startswith(head)}
    assert refusal(saved(tmp_path, bare)).startswith("a nextvit_nano backbone without its classifier: 6 missing (norm.")


def test_a_dense_task_backbone(tmp_path: Path) -> None:
    state = NextViTBackbone(NANO, extra_norms=True).state_dict()
    message = refusal(saved(tmp_path, state))
    assert message == "a dense-task backbone (extra_norm_list), without the head of a classifier"


def test_a_detection_checkpoint(tmp_path: Path, state: State) -> None:
    detector = {f"backbone.{n}": t for n, t in state.items()} | {
        "neck.fpn.weight": torch.ones(1),
        "rpn_head.cls.weight": torch.ones(1),
    }
    message = refusal(saved(tmp_path, {"meta": {"epoch": 12}, "state_dict": detector}))
    assert message == (
        "a detection or segmentation checkpoint (backbone beside neck, rpn_head); only classifiers are read"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(tmp_path: Path, state: State, value: float) -> None:
    state["features.4.e_mhsa.k.weight"][5, 6] = value
    assert refusal(saved(tmp_path, state)) == "features.4.e_mhsa.k.weight holds NaN or infinity"


def test_a_value_too_large_for_float32(tmp_path: Path, state: State) -> None:
    state["stem.0.norm.bias"] = state["stem.0.norm.bias"].double() * 1e300
    assert refusal(saved(tmp_path, state)) == "stem.0.norm.bias holds NaN or infinity"


def test_a_negative_variance(tmp_path: Path, state: State) -> None:
    state["norm.running_var"][3] = -1
    assert refusal(saved(tmp_path, state)) == "norm.running_var holds a negative variance"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_types_that_are_not_read(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    state["stem.1.conv.weight"] = state["stem.1.conv.weight"].to(dtype)
    kind = str(dtype).removeprefix("torch.")
    assert refusal(saved(tmp_path, state)).startswith(f"stem.1.conv.weight is {kind}; only float32, ")


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no tensors; its keys: "),
        ({"model": {}}, "holds no tensors; its keys: "),
        ({"epoch": 1, "best": 0.5}, "holds no tensors; its keys: epoch, best"),
        ({"model": {"model": {"model": {"model": {"model": {}}}}}}, "containers nested deeper than 4: model > "),
    ],
)
def test_files_without_weights(tmp_path: Path, contents: object, says: str) -> None:
    assert refusal(saved(tmp_path, contents)).startswith(says)


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["model"] = endless
    assert refusal(saved(tmp_path, endless)).startswith("containers nested deeper than 4")
