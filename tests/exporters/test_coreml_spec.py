"""What can be asked of Core ML, what is refused in which words, and how it is recorded and named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nextvit_exporters import graph as g
from nextvit_exporters import targets, to_coreml
from nextvit_exporters.coreml.convert import Converted, of_spec
from nextvit_exporters.coreml_spec import HEADS, RELEASES, WEIGHTS, About, CoreMLSpec
from nextvit_exporters.errors import UnsupportedSpec
from nextvit_exporters.passes.sets import NEURAL_ENGINE
from nextvit_exporters.spec import ExportSpec, InputKind, Precision
from nextvit_models.preprocessing import Preprocessing
from tests.exporters.toys import wired

ASKED = CoreMLSpec(about=About("A. Author", "MIT", "1.2", "Digits"))
SPEC = ExportSpec(
    "nano", 3, "coreml", Precision.FP16, 64, 64, 1, 18, Preprocessing(), input=InputKind.IMAGE, coreml=ASKED
)
LOGITS = replace(SPEC, input=InputKind.NORMALIZED, coreml=CoreMLSpec(head="logits"))


def asking(spec: ExportSpec = SPEC, **fields: Any) -> ExportSpec:
    """``spec`` with other wishes to Core ML."""
    return replace(spec, coreml=replace(of_spec(spec), **fields))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ios": 14}, "there is no target iOS 14; choose one of 15, 16, 17, 18, 26"),
        ({"ios": 19}, "there is no target iOS 19; choose one of 15, 16, 17, 18, 26"),
        ({"head": "boxes"}, "there is no head boxes; choose one of classify, logits, features"),
        ({"weights": "int4"}, "there is no weight compression int4; choose one of int8, lut8, lut6, lut4"),
        ({"activations": "fp8"}, "there is no activation compression fp8; choose one of int8"),
        ({"ios": 15, "weights": "lut6"}, "lut6 weights need iOS 16; ask for --ios 16 or more"),
        ({"ios": 16, "activations": "int8"}, "int8 activations need iOS 17; ask for --ios 17 or more"),
        (
            {"ios": 17, "activations": "int8", "weights": "lut4"},
            "int8 activations go with int8 weights, not lut4; leave --weights out",
        ),
        (
            {"ios": 17, "activations": "int8", "method": "kl"},
            "there is no calibration method kl; choose one of minmax, entropy, percentile, mse",
        ),
        ({"equalize": True}, "channels are rescaled for int8 activations alone; ask for --activations int8"),
        (
            {"keep": ("features.1",)},
            "blocks are kept from a compression, which isn't asked for; ask for --activations int8",
        ),
        (
            {"sizes": ((96, 96),), "flexible": (64, 96)},
            "enumerated sizes and a range of sizes exclude each other; give one",
        ),
        ({"flexible": (96, 64)}, "96:64 is no range of sizes; write MIN:MAX"),
        ({"flexible": (64, 64)}, "64:64 is no range of sizes; write MIN:MAX"),
    ],
)
def test_what_no_package_can_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedSpec) as refusal:
        CoreMLSpec(**fields)
    assert str(refusal.value) == says


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (replace(SPEC, coreml=None), "the spec asks for no Core ML package; name the iOS release and the head"),
        (replace(SPEC, precision=Precision.INT8), "coreml can't build int8; choose one of fp32, fp16"),
        *(
            (replace(SPEC, input=kind), f"a package reads pictures or normalised float32 tensors, not {kind} in fp32")
            for kind in (InputKind.FLOAT, InputKind.UINT8, InputKind.UINT8_NHWC)
        ),
        (
            replace(LOGITS, io=Precision.FP16),
            "a package reads pictures or normalised float32 tensors, not normalized in fp16",
        ),
        (
            replace(asking(weights="lut4"), precision=Precision.FP32),
            "lut4 decompresses to FP16; ask for --precision fp16",
        ),
        (
            replace(asking(ios=17, activations="int8"), precision=Precision.FP32),
            "w8a8 decompresses to FP16; ask for --precision fp16",
        ),
        (
            replace(SPEC, skip=("fold-norm",)),
            f"no pass is called 'fold-norm'; the passes are {', '.join(sorted(each.name for each in NEURAL_ENGINE))}",
        ),
        (
            replace(asking(head="logits"), batch=2),
            "Core ML reads pictures one at a time; ask for --batch 1 or --input tensor",
        ),
        (
            replace(asking(LOGITS, head="classify"), batch=3),
            "Core ML classifies one picture at a time; ask for --batch 1 or --logits",
        ),
        (replace(SPEC, labels=("a", "b")), "2 labels for 3 classes; give one label per class"),
        (replace(SPEC, labels=("a", "b", "c", "d")), "4 labels for 3 classes; give one label per class"),
        (
            replace(SPEC, labels=("cat", "dog", "cat")),
            "the label 'cat' is there twice, and Core ML returns one probability for each label",
        ),
        (replace(SPEC, dynamic_size=True), "one size alone is no choice; enumerate more, or give it as --size"),
        (replace(asking(sizes=((64, 31),)), dynamic_size=True), "every size must be 32 or more"),
        (replace(asking(flexible=(16, 96)), dynamic_size=True), "every size must be 32 or more"),
        (
            replace(asking(flexible=(96, 128)), dynamic_size=True),
            "64x64 lies outside 96:128; give a --size within, or another range",
        ),
        (
            replace(asking(flexible=(32, 96)), dynamic_size=True, width=128),
            "64x128 lies outside 32:96; give a --size within, or another range",
        ),
    ],
)
def test_what_this_target_cannot_build(spec: ExportSpec, says: str) -> None:
    with pytest.raises(UnsupportedSpec) as refusal:
        to_coreml.check_spec(spec)
    assert str(refusal.value) == says


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(LOGITS, batch=8),
        replace(LOGITS, batch=2, coreml=CoreMLSpec(head="features")),
        replace(asking(head="logits"), labels=("one", "for", "no", "class")),  # nobody returns them
        replace(SPEC, precision=Precision.FP32),
        replace(asking(flexible=(32, 64)), dynamic_size=True),
        replace(asking(sizes=((32, 96), (96, 32))), dynamic_size=True),
        replace(SPEC, skip=("drop-key-bias",), labels=("a", "b", "c")),
        *(asking(ios=release) for release in RELEASES),
        *(asking(weights=scheme) for scheme in WEIGHTS),
        asking(ios=17, activations="int8", weights="int8"),
    ],
)
def test_what_it_can(spec: ExportSpec) -> None:
    to_coreml.check_spec(spec)


def test_nothing_is_compressed_that_would_overflow() -> None:
    """What has to stay in float32 is known only when the graph has seen pictures."""
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)).double())
    large = np.full((1, 3, 8, 8), 1e5, np.float32)
    spec = replace(asking(LOGITS, weights="lut8"), height=64)
    with pytest.raises(UnsupportedSpec) as refusal:
        to_coreml.settle(spec, graph, large)
    assert str(refusal.value) == (
        "conv would overflow FP16 and has to stay in float32, which a compressed package can't do; "
        "leave the compression out"
    )
    assert of_spec(to_coreml.settle(asking(spec, weights=None), graph, large)).keep_fp32 == ("conv",)
    for left in (asking(spec, audit=False), replace(asking(spec, weights=None), precision=Precision.FP32)):
        assert to_coreml.settle(left, graph, large) == left


def test_what_activations_are_calibrated_on_is_recorded() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)).double())
    spec = asking(LOGITS, ios=17, activations="int8")
    some, others = np.ones((2, 3, 8, 8), np.float32), np.zeros((2, 3, 8, 8), np.float32)
    marks = [of_spec(to_coreml.settle(spec, graph, images)).calibration for images in (some, some, others)]
    assert marks[0] == marks[1] != marks[2]
    own = asking(spec, calibration="ab" * 32, calibration_size=9)
    assert to_coreml.settle(own, graph, some) == own
    assert all(mark is not None and len(mark) == 64 for mark in marks)
    with pytest.raises(ValueError, match="int8 activations need images to calibrate on"):
        to_coreml._compressed(spec, Converted(None, {}), None, lambda _: None)


def test_a_block_to_keep_must_be_there() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)).double())
    image = np.ones((1, 3, 8, 8), np.float32)
    spec = asking(LOGITS, ios=17, activations="int8", keep=("conv", "features.9"))
    with pytest.raises(UnsupportedSpec, match=r"no block is called 'features\.9'; the blocks are conv"):
        to_coreml.settle(spec, graph, image)


def test_a_picture_needs_the_pass_that_normalises_it() -> None:
    graph = g.trace(wired(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1)).double())
    with pytest.raises(UnsupportedSpec, match="normalize-input was refused or rolled back; ask for --input tensor"):
        to_coreml.lower(SPEC, graph)
    (conv,) = graph.graph.find_nodes(op="call_module")
    weight = g.module_as(to_coreml.lower(LOGITS, graph), conv, nn.Conv2d).weight
    assert torch.equal(weight, g.module_as(graph, conv, nn.Conv2d).weight.half().float())


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        LOGITS,
        asking(sizes=((32, 64), (96, 96)), weights="int8"),
        asking(flexible=(32, 96), audit=False),
        asking(ios=26, activations="int8", calibration="ab" * 32, calibration_size=64, method="mse"),
        asking(ios=17, activations="int8", equalize=True, keep=("stem.0", "features.1")),
        asking(head="features", keep_fp32=("features.1.mlp", "add_3")),
        replace(SPEC, coreml=None),
    ],
)
def test_the_spec_comes_back(spec: ExportSpec) -> None:
    read = ExportSpec.from_dict(json.loads(json.dumps(spec.as_dict())))
    assert read == spec
    assert hash(read) == hash(spec)


@pytest.mark.parametrize(
    "damage",
    [
        {"ios": 14},
        {"ios": "16"},
        {"head": None},
        {"sizes": [[64]]},
        {"sizes": [["a", "b"]]},
        {"sizes": None},
        {"flexible": 64},
        {"flexible": [96, 64]},
        {"keep_fp32": 1},
        {"keep": 1},
        {"method": "kl"},
        {"about": {"editor": "me"}},
        {"about": None},
        {"unknown": 1},
    ],
)
def test_a_damaged_record_is_one_line(damage: dict[str, object]) -> None:
    recorded = SPEC.as_dict()["coreml"]
    assert isinstance(recorded, dict)
    with pytest.raises(UnsupportedSpec) as refusal:
        ExportSpec.from_dict(SPEC.as_dict() | {"coreml": recorded | damage})
    assert str(refusal.value).isprintable()


def test_the_record_of_an_older_package_still_reads() -> None:
    """Those before blocks were kept, channels rescaled, or pictures given for calibration alone."""
    spec = asking(ios=17, activations="int8", calibration="ab" * 32)
    recorded = spec.as_dict()["coreml"]
    assert isinstance(recorded, dict)
    older = {
        name: value
        for name, value in recorded.items()
        if name not in {"keep", "equalize", "method", "calibration_size"}
    }
    assert ExportSpec.from_dict(spec.as_dict() | {"coreml": older}) == spec
    assert not of_spec(spec).equalize


@pytest.mark.parametrize("missing", ["sizes", "flexible", "keep_fp32", "about"])
def test_a_record_without_a_part_is_one_line(missing: str) -> None:
    recorded = SPEC.as_dict()["coreml"]
    assert isinstance(recorded, dict)
    less = {name: value for name, value in recorded.items() if name != missing}
    with pytest.raises(UnsupportedSpec, match=r"not one this version reads: .*; export again"):
        ExportSpec.from_dict(SPEC.as_dict() | {"coreml": less})


@pytest.mark.parametrize(
    ("spec", "stem"),
    [
        (SPEC, "nano_classify_64_b1_fp16_image_ios16"),
        (replace(LOGITS, batch=3), "nano_logits_64_b3_fp16_ios16"),
        (asking(head="features", ios=18), "nano_features_64_b1_fp16_image_ios18"),
        (replace(SPEC, precision=Precision.FP32), "nano_classify_64_b1_fp32_image_ios16"),
        (asking(weights="int8"), "nano_classify_64_b1_fp16_image_ios16_int8"),
        (asking(ios=17, activations="int8"), "nano_classify_64_b1_fp16_image_ios17_w8a8"),
        (
            replace(asking(sizes=((96, 96), (32, 128))), dynamic_size=True),
            "nano_classify_64+96+32x128_b1_fp16_image_ios16",
        ),
        (replace(SPEC, height=32, width=96), "nano_classify_32x96_b1_fp16_image_ios16"),
        (replace(asking(flexible=(32, 96)), dynamic_size=True), "nano_classify_32-64-96_b1_fp16_image_ios16"),
        (
            replace(asking(flexible=(32, 96)), dynamic_size=True, height=48),
            "nano_classify_32-48x64-96_b1_fp16_image_ios16",
        ),
    ],
)
def test_the_file_name(spec: ExportSpec, stem: str) -> None:
    assert spec.stem == stem


def test_different_packages_have_different_names() -> None:
    sizes: tuple[dict[str, Any], ...] = (
        {},
        {"sizes": ((96, 96),)},
        {"sizes": ((96, 128),)},
        {"sizes": ((96, 96), (128, 128))},
    )
    ranges = ({"flexible": (32, 96)}, {"flexible": (32, 128)}, {"flexible": (64, 96)})
    specs = [
        replace(asking(ios=ios, head=head, weights=weights, **open_sizes), dynamic_size=bool(open_sizes), input=kind)
        for ios in (16, 26)
        for head in HEADS
        for weights in (None, *WEIGHTS)
        for open_sizes in (*sizes, *ranges)
        for kind in (InputKind.IMAGE, InputKind.NORMALIZED)
    ]
    specs += [replace(SPEC, coreml=CoreMLSpec(17, activations="int8")), replace(SPEC, precision=Precision.FP32)]
    specs += [replace(specs[0], height=96), replace(specs[1], batch=2)]
    assert len({spec.stem for spec in specs}) == len(specs)


def test_two_ranges_with_another_default_have_different_names() -> None:
    specs = [replace(asking(flexible=(32, 96)), dynamic_size=True, height=side) for side in (64, 80)]
    assert specs[0].stem != specs[1].stem


def test_numbers_and_compression_are_named() -> None:
    assert [asking(**fields).numbers for fields in ({}, {"weights": "lut6"}, {"ios": 17, "activations": "int8"})] == [
        "fp16",
        "fp16, lut6",
        "fp16, w8a8",
    ]


def test_tolerances_follow_precision_and_compression() -> None:
    plain, packed = SPEC, asking(weights="lut4")
    same = to_coreml.tolerance_for(packed, targets.SAME_NETWORK)
    assert same == to_coreml.tolerance_for(plain, targets.SAME_NETWORK)
    for question in (targets.PRECISION_COST, targets.COST_AT_WORST, f"{targets.ON_DEVICE}, cpu only"):
        assert to_coreml.tolerance_for(packed, question) == to_coreml.COMPRESSED["lut4"]
        assert to_coreml.tolerance_for(plain, question).relative_rms <= 2e-2
    assert set(to_coreml.COMPRESSED) == {*WEIGHTS, "w8a8"}


def test_passes_follow_the_spec() -> None:
    assert to_coreml.passes_for(LOGITS) == NEURAL_ENGINE
    assert [each.name for each in to_coreml.passes_for(SPEC)] == [
        *(each.name for each in NEURAL_ENGINE),
        "normalize-input",
    ]
    rescaled = to_coreml.passes_for(asking(ios=17, activations="int8", equalize=True))
    assert [each.name for each in rescaled[len(NEURAL_ENGINE) :]] == ["equalize-channels", "normalize-input"]
    without = to_coreml.passes_for(replace(LOGITS, skip=("drop-key-bias",)))
    assert [each.name for each in without] == [e.name for e in NEURAL_ENGINE if e.name != "drop-key-bias"]
