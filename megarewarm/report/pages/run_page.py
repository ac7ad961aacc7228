"""The report of runs: one self-contained HTML page, its pictures as PNGs, its table as CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megarewarm.record.lines import number
from megarewarm.record.run import BITS, RecordedRun, read_runs
from megarewarm.report.figures import abilities, positions, tradeoff, training, values
from megarewarm.report.figures import curves as draw
from megarewarm.report.figures.lines import Line, lines_of
from megarewarm.report.figures.values import describe_values, draw_values
from megarewarm.report.numbers.measure import MEASURES, Measure, file_row, measures_of
from megarewarm.report.numbers.runs import RunRow, differences, rows
from megarewarm.report.numbers.tasks import task_labels
from megarewarm.report.pages.files import finite, write_csv, write_json
from megarewarm.report.pages.html import (
    STYLE,
    Picture,
    breakable,
    dot,
    page_html,
    picture_html,
    save_png,
    setting_text,
    svg_of,
    value_cells,
)
from megarewarm.report.pages.words import summarise
from megarewarm.spelling import DASH, duration_text, tokens_text

PICTURES = ("curves", "tradeoff", "abilities", "values", "positions", "training", "sets", "pretraining", "pretraining_steps")


def report(run_folders: Sequence[Path | str], output_folder: Path | str) -> Path:
    """Write the report of ``run_folders`` into ``output_folder`` and return the path of its report.html.

    Beside it: the pictures as PNG (those of ``PICTURES`` that apply), table.csv and table.json. Raises UserError if a folder
    has no readable metrics.
    """
    runs = read_runs(run_folders)
    table = rows(runs)
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier report's could be taken for this one's
    drawn = pictures(runs, table)
    for picture in drawn:
        save_png(picture, folder)
    measures = measures_of(table)
    flat = [file_row(row, measures) for row in table]
    write_json(folder / "table.json", flat, indent=2)
    # a loss that is not finite is empty here too, with 'diverged' true
    write_csv(folder / "table.csv", [finite(row) for row in flat])
    page = folder / "report.html"
    page.write_text(_page(runs, table, drawn), encoding="utf-8")
    return page


def pictures(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> list[Picture]:
    """The report's pictures of ``runs``, whose rows are ``table``; without those that have nothing to show."""
    lines = lines_of(runs, table)
    named = [(row.label, run) for row, run in zip(table, runs, strict=True)]
    drawn: list[tuple[str, str, Figure | None, str, str]] = [
        (
            "curves",
            "Losses and learning rates",
            draw.draw_curves(lines),
            draw.describe_curves(lines),
            draw.caption_curves(lines),
        ),
        (
            "tradeoff",
            "Forgetting against adaptation",
            tradeoff.draw_tradeoff(lines),
            tradeoff.describe_tradeoff(table),
            tradeoff.caption_tradeoff(table),
        ),
        (
            "abilities",
            "Abilities",
            abilities.draw_abilities(lines),
            abilities.describe_abilities(lines),
            abilities.CAPTION,
        ),
        (
            "values",
            "Values of the training data",
            draw_values(named),
            describe_values(named),
            values.CAPTION,
        ),
        (
            "positions",
            "Loss by position",
            positions.draw_positions(lines),
            positions.describe_positions(lines),
            positions.CAPTION,
        ),
        ("training", "Training", *_training([line for line in lines if not line.is_pretraining])),
        ("sets", "Every validation set", draw.draw_sets(lines), "Line charts: loss of every set against tokens.", ""),
        ("pretraining", "Pre-training", draw.draw_pretraining(lines), draw.describe_pretraining(lines), ""),
        ("pretraining_steps", "Pre-training, step by step", *_training([line for line in lines if line.is_pretraining])),
    ]
    return [Picture(name, title, figure, text, caption) for name, title, figure, text, caption in drawn if figure is not None]


def _training(lines: Sequence[Line]) -> tuple[Figure | None, str, str]:
    return training.draw_training(lines), training.describe_training(lines), training.CAPTION


def _page(runs: Sequence[RecordedRun], table: Sequence[RunRow], pictures: Sequence[Picture]) -> str:
    title = table[0].label if len(table) == 1 else f"{len(table)} runs compared"
    first = ("curves", "tradeoff") if any(picture.name == "curves" for picture in pictures) else ("pretraining",)
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in summarise(runs))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(", ".join(row.label for row in table))}</p>' if len(table) > 1 else "",
        f'<ul class="summary">{sentences}</ul>',
        *(_section(picture) for picture in pictures if picture.name in first),
        "<h2>In numbers</h2>",
        _numbers(table),
        _abilities(table),
        *(_section(picture) for picture in pictures if picture.name not in first),
        _starts(runs, table),
        _processes(runs, table),
        _notes(runs, table),
        _settings(runs, table),
        '<footer class="quiet">The same numbers are in table.csv and table.json beside this page, the pictures in PNG '
        f"files. Losses are mean cross entropies in {runs[0].unit} on fixed validation tokens.</footer>",
    ]
    return page_html(title, STYLE, parts)


