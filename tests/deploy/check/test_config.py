"""A configuration is read whole, or refused in one line with the line of what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextvit_deploy.check.config import Artefact, BadConfig, Config, Matrix, read_config
from nextvit_deploy.check.limits import Budget, Limits, Regression

FULL = """\
[check]
output = "out"
images = "photos"
count = 4
calibration = "./photos"
calibration-size = 64
timeout = "1.5 min"
baseline = "old"
jobs = 2
layers = false
latency = true

[[matrix]]
checkpoints = ["demo", "runs/best.pth", "timm/nextvit_small.bd_in1k"]
targets = ["onnx", "trt"]
precisions = ["fp32", "fp16", "int8"]
sizes = [64, "224x320"]
batches = [1, 8]
passes = ["all", "none"]
gpu = "A-10"
ema = true

[[matrix]]
checkpoints = ["demo"]
targets = ["coreml"]
precisions = ["fp16"]

[[artefact]]
path = "runs/x.onnx"
checkpoint = "runs/best.pth"
[[artefact]]
path = "runs/x.mlpackage"

[tolerance.onnx]
fp16 = { same-network = 1e-6, precision-cost = 2e-3 }
[tolerance.coreml.fp16]
precision-cost-at-worst = 1e-3
on-the-device = 0.02
[budget.trt]
fp16 = { size = "64 MB", kernels = 132, latency-ratio = 1 }
int8 = { size = 12_345 }
[budget.onnx.fp32]
size = "0.5 MiB"
[regression]
error-ratio = 1.5
error-floor = 1e-6
size-ratio = 1.02
kernels-ratio = 1.0
latency-ratio = 1.2
"""
PLAIN = '[[matrix]]\ncheckpoints = ["demo"]\ntargets = ["onnx"]\nprecisions = ["fp32"]\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with what the configurations name."""
    folder = tmp_path_factory.mktemp("project")
    for each in ("photos", "old", "runs/x.mlpackage"):
        (folder / each).mkdir(parents=True)
    for each in ("runs/best.pth", "runs/x.onnx", "a file"):
        (folder / each).write_bytes(b"")
    return folder.resolve()


def read(folder: Path, text: str) -> Config:
    path = folder / "nextvit-export.toml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def refused(folder: Path, text: str) -> tuple[int, str]:
    """The line that the error names, and what it says."""
    with pytest.raises(BadConfig) as caught:
        read(folder, text)
    found = re.fullmatch(rf"{re.escape(str(folder))}/nextvit-export\.toml:(\d+): (.+)", str(caught.value))
    assert found, caught.value
    return int(found[1]), found[2]


def test_everything_is_read(folder: Path) -> None:
    best = str(folder / "runs/best.pth")
    assert read(folder, FULL) == Config(
        path=folder / "nextvit-export.toml",
        output=folder / "out",
        jobs=2,
        timeout=90.0,
        baseline=folder / "old",
        images=folder / "photos",
        count=4,
        calibration=folder / "photos",
        calibration_size=64,
        layers=False,
        latency=True,
        matrices=(
            Matrix(
                checkpoints=(None, best, "timm/nextvit_small.bd_in1k"),
                targets=("onnx", "trt"),
                precisions=("fp32", "fp16", "int8"),
                sizes=((64, 64), (224, 320)),
                batches=(1, 8),
                passes=("all", "none"),
                gpu="a10",
                ema=True,
            ),
            Matrix((None,), ("coreml",), ("fp16",)),
        ),
        artefacts=(Artefact(str(folder / "runs/x.onnx"), best), Artefact(str(folder / "runs/x.mlpackage"))),
        limits=Limits(
            tolerances={
                ("onnx", "fp16"): {"same network": 1e-6, "precision cost": 2e-3},
                ("coreml", "fp16"): {"precision cost, at worst": 1e-3, "on the device": 0.02},
            },
            budgets={
                ("trt", "fp16"): Budget(64_000_000, 132, 1.0),
                ("trt", "int8"): Budget(12_345),
                ("onnx", "fp32"): Budget(524_288),
            },
            regression=Regression(1.5, 1e-6, 1.02, 1.0, 1.2),
        ),
    )


def test_what_is_left_out(folder: Path) -> None:
    assert read(folder, PLAIN) == Config(
        path=folder / "nextvit-export.toml",
        output=folder / "exports/check",
        matrices=(Matrix((None,), ("onnx",), ("fp32",)),),
    )


