#!/usr/bin/env python3
"""What own_replay_mini.yml and language_mini.yml show: python benchmarks/language.py [--write docs/language.md]

Prints the tables of the experiments (configs/experiments) that were run; --write puts them between their marks in the page, and
the picture language_own_replay.png beside it. Losses are on held-out documents, in nats per token or as said, with a number and
a dot for each seed; so are the items that a run lost and won of its task.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.page import put
from benchmarks.reproduction import Arms, end, rise
from megarewarm.record.events import TaskEvent
from megarewarm.record.run import RecordedRun
from megarewarm.report.figures.style import INK, colour, new_figure, quiet_axes, style

ROLES = {"upstream": "prose", "downstream": "code"}
STARTS = {"well": "after 200 steps", "barely": "after 20 steps"}
LANGUAGE_STARTS = {"old": "after 200 steps", "short": "after 20 steps"}
LANGUAGE = {"old": "old", "extended_bytes": "extended, equal bytes", "extended_tokens": "extended, equal tokens"}
REPLAYS = {"none": "none", "real_5": "5 % real", "own_5": "5 % own", "own_25": "25 % own"}


def arm_of(start: str, replay: str) -> str:
    """own_replay_mini names arms without replay as well, language_mini has names of starts alone for them."""
    return f"{start}_{replay}" if start in STARTS or replay != "none" else start


def rises(arms: Arms, role: str, start: str, replay: str) -> np.ndarray:
    """(seeds): how far the loss ends above the start's."""
    return arms.paired(rise(role), arm_of(start, replay))[0]


def against_none(arms: Arms, role: str, start: str, replay: str) -> np.ndarray:
    one, none = arms.paired(end(role), arm_of(start, replay), arm_of(start, "none"))
    return one - none


def each(values: np.ndarray) -> str:
    return ", ".join(f"{value:+.3f}" for value in values).replace("-", "−")


def table(arms: Arms, starts: Mapping[str, str], old: str, new: str) -> Iterator[str]:
    """Rises over the start, and differences from no replay; ``old`` and ``new``: what the two texts are called."""
    yield f"| start | replay | {old}, minus the start's | {old}, minus no replay's | {new}, minus no replay's |"
    yield "|---|---|---|---|---|"
    for start, named in starts.items():
        for replay, label in REPLAYS.items():
            told = [each(rises(arms, "upstream", start, replay))]
            told += [each(against_none(arms, role, start, replay)) if replay != "none" else "" for role in ROLES]
            yield f"| {named} | {label} | {' | '.join(told)} |"


def with_replay(starts: Mapping[str, str]) -> dict[str, str]:
    """The first cells of each arm's row."""
    return {arm_of(s, r): f"{start} | {replay}" for s, start in starts.items() for r, replay in REPLAYS.items()}


def tested(value: Callable[[TaskEvent], float], at: int = -1) -> Callable[[RecordedRun], float]:
    """Of the run's first test (``at`` 0) or last (-1); NaN of a run without any."""
    return lambda run: value(run.tests[at]) if run.tests else np.nan


def abilities(arms: Arms, named: Mapping[str, str], columns: str) -> Iterator[str]:
    """Of each arm's task: accuracy before and after, items lost and won, and how many are beyond chance. Nothing where no run
    was tested. ``named``: the first cells of each arm's row, of ``columns``."""
    found: list[str] = []
    for arm, cells in named.items():
        of = lambda take, at=-1, arm=arm: arms.paired(tested(take, at), arm)[0]  # noqa: E731 - it reads as a table
        if np.isnan(before := of(lambda test: 100 * test.accuracy, 0)).any():
            continue
        told = [", ".join(f"{value:.1f}" for value in values) for values in (before, of(lambda test: 100 * test.accuracy))]
        for change in ("lost", "won", "lost_beyond", "won_beyond"):
            counts = of(
                lambda test, change=change: np.nan if getattr(test, change) is None else getattr(test, change) * test.items
            )
            told.append(", ".join(f"{count:.0f}" for count in counts))
        told.append(each(of(lambda test: test.bits_per_byte) - of(lambda test: test.bits_per_byte, 0)))
        found.append(f"| {cells} | {' | '.join(told)} |")
        items = f"{of(lambda test: test.items)[0]:.0f} items, {100 * of(lambda test: test.chance)[0]:.0f} % by guessing"
    if found:
        heads = ("right before, %", "right after, %", "lost", "won", "lost beyond chance", "won beyond chance", "bits per byte")
        yield from ("", f"The task of held-out prose, {items}:", "", f"| {columns} | {' | '.join(heads)} |")
        yield "|---" * (len(heads) + columns.count("|") + 1) + "|"
        yield from found


