"""``check`` and ``all``: many artefacts at once, each made and judged in a process of its own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nextvit_deploy import terminal as t
from nextvit_deploy.cli import options as o
from nextvit_deploy.cli.grouped import grouped

if TYPE_CHECKING:
    from nextvit_deploy.check.result import CheckResult
    from nextvit_deploy.check.run import CheckRequest

CONFIG: Final = Path("nextvit-export.toml")
_KEPT: Final = "what was finished is kept, and the same command goes on from there"

_PICTURES: Final = 64
"""That ``all`` evaluates each artefact over: enough to show the worst, a few seconds each."""

ConfigFile = Annotated[
    Path, typer.Argument(metavar="[CONFIG]", help="What to check; init writes one.", show_default=True)
]
Folder = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for artefacts and results.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, metavar="N", help="Cells at a time.")]
Ray = Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="A Ray cluster that does the work.")]
Baseline = Annotated[
    Path | None,
    typer.Option("--baseline", metavar="PATH", help="A manifest, or a folder of them, to tell what moved since."),
]
Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="PATTERN", help="Cells of these names, such as '*-fp16-*'.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run every cell, whatever is kept from earlier checks.")]
Junit = Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.")]
Sarif = Annotated[Path | None, typer.Option("--sarif", metavar="FILE", help="Write SARIF 2.1.0.")]
Summary = Annotated[
    Path | None, typer.Option("--summary", metavar="FILE", help="Append Markdown, as to $GITHUB_STEP_SUMMARY.")
]
Page = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html beside the artefacts.")]


@dataclass(frozen=True, slots=True)
class Running:
    """How the cells are run, and where what is found goes."""

    jobs: Jobs = None
    ray: Ray = None
    baseline: Baseline = None
    fresh: Fresh = False
    junit: Junit = None
    sarif: Sarif = None
    summary: Summary = None
    page: Page = True
    as_json: o.AsJson = False
    quiet: o.Quiet = False


@grouped(Running)
def check(config: ConfigFile = CONFIG, *, output: Folder = None, only: Only = None, running: Running) -> None:
    """Check everything that a configuration names: export, verify, hold against limits and a baseline."""
    with t.guard(_KEPT):
        from nextvit_deploy.check.config import read_config
        from nextvit_deploy.check.matrix import cells_of
        from nextvit_deploy.check.run import TIMEOUT, CheckRequest

        asked = read_config(config)
        cells = tuple(c for c in cells_of(asked) if not only or any(fnmatchcase(c.name, each) for each in only))
        if not cells:
            raise typer.BadParameter(f"no cell of {config} has such a name", param_hint="'--only'")
        request = CheckRequest(
            cells=cells,
            output=output or asked.output,
            limits=asked.limits,
            jobs=asked.jobs,
            baseline=asked.baseline,
            timeout=asked.timeout or TIMEOUT,
            whole=not only,
        )
        result = _run(request, running)
    _leave(result)


@grouped(Running)
def all_lanes(
    checkpoint: o.Ckpt = None,
    *,
    output: Folder = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="DIR", help="Images to calibrate INT8 on.")
    ] = None,
    images: o.Images = None,
    count: o.Count = 8,
    ema: o.Ema = False,
    running: Running,
) -> None:
    """Export to everything that this machine can build, prove it all, and end in one table and one report."""
    with t.guard(_KEPT):
        from nextvit_deploy.check.matrix import default_matrix
        from nextvit_deploy.check.places import checkpoint_at
        from nextvit_deploy.check.run import CheckRequest

        lanes, notes = _lanes()
        source = None if checkpoint is None else checkpoint_at(checkpoint, Path(checkpoint).absolute(), "none at all")
        cells = default_matrix(source, lanes, _folder(calibration, "--calibration"))
        pictures = _folder(images, "--images")
        judged = None if checkpoint is not None and images is None else _PICTURES
        cells = tuple(replace(each, images=pictures, count=count, ema=ema, pictures=judged) for each in cells)
        if checkpoint is not None and calibration is None:
            notes = (*notes, "no int8: it is calibrated on pictures of your task; name their folder with --calibration")
        request = CheckRequest(cells, output or Path("exports"), notes=notes)
        result = _run(request, running)
    _leave(result)


def _lanes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lanes that work on this machine, and what would open the others."""
    from nextvit_deploy import doctor

    found = {lane.name: lane for lane in doctor.lanes(doctor.installed_versions())}
    wanted = {"onnx": ("onnx",), "trt": ("trt-rtx", "trt"), "coreml": ("coreml",)}
    lanes = tuple(lane for lane, names in wanted.items() if any(found[name].works for name in names))
    closed = (found[names[0]] for lane, names in wanted.items() if lane not in lanes)
    notes = (f"no {each.name}: {each.reason}" + (f"; {each.remedy}" if each.remedy else "") for each in closed)
    return lanes, tuple(notes)


def _folder(path: Path | None, option: str) -> str | None:
    """A folder of pictures by its whole path; raises DeployError where it is none."""
    from nextvit_deploy.check.places import check_pictures

    if path is None:
        return None
    check_pictures(path.absolute(), option)
    return str(path.absolute())


def _run(request: CheckRequest, running: Running) -> CheckResult:
    """Check, show it, and write what is asked for."""
    from nextvit_deploy.check.run import check as run
    from nextvit_deploy.outputs import check_writable
    from nextvit_deploy.render_check import live, show_check

    request = replace(
        request,
        jobs=running.jobs or request.jobs,
        ray=running.ray,
        baseline=running.baseline or request.baseline,
        fresh=running.fresh,
    )
    for place in (running.junit, running.sarif, running.summary):
        if place is not None:
            check_writable(place)
    with live(request.cells, quiet=running.quiet or running.as_json) as shown:
        result = run(request, shown.event)
    _write(result, running)
    page = _page(request.output) if running.page else None
    if running.as_json:
        t.print_json(result.as_dict())
    elif not running.quiet:
        with t.printing() as console:
            show_check(console, result)
            if page is not None:
                console.print(page, soft_wrap=True, highlight=False, markup=False)
    return result


def _write(result: CheckResult, running: Running) -> None:
    """JUnit, SARIF and the summary, where they are asked for."""
    from nextvit_deploy.check.junit import junit
    from nextvit_deploy.check.sarif import sarif
    from nextvit_deploy.check.summary import summary
    from nextvit_exporters.files import atomic_write

    if running.junit is not None:
        atomic_write(running.junit, junit(result).encode())
    if running.sarif is not None:
        base = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())  # what code scanning resolves addresses against
        text = json.dumps(sarif(result, base), indent=2, allow_nan=False) + "\n"
        atomic_write(running.sarif, text.encode())
    if running.summary is not None:
        before = running.summary.read_bytes() if running.summary.is_file() else b""
        atomic_write(running.summary, before + summary(result).encode())


def _page(folder: Path) -> str:
    """What is said of the report: where it is, or what is missing for it."""
    from nextvit_deploy.report.page import REPORT, write_report
    from nextvit_exporters.errors import MissingExtra

    try:
        return f"report: {write_report(folder, folder / REPORT)}"
    except MissingExtra as error:
        return f"no report: {error}"


def _leave(result: CheckResult) -> None:
    """Exit with the status of the verdict."""
    from nextvit_deploy.verdict import Verdict

    if result.verdict is Verdict.VERIFIED:
        return
    counts = {verdict: sum(row.verdict is verdict for row in result.rows) for verdict in Verdict}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    t.fail(f"{told}, of {len(result.rows)}", t.FAILED if result.verdict is Verdict.FAILED else t.NOT_VERIFIED)
