#!/usr/bin/env python3
"""What "Shown on real text" of docs/laboratory.md shows: python benchmarks/laboratory.py [--write docs/laboratory.md]

Prints the tables; --write puts them between their marks in the page, and its pictures (laboratory_*.png) beside it. An
experiment that has not been run is left as it is; the first lines of its file in configs/experiments say how to run it.

± is the standard deviation over the seeds; of differences, which are paired by seed, half of their 95 % interval (Student's t).
Losses are nats per token on held-out documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from scipy.stats import kendalltau

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.page import put
from benchmarks.reproduction import Arms, Difference, at, end, mean_end, rise
from megarewarm.config.model import ModelConfig
from megarewarm.lab.choose_start import NUMBERS
from megarewarm.model.size import training_flops_per_token
from megarewarm.record.run import DOWNSTREAM, UPSTREAM, RecordedRun
from megarewarm.report.figures.style import INK, QUIET, colour, marker, new_figure, place_beside_black, quiet_axes, style
from megarewarm.report.numbers.runs import merged_loss, tokens_to_reach

Numbers = npt.NDArray[np.float64]


def spread(values: Numbers, form: str = ".3f") -> str:
    """Mean ± standard deviation over the seeds."""
    mean = f"{values.mean():{form}}"
    return f"{mean} ± {values.std(ddof=1):{form.lstrip('+')}}" if len(values) > 1 else f"{mean} (one seed)"


def marked(values: Numbers) -> str:
    """The mean of paired differences with its interval; bold where that is on one side of 0."""
    each = Difference.of(values)
    return f"**{each}**" if abs(each.mean) > each.half else str(each)


def mean_curve(arms: Arms, arm: str, role: str = DOWNSTREAM) -> tuple[Numbers, Numbers]:
    """Tokens, and the mean loss over the seeds there."""
    curves = [run.curve(role) for run in arms._runs[arm].values()]
    return curves[0].tokens, np.mean([curve.losses for curve in curves], axis=0)


# ---- growth ----------------------------------------------------------------------------------------------------------------

GROWN = ("identity", "stack", "interpolate", "stack_no_noise", "stack_aki")


def grown(arms: Arms) -> list[str]:
    return [arm for arm in GROWN if arm in arms._runs]


def flops_per_token(run: RecordedRun) -> float:
    return training_flops_per_token(ModelConfig.model_validate(run.config["model"]), run.config["data"]["sequence_length"])


def compute(run: RecordedRun) -> float:
    return flops_per_token(run) * run.tokens


def shares(arms: Arms, arm: str) -> tuple[Numbers, Numbers]:
    """By seed, what the grown ``arm`` needs for the last loss of ``scratch``: of its tokens, and of its compute with the small
    model's counted; infinite where it never has that loss."""
    curves = arms.paired(lambda run: run, arm, "scratch", "small")
    tokens = np.array([tokens_to_reach(run.curve(DOWNSTREAM), end(DOWNSTREAM)(scratch)) for run, scratch, _ in curves.T])
    each = np.array([flops_per_token(run) for run in curves[0]])
    whole, small = (np.array([compute(run) for run in row]) for row in curves[1:])
    return tokens / np.array([run.tokens for run in curves[1]]), (small + tokens * each) / whole


def percents(values: Numbers) -> str:
    reached = values[np.isfinite(values)]
    never = f"; never in {len(values) - len(reached)} of {len(values)}" if len(reached) < len(values) else ""
    return f"{spread(100 * reached, '.0f')} %{never}" if len(reached) else "never"