def test_paths_begin_at_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    (folder / "sub/x.toml").write_text(
        f'[check]\nimages = "../photos"\n{PLAIN}'.replace('"demo"', '"../runs/best.pth"')
    )
    monkeypatch.chdir(folder / "runs")
    config = read_config(Path("../sub/x.toml"))
    assert (config.images, config.output) == (folder / "photos", folder / "sub/exports/check")
    assert config.matrices[0].checkpoints == (str(folder / "runs/best.pth"),)


def test_as_windows_writes_it(folder: Path) -> None:
    path = folder / "nextvit-export.toml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    assert read_config(path) == read(folder, FULL)


@pytest.mark.parametrize(
    ("text", "seconds"), [('"90 s"', 90), ('"2h"', 7200), ('"1 Minute"', 60), ("45", 45), ("0.5", 0.5)]
)
def test_times(folder: Path, text: str, seconds: float) -> None:
    assert read(folder, f"[check]\ntimeout = {text}\n{PLAIN}").timeout == seconds


WRONG = {
    # in [check], on the second line
    '[check]\noutptu = "x"': (2, "there is no option 'outptu'; did you mean 'output'? choose one of output, images,"),
    "[check]\noutput = 3": (2, 'output is a whole number, where a text is needed; write for example output = "'),
    '[check]\noutput = " "': (2, "output is empty; write"),
    '[check]\noutput = "a file"': (2, "a file is a file, where the output's folder goes; name another"),
    '[check]\nimages = "phots"': (2, "phots isn't there; name a folder of pictures, or leave images out"),
    '[check]\ncalibration = "a file"': (2, "a file is a file; name a folder of pictures"),
    '[check]\nbaseline = "gone"': (2, "gone to compare with; keep an earlier check's output there, or leave it out"),
    "[check]\ncount = 0": (2, "count is 0; give 1 to 999999"),
    "[check]\ncount = true": (2, "count is true or false, where a whole number is needed; write for example count = 8"),
    '[check]\njobs = "2"': (2, "jobs is a text, where a whole number is needed; write for example jobs = 2"),
    "[check]\njobs = 99999999999999999999999": (2, "jobs is 99999999999999999999999; give 1 to 1024"),
    "[check]\nlayers = 1": (2, "layers is a whole number, where true or false is needed"),
    "[check]\nlayers = 2020-01-01": (2, "layers is a date or a time, where true or false is needed"),
    '[check]\ntimeout = "soon"': (2, "'soon' is no time; write for example \"30 min\""),
    '[check]\ntimeout = "0 s"': (2, "'0 s' is no time"),
    "[check]\ntimeout = inf": (2, "timeout is inf; give seconds above 0"),
    "[check]\ntimeout = nan": (2, "timeout is nan; give seconds above 0"),
    "[check]\ntimeout = true": (2, "timeout is true or false, where a text is needed"),
    "check = 1": (1, "check is a whole number, where a table is needed; begin it with [check]"),
    'output = "x"': (1, "there is no section 'output'; write it below [check]"),
    'targets = ["onnx"]': (1, "there is no section 'targets'; write it below [[matrix]]"),
    "[[artifact]]": (1, "there is no section 'artifact'; did you mean 'artefact'?"),
    # limits
    "[tolerance.onx]": (1, "there is no target 'onx'; did you mean 'onnx'? choose one of onnx, trt, coreml"),
    "[tolerance.onnx]\nfp8 = {}": (2, "there is no precision 'fp8'; did you mean 'fp"),
    "[tolerance.onnx]\nfp32 = {}": (2, "fp32 states nothing; leave it out"),
    "[tolerance.onnx]\nfp32 = 1e-6": (
        2,
        "fp32 is a number, where a table is needed; begin it with [tolerance.onnx.fp32]",
    ),
    "[tolerance.onnx]\nfp32 = {same-netwrk = 1e-6}": (2, "'same-netwrk'; did you mean 'same-network'?"),
    "[tolerance.onnx.fp32]\n\nsame-network = 1e-4": (
        3,
        "same-network of 0.0001 is looser than onnx's own, 1e-05, which stays in force; give 1e-05 or less",
    ),
    "[tolerance.onnx.fp32]\nsame-network = 0": (2, "same-network is 0; give the worst relative error, above 0"),
    '[tolerance.onnx.fp32]\nsame-network = "1e-6"': (2, "is a text, where a number is needed"),
    f"[tolerance.onnx.fp32]\nsame-network = 1{'0' * 400}": (2, "0...00"),
    "[tolerance.trt]\nfp16 = {same-network = 1e-6}": (
        2,
        "nothing here is trt in fp16, so this tolerance limits nothing",
    ),
    "[budget.trt.fp16]\nkernels = 1": (1, "nothing here is trt in fp16, so this budget limits nothing; add it"),
    "[budget.onnx.fp32]\nkernel = 1": (2, "there is no budget 'kernel'; did you mean 'kernels'?"),
    "[budget.onnx.fp32]\nkernels = 1.5": (2, "kernels is a number, where a whole number is needed"),
    '[budget.onnx.fp32]\nsize = "64 mb/s"': (2, "size is '64 mb/s'; write for example \"64 MB\""),
    '[budget.onnx.fp32]\nsize = "0 MB"': (2, "size is '0 MB'"),
    "[budget.onnx.fp32]\nsize = -1": (2, "size is -1; give 1 to"),
    "[budget.onnx.fp32]\nlatency-ratio = 1.0": (2, "limits what isn't measured; add latency = true to [check]"),
    "[regression]\nlatency-ratio = 1.2": (2, "limits what isn't measured; add latency = true to [check]"),
    "[regression]\nsize-ratio = 0.9": (2, "size-ratio is 0.9; give 1.0, which allows no growth, or more"),
    "[regression]\nerror-floor = 1e-6": (2, "error-floor says where error-ratio begins to count, which isn't there"),
    "[regression]\nsize = 1": (2, "there is no limit 'size'; did you mean 'size-ratio'?"),
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_beside_a_matrix(folder: Path, text: str) -> None:
    line, message = refused(folder, f"{text}\n{PLAIN}")
    assert (line, WRONG[text][1] in message) == (WRONG[text][0], True), (line, message)


MATRIX = {
    "checkpoints": {
        "[]": 'checkpoints is empty; write for example checkpoints = ["demo"]',
        '"demo"': 'checkpoints is a text, where a list is needed; write for example checkpoints = ["demo"]',
        '["demo", "demo"]': "checkpoints has 'demo' twice; leave one out",
        '["runs/best.pth", "./runs/../runs/best.pth"]': "checkpoints has './runs/../runs/best.pth' twice",
        '["runs/bets.pth"]': "runs/bets.pth'; give the checkpoint's file, a hub id, or \"demo\"",
        '["runs"]': "'runs' is a folder; give the checkpoint's file",
        "[1]": 'a checkpoint is a whole number; write "demo", a path or a hub id',
        '["a\\u0000b"]': "give the checkpoint's file",
        f'["{"x" * 5000}"]': "give the checkpoint's file",
    },
    "targets": {
        '["tensorrt"]': "there is no target 'tensorrt'; did you mean 'trt'? choose one of onnx, trt, coreml",
        '["onnx", "onnx"]': "targets has 'onnx' twice; leave one out",
        "[[]]": "there is no target []; choose one of",
    },
    "precisions": {
        '["fp61"]': "there is no precision 'fp61'; did you mean 'fp16'?",
        '["int8", 5]': "there is no precision 5; choose one of fp32, fp16, int8",
    },
    "sizes": {
        "[16]": "a size of 16; give sides of 32 to 16384 pixels",
        '["64x99999"]': "a size of '64x99999'; give sides of 32",
        '["64*64"]': "'64*64' is no size; write 224 or \"224x320\", height first",
        "[64.0]": "64.0 is no size",
        "[true]": "true is no size",
        "[-64]": "-64 is no size",
        '[64, "64x64"]': "sizes has '64x64' twice",
    },
    "batches": {"[0]": "0 is no batch; give a whole number from 1", "[true]": "true is no batch", "[1, 1]": "1 twice"},
    "passes": {'["some"]': "there is no set of passes 'some'; "},
    "gpu": {
        '"a11"': "there is no GPU 'a11'; did you mean 'a1",
        '"a10"': "gpu is who engines are built for, and trt is not among the targets; leave one out",
    },
    "ema": {"0": "ema is a whole number, where true or false is needed"},
    "size": {"64": "there is no key of a matrix 'size'; did you mean 'sizes'?"},
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MATRIX.items() for value in values])
def test_what_is_wrong_in_a_matrix(folder: Path, key: str, value: str) -> None:
    kept = [line for line in PLAIN.splitlines() if not line.startswith(f"{key} ")]
    line, message = refused(folder, "\n".join([*kept, "", f"{key} = {value}"]))
    assert line == len(kept) + 2
    assert MATRIX[key][value] in message