def _section(picture: Picture) -> str:
    return picture_html(picture, svg_of(picture.figure), "h2", narrow=picture.name == "tradeoff")


def _numbers(table: Sequence[RunRow]) -> str:
    """One row per run; a group of measures that no run has gets no columns."""
    shown = [measure for measure in MEASURES if measure.runs and measure.of is not None]
    plain = [measure for measure in shown if not measure.group]
    names = dict.fromkeys(measure.group for measure in shown if measure.group)
    groups = {name: [measure for measure in shown if measure.group == name] for name in names}
    groups = {name: held for name, held in groups.items() if any(m.of(row) is not None for m in held for row in table if m.of)}
    head = "".join(f'<th rowspan="2" scope="col">{name}</th>' for name in ("Run", *(measure.heading for measure in plain)))
    head += "".join(f'<th colspan="{len(g)}" scope="colgroup" class="group">{name}</th>' for name, g in groups.items())
    under = "".join(
        f'<th scope="col"{_GROUP if index == 0 else ""}>{measure.heading}</th>'
        for group in groups.values()
        for index, measure in enumerate(group)
    )
    body = []
    for index, row in enumerate(table):
        note = {"continued": "", "scratch": "from scratch", "pretraining": "pre-training"}[row.kind]
        cells = [
            f'<th scope="row">{dot(index)}{breakable(row.label)}' + (f"<small>{note}</small>" if note else "") + "</th>",
            *(_cell(measure, row) for measure in plain),
            *(_cell(measure, row, at == 0) for group in groups.values() for at, measure in enumerate(group)),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    grey = "" if table[0].unit == BITS else "perplexity below a loss, "
    note = (
        f"Grey: {grey}tokens at which the highest rise above the start was measured. "
        "Forgetting is the rise of the upstream loss, adaptation the fall of the downstream loss."
    )
    return (
        f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr><tr>{under}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div>\n<p class="quiet">{note}</p>'
    )


_GROUP, _LONG = ' class="group"', ' class="long"'


def _cell(measure: Measure, row: RunRow, begins_group: bool = False) -> str:
    assert measure.of is not None
    text = measure.show(measure.of(row))
    small = measure.small(row) if measure.small is not None else None
    below = f"<small>{small}</small>" if small else ""
    return f"<td{_GROUP if begins_group else ''}>{f'<b>{text}</b>' if measure.headline else text}{below}</td>"


def _abilities(table: Sequence[RunRow]) -> str:
    """The last test of each run on each of its tasks against its first."""
    body = []
    labels = task_labels(key for row in table for key in row.tests)
    for index, row in enumerate(table):
        for key, found in row.tests.items():
            first, last = found[0], found[-1]
            accuracy, bits = ([getattr(test, key) for test in (first, last)] for key in ("accuracy", "bits_per_byte"))
            changes = [None if share is None else share * last.items for share in (last.lost, last.won)]
            beyond = [None if share is None else share * last.items for share in (last.lost_beyond, last.won_beyond)]
            texts = [
                f"{100 * accuracy[0]:.1f} &rarr; <b>{100 * accuracy[1]:.1f}</b>",
                f"{100 * last.chance:.1f}",
                *(DASH if count is None else f"{count:.0f}" for count in changes),
                *(DASH if count is None else f"{count:.1f}" for count in beyond),
                f"{bits[0]:.3f} &rarr; {bits[1]:.3f}",
            ]
            cells = "".join(f"<td>{text}</td>" for text in (breakable(labels[key]), f"{last.items:,}", *texts))
            body.append(f'<tr><th scope="row">{dot(index)}{breakable(row.label)}</th>{cells}</tr>')
    if not body:
        return ""
    names = ("Run", "Task", "Items", "Accuracy, %", "Guessing, %", "Lost", "Won", "Lost beyond chance", "Won beyond chance")
    head = "".join(f'<th scope="col">{name}</th>' for name in (*names, "Bits per byte"))
    return (
        f'<h2>Tasks</h2>\n<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(body)}</tbody></table></div>\n<p class="quiet">From the first test to the last, on the same items. '
        "Lost: items that were right before the run and are wrong now; won: the other way round. Beyond chance: less what "
        "guessing explains, (1 - accuracy before) (1 - accuracy now) / (k - 1) of items of k choices (arXiv 2510.17776). "
        "Bits per byte: of the right choices.</p>"
    )


def _starts(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> str:
    """What every run started from, and which state of the checkpoint it kept and reset."""
    if not any(run.start for run in runs):
        return ""
    starts: dict[tuple[str, str, str], list[str]] = {}
    for run, row in zip(runs, table, strict=True):
        reset = run.start.get("reset")
        told = ", ".join(map(_choice, reset)) if isinstance(reset, list) else ""
        parameters = run.start.get("parameters")
        size = tokens_text(parameters) if isinstance(parameters, int | float) else DASH
        starts.setdefault((row.origin or "scratch", told or DASH, size), []).append(row.label)
    body = "".join(
        f"<tr>{''.join(f'<td>{breakable(value)}</td>' for value in (', '.join(names), *start))}</tr>"
        for start, names in starts.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Runs", "Started from", "State kept and reset", "Parameters"))
    return (
        "<h2>Starts</h2>\n"
        f'<div class="wide"><table class="settings"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _processes(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> str:
    """When each run trained, for how long, on what and with which versions; without empty columns."""
    columns: dict[str, list[str]] = {
        "Date (UTC)": [_date(number(run.start.get("time"))) for run in runs],
        "Wall time": [DASH if row.wall_time is None else duration_text(row.wall_time) for row in table],
        "Tokens/s": [DASH if row.tokens_per_second is None else tokens_text(row.tokens_per_second) for row in table],
        "Device": [_device(run.start) for run in runs],
        "Precision": [_said(run.start.get("precision")) for run in runs],
        "Kernels": [_said(run.start.get("kernels")) for run in runs],
        "Versions": [_said(run.start.get("versions")) for run in runs],
    }
    columns = {name: texts for name, texts in columns.items() if any(text != DASH for text in texts)}
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Run", *columns))
    cells = [[f"<td{_LONG * (len(text) > 30)}>{text}</td>" for text in texts] for texts in columns.values()]
    body = "".join(
        f'<tr><th scope="row">{breakable(row.label)}</th>{"".join(line)}</tr>'
        for row, line in zip(table, zip(*cells, strict=True), strict=True)
    )
    return (
        f'<h2>Time and machine</h2>\n<div class="wide"><table class="settings"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>\n<p class="quiet">Wall time is from each start to its last event, without '
        "pauses. Tokens/s is the median over steps, without evaluations and saves.</p>"
    )


def _date(time: float) -> str:
    """Seconds since 1970 as '2026-11-28 10:12'; a dash if that is no date."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M") if 0 < time < 4e9 else DASH


def _device(start: dict[str, Any]) -> str:
    """'1 x cpu', '8 x cuda, pipeline 1 x data 8 x tensor 1'."""
    ranks, device, layout = (start.get(key) for key in ("ranks", "device", "layout"))
    if not isinstance(ranks, int) or device is None:
        return DASH
    return breakable(f"{ranks} x {str(device).partition(':')[0]}" + (f", {layout}" if ranks > 1 else ""))


def _said(value: Any) -> str:
    """A text, or 'name value' for each of a mapping's texts, as HTML; only the names of flags that are set."""
    if isinstance(value, dict):
        told = {str(key): own for key, own in value.items() if own and isinstance(own, str | bool)}
        return breakable(", ".join(key if own is True else f"{key} {own}" for key, own in told.items())) or DASH
    return breakable(value) if isinstance(value, str) and value else DASH


def _notes(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> str:
    """The notes of each run's start, such as validation sets that hold less than requested."""
    said: dict[str, list[str]] = {}
    for run, row in zip(runs, table, strict=True):
        notes = run.start.get("notes")
        for note in notes if isinstance(notes, list) else ():
            said.setdefault(str(note), []).append(row.label)
    if not said:
        return ""
    lines = "".join(f"<li>{escape(', '.join(labels))}: {breakable(note)}</li>" for note, labels in said.items())
    return f"<h2>Notes at the start</h2>\n<ul>{lines}</ul>"


def _choice(line: Any) -> str:
    """A line of the reset table, such as 'moments: reset'."""
    return f"{line.get('line')}: {line.get('choice')}" if isinstance(line, dict) else str(line)


def _settings(runs: Sequence[RecordedRun], table: Sequence[RunRow]) -> str:
    """The config keys in which the runs differ, without pre-training, which differs in most."""
    kept = [(run, row) for run, row in zip(runs, table, strict=True) if row.kind != "pretraining"]
    if len(kept) < 2:
        return ""
    different = differences([run for run, _ in kept])
    different.pop("start.from", None)  # shown under Starts
    if not different:
        return "<h2>Settings</h2>\n<p>The configs of the runs are the same in every key.</p>"
    head = "".join(f'<th scope="col">{escape(row.label)}</th>' for _, row in kept)
    body = "".join(f'<tr><th scope="row">{escape(key)}</th>{_cells(values)}</tr>' for key, values in different.items())
    return (
        "<h2>Settings that differ</h2>\n"
        f'<div class="wide"><table class="settings"><thead><tr><th scope="col">Key</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(values: Sequence[Any]) -> str:
    return "".join(value_cells([setting_text(value) for value in values]))
