#!/usr/bin/env python3
"""What configs/experiments/own_replay_mini.yml shows: python benchmarks/language.py [--write docs/language.md]

Prints the table; --write puts it between its marks in the page, and the picture language_own_replay.png beside it. Differences
are paired by seed; ± is half of their 95 % interval (Student's t). Losses are nats per token on held-out documents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.reproduction import Arms, Difference, end, rise
from benchmarks.worth import points
from megarewarm.record.run import RecordedRun
from megarewarm.report.figures.style import INK, new_figure, quiet_axes, style

STARTS = {"well": "after 200 steps", "barely": "after 20 steps"}
REPLAYS = {"none": "none", "real_5": "5 % real", "own_5": "5 % own", "own_25": "25 % own"}


def measured(arms: Arms, measure: Callable[[RecordedRun], float], start: str, replay: str) -> Difference:
    return Difference.of(arms.paired(measure, f"{start}_{replay}")[0])


def against_none(arms: Arms, role: str, start: str, replay: str) -> Difference:
    one, none = arms.paired(end(role), f"{start}_{replay}", f"{start}_none")
    return Difference.of(one - none)


def table(arms: Arms) -> Iterator[str]:
    """Rises over the start, and differences from no replay."""
    yield "| start | replay | prose at the end, minus the start's | prose, minus no replay's | code, minus no replay's |"
    yield "|---|---|---|---|---|"
    for start, named in STARTS.items():
        for replay, label in REPLAYS.items():
            told = [f"{measured(arms, rise('upstream'), start, replay)}"]
            told += [
                str(against_none(arms, role, start, replay)) if replay != "none" else "" for role in ("upstream", "downstream")
            ]
            yield f"| {named} | {label} | {' | '.join(told)} |"
    yield ""
    for start, named in STARTS.items():
        own, real = arms.paired(end("upstream"), f"{start}_own_5", f"{start}_real_5")
        yield f"- start {named}: prose with 5 % own minus 5 % real replay {Difference.of(own - real)}."


def draw(arms: Arms, place: Path) -> None:
    with style():
        figure = new_figure(8.4, 3.4)
        for number, (role, title) in enumerate({"upstream": "loss on prose", "downstream": "loss on code"}.items()):
            axes = figure.add_subplot(1, 2, number + 1)
            for k, (start, named) in enumerate(STARTS.items()):
                found = [measured(arms, rise(role), start, replay) for replay in REPLAYS]
                points(axes, [i + 0.16 * (k - 0.5) for i in range(len(REPLAYS))], found, k, f"start {named}", line="none")
            axes.axhline(0, color=INK, linewidth=0.6)
            axes.set_xticks(range(len(REPLAYS)), list(REPLAYS.values()))
            axes.set_title(f"{title} at the end, minus the start's", loc="left")
            quiet_axes(axes)
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
