"""Shared parts of a report's pages: their style, cells of settings, pictures as data, a picture's files."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megarewarm.report.figures import style
from megarewarm.spelling import DASH, rate_text

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --quiet: #5c6570; --line: #dfe3e8; --wash: #f6f7f9;
  --mark: #0072b2; --shade: #0003; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e8eb; --quiet: #a7b0ba; --line: #383e46; --wash: #21262c;
    --mark: #56b4e9; --shade: #000b; }
  figure img { border-radius: 6px; filter: brightness(0.92); }
  .dot { box-shadow: 0 0 0 1px #fff9; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1120px; padding: 40px 28px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 10px; }
p, li { max-width: 82ch; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; }
.quiet, figcaption { color: var(--quiet); font-size: 14px; }
.summary { margin: 22px 0 0; padding: 14px 22px 14px 40px; background: var(--wash); border-left: 4px solid var(--mark); }
.summary li { margin: 5px 0; }
a { color: var(--mark); }
figure { margin: 10px 0 0; }
figure img { display: block; width: 100%; min-width: 960px; height: auto; }
figure.narrow img { max-width: 820px; min-width: 700px; }
figcaption { margin-top: 6px; max-width: 82ch; }
.wide { overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 30%, transparent) left / 36px 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) right / 36px 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / 9px 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / 9px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 6px 7px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
thead tr:first-child th[colspan] { text-align: center; border-bottom: 2px solid var(--line); color: var(--ink); }
th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); text-align: left; }
tbody th:first-child { position: sticky; left: 0; background: var(--paper); }
tbody tr:hover { background: var(--wash); }
td, tbody th { vertical-align: top; }
td small, th small { display: block; color: var(--quiet); font-size: 12px; font-weight: 400; line-height: 1.2; }
th small { margin-left: 17px; }
.numbers tbody th { white-space: normal; min-width: 120px; padding-left: 24px; text-indent: -17px; }
.numbers th small { margin-left: 0; text-indent: 0; }
.group { border-left: 1px solid var(--line); }
.settings td { white-space: normal; overflow-wrap: anywhere; min-width: 88px; }
.settings th, .settings td { text-align: left; vertical-align: top; }
.settings tbody th { font: 13px/1.6 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: nowrap; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
@media (max-width: 700px) {
  body { padding: 24px 14px 48px; }
  .summary { padding: 10px 12px 10px 28px; }
  .settings .long { min-width: 250px; }
  .quiet, figcaption, table { font-size: 16px; } td small, th small { font-size: 14px; }
}
footer { margin-top: 52px; padding-top: 12px; border-top: 1px solid var(--line); }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; } figure, tr, .summary { break-inside: avoid; }
  table { font-size: 8.5pt; } th, td { padding: 3px 5px; } .wide { overflow: visible; background: none; }
  figure img, figure.narrow img { min-width: 0; }
  * { print-color-adjust: exact; }
}
"""
STYLE += "".join(f".dot.c{index} {{ background: {colour}; }}\n" for index, colour in enumerate(style.COLOURS))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, its file's name, its heading, its alternative text, and its caption."""

    name: str
    title: str
    figure: Figure
    description: str
    caption: str


def svg_of(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same data."""
    stream = io.BytesIO()
    with style.style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def page_html(title: str, css: str, parts: Sequence[str], script: str = "") -> str:
    """A whole page of ``parts``, without empty ones. Its Content-Security-Policy allows the pictures in it, exactly this
    ``css`` and this ``script``, and nothing else."""
    policy = f"default-src 'none'; img-src data:; style-src {content_hash(css)}"
    policy += f"; script-src {content_hash(script)}" * bool(script) + "; base-uri 'none'; form-action 'none'"
    after = f"\n<script>{script}</script>" * bool(script)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>{after}\n</body>\n</html>\n"
    )


def content_hash(text: str) -> str:
    """The source expression by which a Content-Security-Policy allows exactly ``text``."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def dot(index: int) -> str:
    """A dot in the colour of the ``index``-th run."""
    return f'<span class="dot c{index % len(style.COLOURS)}"></span>'


def picture_html(picture: Picture, svg: bytes, heading: str = "h3", *, narrow: bool = False) -> str:
    """A section with the picture inside it, as a data URL."""
    data = base64.b64encode(svg).decode("ascii")
    narrowly = ' class="narrow"' if narrow else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        f"<section><{heading}>{escape(picture.title)}</{heading}>\n<figure{narrowly}>"
        f'<div class="wide"><img alt="{escape(picture.description)}" src="data:image/svg+xml;base64,{data}"></div>'
        f"{caption}</figure></section>"
    )


def save_picture(picture: Picture, svg: bytes, folder: Path) -> None:
    """NAME.png and NAME.svg in ``folder``."""
    (folder / f"{picture.name}.svg").write_bytes(svg)
    save_png(picture, folder)


def save_png(picture: Picture, folder: Path) -> None:
    """NAME.png in ``folder``."""
    with style.style():
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=160)


def value_cells(texts: Sequence[str]) -> list[str]:
    """Cells with a value in bold if it differs from the most common one, if one value is the most common."""
    (usual, count), *others = Counter(texts).most_common()
    plain = {usual} if others and count > others[0][1] else set(texts)
    return [f"<td>{text}</td>" if text in plain else f"<td><b>{text}</b></td>" for text in texts]


def setting_text(value: Any) -> str:
    """A setting's value as HTML."""
    if value is None:
        return DASH
    if isinstance(value, float):
        return rate_text(value) if 0 < abs(value) < 1e-2 else f"{value:g}"
    return breakable(str(value))


def breakable(text: str) -> str:
    """HTML in which long paths may break after a slash or an underscore."""
    return escape(text).replace("/", "/<wbr>").replace("_", "_<wbr>")