@pytest.mark.parametrize("key", ["checkpoints", "targets", "precisions"])
def test_what_a_matrix_needs(folder: Path, key: str) -> None:
    kept = [line for line in PLAIN.splitlines() if not line.startswith(f"{key} ")]
    assert refused(folder, "\n\n" + "\n".join(kept)) == (
        3,
        f"this matrix has no {key}; write for example {key} = "
        + {"checkpoints": '["demo"]', "targets": '["onnx"]', "precisions": '["fp16"]'}[key],
    )


def test_the_line_is_the_elements_own(folder: Path) -> None:
    text = PLAIN.replace('["onnx"]', '[\n  "onnx", # fine\n\n  "trt",\n  "tr",\n]')
    assert refused(folder, text) == (7, "there is no target 'tr'; did you mean 'trt'? choose one of onnx, trt, coreml")


def test_what_contradicts_itself(folder: Path) -> None:
    line, message = refused(folder, PLAIN + "\n" + PLAIN.replace('"fp32"', '"fp16", "fp32"'))
    assert (line, message) == (
        6,
        "this matrix asks again for demo as onnx in fp32, as number 1 does; leave it out of one",
    )
    line, message = refused(folder, PLAIN.replace('"demo"', '"runs/best.pth"').replace("fp32", "int8"))
    assert line == 4
    assert message.startswith("int8 of best.pth needs pictures to calibrate on; name their folder as calibration")
    line, message = refused(folder, PLAIN.replace("onnx", "coreml") + "batches = [1,\n4]")
    assert (line, message[:39]) == (6, "coreml takes one picture at a time, not")


