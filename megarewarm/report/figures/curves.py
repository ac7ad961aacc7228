"""The report's figures. Every function returns a matplotlib figure; none shows or writes anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from megarewarm.record.run import BITS, DOWNSTREAM, UPSTREAM, Curve, RecordedRun
from megarewarm.report.figures import style
from megarewarm.report.figures.labels import spread
from megarewarm.report.figures.lines import Line
from megarewarm.spelling import rate_text, tokens_text

_WIDTH = 11.0
_LEAST = 2.2  # inches of the left column: room for two headings
_EARLY = 0.1  # the share of the tokens that the left column enlarges
_AT_END = 0.97  # of the axis: a curve that ends before isn't joined to its label, which would look like its continuation
_POINTS = 1200  # more points are not visible on a page


def draw_curves(lines: Sequence[Line]) -> Figure | None:
    """Learning rate, upstream and downstream loss against the tokens of this stage, for every run but pre-training.

    If there are enough evaluations, a left column enlarges the first tenth. ``None`` if nothing is left to draw.
    """
    kept = [line for line in lines if not line.is_pretraining]
    return curves_figure(kept) if kept else None


def draw_pretraining(lines: Sequence[Line]) -> Figure | None:
    """The runs that others continue, in a small figure of their own; ``None`` if there are none."""
    lines = [line for line in lines if line.is_pretraining]
    if not lines:
        return None
    quantities = ["lr", *(role for role in (UPSTREAM, DOWNSTREAM) if any(line.run.sets(role) for line in lines))]
    with style.style():
        figure = style.new_figure(_WIDTH, 3.0)
        left = 0.065
        for column, quantity in enumerate(quantities):
            axes = figure.add_axes((left + column * 0.335, 0.17, 0.235, 0.64))  # between them: ticks of loss and perplexity
            if quantity == "lr":
                _draw_rates(axes, lines)
                _rate_ticks(axes)
            else:
                _draw_losses(axes, lines, quantity)
                _limit(axes, lines, [line.run.curve(quantity) for line in lines])
                _loss_ticks(axes, lines[0].run.unit)
                _end_markers(axes, lines, quantity)
            axes.set_title(_title(lines, quantity))
            axes.set_xlim(0, max(line.run.tokens for line in lines) or 1)
            token_axis(axes)
        if len(lines) > 1:
            legend_above(figure, lines)
        return figure


def draw_sets(lines: Sequence[Line]) -> Figure | None:
    """Every validation set by itself, if a role has several sets or a set has no role; else ``None``."""
    lines = [line for line in lines if not line.is_pretraining] or lines
    sets = list(dict.fromkeys((e.role, e.name) for line in lines for e in line.run.evaluations))
    if len(sets) == len({role for role, _ in sets} - {"other"}):
        return None
    with style.style():
        count = math.ceil(len(sets) / 2)
        head = 0.55 + 0.21 * math.ceil(len(lines) / legend_columns(lines))
        total = head + 2.9 * count
        figure = style.new_figure(_WIDTH, total)
        panels = list(figure.subplots(count, 2, squeeze=False).flat)
        figure.subplots_adjust(
            left=0.095, right=0.985, top=1 - head / total, bottom=0.55 / total, hspace=0.42, wspace=0.24
        )  # fmt: skip
        for axes, (role, name) in zip(panels, sets, strict=False):
            _draw_losses(axes, lines, role, name)
            _limit(axes, lines, [line.run.curve(role, name) for line in lines])
            bits = ", bits per byte" if lines[0].run.unit == BITS else ""
            axes.set_title(name + bits if role == "other" else f"{name} ({role}{bits})")
            axes.set_xlim(0, max(line.run.tokens for line in lines) or 1)
            _loss_ticks(axes, lines[0].run.unit)
            _end_markers(axes, lines, role, name)
            token_axis(axes)
        for axes in panels[len(sets) :]:
            axes.set_visible(False)
        legend_above(figure, lines)
        return figure


def describe_curves(lines: Sequence[Line]) -> str:
    """Alternative text of ``draw_curves``: what it shows, and where each run begins and ends."""
    return _describe([line for line in lines if not line.is_pretraining])


def caption_curves(lines: Sequence[Line]) -> str:
    """How to read ``draw_curves`` of these lines."""
    return caption_lines([line for line in lines if not line.is_pretraining])


def caption_lines(kept: Sequence[Line], stages: Sequence[tuple[float, str]] = ()) -> str:
    """How to read ``curves_figure`` of these lines, with the same ``stages``."""
    text = "The number after a name is its last loss."
    if any(_starts(kept, role) for role in (UPSTREAM, DOWNSTREAM)):
        text += " The dashed line is the start checkpoint's loss."
    if not stages and _has_early_detail(kept):
        text += " The left column enlarges the shaded tenth of the right one."
    if kept and any(len(group) > 1 for group in _same_rates(kept)):
        text += " Dashes that change colour are runs with the same learning rate."
    if len({line.run.origin is None for line in kept}) > 1:
        text += " Runs from scratch begin above the picture; an arrow marks one that also ends there."
    return text


def describe_pretraining(lines: Sequence[Line]) -> str:
    """Alternative text of ``draw_pretraining``."""
    return _describe([line for line in lines if line.is_pretraining])


def _describe(lines: Sequence[Line]) -> str:
    return describe_named([(line.row.label, line.run) for line in lines if line.row is not None])


def describe_named(named: Sequence[tuple[str, RecordedRun]]) -> str:
    """Alternative text of ``curves_figure`` for runs under the given names."""
    ends = []
    for label, run in named:
        parts = [f"peak LR {rate_text(run.peak_lr)}"]
        for role in (UPSTREAM, DOWNSTREAM):
            if len(curve := run.curve(role)):
                first, last = (f"{x:.2f}" if math.isfinite(x) else "diverged" for x in curve.losses[[0, -1]].tolist())
                parts.append(f"{role} loss {first} to {last}")
        ends.append(f"{label}: {', '.join(parts)}")
    return "Line charts of learning rate, upstream loss and downstream loss against tokens. " + "; ".join(ends) + "."


def curves_figure(
    lines: Sequence[Line], stages: Sequence[tuple[float, str]] = (), axis: str = "tokens of this stage"
) -> Figure:
    """One row per quantity; the left column enlarges the first tenth if it has enough detail.

    ``stages``: tokens at which each stage of a chain begins, and its name; they are marked, and nothing is enlarged.
    """
    roles = [role for role in (UPSTREAM, DOWNSTREAM) if any(line.run.sets(role) for line in lines)]
    heights = [max(1.7, 0.21 * len(lines) + 0.5), *([max(3.0, 0.2 * len(lines) + 0.4)] * len(roles))]
    above, gap, below = 0.42, 0.68, 0.55
    total = above + sum(heights) + gap * len(roles) + below
    longest = max(len("start checkpoint"), *(len(line.label) for line in lines))
    early_end = any(line.run.tokens < _AT_END * max(other.run.tokens for other in lines) for line in lines)
    label_width = 0.55 + 0.076 * (longest + (15 if early_end else 6))
    left, right = 0.1, 1 - label_width / _WIDTH
    early = not stages and _has_early_detail(lines)
    with style.style():
        figure = style.new_figure(_WIDTH, total)
        span = max(line.run.tokens for line in lines) or 1.0
        top = total - above
        for quantity, height in zip(["lr", *roles], heights, strict=True):
            middle = left + max((right - left) * 0.31, _LEAST / _WIDTH) if early else left
            box = (top - height) / total, height / total
            whole = figure.add_axes((middle, box[0], right - middle, box[1]))
            whole.set_xlim(0, span)
            columns = [whole]
            if early:
                columns.insert(0, figure.add_axes((left, box[0], middle - left - 0.018, box[1]), sharey=whole))
                columns[0].set_xlim(0, span * _EARLY)
                whole.axvspan(0, span * _EARLY, color=style.GRID, alpha=0.45, linewidth=0, zorder=0)
            for axes in columns:
                if quantity == "lr":
                    _draw_rates(axes, lines)
                else:
                    _draw_losses(axes, lines, quantity)
                token_axis(axes, axis if not roles or quantity == roles[-1] else "")
            _mark_stages(whole, stages, names=quantity == roles[0] if roles else True)
            columns[0].set_title(_title(lines, quantity))
            if quantity == "lr":
                _rate_ticks(columns[0])
                _legend(whole, lines)
            else:
                _limit(whole, lines, [line.run.curve(quantity) for line in lines])
                _loss_ticks(columns[0], lines[0].run.unit)
                _end_labels(columns, lines, quantity)
                _end_markers(whole, lines, quantity)
            if early:
                whole.tick_params(labelleft=False)
                if quantity == "lr":
                    columns[0].set_title("first 10%", loc="right", color=style.QUIET, fontweight="normal", fontsize=9.5)
                    whole.set_title("whole run", color=style.QUIET, fontweight="normal", fontsize=9.5)
            top -= height + gap
        return figure


def _has_early_detail(lines: Sequence[Line]) -> bool:
    """Whether some run was evaluated often enough in the first tenth to enlarge it."""
    for line in lines:
        for role in (UPSTREAM, DOWNSTREAM):
            tokens = line.run.curve(role).tokens
            if len(tokens) > 12 and np.count_nonzero(tokens <= _EARLY * line.run.tokens) >= 5:
                return True
    return False


def _title(lines: Sequence[Line], quantity: str) -> str:
    if quantity == "lr":
        return "Learning rate"
    names = list(dict.fromkeys(name for line in lines for name in line.run.sets(quantity)))
    what = ", ".join(names) if len(names) < 3 else f"mean of {len(names)} sets"
    bits = ", bits per byte" if lines[0].run.unit == BITS else ""
    return f"{quantity.capitalize()} loss{bits} ({what})"


def _same_rates(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in groups that share a learning-rate curve, apart from its very start."""
    groups: list[tuple[NDArray[np.float64], list[Line]]] = []
    span = max(line.run.tokens for line in lines)
    for line in lines:
        tokens = line.run.train["tokens"] - line.run.tokens_before
        if not len(tokens):
            continue
        sampled = np.interp(np.linspace(0.05, 1, 40) * span, tokens, line.run.train["lr"], right=np.nan)
        for known, group in groups:
            if np.allclose(known, sampled, rtol=0.02, atol=0, equal_nan=True):
                group.append(line)
                break
        else:
            groups.append((sampled, [line]))
    return [group for _, group in groups]


