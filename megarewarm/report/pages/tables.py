"""The tables of an experiment's page: the arms' numbers, sortable in a browser, and their paired differences."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from html import escape

from megarewarm.report.numbers.arms import ArmRow, Comparison
from megarewarm.report.numbers.seeds import Spread
from megarewarm.report.pages.findings import difference_text
from megarewarm.report.pages.html import breakable
from megarewarm.spelling import DASH, MINUS, loss_text, rate_text, signed_text, tokens_text

# Sorts a table by a click on (or Enter in) a header, or by the address: #sort=KEY, #sort=-KEY for descending. Rows without a
# number stay last. Without it the table is a plain one.
SCRIPT = """
(() => {
  const table = document.querySelector("table.sortable");
  if (!table) return;
  const body = table.tBodies[0];
  const heads = [...table.querySelectorAll("th[data-key]")];
  const sort = (head, descending) => {
    const column = Number(head.dataset.column);
    const value = row => row.cells[column].dataset.value;
    const text = head.dataset.kind === "text";
    const rows = [...body.rows];
    rows.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = text ? x.localeCompare(y, "en", {numeric: true}) : Number(x) - Number(y);
      return descending ? -order : order;
    });
    body.append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  };
  heads.forEach(head => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head, head.getAttribute("aria-sort") === "ascending"));
  });
  const asked = /^#sort=(-?)([a-z_]+)$/.exec(location.hash);
  const head = asked && heads.find(head => head.dataset.key === asked[2]);
  if (head) sort(head, asked[1] === "-");
})();
"""

STYLE = """
body { max-width: 1240px; }
main > section figure { max-width: 1100px; }
h3 { font-size: 16px; margin: 26px 0 4px; }
.sortable { font-size: 12.5px; }
.sortable th, .sortable td { padding: 5px 4px; }
.sortable td { white-space: normal; } .sortable td small { white-space: nowrap; font-size: 11px; }
.sortable thead th { white-space: normal; }
.sortable thead button { all: unset; cursor: pointer; text-align: inherit; }
.sortable thead button:hover, .sortable thead button:focus-visible { text-decoration: underline; color: var(--ink); }
.sortable thead button:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.sortable th[aria-sort] { color: var(--ink); }
.sortable th[aria-sort="ascending"] button::after { content: " \\2191"; }
.sortable th[aria-sort="descending"] button::after { content: " \\2193"; }
.sortable tbody th { white-space: normal; min-width: 110px; overflow-wrap: anywhere; }
td.text, th.text { text-align: left; }
.main th { font-weight: 700; }
tbody th { font-weight: 500; }
summary { cursor: pointer; font-size: 20px; font-weight: 700; margin: 44px 0 10px; }
.summary li { max-width: 92ch; }
@media print {
  body { font-size: 10pt; }
  .sortable { font-size: 6.6pt; } .sortable th, .sortable td { padding: 2px 2px; } .sortable td small { font-size: 5.8pt; }
  .sortable tbody th { min-width: 60px; } h3 { break-after: avoid; } thead { display: table-header-group; }
  section { break-inside: avoid; }
}
"""


def content_hash(text: str) -> str:
    """The source expression by which a Content-Security-Policy allows exactly ``text``."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


_Show = Callable[[float], str]
_COLUMNS: tuple[tuple[str, str, str, _Show], ...] = (
    ("peak_lr", "", "Peak LR", rate_text),
    ("tokens", "", "Tokens", tokens_text),
    ("upstream_before", "Upstream loss", "Before", loss_text),
    ("upstream_after", "Upstream loss", "After", loss_text),
    ("forgetting", "Upstream loss", "Forgetting", signed_text),
    ("upstream_rise", "Upstream loss", "Highest rise", signed_text),
    ("upstream_recovered_tokens", "Upstream loss", "Recovered at", tokens_text),
    ("downstream_before", "Downstream loss", "Before", loss_text),
    ("downstream_after", "Downstream loss", "After", loss_text),
    ("adaptation", "Downstream loss", "Adaptation", signed_text),
    ("downstream_rise", "Downstream loss", "Highest rise", signed_text),
    ("downstream_recovered_tokens", "Downstream loss", "Recovered at", tokens_text),
    ("average_after", "", "Average of both", loss_text),
    ("tokens_saved", "", "Tokens saved", lambda value: f"{MINUS if value < 0 else ''}{tokens_text(abs(value))}"),
)
_NEVER = {
    "upstream_recovered_tokens": "not recovered",
    "downstream_recovered_tokens": "not recovered",
    "tokens_saved": "never",
    "upstream_after": "diverged",
    "downstream_after": "diverged",
    "average_after": "diverged",
}


