#!/usr/bin/env python3
"""What configs/experiments/worth_mini.yml shows: python benchmarks/worth.py [--write docs/worth.md]

Prints the tables; --write puts them between their marks in the page, and its pictures (worth_sources.png, worth_selection.png,
worth_order.png) beside it. Parts that have not been run are left as they are.

All differences are paired by seed; ± is half of their 95 % interval (Student's t). Losses are nats per token on held-out
documents after the last step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.page import put
from benchmarks.reproduction import Arms, Difference, end
from megarewarm.data.files.document_table import read_table
from megarewarm.data.files.token_file import TokenFile, open_tokens
from megarewarm.record.run import RecordedRun
from megarewarm.report.figures.style import INK, colour, new_figure, quiet_axes, style

SOURCES = ("prose", "code", "headers", "spoiled", "tenfold")
SETS = ("prose", "code")
ROLES = {"prose": "upstream", "code": "downstream", "headers": "downstream"}
KEPT, DROPPED, ENDS = (75, 50, 25), (1, 3, 5, 10), ("easiest", "hardest", "random")

Numbers = npt.NDArray[np.float64]


def last(name: str) -> Callable[[RecordedRun], float]:
    """The last loss on the set ``name``."""
    return end(ROLES[name], name)


def against(arms: Arms, one: str, other: str, *names: str) -> Difference:
    """The last loss of arm ``one`` minus that of ``other``, the mean of the sets ``names``."""
    both = np.mean([arms.paired(last(name), one, other) for name in names], axis=0)
    return Difference.of(both[0] - both[1])


# ---- values of sources -----------------------------------------------------------------------------------------------------


def values_of(arms: Arms) -> dict[str, Numbers]:
    """By set: the mean value of a row of each source at the end, (sources, seeds), in 1e-3 nats per token of the set."""

    def value(name: str, source: str) -> Callable[[RecordedRun], float]:
        def of(run: RecordedRun) -> float:
            event = [each for each in run.events if each["event"] == "value" and each["name"] == name][-1]
            return 1e3 * float(event["sources"].get(source, np.nan)) / int(event["rows"].get(source, 1))

        return of

    return {name: np.concatenate([arms.paired(value(name, source), "sources_none") for source in SOURCES]) for name in SETS}


def worth_of(arms: Arms) -> dict[str, Numbers]:
    """By set: how much higher the loss is without each source, (sources, seeds)."""
    found = {}
    for name in SETS:
        rows = arms.paired(last(name), "sources_none", *(f"sources_{source}" for source in SOURCES))
        found[name] = rows[1:] - rows[0]
    return found


def with_mean(found: dict[str, Numbers]) -> dict[str, Numbers]:
    return found | {"mean of both": np.mean([found[name] for name in SETS], axis=0)}


def trust(arms: Arms) -> str:
    """R^2 of the predicted change of the loss in valued steps against the measured one, by set, of all seeds."""
    told = []
    for name in SETS:
        pairs = []
        for run in arms._runs["sources_none"].values():
            events = [each for each in run.events if each["event"] == "value" and each["name"] == name]
            predicted, measured = (np.array([each[key] for each in events]) for key in ("predicted", "measured"))
            pairs.append(1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())
        told.append(f"{name} {', '.join(f'{each:.3f}' for each in pairs)}".replace("-", "−"))
    return "; ".join(told)


def sources(arms: Arms) -> Iterator[str]:
    values, worth = with_mean(values_of(arms)), with_mean(worth_of(arms))
    yield "| source | value of a row against prose | against code | loss without it: prose | code |"
    yield "|---|---|---|---|---|"
    for i, source in enumerate(SOURCES):
        told = [plus_minus(values[name][i], 1) for name in SETS] + [str(Difference.of(worth[name][i])) for name in SETS]
        yield f"| {source} | {' | '.join(told)} |"
    yield ""
    for name in (*SETS, "mean of both"):
        lowest = sum(int(np.argmin(column)) == SOURCES.index("spoiled") for column in values[name].T)
        taus = [kendalltau(v, w).statistic for v, w in zip(values[name].T, worth[name].T, strict=True)]
        whole = kendalltau(values[name].mean(1), worth[name].mean(1)).statistic
        in_seeds = ", ".join(f"{tau:+.2f}" for tau in taus).replace("-", "−")
        gain = np.delete(worth[name], SOURCES.index("spoiled"), axis=0).mean(0) - worth[name][SOURCES.index("spoiled")]
        yield (
            f"- {name}: the spoiled source has the lowest value in {lowest} of {len(taus)} seeds; Kendall's tau of values and "
            f"leave-one-out {in_seeds} in the seeds, {f'{whole:+.2f}'.replace('-', '−')} of their means; dropping one of the "
            f"other four, on average, minus dropping the spoiled one: {Difference.of(gain)}."
        )
    yield f"- R² of the predicted against the measured change in the valued steps, seed by seed: {trust(arms)}."


def plus_minus(values: Numbers, digits: int) -> str:
    each = Difference.of(values)
    if each.seeds < 2:
        return f"{each.mean:+.{digits}f} (one seed)".replace("-", "−")
    return f"{each.mean:+.{digits}f} ± {each.half:.{digits}f}".replace("-", "−")


# ---- selection -------------------------------------------------------------------------------------------------------------


def selection(arms: Arms, data: Path) -> Iterator[str]:
    yield "| arm | against | code | prose |"
    yield "|---|---|---|---|"
    rows = [("mix", "clean"), ("mix_selected", "clean"), ("mix_selected", "mix")]
    rows += [(f"d4_{kept}pct", "d4_all") for kept in KEPT]
    rows += [(f"diet_{end_}_{share}", "diet_none") for share in DROPPED for end_ in ENDS]
    for one, other in rows:
        yield f"| {one} | {other} | {against(arms, one, other, 'code')} | {against(arms, one, other, 'prose')} |"
    yield ""
    yield restored(data)


def restored(data: Path) -> str:
    """What the selection left of the file with copies, counted by contents."""
    mix, clean = open_tokens(data / "mix"), open_tokens(data / "clean")
    kept = read_table(data / "mix_selected", "list", mix).values
    before, after = {content(clean, i) for i in range(clean.num_documents)}, [content(mix, int(i)) for i in kept]
    return (
        f"Of {mix.num_documents:,} documents, {len(kept):,} were kept, where {clean.num_documents:,} were there before the "
        f"copies; {len(set(after) & before):,} of them are documents of before, byte for byte, the rest copies of which one "
        f"token in two hundred was changed."
    )


def content(file: TokenFile, number: int) -> bytes:
    return file.document(number).tobytes()


# ---- order -----------------------------------------------------------------------------------------------------------------


def orders(arms: Arms) -> list[str]:
    return sorted(arm for arm in arms._runs if arm.startswith("order_") and arm != "order_blend")


def order(arms: Arms) -> Iterator[str]:
    names = ("prose", "code", "headers")
    yield f"| order | {' | '.join(names)} | mean |"
    yield "|---|---|---|---|---|"
    blend = [arms.paired(last(name), "order_blend")[0].mean() for name in names]
    yield f"| blend | {' | '.join(f'{loss:.3f}' for loss in [*blend, np.mean(blend)])} |"
    ranked = sorted(orders(arms), key=lambda arm: against(arms, arm, "order_blend", *names).mean)
    for arm in ranked:
        told = [str(against(arms, arm, "order_blend", name)) for name in names]
        told.append(str(against(arms, arm, "order_blend", *names)))
        yield f"| {arm.removeprefix('order_').replace('_', ', ')} | {' | '.join(told)} |"


# ---- pictures --------------------------------------------------------------------------------------------------------------


def draw_sources(arms: Arms, place: Path) -> None:
    values, worth = values_of(arms), worth_of(arms)
    with style():
        figure = new_figure(8.4, 3.6)
        for k, name in enumerate(SETS):
            axes = figure.add_subplot(1, 2, k + 1)
            for i, source in enumerate(SOURCES):
                x, y = values[name][i], worth[name][i]
                axes.plot(x, y, "o", color=colour(i), markersize=4.5, label=source)
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.axvline(0, color=INK, linewidth=0.6)
            axes.margins(0.18)
            axes.set_xlabel("value of a row (1e-3 nats)")
            axes.set_ylabel("loss without the source, minus with it")
            axes.set_title(f"on {name}", loc="left")
            quiet_axes(axes)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(SOURCES), frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(place, dpi=110)


def draw_selection(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(9.6, 3.4)
        bars(figure.add_subplot(1, 3, 1), arms, [("ten copies", "mix", "clean"), ("selected", "mix_selected", "clean")])
        figure.axes[0].set_title("loss on code, minus clean", loc="left")
        axes = figure.add_subplot(1, 3, 2)
        points(axes, [*KEPT], [against(arms, f"d4_{kept}pct", "d4_all", "code") for kept in KEPT], 0, "D4")
        axes.set_title("minus any documents", loc="left")
        axes.set_xlabel("documents kept (%)")
        axes.invert_xaxis()
        axes = figure.add_subplot(1, 3, 3)
        for k, end_ in enumerate(ENDS):
            found = [against(arms, f"diet_{end_}_{share}", "diet_none", "code") for share in DROPPED]
            points(axes, [share + 0.12 * (k - 1) for share in DROPPED], found, k, end_)
        axes.set_title("minus nothing dropped", loc="left")
        axes.set_xlabel("documents dropped (%)")
        axes.legend(frameon=False, fontsize=8.5)
        for axes in figure.axes:
            axes.axhline(0, color=INK, linewidth=0.6)
            quiet_axes(axes)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


def draw_order(arms: Arms, place: Path) -> None:
    names = ("prose", "code", "headers")
    with style():
        figure = new_figure(8.4, 3.6)
        axes = figure.add_subplot()
        ranked = sorted(orders(arms), key=lambda arm: against(arms, arm, "order_blend", *names).mean)
        for k, name in enumerate(names):
            found = [against(arms, arm, "order_blend", name) for arm in ranked]
            points(axes, [i + 0.14 * (k - 1) for i in range(len(ranked))], found, k, name, line="none")
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.set_xticks(range(len(ranked)), [arm.removeprefix("order_").replace("_", "\n") for arm in ranked])
        axes.set_ylabel("last loss, minus the blend's")
        axes.legend(frameon=False, ncols=3, fontsize=8.5)
        quiet_axes(axes)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


def bars(axes: Axes, arms: Arms, rows: Sequence[tuple[str, str, str]]) -> None:
    found = [against(arms, one, other, "code") for _, one, other in rows]
    heights = [each.mean for each in found]
    axes.bar(range(len(rows)), heights, 0.5, yerr=halves(found), color=colour(0), capsize=3)
    axes.set_xticks(range(len(rows)), [name for name, *_ in rows])


def points(axes: Axes, x: Sequence[float], found: Sequence[Difference], k: int, label: str, line: str = "-") -> None:
    means = [each.mean for each in found]
    axes.errorbar(x, means, halves(found), fmt="o", ls=line, color=colour(k), ms=4, lw=1.3, capsize=3, label=label)


def halves(found: Sequence[Difference]) -> list[float]:
    """Half the widths of the intervals; 0 where one seed gives none."""
    return [each.half if each.seeds > 1 else 0.0 for each in found]


PARTS: dict[str, tuple[Callable[[Arms, Path], Iterator[str]], Callable[[Arms, Path], None], str]] = {
    "sources": (
        lambda arms, data: sources(arms),
        draw_sources,
        "The value of a row of each source against the loss without the source, a dot for each seed",
    ),
    "selection": (selection, draw_selection, "Differences of the loss on code: ten copies, D4, dropped documents"),
    "order": (lambda arms, data: order(arms), draw_order, "Losses of six orders of three sources, minus the blend's"),
}


def main() -> None:
    """Print the tables, or write them into a page, each between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where worth_mini and worth_data are")
    parser.add_argument("--folder", type=Path, help="of the experiment; default: RUNS/worth_mini")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    arms, data = Arms(arguments.folder or arguments.runs / "worth_mini"), arguments.runs / "worth_data"
    page = arguments.write.read_text(encoding="utf-8") if arguments.write is not None else ""
    print(f"{arms.state}.", file=sys.stderr)
    for name, (tell, draw, picture) in PARTS.items():
        try:
            told = "\n".join(tell(arms, data))
        except SystemExit as missing:
            print(f"{missing}: what the page says of {name} stays", file=sys.stderr)
            continue
        if arguments.write is None:
            print(f"\n{told}")
            continue
        place = arguments.write.with_name(f"worth_{name}.png")
        page = put(page, name, f"{arms.state}.\n\n{told}\n\n![{picture}]({place.name})")
        draw(arms, place)
    if arguments.write is not None:
        arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
