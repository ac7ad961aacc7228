#!/usr/bin/env python3
"""What configs/experiments/own_replay_mini.yml shows: python benchmarks/language.py [--write docs/language.md]

Prints the table; --write puts it between its marks in the page, and the picture language_own_replay.png beside it. Losses are
nats per token on held-out documents, a number and a dot for each seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.reproduction import Arms, end, rise
from megarewarm.report.figures.style import INK, colour, new_figure, quiet_axes, style

ROLES = {"upstream": "prose", "downstream": "code"}
STARTS = {"well": "after 200 steps", "barely": "after 20 steps"}
REPLAYS = {"none": "none", "real_5": "5 % real", "own_5": "5 % own", "own_25": "25 % own"}


def rises(arms: Arms, role: str, start: str, replay: str) -> np.ndarray:
    """(seeds): how far the loss ends above the start's."""
    return arms.paired(rise(role), f"{start}_{replay}")[0]


def against_none(arms: Arms, role: str, start: str, replay: str) -> np.ndarray:
    one, none = arms.paired(end(role), f"{start}_{replay}", f"{start}_none")
    return one - none


def each(values: np.ndarray) -> str:
    return ", ".join(f"{value:+.3f}" for value in values).replace("-", "−")


def table(arms: Arms) -> Iterator[str]:
    """Rises over the start, and differences from no replay."""
    yield "| start | replay | prose, minus the start's | prose, minus no replay's | code, minus no replay's |"
    yield "|---|---|---|---|---|"
    for start, named in STARTS.items():
        for replay, label in REPLAYS.items():
            told = [each(rises(arms, "upstream", start, replay))]
            told += [each(against_none(arms, role, start, replay)) if replay != "none" else "" for role in ROLES]
            yield f"| {named} | {label} | {' | '.join(told)} |"


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
    """Print the table, or write it into a page between its marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_replay_mini"), help="of the experiment")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    arms = Arms(arguments.folder)
    told = f"{arms.state}.\n\n" + "\n".join(table(arms))
    if arguments.write is None:
        print(told)
        return
    begin, finish = "<!-- own replay: begin -->", "<!-- own replay: end -->"
    page = arguments.write.read_text(encoding="utf-8")
    place = arguments.write.with_name("language_own_replay.png")
    picture = f"![Rise of the losses on prose and code with four kinds of replay, from two starts]({place.name})"
    page = f"{page.split(begin)[0]}{begin}\n{told}\n\n{picture}\n{finish}{page.split(finish)[1]}"
    draw(arms, place)
    arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
