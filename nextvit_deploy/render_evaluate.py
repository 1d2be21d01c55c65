"""An evaluation's tables for people, at home in 80 columns."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.markup import escape

from nextvit_deploy.evaluate.evaluation import Evaluation, Image
from nextvit_deploy.render import show_notes, table

_SHORT: Final = 10
"""Rows of a table, and images, unless more is asked for."""
_FEW: Final = 5


def show_evaluation(console: Console, found: Evaluation, *, verbose: bool) -> None:
    """Notes, figures, flips and the worst images; all of them with ``verbose``."""
    show_notes(console, found.notes)
    seen, data = found.figures, found.dataset
    console.print(
        f"{escape(found.artefact.path.name)} and PyTorch on {seen.count} of {data.total} images in "
        f"{escape(data.folder)}; {escape(data.classes)}",
        soft_wrap=True,
    )
    console.print(f"{escape(found.executor)} ({found.mode}), {_how(found)}", soft_wrap=True)
    _show_accuracy(console, found)
    console.print(
        f"agrees with PyTorch on {seen.agreement:.2%}, {seen.flipped} flips, {seen.can_flip} could flip\n"
        f"logits: {seen.sqnr_db:.1f} dB, relative rms {seen.relative_rms:.1e}, max|d| {seen.max_abs:.1e}",
        soft_wrap=True,
    )
    if seen.not_finite:
        console.print(f"[red]NaN or infinity on {seen.not_finite} images[/]")
    _show_flips(console, found, len(seen.flips) if verbose else _SHORT)
    _show_worst(console, "Nearest to another class, or past it", found.by_margin, verbose=verbose)
    if verbose:
        _show_worst(console, "Furthest from PyTorch", found.by_error, verbose=True)
        for line in found.checkpoint.found:
            console.print(f"  {escape(line)}", style="dim")


def _how(found: Evaluation) -> str:
    """Seconds, and who worked."""
    run = found.run
    if run.ray is not None:
        who = f"on the Ray cluster at {escape(run.ray)}"
    else:
        who = "1 process" if run.workers == 1 else f"{run.workers} processes"
    return f"{run.seconds:.1f} s, {who}"


def _show_accuracy(console: Console, found: Evaluation) -> None:
    seen = found.figures
    if seen.artefact is None or seen.pytorch is None or seen.points is None:
        return
    shown = table("Right, of the images' classes")
    shown.padding = (0, 1)
    for name in ("", "artefact", "PyTorch", "points"):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    shown.add_row("top-1", f"{seen.artefact.top1:.2%}", f"{seen.pytorch.top1:.2%}", f"{seen.points[0]:+.2f}")
    shown.add_row("top-5", f"{seen.artefact.top5:.2%}", f"{seen.pytorch.top5:.2%}", f"{seen.points[1]:+.2f}")
    console.print(shown)


def _show_flips(console: Console, found: Evaluation, most: int) -> None:
    flips = found.figures.flips
    if not flips:
        return
    shown = table("Flips")
    shown.padding = (0, 1)
    for name in ("PyTorch", "artefact"):
        shown.add_column(name, overflow="fold")
    for name in ("images", "made right", "made wrong"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in flips[:most]:
        right, wrong = ("" if count is None else str(count) for count in (each.made_right, each.made_wrong))
        names = (escape(found.called(number)) for number in (each.pytorch, each.artefact))
        shown.add_row(*names, str(each.count), right, wrong)
    console.print(shown)
    if len(flips) > most:
        console.print(f"and {len(flips) - most} more pairs; all with --verbose", style="dim")


def _show_worst(console: Console, title: str, images: tuple[Image, ...], *, verbose: bool) -> None:
    shown = table(title)
    shown.padding = (0, 1)
    shown.add_column("image", overflow="fold")
    for name in ("is", "PyTorch", "artefact"):
        shown.add_column(name, overflow="fold")
    for name in ("margin", "rms"):
        shown.add_column(name, justify="right", no_wrap=True)
    for each in images if verbose else images[:_FEW]:
        names = (escape(text) for text in (each.name, each.label or "", each.pytorch, each.artefact))
        shown.add_row(*names, f"{each.margin:.2g}", f"{each.relative_rms:.1e}")
    console.print(shown)