def _draw_rates(axes: Axes, lines: Sequence[Line]) -> None:
    """The learning rates. Runs that share a curve are drawn as alternating dashes."""
    for group in _same_rates(lines):
        for turn, line in enumerate(group):
            tokens = line.run.train["tokens"] - line.run.tokens_before
            keep = _thin(len(tokens))
            # The first is solid underneath, so that dashes out of step leave no gaps.
            dashes = (turn * 6.0, (6.0, 6.0 * (len(group) - 1))) if turn else "solid"
            axes.plot(tokens[keep], line.run.train["lr"][keep], color=line.colour, linestyle=dashes, dash_capstyle="butt")


def _draw_losses(axes: Axes, lines: Sequence[Line], role: str, name: str | None = None) -> None:
    for line in lines:
        curve = line.run.curve(role, name)
        keep = _thin(len(curve))
        axes.plot(curve.tokens[keep], curve.losses[keep], color=line.colour, linestyle=line.dashes)
        if (band := _band(line, role, name)) is not None:
            axes.fill_between(band[0], band[1], band[2], color=line.colour, alpha=0.18, linewidth=0, zorder=1.4)


def _band(
    line: Line, role: str, name: str | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Tokens, lowest and highest loss over the seeds, (points,) each; ``None`` for a single seed."""
    if len(line.seeds) < 2:
        return None
    curves = [run.curve(role, name) for run in line.seeds]
    tokens = curves[0].tokens
    for curve in curves[1:]:
        tokens = np.intersect1d(tokens, curve.tokens)
    losses = np.array([curve.losses[np.isin(curve.tokens, tokens)] for curve in curves])
    keep = _thin(len(tokens))
    return tokens[keep], losses.min(axis=0)[keep], losses.max(axis=0)[keep]


def _end_markers(axes: Axes, lines: Sequence[Line], role: str, name: str | None = None) -> None:
    """A marker at the end of every curve that ends inside the picture."""
    low, high = axes.get_ylim()
    for line in lines:
        curve = line.run.curve(role, name)
        if len(curve) and low <= curve.losses[-1] <= high:
            axes.plot(
                curve.tokens[-1:], curve.losses[-1:], line.marker, color=line.colour, markersize=5.5, clip_on=False,
                markeredgecolor="white", markeredgewidth=0.6, zorder=3,
            )  # fmt: skip


def _starts(lines: Sequence[Line], role: str) -> list[tuple[str, float]]:
    """Label and loss of every start checkpoint; runs from the same one share a line."""
    starts: dict[str, tuple[str, float]] = {}
    for line in lines:
        loss = line.run.start_loss(role) if line.run.origin else None
        if loss is not None and math.isfinite(loss) and line.run.origin not in starts:
            starts[str(line.run.origin)] = (line.label, loss)
    if len(starts) == 1:
        return [("start checkpoint", loss) for _, loss in starts.values()]
    return [(f"start of {label}", loss) for label, loss in starts.values()]


def _end_labels(columns: Sequence[Axes], lines: Sequence[Line], role: str) -> None:
    """Name and final loss of every run, right of the axes, in the order of the losses, joined to the ends by hairlines; for a
    run that ended early, at its end, without a hairline.

    The start checkpoint's loss is a dashed line with a label among them.
    """
    axes = columns[-1]
    low, high = axes.get_ylim()
    edge = axes.get_xlim()[1]
    ends: list[tuple[float, float, str, str]] = []  # loss, tokens, text, colour
    for label, loss in _starts(lines, role):
        for column in columns:
            column.axhline(loss, color=style.QUIET, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
        ends.append((loss, edge, f"{label}  {loss:.2f}", style.QUIET))
    for line in lines:
        curve = line.run.curve(role)
        if len(curve):
            loss, last = float(curve.losses[-1]), float(curve.tokens[-1])
            end = f"{loss:.2f}" + (" ↑" if loss > high else "")
            if not math.isfinite(loss):  # at the first of its last non-finite evaluations
                finite = np.flatnonzero(np.isfinite(curve.losses))
                end, loss, last = "diverged", math.inf, float(curve.tokens[finite[-1] + 1 if len(finite) else 0])
            end += f" at {tokens_text(last)}" if last < _AT_END * edge else ""
            ends.append((loss, last, f"{line.label}  {end}", line.colour))
    ends.sort(key=lambda end: end[0])
    height = axes.get_position().height * axes.figure.get_figheight()  # type: ignore[union-attr]
    heights = [(min(loss, high) - low) / (high - low) for loss, *_ in ends]
    for (loss, tokens, text, colour), place in zip(ends, spread(heights, gap=0.19 / height), strict=True):
        joined = {
            "arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkA": 1,
            "shrinkB": 3, "relpos": (0, 0.5),
        }  # fmt: skip
        axes.annotate(
            text, (tokens, min(loss, high)), xytext=(1 + 0.25 / axes.get_position().width / _WIDTH, place),
            textcoords="axes fraction", va="center", ha="left", fontsize=9, color=style.for_text(colour),
            annotation_clip=False, arrowprops=joined if loss <= high and tokens >= _AT_END * edge else None,
        )  # fmt: skip


def _legend(axes: Axes, lines: Sequence[Line]) -> None:
    """The runs by peak learning rate, beside the learning-rate panel."""
    ranked = sorted(lines, key=lambda line: -(line.run.peak_lr or 0.0))
    legend = axes.legend(
        handles=[line.legend_entry(axes, f"  {rate_text(line.run.peak_lr)}") for line in ranked],
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, labelspacing=0.35,
        handlelength=1.4, title="run and peak LR", title_fontsize=9, alignment="left", borderaxespad=0,
    )  # fmt: skip
    legend.get_title().set_color(style.QUIET)


def legend_above(figure: Figure, lines: Sequence[Line]) -> None:
    """The names of ``lines`` at the top of ``figure``."""
    figure.legend(
        handles=[line.legend_entry(figure.axes[0]) for line in lines],
        loc="upper left", bbox_to_anchor=(0.055, 1), ncols=legend_columns(lines), frameon=False, fontsize=9,
    )  # fmt: skip


def legend_columns(lines: Sequence[Line]) -> int:
    """As many columns of names as fit side by side."""
    return max(1, min(len(lines), int((_WIDTH - 0.8) / (0.65 + 0.078 * max(len(line.label) for line in lines)))))


def _limit(axes: Axes, lines: Sequence[Line], curves: Sequence[Curve]) -> None:
    """Show all of the continued runs, and as much of those from scratch as doesn't dwarf the rest."""
    continued = [_finite(curve) for line, curve in zip(lines, curves, strict=True) if line.run.origin]
    scratch = [_finite(curve) for line, curve in zip(lines, curves, strict=True) if not line.run.origin]
    if any(len(losses) for losses in continued):
        shown = np.concatenate(continued)
        room = 0.5 * max(float(np.ptp(shown)), 0.1)
        low, high = shown.min() - room, shown.max() + room
        shown = np.concatenate([shown, *(losses[(losses > low) & (losses < high)][-1:] for losses in scratch)])
    elif any(len(losses) for losses in scratch):
        # The loss of a run from scratch falls so fast in the first twentieth that it would leave no room for the rest.
        shown = np.concatenate(
            [c.losses[(c.tokens >= 0.05 * c.tokens.max()) & np.isfinite(c.losses)] for c in curves if len(c)]
        )
    else:
        return
    pad = 0.06 * max(float(np.ptp(shown)), 0.02)
    axes.set_ylim(shown.min() - pad, shown.max() + pad)


def _finite(curve: Curve) -> NDArray[np.float64]:
    return curve.losses[np.isfinite(curve.losses)]


def _rate_ticks(axes: Axes) -> None:
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate_text(value)))


