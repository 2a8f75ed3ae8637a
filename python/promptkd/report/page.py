"""The frame of a report: one HTML file with its style inside, for light, dark and small screens."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePosixPath

_THUMBNAIL = 96

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --ink: #1c2230; --soft: #5b6577;
  --rule: #dde1e8; --good: #1f7a45; --bad: #b3261e; --warn-back: #fff4e0; --warn-ink: #6b4300;
  --c0: #2f6fb5; --c1: #d9742b; --c2: #2a8a57; --c3: #8a4fb0; }
@media (prefers-color-scheme: dark) { :root { --back: #14171d; --card: #1d222b; --ink: #e6e9ef;
  --soft: #9aa5b8; --rule: #333b48; --good: #63cf8e; --bad: #ff8a80; --warn-back: #3a2d12;
  --warn-ink: #ffd894; --c0: #6ea8e6; --c1: #f0a063; --c2: #62c48f; --c3: #c194e0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, li, figcaption, .soft { color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .3rem .4rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.mean td { font-weight: 600; border-top: 2px solid var(--rule); }
.up { color: var(--good); } .down { color: var(--bad); } td.paper { color: var(--soft); }
.note { background: var(--warn-back); color: var(--warn-ink); padding: .5rem .75rem; margin: .5rem 0;
  border-radius: .4rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.chart { margin: 0; background: var(--card); border-radius: .5rem; padding: .5rem; }
.chart svg { width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.chart text.title { fill: var(--ink); font-size: 13px; font-weight: 600; }
.chart figcaption { font-size: .8rem; }
.grid { stroke: var(--rule); } .ideal { stroke: var(--ink); stroke-dasharray: 4 3; }
.line { fill: none; stroke-width: 2; }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); }
.line.c2 { stroke: var(--c2); } .line.c3 { stroke: var(--c3); }
.dot.c0, .bar.c0 { fill: var(--c0); } .dot.c1 { fill: var(--c1); }
.dot.c2 { fill: var(--c2); } .dot.c3 { fill: var(--c3); }
.key { margin-right: .9rem; white-space: nowrap; display: inline-block; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: .2rem; margin-right: .3rem; }
.swatch.c0 { background: var(--c0); } .swatch.c1 { background: var(--c1); }
.swatch.c2 { background: var(--c2); } .swatch.c3 { background: var(--c3); }
.classes { display: grid; grid-template-columns: fit-content(40%) 1fr 4rem; gap: .15rem .6rem;
  font-size: .85rem; align-items: center; }
.classes b { font-weight: 400; } .classes span:nth-child(3n) { text-align: right; }
.track { background: var(--card); border-radius: .3rem; height: .8rem; display: block; }
.fill { background: var(--c0); border-radius: .3rem; height: .8rem; display: block; }
.pairs { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.pair { background: var(--card); border-radius: .5rem; padding: .6rem; }
.pair img { height: 4.5rem; border-radius: .3rem; margin: .4rem .4rem 0 0; }
details { margin: .75rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); padding: .75rem; border-radius: .5rem; font-size: .8rem; }
"""


def page(title: str, body: str) -> str:
    """A whole document; it fetches nothing and runs no script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], mean: int | None = None) -> str:
    """A table that scrolls by itself on a small screen.

    Args:
        heads: of the columns, plain text.
        rows: cells, plain text; a cell that starts with "+" or a minus sign is a difference, coloured.
        mean: number of the first row that is a mean over the others.
    """
    lines = ["<tr>" + "".join(f"<th>{escape(h)}</th>" for h in heads) + "</tr>"]
    for number, row in enumerate(rows):
        cells = "".join(
            f"<td{_class(cell, head)}>{escape(cell)}</td>"
            for cell, head in zip(row, heads, strict=True)
        )
        kind = ' class="mean"' if mean is not None and number >= mean else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _class(cell: str, head: str) -> str:
    name = {"+": "up", "\N{MINUS SIGN}": "down"}.get(cell[:1], "paper" if head == "paper" else "")
    return f' class="{name}"' if name else ""


def class_bars(classes: Sequence[tuple[str, float, int]], full: float = 100) -> str:
    """One bar a class: (name, percent, pictures); `full` percent fill the width."""
    rows = "".join(
        f'<b>{escape(name)}</b><span class="track" title="{count} pictures">'
        f'<span class="fill" style="width:{100 * share / full:.1f}%"></span></span>'
        f"<span>{share:.1f} %</span>"
        for name, share, count in classes
    )
    return f'<div class="classes">{rows}</div>'


def pair_card(truth: str, taken_for: str, text: str, pictures: Sequence[str]) -> str:
    """A confusion with its pictures, given as data URLs."""
    shown = "".join(f'<img src="{url}" alt="{escape(truth)}">' for url in pictures)
    return (
        f'<div class="pair"><strong>{escape(truth)}</strong> taken for '
        f'<strong>{escape(taken_for)}</strong><br><span class="soft">{escape(text)}</span>'
        f"<div>{shown}</div></div>"
    )


def thumbnail(root: Path, name: str) -> str | None:
    """A small picture as a data URL, None where it can't be read or doesn't lie under the root."""
    from PIL import Image

    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return None
    try:
        with Image.open(root / name) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            small = image.convert("RGB")
        small.thumbnail((2 * _THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
