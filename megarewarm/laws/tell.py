"""Advice in the terminal: the answer, one table of measured and predicted losses, and the laws on request."""

from __future__ import annotations

import itertools

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megarewarm.laws.advice import Advice
from megarewarm.laws.answer import Recommendation, aimed
from megarewarm.laws.sections import LawSection, Prediction, describe
from megarewarm.spelling import loss_text, rate_text

FORMS = {
    "schedule": "L(t) = L(0) + A ((S0 + S1)^-a - S0^-a) - C S2 + B (1 - (1 + E S1)^-b)",
    "replay": "L(D, r) = E + B r^n / D^b + C / (r + e)^g",
}
_ARMS, _PREDICTED = 12, 5  # rows of a list of arms
_WIDEST = 9  # columns of a grid; a wider one shows only measured losses


def print_advice(advice: Advice, console: Console, details: bool = False) -> None:
    """Print the answer to every question, best first; with ``details`` also the laws, their predictions of held-out levels, and
    every family's verdict. advice.json has the rest."""
    console.print(f"[bold]{advice.title}[/]", highlight=False)
    for one in advice.answers:
        if len(advice.answers) > 1:
            console.print(f"\n[bold]{_group(one)}[/]", highlight=False)
        for number, sentence in enumerate(one.sentences):
            console.print(sentence, style="bold" if not number else None, highlight=False, markup=False)
        if len(one.measured) > 1:
            console.print()
            console.print(_grid(one) or _list(one))
    for note in advice.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    if not details:
        if advice.sections:
            console.print("--all shows the laws and how well they predicted held-out levels.", style="dim")
        return
    for section in advice.sections:
        console.print()
        console.print(f"[bold]{section.kind}[/] · {', '.join(section.family.arms)}", highlight=False)
        if section.laws:
            console.print(FORMS[section.kind], style="dim", highlight=False)
            console.print(_held_out(section))
        for sentence in section.sentences:
            console.print(f"- {sentence}", highlight=False, markup=False)


def _group(one: Recommendation) -> str:
    run = one.question.runs[0]
    names = one.question.arms
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} (from {run.config.get('start', {}).get('from', 'a checkpoint')}, {run.steps} steps)"


def _grid(one: Recommendation) -> Table | None:
    """Peak x replay, if the arms differ only in these: upstream above downstream, predictions with a tilde."""
    cells: dict[tuple[float, float], dict[str, float]] = {}
    for arm, losses in one.measured.items():
        keys = _cell(float(one.question.of(arm)[0].rates.max()), one.question.of(arm)[0].replay)
        if keys in cells:
            return None
        cells[keys] = losses
    kinds = {describe(run, {"max_lr": 0.0}, 0.0) for run in one.question.runs}
    if len({peak for peak, _ in cells}) < 2 or len({fraction for _, fraction in cells}) < 2 or len(kinds) > 1:
        return None
    measured = set(cells)
    tried = sorted({fraction for _, fraction in measured})
    tried += [round((low + high) / 2, 5) for low, high in itertools.pairwise(tried)]
    for section in one.sections:
        for made in section.predictions:
            if made.arm is None:
                replay = made.keys["replay"]
                key = _cell(float(made.keys["schedule"]["max_lr"]), replay["fraction"] if replay else 0.0)
                if key not in measured and key[1] in tried:
                    cells[key] = cells.get(key, {}) | made.losses
    if len({peak for peak, _ in cells}) > _WIDEST:
        peaks = {peak for peak, _ in measured}
        cells = {key: losses for key, losses in cells.items() if key[0] in peaks}
    peaks_shown = sorted({peak for peak, _ in cells})
    best = _cell(float(one.question.of(one.best)[0].rates.max()), one.question.of(one.best)[0].replay)
    what = "final losses, " + " above ".join(one.question.roles)
    what += "; ~ predicted, not run" if len(cells) > len(measured) else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=what, title_justify="left", show_lines=False)
    table.add_column("replay", justify="right", no_wrap=True)
    for peak in peaks_shown:
        table.add_column(f"peak\n{rate_text(peak)}", justify="right", no_wrap=True)
    for fraction in sorted({fraction for _, fraction in cells}):
        row: list[RenderableType] = [f"{100 * fraction:.3g}%"]
        for peak in peaks_shown:
            key = peak, fraction
            mark = "" if key in measured else "~"
            values = [cells.get(key, {}).get(role) for role in one.question.roles]
            text = "\n".join("" if value is None else f"{mark}{loss_text(value)}" for value in values)
            row.append(Text(text, style="bold reverse" if key == best else ""))
        table.add_row(*row, end_section=False)
    return table


def _cell(peak: float, fraction: float) -> tuple[float, float]:
    return float(f"{peak:.4g}"), round(fraction, 5)


def _list(one: Recommendation) -> Table:
    """The best arms, and the best predictions of new runs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for role in one.question.roles:
        table.add_column(role, justify="right", no_wrap=True)
    order = sorted(one.measured, key=lambda arm: aimed(one.measured[arm], one.aim))
    order.sort(key=lambda arm: arm != one.best)
    for arm in order[:_ARMS]:
        table.add_row(arm, *(loss_text(one.measured[arm][role]) for role in one.question.roles))
    if len(order) > _ARMS:
        table.add_row(f"and {len(order) - _ARMS} more arms", *("" for _ in one.question.roles))
    for made in _not_run(one)[:_PREDICTED]:
        table.add_row(f"~ {made.what}", *(f"{made.losses[role]:.3f}±{made.bands[role]:.3f}" for role in one.question.roles))
    return table


def _not_run(one: Recommendation) -> list[Prediction]:
    """Predictions of all losses of new runs, the lowest first."""
    made = [p for section in one.sections for p in section.predictions if p.arm is None]
    return sorted((p for p in made if set(p.losses) == set(one.question.roles)), key=lambda p: aimed(p.losses, one.aim))


def _held_out(section: LawSection) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title="held out, then predicted", title_justify="left"
    )
    table.add_column("arm", overflow="fold", min_width=16)
    for role in section.laws:
        for column in (role, "law", "error"):
            table.add_column(column, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], list[str]] = {}
    several = len({arm.along for law in section.laws.values() for arm in law.trial.arms}) > 1
    for law in section.laws.values():
        for arm in law.trial.arms:
            mark = "" if arm.inside else " *"
            cells = [loss_text(arm.measured), loss_text(arm.predicted), f"{arm.error:+.3f}{mark}"]
            rows.setdefault((arm.arm, arm.level), []).extend(cells)
    for (name, level), cells in rows.items():
        table.add_row(f"{name} (without {level})" if several and level and level != name else name, *cells)
    if any(not arm.inside for law in section.laws.values() for arm in law.trial.arms):
        table.caption, table.caption_justify = (
            "* outside the range of the remaining arms: not counted, and nothing is predicted there",
            "left",
        )
    return table