def growth(arms: Arms) -> Iterator[str]:
    small, scratch = arms.paired(compute, "small", "scratch")
    yield (
        f"The small model ends at {spread(arms.paired(end(DOWNSTREAM), 'small')[0])}; it cost "
        f"{100 * (small / scratch).mean():.0f} % of the compute of `scratch`."
    )
    yield ""
    yield "| start | first loss | last loss | minus `scratch` | tokens to that of `scratch` | all compute to it |"
    yield "|---|---|---|---|---|---|"
    for arm in ("scratch", *grown(arms)):
        first = spread(arms.paired(lambda run: float(run.start_loss(DOWNSTREAM) or np.nan), arm)[0])
        own, reference = arms.paired(end(DOWNSTREAM), arm, "scratch")
        if arm == "scratch":
            yield f"| {arm} | {first} | {spread(own)} | | 100 % | 100 % |"
            continue
        needs = " | ".join(percents(share) for share in shares(arms, arm))
        yield f"| {arm} | {first} | {spread(own)} | {marked(own - reference)} | {needs} |"


def draw_growth(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 4.2)
        names = ("scratch", *grown(arms))
        small = arms.paired(compute, "small")[0].mean()
        last = arms.paired(end(DOWNSTREAM), "scratch")[0].mean()
        for k, title in enumerate(("tokens of the large model (M)", "all training compute (TFLOP)")):
            axes = figure.add_subplot(1, 2, k + 1)
            for i, arm in enumerate(names):
                tokens, losses = mean_curve(arms, arm)
                each = arms.paired(flops_per_token, arm)[0].mean()
                x = tokens / 1e6 if k == 0 else (tokens * each + (0 if arm == "scratch" else small)) / 1e12
                axes.plot(
                    x,
                    losses,
                    color=INK if arm == "scratch" else colour(place_beside_black(i - 1)),
                    label=arm,
                    lw=2.2 if arm == "scratch" else 1.5,
                )
            if k == 1:
                tokens, losses = mean_curve(arms, "small")
                each = arms.paired(flops_per_token, "small")[0].mean()
                axes.plot(tokens * each / 1e12, losses, color=QUIET, ls=(0, (1.5, 1.5)), label="small")
            axes.axhline(last, color=INK, lw=0.7, ls=(0, (5, 3)))
            axes.set_ylim(last - 0.25, last + 1.5)
            axes.set_xlabel(title)
            axes.set_ylabel("loss on held-out prose")
            quiet_axes(axes)
        figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.13, 1, 1))
        figure.savefig(place, dpi=110)


# ---- teacher and student ---------------------------------------------------------------------------------------------------

TAUGHT = ("plain", "again", "student_hidden", "student_logits", "start_logits", "teacher")
BOTH = {"code": end(DOWNSTREAM), "prose": end(UPSTREAM), "mean of both": mean_end}


def teacher(arms: Arms) -> Iterator[str]:
    return against(arms, TAUGHT, "plain")


def against(arms: Arms, names: Sequence[str], reference: str) -> Iterator[str]:
    """The last losses of each arm, and their differences from those of ``reference``."""
    yield f"| arm | {' | '.join(f'{name} | minus `{reference}`' for name in BOTH)} |"
    yield f"|---|{'---|' * 2 * len(BOTH)}"
    for arm in names:
        cells = []
        for measure in BOTH.values():
            own, other = arms.paired(measure, arm, reference)
            cells += [spread(own), "" if arm == reference else marked(own - other)]
        yield f"| {arm} | {' | '.join(cells)} |"


def draw_teacher(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 3.6)
        for k, (name, measure) in enumerate(BOTH.items()):
            axes = figure.add_subplot(1, 3, k + 1)
            against_plain(axes, [arms.paired(measure, arm, "plain") for arm in TAUGHT[1:]], TAUGHT[1:], k == 0)
            axes.set_title(name, loc="left")
        figure.supxlabel("last loss, minus that of plain", fontsize=10, color=QUIET)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


def against_plain(axes: Axes, pairs: Sequence[Numbers], names: Sequence[str], named: bool) -> None:
    """Paired differences with their intervals, an arm a line from the top; each seed's as a dot."""
    for i, (own, reference) in enumerate(pairs):
        gap = own - reference
        each = Difference.of(gap)
        axes.errorbar(each.mean, i, xerr=each.half if each.seeds > 1 else 0, fmt="o", color=colour(i), ms=5, lw=1.6, capsize=3)
        axes.plot(gap, [i + 0.22] * len(gap), "|", color=colour(i), ms=6)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    quiet_axes(axes)


