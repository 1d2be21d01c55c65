"""Faults planted in saved packages, each with a hash that vouches for it: the numbers find them.

Measured in exact arithmetic: a sound package is within 3e-16 of PyTorch, the mildest of these faults (one channel by
one hundredth) is at 2.6e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

from nextvit_exporters.targets import COST_AT_WORST, PRECISION_COST, SAME_NETWORK
from nextvit_models.checkpoint import load_checkpoint
from nextvit_models.demo import DEMO_CHECKPOINT
from tests.deploy.support import Exported, Json
from tests.deploy.support_coreml import (
    Draft,
    Fault,
    Values,
    by_question,
    error,
    exported,
    failed,
    needs_coremltools,
    planted,
    verified,
)

pytestmark = [needs_coremltools, pytest.mark.usefixtures("quick")]
COUNT: Final = ("--count", "2")
"""Two images show every fault; eight only take longer."""
SEEN: Final = 10
"""How many times the clean error a fault has to come to."""
BGR: Final = 30


# One number or some of them.
def scale_channel(draft: Draft) -> None:
    draft.change(draft.find("conv", "features.3.mlp.conv1"), "weight", _first_scaled)


def _first_scaled(values: Values) -> Values:
    """One channel by one hundredth; in a compressed package its scale, or a table's first value."""
    values[0] *= 1.01
    return values


def zero_element(draft: Draft) -> None:
    def zeroed(values: Values) -> Values:
        values.flat[np.abs(values).argmax()] = 0
        return values

    draft.change(draft.find("conv", "features.4.mlp.conv1"), "weight", zeroed)


def zero_bias(draft: Draft) -> None:
    draft.change(draft.find("conv", "features.2.patch_embed.conv"), "bias", np.zeros_like)


def shift_bias(draft: Draft) -> None:
    draft.change(draft.find("conv", "features.1.mlp.conv1"), "bias", lambda values: np.roll(values, 1))


def swap_classes(draft: Draft) -> None:
    for parameter in ("weight", "bias"):
        draft.change(draft.find("linear"), parameter, lambda values: values[[0, 1, 2, 5, 4, 3, 6, 7, 8, 9]])


def put_nan(draft: Draft) -> None:
    draft.change(draft.find("linear"), "bias", lambda values: np.full_like(values, np.nan))


def other_epsilon(draft: Draft) -> None:
    """The norm behind stem.1 folded with 1e-3 in place of 1e-5."""
    state = load_checkpoint(DEMO_CHECKPOINT).model.state_dict()
    variance, beta = (state[f"stem.1.norm.{name}"].double().numpy() for name in ("running_var", "bias"))
    factor = np.sqrt((variance + 1e-5) / (variance + 1e-3))
    conv = draft.find("conv", "stem.1.conv")
    draft.change(conv, "weight", lambda values: values * factor.reshape(-1, 1, 1, 1))
    draft.change(conv, "bias", lambda values: beta + (values - beta) * factor)


def other_attention_scale(draft: Draft) -> None:
    for parameter in ("weight", "bias"):
        draft.change(draft.find("conv", "features.4.e_mhsa.q"), parameter, lambda values: values * 1.04)


def other_mean(draft: Draft) -> None:
    def off(values: Values) -> Values:
        values[0, 1] += 1
        return values

    draft.change(draft.find("add"), "y", off)


def other_std(draft: Draft) -> None:
    def off(values: Values) -> Values:
        values[:, 2] *= 1.02
        return values

    draft.change(draft.find("conv", "stem.0.conv"), "weight", off)


def blue_first(draft: Draft) -> None:
    draft.model.description.input[0].type.imageType.colorSpace = BGR


# What an operation does.
def shift_window(draft: Draft) -> None:
    """All padding on one side; the shapes stay."""
    draft.change(draft.find("conv", "features.3.mhca.group_conv3x3"), "pad", lambda _: np.array([0, 2, 0, 2]))


def widen_window(draft: Draft) -> None:
    """Every other pixel of a window of five; the shapes stay."""
    conv = draft.find("conv", "features.1.mhca.group_conv3x3")
    for parameter in ("dilations", "pad"):
        draft.change(conv, parameter, lambda values: np.full_like(values, 2))


def shorten_pool(draft: Draft) -> None:
    """One token fewer in each mean; the shapes stay."""
    draft.change(draft.find("avg_pool", "features.2.e_mhsa.sr"), "kernel_sizes", lambda values: values - 1)


def widen_pool(draft: Draft) -> None:
    """Windows of three by three, cut off at the edge; the shapes stay."""
    for index in range(2):
        draft.change(draft.find("avg_pool", "features.3.patch_embed.avgpool", index), "kernel_sizes", lambda v: v + 1)


def drop_relu(draft: Draft) -> None:
    draft.find("relu", "features.3.mlp.act").type = "identity"


def softmax_over_queries(draft: Draft) -> None:
    draft.change(draft.find("softmax", "features.4.e_mhsa"), "axis", lambda _: np.array(-2))


def turn_weights_of_attention(draft: Draft) -> None:
    """As many queries as keys, so the shapes stay."""
    draft.change(draft.find("matmul", "features.6.e_mhsa", 1), "transpose_y", np.logical_not)


# How they are wired.
def swap_parts_of_concat(draft: Draft) -> None:
    first, second = draft.find("concat", "features.4").inputs["values"].arguments
    first.name, second.name = second.name, first.name


def swap_key_and_value(draft: Draft) -> None:
    key, value = draft.find("split", "features.4.e_mhsa.k_v").outputs
    key.name, value.name = value.name, key.name


def drop_shortcut(draft: Draft) -> None:
    add = draft.find("add", "features.3")
    add.inputs["x"].arguments[0].name = add.inputs["y"].arguments[0].name