def _loss_ticks(axes: Axes, unit: str) -> None:
    """Two columns of numbers at the same grid lines: the loss, and right of it the perplexity, which is its exponential; of a
    loss in bits per byte the one column."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, min_n_ticks=4))
    first, second = axes.get_yticks()[:2]
    decimals = next((d for d in (1, 2, 3) if abs(round((second - first) * 10**d) - (second - first) * 10**d) < 1e-6), 4)
    if unit == BITS:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{decimals}f}"))
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{decimals}f}   {_perplexity_tick(value)}"))
    for text, x in (("loss", -33), ("perpl.", -5)):
        axes.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(x, 9), textcoords="offset points", ha="right",
            fontsize=8, color=style.QUIET,
        )  # fmt: skip


def _perplexity_tick(loss: float) -> str:
    value = math.exp(min(loss, 50))
    return f"{float(f'{value:.3g}'):.0f}" if value >= 99.5 else f"{value:.1f}"


def _mark_stages(axes: Axes, stages: Sequence[tuple[float, str]], names: bool) -> None:
    """A line where each stage but the first begins, and the stages' names at the top."""
    for number, (tokens, name) in enumerate(stages):
        if number:
            axes.axvline(tokens, color=style.QUIET, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.2)
        if names:
            axes.annotate(
                name, (tokens, 1), xycoords=("data", "axes fraction"), xytext=(6, -3), textcoords="offset points", va="top",
                fontsize=9, color=style.QUIET, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
            )  # fmt: skip


def token_axis(axes: Axes, label: str = "tokens of this stage") -> None:
    """Ticks and the ``label`` of an axis of tokens."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
    style.quiet_axes(axes)
    axes.set_xlabel(label)


def _thin(count: int) -> NDArray[np.int64]:
    """Indices of at most about ``_POINTS`` points: all of the first, where schedules change fast, and the very last."""
    if count <= _POINTS:
        return np.arange(count)
    spaced = np.linspace(0, count - 1, _POINTS).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(200), spaced]))