# ---- scores of starts ------------------------------------------------------------------------------------------------------

SCORES: dict[str, tuple[str, float]] = {
    "loss on code at the start": ("loss_code_validation", 1.0),
    "loss on prose at the start": ("loss_prose_validation", 1.0),
    "LogME": ("logme", -1.0),
    "tokens trained on": ("tokens", -1.0),
}
TRUTH = "loss_code_validation_after"


class Starts:
    """What ``choose-start`` wrote, a list of candidates a seed."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob(f"seed_*/{NUMBERS}"))
        if not files:
            raise SystemExit(f"{folder}: no {NUMBERS} of a seed; the commands are in configs/experiments/teacher_mini.yml")
        self.seeds = [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def column(self, key: str) -> Numbers:
        """(seeds, candidates)."""
        return np.array([[float(row[key]) for row in rows] for rows in self.seeds])

    def taus(self, key: str, sign: float) -> Numbers:
        """Kendall's tau of a score with the loss after the probe, by seed."""
        pairs = zip(self.column(key), self.column(TRUTH), strict=True)
        return np.array([kendalltau(sign * score, after).statistic for score, after in pairs])


def starts(found: Starts) -> Iterator[str]:
    yield "| score | Kendall's tau, seed by seed | mean ± standard deviation |"
    yield "|---|---|---|"
    for name, (key, sign) in SCORES.items():
        taus = found.taus(key, sign)
        yield f"| {name} | {', '.join(f'{tau:+.2f}' for tau in taus)} | {spread(taus, '+.2f')} |".replace("-", "−")
    yield ""
    yield "| pre-training steps | loss on code | prose | LogME | code after the probe |"
    yield "|---|---|---|---|---|"
    before = found.column("loss_code_validation").mean(0)
    prose, evidence = found.column("loss_prose_validation").mean(0), found.column("logme").mean(0)
    for i, step in enumerate(found.column("step")[0]):
        spreads = spread(found.column(TRUTH)[:, i])
        yield f"| {step:.0f} | {before[i]:.3f} | {prose[i]:.3f} | {evidence[i]:.4f} | {spreads} |"