def read_too_early(draft: Draft) -> None:
    """The second half of a block reads what the first half read."""
    add = draft.find("add", "features.1")
    draft.find("conv", "features.1.mlp.conv1").inputs["x"].arguments[0].name = add.inputs["x"].arguments[0].name


# What no executor can compute, or an app would read wrongly.
def stop_striding(draft: Draft) -> None:
    draft.change(draft.find("conv", "stem.3.conv"), "strides", np.ones_like)


def turn_queries(draft: Draft) -> None:
    draft.change(draft.find("matmul", "features.4.e_mhsa"), "transpose_x", np.logical_not)


def drop_cast(draft: Draft) -> None:
    """float32 goes into a convolution of float16: not to be seen where both are widened."""
    cast = draft.find("cast")
    draft.find("conv", "stem.0.conv").inputs["x"].arguments[0].name = cast.inputs["x"].arguments[0].name
    draft.operations.remove(cast)


def swap_labels(draft: Draft) -> None:
    labels = draft.value(draft.find("classify"), "classes").immediateValue.list.values
    third, fifth = (labels[number].immediateValue.tensor.strings.values for number in (3, 5))
    third[0], fifth[0] = fifth[0], third[0]


NUMBERS: Final[tuple[Fault, ...]] = (
    scale_channel,
    zero_element,
    zero_bias,
    shift_bias,
    swap_classes,
    other_epsilon,
    other_attention_scale,
    other_mean,
    other_std,
    blue_first,
    shift_window,
    widen_window,
    shorten_pool,
    widen_pool,
    drop_relu,
    softmax_over_queries,
    turn_weights_of_attention,
    swap_parts_of_concat,
    swap_key_and_value,
    drop_shortcut,
    read_too_early,
)
REFUSED: Final[dict[Fault, str]] = {
    put_nan: " (of proj_head.0) has weights that are infinite or no number in float16",
    stop_striding: " (of stem.3.conv) is declared (1, 24, 16, 16), and (1, 24, 32, 32) was computed",
    turn_queries: " (of features.4.e_mhsa) can't be executed: ",
    drop_cast: " (of stem.0.conv) mixes float16 and float32; a cast is missing",
    swap_labels: "the label of class 3 is '5', and '3' was asked for",
}
ELSEWHERE: Final = (scale_channel, swap_classes, other_mean, swap_key_and_value)
"""Some of each kind, for packages in other numbers."""
PACKAGES: Final[dict[str, tuple[str, ...]]] = {
    "fp32": ("--precision", "fp32"),
    "int8": ("--weights", "int8"),
    "lut4": ("--weights", "lut4"),
}
_SOUND: Final[dict[Path, float]] = {}


def clean(made: Exported) -> float:
    """The error of exact arithmetic on the package as it was exported."""
    if made.path not in _SOUND:
        _SOUND[made.path] = exactly(verified(made.path, *COUNT))
    return _SOUND[made.path]


def exactly(manifest: Json) -> float:
    (check,) = by_question(manifest)[SAME_NETWORK]
    return error(check)


def assert_seen(made: Exported, path: Path) -> None:
    """The exact question alone finds what is wrong with ``path``, and by far."""
    manifest = failed(path, *COUNT)
    (check,) = by_question(manifest)[SAME_NETWORK]
    sound, found = clean(made), exactly(manifest)
    ratio = f"{found:.1e} is {found / max(sound, 1e-16):.1e} times the clean error of {sound:.1e}"
    assert check["verdict"] == "failed", ratio
    assert check["comparisons"], check["why"]
    assert found >= SEEN * sound, ratio


@pytest.mark.parametrize("fault", NUMBERS)
def test_numbers_find_it(package: Exported, fault: Fault, tmp_path: Path) -> None:
    assert_seen(package, planted(package, tmp_path, fault))


@pytest.mark.parametrize("fault", REFUSED)
def test_execution_finds_it(package: Exported, fault: Fault, tmp_path: Path) -> None:
    """There is nothing to compare: the reason names the operation and its module, or the label."""
    for check in failed(planted(package, tmp_path, fault), *COUNT)["checks"]:
        assert (check["verdict"], check["comparisons"]) == ("failed", []), check
        assert REFUSED[fault] in str(check["why"])


@pytest.mark.parametrize("numbers", PACKAGES)
@pytest.mark.parametrize("fault", ELSEWHERE)
def test_numbers_find_it_in(
    numbers: str, fault: Fault, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = exported(tmp_path_factory.getbasetemp(), *PACKAGES[numbers])
    assert_seen(made, planted(made, tmp_path, fault))


@pytest.mark.parametrize("fault", [scale_channel, other_attention_scale, other_mean])
def test_what_the_cost_of_the_precision_hides(package: Exported, fault: Fault, tmp_path: Path) -> None:
    """Beside FP16's own rounding these are nothing: why there are two questions."""
    sound = by_question(verified(package.path, *COUNT))
    found = by_question(failed(planted(package, tmp_path, fault), *COUNT))
    assert [each["verdict"] for each in found[SAME_NETWORK]] == ["failed"]
    for question in (PRECISION_COST, COST_AT_WORST):
        (before,), (after,) = sound[question], found[question]
        assert after["verdict"] == "verified"
        assert error(after) < 1.5 * error(before)


def test_what_is_written_again_is_still_sound(package: Exported, tmp_path: Path) -> None:
    """It is the fault that is found, not how it was planted."""

    def rename(draft: Draft) -> None:
        draft.model.description.metadata.author = "somebody else"

    path = planted(package, tmp_path, rename)
    assert exactly(verified(path, *COUNT)) == clean(package)
