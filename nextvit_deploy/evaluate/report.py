"""An evaluation as one page that needs nothing else: no network, no script, light or dark as the reader has it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import Final

from PIL import Image as Pillow

from nextvit_deploy.data import Pictures
from nextvit_deploy.evaluate.evaluation import Evaluation, Image

_SIDE: Final = 96
"""Pixels of a thumbnail's longer side."""
_QUALITY: Final = 85
_FLIPS: Final = 200
"""Rows of the table of flips; the JSON has them all."""
_MARGIN: Final = (
    '<p class="soft">By the margin: twice the largest difference of a logit over the gap between PyTorch\'s first two '
    "classes. Below 1 the first class can't change.</p>"
)
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --page: #fff; --tile: #f6f8fa;
  --bad: #b42318; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117;
  --tile: #151b23; --bad: #ff7b72; --good: #3fb950; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.soft, figcaption, td.soft, .tile span { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
.tile, figure { background: var(--tile); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
.tile b { display: block; font-size: 1.35rem; }
figure { margin: 0; } figure img { width: 100%; max-width: 8rem; height: auto; display: block; }
.table { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; } .bad { color: var(--bad); } .good { color: var(--good); }
"""


def page(found: Evaluation, pictures: Pictures) -> str:
    """The whole page; ``pictures`` are those that were evaluated, of which the worst are read once more."""
    name = escape(found.artefact.path.name)
    thumbnails = _thumbnails([*found.by_margin, *found.by_error], pictures)
    parts = [
        f"<h1>{name}</h1>",
        _about(found),
        _summary(found),
        *(f'<p class="bad">Note: {escape(note)}</p>' for note in found.notes),
        _flips(found),
        "<h2>Nearest to another class, or past it</h2>",
        _MARGIN,
        _gallery(found.by_margin, thumbnails),
        "<h2>Furthest from PyTorch</h2>",
        '<p class="soft">By the relative root mean square error of the image\'s logits.</p>',
        _gallery(found.by_error, thumbnails),
        _versions(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Evaluation of {name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _about(found: Evaluation) -> str:
    data = found.dataset
    return (
        f'<p class="soft">{found.figures.count} of {data.total} images in {escape(data.folder)} '
        f"({escape(data.classes)}), through {escape(found.executor)} ({escape(found.mode)}) and through float32 "
        f"PyTorch from {escape(found.checkpoint.name)}; {escape(str(found.spec.precision))}, sha256 "
        f"{escape(found.artefact.sha256[:12])}</p>"
    )


def _summary(found: Evaluation) -> str:
    seen, tiles = found.figures, []
    if seen.artefact is not None and seen.pytorch is not None and seen.points is not None:
        for title, ours, theirs, points in zip(
            ("top-1", "top-5"),
            (seen.artefact.top1, seen.artefact.top5),
            (seen.pytorch.top1, seen.pytorch.top5),
            seen.points,
            strict=True,
        ):
            tiles.append((f"{ours:.2%}", f"{title}; PyTorch {theirs:.2%}, {points:+.2f} points"))
    tiles += [
        (f"{seen.agreement:.2%}", "name PyTorch's first class"),
        (str(seen.flipped), f"flips of {seen.count} images; {seen.can_flip} could"),
        (f"{seen.sqnr_db:.1f} dB", "signal to noise of the logits"),
        (f"{seen.relative_rms:.1e}", f"relative rms; largest difference {seen.max_abs:.1e}"),
    ]
    if seen.not_finite:
        tiles.append((str(seen.not_finite), "images answered with NaN or infinity"))
    listed = "".join(f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{listed}</div>'


def _flips(found: Evaluation) -> str:
    flips = found.figures.flips
    if not flips:
        return "<h2>Flips</h2>\n<p>None: PyTorch and the artefact name the same first class on every image.</p>"
    labelled = flips[0].made_right is not None
    head = ["PyTorch", "artefact", "images", *(("made right", "made wrong", "neither") if labelled else ())]
    rows = []
    for each in flips[:_FLIPS]:
        row = [escape(found.called(each.pytorch)), escape(found.called(each.artefact)), str(each.count)]
        if each.made_right is not None and each.made_wrong is not None:
            row += [str(each.made_right), str(each.made_wrong), str(each.count - each.made_right - each.made_wrong)]
        rows.append(row)
    more = f"<p>and {len(flips) - _FLIPS} more pairs, in the JSON</p>" if len(flips) > _FLIPS else ""
    return f"<h2>Flips</h2>\n{_table(head, rows)}{more}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A table of finished HTML; columns after the first ``text_columns`` are numbers."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = ["" if at < text_columns else ' class="number"' for at in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="table"><table>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _gallery(images: Iterable[Image], thumbnails: dict[int, str]) -> str:
    return '<div class="tiles">' + "\n".join(_figure(each, thumbnails[each.index]) for each in images) + "</div>"


def _figure(image: Image, source: str) -> str:
    label = "" if image.label is None else f"is {escape(image.label)}<br>"
    kind = ' class="bad"' if image.artefact != image.pytorch else ""
    return (
        f'<figure><img src="{source}" alt="{escape(image.name)}">'
        f"<figcaption>{escape(image.name)}<br>{label}PyTorch {escape(image.pytorch)}<br>"
        f"<span{kind}>artefact {escape(image.artefact)}</span><br>"
        f"margin {image.margin:.2g}, rms {image.relative_rms:.1e}</figcaption></figure>"
    )


def _thumbnails(images: Iterable[Image], pictures: Pictures) -> dict[int, str]:
    """Data URIs by the image's number: what the network was shown, one read at a time."""
    return {index: _thumbnail(pictures, index) for index in sorted({each.index for each in images})}


def _thumbnail(pictures: Pictures, index: int) -> str:
    pixels = pictures.read(index, index + 1).pixels[0]
    picture = Pillow.fromarray(pixels.transpose(1, 2, 0))
    picture.thumbnail((_SIDE, _SIDE))
    data = BytesIO()
    picture.save(data, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _versions(found: Evaluation) -> str:
    listed = [(escape(name), escape(value)) for name, value in sorted(found.versions.items())]
    return f"<h2>Versions</h2>\n{_table(('package', 'version'), listed)}"