def draw_starts(found: Starts, place: Path) -> None:
    after = found.column(TRUTH)
    with style():
        figure = new_figure(8.4, 5.6)
        for k, (name, (key, sign)) in enumerate(SCORES.items()):
            axes = figure.add_subplot(2, 2, k + 1)
            for seed, (x, y) in enumerate(zip(found.column(key), after, strict=True)):
                axes.plot(x, y, "o", color=colour(seed), ms=5, label=f"seed {seed + 1}")
            if key == "tokens":
                axes.set_xscale("log")
            axes.set_title(f"{name}: tau {found.taus(key, sign).mean():.2f}", loc="left")
            axes.margins(0.1)
            quiet_axes(axes)
            if k % 2 == 0:
                axes.set_ylabel("loss on code after the probe")
        figure.axes[0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


# ---- moments ---------------------------------------------------------------------------------------------------------------

MOMENTS = ("keep", "reset", "measure")
WARMUPS = {"none": "no warmup", "warm": "a warmup of 12 %"}


def moments(arms: Arms) -> Iterator[str]:
    measures = {"code, halfway": at(DOWNSTREAM, 0.5), "code": end(DOWNSTREAM), "prose": end(UPSTREAM)}
    yield f"| warmup | moments | {' | '.join(f'{name} | minus `reset`' for name in measures)} |"
    yield f"|---|---|{'---|' * 2 * len(measures)}"
    for warmup, words in WARMUPS.items():
        for kind in MOMENTS:
            cells = []
            for measure in measures.values():
                own, reference = arms.paired(measure, f"rewarm_{kind}_{warmup}", f"rewarm_reset_{warmup}")
                cells += [spread(own), "" if kind == "reset" else marked(own - reference)]
            yield f"| {words} | {kind} | {' | '.join(cells)} |"


def draw_moments(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 3.6)
        for k, (warmup, words) in enumerate(WARMUPS.items()):
            axes = figure.add_subplot(1, 2, k + 1)
            losses = {
                kind: np.mean([run.train["loss"] for run in arms._runs[f"rewarm_{kind}_{warmup}"].values()], axis=0)
                for kind in MOMENTS
            }
            for i, kind in enumerate(("keep", "measure")):
                gap = losses[kind] - losses["reset"]
                axes.plot(np.arange(1, len(gap) + 1), gap, color=colour(i), label=kind, lw=1.5)
            axes.axhline(0, color=INK, lw=0.8)
            axes.set_title(words, loc="left")
            axes.set_xlabel("step")
            quiet_axes(axes)
        figure.axes[0].set_ylabel("training loss, minus that of reset")
        figure.axes[1].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


# ---- merging and decay -----------------------------------------------------------------------------------------------------

WINDOWS = (20, 50)


def wsm(arms: Arms) -> Iterator[str]:
    yield "| window | set | constant rate, last weights | merged | trained decay | merged − last weights | merged − decay |"
    yield "|---|---|---|---|---|---|---|"
    for window in WINDOWS:
        for role, name in ((DOWNSTREAM, "code"), (UPSTREAM, "prose")):
            last, merged, decayed = ends(arms, window, role)
            cells = [spread(last), spread(merged), spread(decayed), marked(merged - last), marked(merged - decayed)]
            yield f"| {window} % | {name} | {' | '.join(cells)} |"


def ends(arms: Arms, window: int, role: str) -> Numbers:
    """(3, seeds): losses of the last weights at a constant rate, of their average, and after a trained decay."""
    names = (f"merge_{window}", f"decay_{window}")
    last, decayed = arms.paired(end(role), *names)
    return np.stack([last, arms.paired(lambda run: merged_loss(run, role), names[0])[0], decayed])


def draw_wsm(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 3.4)
        for k, (role, name) in enumerate(((DOWNSTREAM, "code"), (UPSTREAM, "prose"))):
            axes = figure.add_subplot(1, 2, k + 1)
            for j, window in enumerate(WINDOWS):
                for i, losses in enumerate(ends(arms, window, role)):
                    x = j + 0.22 * (i - 1)
                    axes.errorbar(x, losses.mean(), losses.std(ddof=1), fmt="o", color=colour(i), ms=6, capsize=3)
                    axes.plot(
                        [x + 0.07] * len(losses),
                        losses,
                        "_",
                        color=colour(i),
                    )
            axes.set_xticks(range(len(WINDOWS)), [f"last {window} %" for window in WINDOWS])
            axes.set_xlim(-0.5, len(WINDOWS) - 0.5)
            axes.set_title(name, loc="left")
            quiet_axes(axes)
        figure.axes[0].set_ylabel("loss at the end")
        handles = [figure.axes[0].plot([], [], "o", color=colour(i))[0] for i in range(3)]
        names = ("constant rate, last weights", "merged", "trained decay")
        figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.09, 1, 1))
        figure.savefig(place, dpi=110)


# ---- new layers ------------------------------------------------------------------------------------------------------------

LAYERS = ("plain", "all_layers", "new_layers", "new_layers_then_all")


def identity(arms: Arms) -> Iterator[str]:
    return against(arms, LAYERS, "plain")


def draw_identity(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 4.4)
        axes = figure.add_subplot()
        for i, arm in enumerate(LAYERS):
            forgotten, learned = arms.paired(rise(UPSTREAM), arm)[0], -arms.paired(rise(DOWNSTREAM), arm)[0]
            axes.plot(forgotten, learned, "o", color=colour(i), ms=4, alpha=0.45)
            axes.plot(forgotten.mean(), learned.mean(), marker(i), color=colour(i), ms=9, ls="none", label=arm)
        axes.set_xlabel("forgetting: rise of the loss on prose")
        axes.set_ylabel("adaptation: fall of the loss on code")
        axes.set_title("up and left is better", loc="left")
        axes.margins(0.1)
        quiet_axes(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=len(LAYERS), frameon=False)
        figure.tight_layout(rect=(0, 0.07, 1, 1))
        figure.savefig(place, dpi=110)