def bits(role: str, at: int = -1) -> Callable[[RecordedRun], float]:
    """The loss of the run's first or last evaluation of ``role``, in bits per byte."""
    return lambda run: [e.bits_per_byte or np.nan for e in run.evaluations if e.role == role][at]


def language_table(arms: Arms) -> Iterator[str]:
    """German learned and English lost, of the old vocabulary and of the extended one."""
    yield "| vocabulary | German, bits per byte | German, minus the old one's | English, minus the start's |"
    yield "|---|---|---|---|"
    for arm, named in LANGUAGE.items():
        (german, old), (english, _) = (arms.paired(bits(role), arm, "old") for role in ("downstream", "upstream"))
        _, start = arms.paired(bits("upstream", 0), arm, "old")  # before rows were added
        told = ", ".join(f"{value:.3f}" for value in german)
        yield f"| {named} | {told} | {each(german - old) if arm != 'old' else ''} | {each(english - start)} |"


def draw(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 3.4)
        for number, (role, name) in enumerate(ROLES.items()):
            axes = figure.add_subplot(1, 2, number + 1)
            for k, (start, named) in enumerate(STARTS.items()):
                for i, replay in enumerate(REPLAYS):
                    found = rises(arms, role, start, replay)
                    label = f"start {named}" if i == 0 else None
                    axes.plot([i + 0.2 * (k - 0.5)] * len(found), found, "o", color=colour(k), markersize=4.5, label=label)
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.set_xticks(range(len(REPLAYS)), list(REPLAYS.values()))
            axes.set_title(f"loss on {name} at the end, minus the start's", loc="left")
            quiet_axes(axes)
        figure.axes[0].set_ylabel("nats per token")
        figure.axes[0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(place, dpi=110)


def main() -> None:
    """Print the tables, or write them into a page between their marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_replay_mini"), help="of own_replay_mini")
    parser.add_argument("--language", type=Path, default=Path("runs/language_mini"), help="of language_mini")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    found: dict[str, str] = {}
    if (arguments.folder / "experiment.json").is_file() or not (arguments.language / "experiment.json").is_file():
        arms = Arms(arguments.folder)
        told = [f"{arms.state}.\n", *table(arms, STARTS, "prose", "code")]
        found["own replay"] = "\n".join([*told, *abilities(arms, with_replay(STARTS), "start | replay")])
        if arguments.write is not None:
            place = arguments.write.with_name("language_own_replay.png")
            draw(arms, place)
            picture = f"![Rise of the losses on prose and code with four kinds of replay, from two starts]({place.name})"
            found["own replay"] += f"\n\n{picture}"
    if (arguments.language / "experiment.json").is_file():
        arms = Arms(arguments.language)
        told = [f"{arms.state}.\n", *language_table(arms), *abilities(arms, LANGUAGE, "vocabulary")]
        found["language"] = "\n".join(told)
        told = [*table(arms, LANGUAGE_STARTS, "English", "German")]
        told += abilities(arms, with_replay(LANGUAGE_STARTS), "start | replay")
        found["language replay"] = "\n".join(told)
    if arguments.write is None:
        print(*found.values(), sep="\n\n")
        return
    page = arguments.write.read_text(encoding="utf-8")
    for name, text in found.items():
        page = put(page, name, text)
    arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