def arms_html(rows: Sequence[ArmRow], main: str | None) -> str:
    """One row per arm, in order. Every cell carries its number, by which the script sorts; columns without any are left out."""
    columns = [column for column in _COLUMNS if any(row.values.get(column[0]) for row in rows)]
    groups: list[list[str | int]] = []
    for _, group, *_ in columns:
        if groups and groups[-1][0] == group and group:
            groups[-1][1] = int(groups[-1][1]) + 1
        else:
            groups.append([group, 1])
    above = "".join(f'<th colspan="{count}"{" class=group" if name else ""}>{name}</th>' for name, count in groups)
    heads = [("arm", "Arm", "text"), ("seeds", "Seeds", "number"), *((key, name, "number") for key, _, name, _ in columns)]
    below = "".join(
        f'<th scope="col" data-key="{key}" data-column="{index}" data-kind="{kind}">{name}</th>'
        for index, (key, name, kind) in enumerate(heads)
    )
    body = "".join(_row(row, columns, row.name == main) for row in rows)
    return (
        f'<div class="wide"><table class="numbers sortable"><thead><tr><th></th><th></th>{above}</tr><tr>{below}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
        '<p class="quiet">Means over the complete seeds, below them ± their standard deviation. A click on a header sorts. '
        "Before: the very checkpoint the run started from, evaluated before the first step. Highest rise: the highest "
        "evaluation above that; recovered at: tokens of the first evaluation after it that is at or below the start again. "
        "Tokens saved: those of the arm from scratch less those at which this arm was as low downstream as that one's end "
        "(linear between evaluations).</p>"
    )


def _row(row: ArmRow, columns: Sequence[tuple[str, str, str, _Show]], main: bool) -> str:
    complete, planned = row.seeds
    note = {"continued": "", "scratch": "from scratch", "pretraining": "pre-training"}[row.kind]
    cells = [
        f'<th scope="row" data-value="{escape(row.name)}">{breakable(row.name)}{f"<small>{note}</small>" if note else ""}</th>',
        f'<td data-value="{complete}">{complete if complete == planned else f"{complete} of {planned}"}</td>',
    ]
    for key, _, _, show in columns:
        spread = row.spread(key)
        bold = key in ("forgetting", "adaptation")
        cells.append(_cell(spread, show, _NEVER.get(key, ""), bold, key not in ("peak_lr", "tokens")))
    return f"<tr{' class=main' if main else ''}>{''.join(cells)}</tr>"


def _cell(spread: Spread, show: _Show, never: str, bold: bool, deviation: bool) -> str:
    count = len(spread.values) + spread.others
    if spread.mean is None:
        return f'<td data-value="">{never if spread.others else DASH}</td>'
    small = []
    if deviation and spread.deviation is not None:
        small.append(f"± {show(spread.deviation).lstrip('+')}")
    if spread.others:
        small.append(f"{never} in {spread.others} of {count}")
    text = show(spread.mean)
    below = f"<small>{', '.join(small)}</small>" if small else ""
    return f'<td data-value="{spread.mean!r}">{f"<b>{text}</b>" if bold else text}{below}</td>'


def comparisons_html(compared: Sequence[Comparison]) -> str:
    """Every arm against its reference: final upstream and downstream loss and their average; bold what is more than noise."""
    by_pair: dict[tuple[str, str, str], dict[str, Comparison]] = {}
    for c in compared:
        by_pair.setdefault((c.group, c.arm, c.reference), {})[c.measure] = c
    names = {"upstream_after": "Upstream loss", "downstream_after": "Downstream loss", "average_after": "Average"}
    measures = [measure for measure in names if any(measure in found for found in by_pair.values())]
    titles = ("Sweep", "Arm", "Against", "Seeds", *(names[measure] for measure in measures))
    head = "".join(f'<th scope="col"{" class=text" if index < 3 else ""}>{title}</th>' for index, title in enumerate(titles))
    body = []
    for (group, arm, reference), found in by_pair.items():
        seeds = max(len(c.difference.values) for c in found.values())
        cells = "".join(_difference(found.get(measure)) for measure in measures)
        any_one = next(iter(found.values()))
        lengths = "" if any_one.same_length else f"<small>{' against '.join(map(tokens_text, any_one.tokens))} tokens</small>"
        body.append(
            f'<tr><td class="text">{escape(group) or DASH}</td><th scope="row">{breakable(arm)}</th>'
            f'<td class="text">{breakable(reference)}{lengths}</td><td>{seeds}</td>{cells}</tr>'
        )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>\n'
        '<p class="quiet">Final losses, arm minus reference, paired by seed: mean ± half the 95 % interval (Student\'s t). '
        "Bold where the interval excludes 0 and both were trained on as many tokens; with one seed nothing is known of the "
        "noise.</p>"
    )


def _difference(comparison: Comparison | None) -> str:
    if comparison is None or not math.isfinite(comparison.difference.mean):
        return f"<td>{DASH}</td>"
    text = difference_text(comparison.difference)
    return f"<td><b>{text}</b></td>" if comparison.established else f"<td>{text}</td>"