# ---- parts of the model ----------------------------------------------------------------------------------------------------

SHARES, PARTS_TRAINED = ("0.5pct", "2pct", "8pct"), ("all", "head", "embeddings_head", "norms")


def probing(arms: Arms) -> Iterator[str]:
    yield f"| documents | set | {' | '.join(PARTS_TRAINED)} | best part minus all |"
    yield f"|---|---|{'---|' * (len(PARTS_TRAINED) + 1)}"
    for share in SHARES:
        for measure, name in ((end(DOWNSTREAM), "code"), (end(UPSTREAM), "prose")):
            losses = arms.paired(measure, *(f"part_{share}_{part}" for part in PARTS_TRAINED))
            best = 1 + int(losses[1:].mean(1).argmin())
            cells = [*map(spread, losses), f"{marked(losses[best] - losses[0])} ({PARTS_TRAINED[best]})"]
            yield f"| {share.removesuffix('pct')} % | {name} | {' | '.join(cells)} |"


def draw_probing(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 4.0)
        for k, (role, name) in enumerate(((DOWNSTREAM, "code"), (UPSTREAM, "prose"))):
            axes = figure.add_subplot(1, 2, k + 1)
            for i, part in enumerate(PARTS_TRAINED):
                losses = arms.paired(end(role), *(f"part_{share}_{part}" for share in SHARES))
                x = np.arange(len(SHARES)) + 0.04 * (i - 1.5)
                shown = axes.errorbar(x, losses.mean(1), losses.std(1, ddof=1), color=colour(i), capsize=3, lw=1.5, label=part)
                shown.lines[0].set(marker=marker(i), markersize=6)
            axes.set_xticks(range(len(SHARES)), [f"{share.removesuffix('pct')} %" for share in SHARES])
            axes.set_title(f"loss on {name}", loc="left")
            axes.set_xlabel("documents of the new data")
            quiet_axes(axes)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        figure.savefig(place, dpi=110)


# ---- the page --------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """An experiment of the page. ``opened``: what reads its folder; ``picture``: what its picture shows."""

    opened: Callable[[Path], Any]
    tell: Callable[[Any], Iterator[str]]
    draw: Callable[[Any, Path], None]
    picture: str


PARTS: dict[str, Part] = {
    "growth_mini": Part(Arms, growth, draw_growth, "Loss over the large model's tokens, and over all compute"),
    "starts_mini": Part(Starts, starts, draw_starts, "Loss on code after the probe against four scores of its start"),
    "teacher_mini": Part(Arms, teacher, draw_teacher, "Last losses minus those of plain re-warming, with each seed's"),
    "moments_mini": Part(
        Arms, moments, draw_moments, "Training loss with kept and measured moments, minus that with reset ones"
    ),
    "identity_mini": Part(Arms, identity, draw_identity, "Forgetting against adaptation of four arms, with each seed's"),
    "probing_mini": Part(Arms, probing, draw_probing, "Last losses over the number of documents, for four parts trained"),
    "wsm_mini": Part(Arms, wsm, draw_wsm, "Last losses at a constant rate, of merged weights and after a trained decay"),
}


def main() -> None:
    """Print the tables, or write them into a page, each between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the experiments' folders are")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    page = arguments.write.read_text(encoding="utf-8") if arguments.write is not None else ""
    for name, part in PARTS.items():
        folder = arguments.runs / name
        try:
            found = part.opened(folder)
            told = "\n".join(part.tell(found))
        except SystemExit as missing:
            print(f"{missing}; what the page says of {name} stays", file=sys.stderr)
            continue
        if isinstance(found, Arms):
            told = f"{found.state}.\n\n{told}"
        if arguments.write is None:
            print(f"\n{told}")
            continue
        place = arguments.write.with_name(f"laboratory_{name.removesuffix('_mini')}.png")
        page = put(page, name, f"{told}\n\n![{part.picture}]({place.name})")
        part.draw(found, place)
    if arguments.write is not None:
        arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
