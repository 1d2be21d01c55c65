"""An evaluation as one page that needs nothing else: no network, no script, light or dark as the reader has it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import Final

from PIL import Image as Pillow

from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate.evaluation import Evaluation, Image
from nextvit_deploy.report.html import fill

_SIDE: Final = 96
"""Pixels of a thumbnail's longer side."""
_QUALITY: Final = 85
_FLIPS: Final = 200
"""Rows of the table of flips; the JSON has them all."""


def page(found: Evaluation) -> str:
    """The whole page."""
    flips = found.figures.flips
    labelled = bool(flips) and flips[0].made_right is not None
    return fill(
        "evaluation.html.j2",
        found=found,
        tiles=list(_tiles(found)),
        flips_head=["PyTorch", "artefact", "images", *(("made right", "made wrong", "neither") if labelled else ())],
        flips=list(_flips(found)),
        more_flips=max(0, len(flips) - _FLIPS),
        by_margin=_gallery(found.by_margin, found.thumbnails),
        by_error=_gallery(found.by_error, found.thumbnails),
    )


def thumbnails(images: Iterable[Image], pictures: Pictures) -> dict[int, str]:
    """JPEGs in base64 by the image's number: what the network was shown, one read at a time."""
    return {index: _thumbnail(pictures, index) for index in sorted({each.index for each in images})}


def _tiles(found: Evaluation) -> Iterator[tuple[str, str]]:
    """The figures, each with what it is."""
    seen = found.figures
    if seen.artefact is not None and seen.pytorch is not None and seen.points is not None:
        ours, theirs, points = seen.artefact, seen.pytorch, seen.points
        yield f"{ours.top1:.2%}", f"top-1; PyTorch {theirs.top1:.2%}, {points[0]:+.2f} points"
        yield f"{ours.top5:.2%}", f"top-5; PyTorch {theirs.top5:.2%}, {points[1]:+.2f} points"
    yield f"{seen.agreement:.2%}", "name PyTorch's first class"
    yield str(seen.flipped), f"flips of {seen.count} images; {seen.can_flip} could"
    yield f"{seen.sqnr_db:.1f} dB", "signal to noise of the logits"
    yield f"{seen.relative_rms:.1e}", f"relative rms; largest difference {seen.max_abs:.1e}"
    if seen.not_finite:
        yield str(seen.not_finite), "images answered with NaN or infinity"


def _flips(found: Evaluation) -> Iterator[list[str]]:
    """Rows of the table of flips."""
    for each in found.figures.flips[:_FLIPS]:
        row = [found.called(each.pytorch), found.called(each.artefact), str(each.count)]
        if each.made_right is not None and each.made_wrong is not None:
            row += [str(each.made_right), str(each.made_wrong), str(each.count - each.made_right - each.made_wrong)]
        yield row


def _gallery(images: Iterable[Image], known: Mapping[int, str]) -> list[tuple[Image, str]]:
    """Each with its thumbnail's data URI, empty where there is none."""
    return [(each, f"data:image/jpeg;base64,{known[each.index]}" if each.index in known else "") for each in images]


def _thumbnail(pictures: Pictures, index: int) -> str:
    pixels = pictures.read(index, index + 1).pixels[0]
    picture = Pillow.fromarray(pixels.transpose(1, 2, 0))
    picture.thumbnail((_SIDE, _SIDE))
    data = BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY)
    return base64.b64encode(data.getvalue()).decode()