def test_artefacts(folder: Path) -> None:
    one = '[[artefact]]\npath = "runs/x.onnx"\n'
    assert read(folder, one).artefacts == (Artefact(str(folder / "runs/x.onnx")),)
    limit = "[budget.onnx.int8]\nkernels = 1\n"  # which precision it is in nobody knows yet
    assert read(folder, one + limit).limits.budgets == {("onnx", "int8"): Budget(kernels=1)}
    for text, line, said in (
        (one + one, 3, "x.onnx is there twice; leave one out"),
        (one.replace("x.onnx", "y.onnx"), 2, "runs/y.onnx; export it first, or leave it out"),
        (one.replace("x.onnx", "best.pth"), 2, "no artefact; give one that ends in .onnx, .engine, .mlpackage"),
        ("[[artefact]]\n", 1, 'this artefact has no path; write for example path = "exports/model.onnx"'),
        (one + 'checkpoint = "b.pth"', 3, "b.pth'; give the checkpoint's file"),
        (one + limit.replace("onnx", "trt"), 3, "nothing here is trt in int8"),
    ):
        where, message = refused(folder, text)
        assert where == line
        assert message.endswith(said) or said in message


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 1, "there is nothing to check; add a [[matrix]] or an [[artefact]]"),
        ("matrix = [1]", 1, "matrix is a list, where there may be several; begin each with [[matrix]]"),
        ("[matrix]", 1, "matrix is a table, where there may be several; begin each with [[matrix]]"),
        ("a = 1\nb = demo\n", 2, "not TOML in column 5: invalid value; see https://toml.io for how it is written"),
        ("a = 1\na = 2\n", 2, "not TOML in column 6: cannot overwrite a value"),
        ("a = 1\n\nb = [\n", 3, "not TOML at the end of the file: "),
        (f"\na = {'[' * 5000}{']' * 5000}", 1, "nested too deeply"),
        (f"\na = {'1' * 5000}", 1, "a number too long"),
    ],
)
def test_what_is_no_configuration(folder: Path, text: str, line: int, said: str) -> None:
    where, message = refused(folder, text)
    assert where == line
    assert said in message


def test_files_that_can_not_be_read(folder: Path) -> None:
    with pytest.raises(BadConfig, match=r"^there is no .*/gone\.toml; write one with: nextvit-export init$"):
        read_config(folder / "gone.toml")
    with pytest.raises(BadConfig, match=r"^\S+ can't be read: Is a directory; give a TOML file$"):
        read_config(folder)
    (folder / "latin.toml").write_bytes(b"# fine\na = '\xe9'\n")
    with pytest.raises(BadConfig, match=r"/latin\.toml:2: not text in UTF-8; save it so$"):
        read_config(folder / "latin.toml")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(FULL)),
    st.integers(0, 12),
    st.sampled_from(
        ["", "=", '"', "[", "]", "{", "}", "\n", "0", "-1", "true", "nan", "1e999", '""', "[[matrix]]", "\x00"]
    ),
)
def test_a_damaged_file_is_read_or_refused_in_a_line(folder: Path, start: int, length: int, patch: str) -> None:
    text = FULL[:start] + patch + FULL[start + length :]
    try:
        read(folder, text)
    except BadConfig as error:
        said = str(error)
        found = re.match(rf"{re.escape(str(folder))}/nextvit-export\.toml:(\d+): \S", said)
        assert found, said
        assert "\n" not in said
        assert 1 <= int(found[1]) <= text.count("\n") + 1
