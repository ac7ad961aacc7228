"""The tables of an experiment's page: the arms' numbers, sortable in a browser, and their paired differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from megarewarm.report.numbers.arms import ArmRow, Comparison
from megarewarm.report.numbers.measure import Measure
from megarewarm.report.numbers.seeds import Spread
from megarewarm.report.pages.findings import difference_text
from megarewarm.report.pages.html import breakable
from megarewarm.spelling import DASH, tokens_text

# Sorts a table by a click on (or Enter in) a header, or by the address: #sort=KEY, #sort=-KEY for descending. Rows without a
# number stay last. Without the script the table is a plain one.
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
  const asked = /^#sort=(-?)(.+)$/.exec(decodeURIComponent(location.hash));
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
.sortable thead button:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
.sortable th[aria-sort] { color: var(--ink); }
.sortable th[aria-sort="ascending"] button::after { content: " \\2191"; }
.sortable th[aria-sort="descending"] button::after { content: " \\2193"; }
.sortable tbody th { white-space: normal; min-width: 110px; overflow-wrap: anywhere; }
td.text, th.text { text-align: left; }
.main th { font-weight: 700; }
tbody th { font-weight: 500; }
summary { cursor: pointer; font-size: 20px; font-weight: 700; margin: 44px 0 10px; }
.summary li { max-width: 92ch; }
@media (max-width: 700px) { .sortable { font-size: 15px; } }
@media print {
  body { font-size: 10pt; }
  .sortable { font-size: 6.6pt; } .sortable th, .sortable td { padding: 2px 2px; } .sortable td small { font-size: 5.8pt; }
  .sortable tbody th { min-width: 60px; } h3 { break-after: avoid; } thead { display: table-header-group; }
  section { break-inside: avoid; }
}
"""


_NOTES = {
    "upstream_before": "Before: the start checkpoint, evaluated before the first step.",
    "upstream_rise": "Highest rise: the highest evaluation minus that.",
    "upstream_recovered_tokens": "Recovered at: tokens of the first evaluation after it that is at or below the start.",
    "tokens_saved": "Tokens saved: those of the arm from scratch minus those at which this arm reached its final downstream "
    "loss (linear between evaluations).",
}
_TASK_NOTE = (
    "Task: accuracy of the first test and of the last; items lost (right before the first step and wrong at the end) and won, "
    "guesses included. arms.csv has them chance-adjusted too."
)


def arms_html(rows: Sequence[ArmRow], main: str | None) -> str:
    """One row per arm, in order. Every cell carries its number, by which the script sorts; empty columns are omitted."""
    columns = [m for m in rows[0].measures if m.arms and m.heading and any(row.values.get(m.key) for row in rows)]
    # columns without a group stay separate, even next to each other
    groups = itertools.groupby(enumerate(columns), lambda place: (place[1].group, place[1].group or place[0]))
    above = "".join(
        f'<th colspan="{len(list(same))}"{" class=group" if group else ""}>{breakable(group)}</th>'
        for (group, _), same in groups
    )
    heads = [("arm", "Arm", "text"), ("seeds", "Seeds", "number"), *((m.key, m.heading, "number") for m in columns)]
    below = "".join(
        f'<th scope="col" data-key="{escape(key)}" data-column="{index}" data-kind="{kind}">{name}</th>'
        for index, (key, name, kind) in enumerate(heads)
    )
    body = "".join(_row(row, columns, row.name == main) for row in rows)
    keys = {measure.key for measure in columns}
    notes = [text for key, text in _NOTES.items() if key in keys]
    if any(key.startswith("task_") for key in keys):
        notes.append(_TASK_NOTE)
    return (
        f'<div class="wide"><table class="numbers sortable"><thead><tr><th></th><th></th>{above}</tr><tr>{below}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
        '<p class="quiet">Means over the complete seeds, below them ± their standard deviation. A click on a header sorts. '
        f"{' '.join(notes)}</p>"
    )


def _row(row: ArmRow, columns: Sequence[Measure], main: bool) -> str:
    complete, planned = row.seeds
    kind = {"continued": "", "scratch": "from scratch", "pretraining": "pre-training"}[row.kind]
    note = kind if row.arm.runs else "not begun"
    cells = [
        f'<th scope="row" data-value="{escape(row.name)}">{breakable(row.name)}{f"<small>{note}</small>" if note else ""}</th>',
        f'<td data-value="{complete}">{complete if complete == planned else f"{complete} of {planned}"}</td>',
    ]
    cells += [_cell(row.spread(measure.key), measure) for measure in columns]
    return f"<tr{' class=main' if main else ''}>{''.join(cells)}</tr>"


def _cell(spread: Spread, measure: Measure) -> str:
    count = len(spread.values) + spread.others
    if spread.mean is None:
        return f'<td data-value="">{measure.infinite if spread.others else DASH}</td>'
    small = []
    if measure.spread and spread.deviation is not None:
        small.append(f"± {measure.text(spread.deviation).lstrip('+')}")
    if spread.others:
        small.append(f"{measure.infinite} in {spread.others} of {count}")
    text = measure.text(spread.mean)
    below = f"<small>{', '.join(small)}</small>" if small else ""
    return f'<td data-value="{spread.mean!r}">{f"<b>{text}</b>" if measure.headline else text}{below}</td>'


def comparisons_html(compared: Sequence[Comparison]) -> str:
    """Every arm against its reference: final upstream and downstream loss and their average; bold if more than noise."""
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
        "Bold if the interval excludes 0 and both were trained on the same number of tokens; with one seed the noise is "
        "unknown.</p>"
    )


def _difference(comparison: Comparison | None) -> str:
    if comparison is None or not math.isfinite(comparison.difference.mean):
        return f"<td>{DASH}</td>"
    text = difference_text(comparison.difference)
    return f"<td><b>{text}</b></td>" if comparison.established else f"<td>{text}</td>"
