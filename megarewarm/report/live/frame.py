"""One frame of the live view as lines of styled text, for any width, in Unicode or ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.text import Text

from megarewarm.record.run import APART, BITS
from megarewarm.report.live.watch import STATES, Losses, Overview, RunView, State
from megarewarm.spelling import duration_text, rate_text, signed_text, tokens_text

WIDE = 118
"""Least number of columns for all of a run's numbers on one line."""

_STYLES: dict[State, str] = {
    "diverged": "bold red", "stalled": "bold red", "running": "cyan", "stopped": "yellow", "waiting": "dim", "done": "green",
}  # fmt: skip
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_ASCII = str.maketrans({"·": "|", "−": "-", "–": "-", "—": "-", "→": ">", "…": "~", "’": "'", "×": "x"})
_UNITS = {
    BITS: "tokenizers differ: upstream and downstream losses are in bits per byte",
    APART: "tokenizers differ, and not every bits per byte is known: losses don't compare",
}
_LONGEST_NAME = 36
_TITLE = 16  # characters of the title that stay in a full headline
_ALARMS = 6  # most lines of alarms in a frame without a set height
_ROWS = 40  # most runs that such a frame lists before it folds


def frame(overview: Overview, width: int, height: int | None = None, *, unicode: bool = True) -> list[Text]:
    """The frame: a headline, a line for each run (two for a running one if they fit a narrow terminal), tests on tasks, alarms.

    No line is wider than ``width`` characters and there are at most ``height`` of them (at least 6). The most urgent runs come
    first; if not all fit, waiting and finished runs are counted instead of listed.
    """
    width = max(width, 40)
    room = max(height, 6) if height is not None else None
    lines = [_headline(overview, width)]
    alarms = _alarm_lines(overview)
    most = _ALARMS if room is None else max(1, min(_ALARMS, (room - 3) // 3))
    if len(alarms) > most:
        alarms = [*alarms[: most - 1], Text(f"{len(alarms) - most + 1} more alarms", style="red")]
    alarms += [Text(_UNITS[overview.unit], style="dim")] if overview.unit in _UNITS else []
    tests = _test_lines(overview, width)
    if room is None or len(lines) + 1 + len(overview.runs) + len(tests) + len(alarms) <= room:
        alarms = [*tests, *alarms]
    used = len(lines) + 1 + len(alarms)
    rows = _rows(overview, width, None if room is None else room - used, unicode)
    lines += [_header(overview, width), *rows, *alarms]
    return [_fit(line, width, unicode) for line in lines]


def _headline(overview: Overview, width: int) -> Text:
    counts = [(overview.count(state), state) for state in STATES]
    text = Text()
    tail = Text()
    for number, state in counts:
        if number:
            tail.append("  ")
            tail.append(f"{number} {state}", style=_STYLES[state])
    if not all(run.state == "done" for run in overview.runs):
        tail.append(f"  {overview.share:.0%}")
        if overview.left is not None and overview.left > 0:
            tail.append(f"  {duration_text(overview.left)} left", style="bold")
            rest = f" without {overview.idle} idle"
            if overview.idle and len(tail.plain) + len(rest) + min(len(overview.title), _TITLE) <= width:
                tail.append(rest, style="dim")
    text.append(_short(overview.title, max(8, width - len(tail.plain))), style="bold")
    return text.append_text(tail)


def _columns(overview: Overview, width: int) -> tuple[int, int, bool]:
    """Width of the names, of the sparklines, and whether all numbers fit on one line."""
    wide = width >= WIDE
    fixed = 9 + 10 + 2 * (7 + 7 + 3) + 7 + 8 + 7 + 7 if wide else 9 + 5 + 2 * (8 + 2) + 7
    longest = min(_LONGEST_NAME, max((8, *(len(run.name) for run in overview.runs))))
    spark = max(4, min(24, (width - fixed - longest) // 2))
    return max(8, min(longest, width - fixed - 2 * spark)), spark, wide


def _header(overview: Overview, width: int) -> Text:
    name, spark, wide = _columns(overview, width)
    text = f"{'run':{name}} {'state':8}"
    if wide:
        text += f" {'step':>9}  {'upstream':{spark + 15}}  {'downstream':{spark + 15}}"
        text += f" {'loss':>6} {'lr':>7} {'tok/s':>6} {'left':>6}"
    else:
        text += f" {'':>4}  {'upstream':{spark + 8}}  {'downstream':{spark + 8}} {'left':>6}"
    return Text(text, style="dim")


def _rows(overview: Overview, width: int, room: int | None, unicode: bool) -> list[Text]:
    """The runs' lines within ``room`` lines."""
    by_state = {state: [run for run in overview.runs if run.state == state] for state in STATES}
    ranked = [run for state in STATES for run in by_state[state]]
    limit = _ROWS if room is None else room
    columns = _columns(overview, width)
    folds: list[Text] = []
    shown = ranked
    if len(ranked) > limit:
        kept = [run for run in ranked if run.state not in ("waiting", "done")]
        folded = [state for state in ("waiting", "done") if by_state[state]]
        if room is not None and len(kept) > room - len(folded):
            kept = kept[: max(0, room - len(folded) - 1)]
            missing = sum(run.state not in ("waiting", "done") for run in ranked) - len(kept)
            folds.append(Text(f"{missing} more running or idle", style="dim"))
        shown = kept
        folds += [_folded(state, by_state[state], width) for state in STATES if state in folded]
    rows: list[Text] = []
    twice = not columns[2] and len(shown) + len(folds) + len(by_state["running"]) <= limit
    for run in shown:
        rows.append(_row(run, columns, unicode))
        if twice and run.state == "running" and run.step is not None:
            rows.append(_detail(run))
    return rows + folds


def _row(run: RunView, columns: tuple[int, int, bool], unicode: bool) -> Text:
    name, spark, wide = columns
    text = Text(f"{_short(run.name, name):{name}} ")
    text.append(f"{run.state:8}", style=_STYLES[run.state])
    if run.state == "waiting":
        waits = f"for {', '.join(run.after)}" if run.after else ""
        return text.append(f"  {waits}", style="dim")
    text.append(f" {_steps(run):>9}" if wide else f" {run.share:>4.0%}")
    for losses in (run.upstream, run.downstream):
        text.append("  ")
        text.append_text(sparkline(losses, spark, unicode))
        if wide:
            text.append(f" {_loss(losses.newest):>6}")
        told = _loss(losses.newest) if losses.start is None and not wide else _signed(losses.difference)
        text.append(f" {told:>7}", style=_trend(losses.difference))
    if wide:
        rate = tokens_text(run.tokens_per_second) if run.tokens_per_second else "–"
        text.append(f" {_loss(run.loss):>6} {rate_text(run.lr):>7} {rate:>6}")
    return text.append(f" {duration_text(run.left) if run.state == 'running' else '':>6}")


def _detail(run: RunView) -> Text:
    """The numbers for which a narrow terminal has no columns."""
    parts = [f"step {_steps(run)}", f"loss {_loss(run.loss)}", f"lr {rate_text(run.lr)}"]
    if run.tokens_per_second:
        parts.append(f"{tokens_text(run.tokens_per_second)} tok/s")
    for name, losses in (("up", run.upstream), ("down", run.downstream)):
        if losses.newest is not None:
            parts.append(f"{name} {_loss(losses.newest)}")
    return Text("  " + " · ".join(parts), style="dim")


def sparkline(losses: Losses, width: int, unicode: bool = True) -> Text:
    """The losses so far in ``width`` characters, red where above the start checkpoint's, green where below.

    Each character is the loss farthest from the start's in its share of the steps, so that a short rise is visible. The height
    ranges from the lowest to the highest of the run's own losses, including the start's.
    """
    points = [(step, loss) for step, loss in losses.points if math.isfinite(loss)]
    if not points:
        return Text(" " * width)
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([loss for _, loss in points])
    span = max(steps[-1] - steps[0], 1.0)
    cells = np.minimum((steps - steps[0]) / span * width, width - 1).astype(int)
    centre = losses.start if losses.start is not None else float(values.mean())
    levels = np.interp(np.arange(width) + 0.5, (steps - steps[0]) / span * width, values)
    for cell in np.unique(cells):
        within = values[cells == cell]
        levels[cell] = within[np.argmax(np.abs(within - centre))]
    levels[-1] = values[-1]
    low, high = min(float(levels.min()), centre), max(float(levels.max()), centre)
    bars = _BARS if unicode else _ASCII_BARS
    text = Text()
    for level in levels:
        place = round((level - low) / (high - low) * (len(bars) - 1)) if high > low else 0
        text.append(bars[place], style=_trend(level - centre) if losses.start is not None else "")
    return text


def _folded(state: State, runs: Sequence[RunView], width: int) -> Text:
    """Runs of one state in one line: their number, and the most important facts about them."""
    text = Text(f"{len(runs)} {state}", style=_STYLES[state])
    if state == "done":
        for role, name in (("upstream", " · lowest up"), ("downstream", ", down")):
            losses = [(getattr(run, role).newest, run.name) for run in runs]
            ended = [(loss, name) for loss, name in losses if loss is not None and math.isfinite(loss)]
            if len(runs) > 1 and ended:
                loss, best = min(ended)
                text.append(f"{name} {_loss(loss)} ", style="dim").append(_short(best, max(8, (width - 40) // 2)))
        return text
    names, left = [run.name for run in runs], width - len(text.plain) - 16
    listed: list[str] = []
    while names and len(", ".join([*listed, names[0]])) <= left:
        listed.append(names.pop(0))
    told = ", ".join(listed) + (f" and {len(names)} more" if names else "")
    return text.append(f" · {told}" if listed else "", style="dim")


def _test_lines(overview: Overview, width: int) -> list[Text]:
    """The newest test of each task, of each of the running runs, or of the only run, in as many lines as they need."""
    shown = [run for run in overview.runs if run.tests and (run.state == "running" or len(overview.runs) == 1)]
    lines = []
    for run in shown[:_ALARMS]:
        line = f"  {_short(run.name, 28)}: " if len(overview.runs) > 1 else "  "
        begun = False
        for test in run.tests:
            text = f"{test.name} {100 * test.accuracy:.1f} %"
            if test.lost is not None and test.won is not None and test.step > run.first:
                text += f", lost {test.lost * test.items:.0f}, won {test.won * test.items:.0f}"
            if begun and len(line) + 3 + len(text) > width:
                lines.append(line)
                line, begun = "    ", False
            line += " · " * begun + text
            begun = True
        lines.append(line)
    return [Text(line, style="dim") for line in lines]


def _alarm_lines(overview: Overview) -> list[Text]:
    """A line for each alarm of a run that isn't done, the most urgent state first."""
    lines = []
    for state in STATES:
        for run in overview.runs:
            if run.state != state or (state == "done" and len(overview.runs) > 1):
                continue
            for alarm in run.alarms:
                text = Text("! ", style="bold red")
                lines.append(text.append(_short(run.name, 28), style="bold").append(f": {alarm}", style="not bold"))
    return lines


def _steps(run: RunView) -> str:
    step, total = run.step or 0, run.total
    if total is None:
        return f"{step}/?"
    plain = f"{step}/{total}"
    return plain if len(plain) <= 9 else f"{tokens_text(step)}/{tokens_text(total)}"


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}" if math.isfinite(loss) else "nan"


def _signed(difference: float | None) -> str:
    return signed_text(difference).replace("diverged", "nan")


def _trend(difference: float | None) -> str:
    if difference is None or not math.isfinite(difference) or abs(difference) < 5e-4:
        return ""
    return "red" if difference > 0 else "green"


def _short(name: str, width: int) -> str:
    """At most ``width`` characters: keeps the start and the end of a long name, because both distinguish it."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _fit(line: Text, width: int, unicode: bool) -> Text:
    """Cut to the width; in ASCII if the terminal shows nothing else."""
    if len(line.plain) > width:
        line = line[: width - 1].append("…")
    if not unicode:
        line.plain = line.plain.translate(_ASCII).encode("ascii", "replace").decode()
    line.no_wrap, line.overflow = True, "crop"
    return line
