#!/usr/bin/env python3
"""The papers' claims, judged on the mini experiments: python benchmarks/reproduction.py [--write docs/reproduction.md]

RecordedRun before it, either or both (the rows of one that is not there stay as they are):
    python tools/sweep.py configs/experiments/rewarm_2308_04014_mini.yml
    python tools/sweep.py configs/experiments/replay_2403_08763_mini.yml

Every comparison is paired by seed: the same pre-training, data order and validation tokens on both sides. A difference "holds"
where its 95 % interval (Student's t over the seeds) lies on the claimed side of zero, "does not" where it lies on the other,
and otherwise can't be told. An equality holds where the interval lies within the margin that is given, and does not where it
lies outside of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from scipy.stats import t as student

from benchmarks.page import put
from megarewarm.record.run import NothingYet, RecordedRun, read_run

HOLDS, FAILS, OPEN = "holds", "does not", "can't tell"


class Arms:
    """The finished runs of an experiment: ``arms[arm][seed]``."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "experiment.json").is_file():
            raise SystemExit(f"{folder}: not run here")
        record = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
        self.folder, self.planned = folder, len(record["runs"])
        self._runs: dict[str, dict[int, RecordedRun]] = {}
        for item in record["runs"]:
            place = folder / item["folder"]
            if not (place / "metrics.jsonl").is_file():
                continue
            try:
                run = read_run(place)
            except NothingYet:
                continue
            if any(event["event"] == "stop" and event.get("reason") == "complete" for event in run.events):
                self._runs.setdefault(item["arm"], {})[item["seed"]] = run
        if not self._runs:
            raise SystemExit(f"{folder}: no finished run; carry the experiment out first (see this file's first lines)")

    @property
    def state(self) -> str:
        """How many of its runs are finished, in words."""
        done = sum(len(seeds) for seeds in self._runs.values())
        return f"{self.folder.name}: {done} of {self.planned} runs finished"

    def paired(self, measure: Callable[[RecordedRun], Any], *arms: str) -> np.ndarray:
        """(arms, seeds): ``measure`` of the seeds that all ``arms`` have finished."""
        for arm in arms:
            if arm not in self._runs:
                raise SystemExit(f"{self.folder}: arm '{arm}' has no finished run")
        seeds = sorted(set.intersection(*(set(self._runs[arm]) for arm in arms)))
        return np.array([[measure(self._runs[arm][seed]) for seed in seeds] for arm in arms])


def end(role: str, name: str | None = None) -> Callable[[RecordedRun], float]:
    """The last loss of a role."""
    return lambda run: float(run.curve(role, name).losses[-1])


def rise(role: str) -> Callable[[RecordedRun], float]:
    """How far the loss ends above the start checkpoint's."""
    return lambda run: float(run.curve(role).losses[-1]) - _start(run, role)


def peak(role: str) -> Callable[[RecordedRun], float]:
    """How far the loss rises above the start checkpoint's at most."""
    return lambda run: float(run.curve(role).losses.max()) - _start(run, role)


def at(role: str, share: float) -> Callable[[RecordedRun], float]:
    """The loss after a share of the run's tokens, between evaluations by a straight line."""
    return lambda run: float(np.interp(share * run.tokens, run.curve(role).tokens, run.curve(role).losses))


def mean_end(run: RecordedRun) -> float:
    """The mean of the last upstream and downstream loss."""
    return (end("upstream")(run) + end("downstream")(run)) / 2


def _start(run: RecordedRun, role: str) -> float:
    loss = run.start_loss(role)
    assert loss is not None, f"{run.folder}: not evaluated at its start"
    return loss


@dataclass(frozen=True)
class Difference:
    """Paired differences: their mean, half the width of the 95 % interval, and how many seeds."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: np.ndarray) -> Difference:
        count = len(values)
        if count < 2:
            return cls(float(values.mean()), float("inf"), count)
        half = student.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
        return cls(float(values.mean()), float(half), count)

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.mean:+.3f} (one seed)".replace("-", "−")
        return f"{self.mean:+.3f} ± {self.half:.3f}".replace("-", "−")

    @property
    def percent(self) -> str:
        """As a share."""
        return f"{self.mean:.0%} (one seed)" if self.seeds < 2 else f"{self.mean:.0%} ± {self.half:.0%}"

    def positive(self) -> str:
        return HOLDS if self.mean - self.half > 0 else FAILS if self.mean + self.half < 0 else OPEN

    def within(self, margin: float) -> str:
        if abs(self.mean) + self.half < margin:
            return HOLDS
        return FAILS if abs(self.mean) - self.half > margin else OPEN


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, what the mini experiment shows, and whether that agrees."""

    paper: str
    says: str
    shows: str
    verdict: str


def together(*verdicts: str) -> str:
    """One verdict of several parts: all hold, one fails, or it can't be told."""
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def rewarming(arms: Arms) -> Iterator[Claim]:
    """arXiv 2308.04014."""
    up, down = end("upstream"), end("downstream")

    def gap(measure: Callable[[RecordedRun], float], more: str, less: str) -> Difference:
        one, two = arms.paired(measure, more, less)
        return Difference.of(one - two)

    steps = [gap(down, "max_lr_1e-3", "rewarm"), gap(down, "rewarm", "max_lr_4e-3")]
    margin = abs(gap(down, "max_lr_1e-3", "max_lr_4e-3").mean) / 2
    lengths = {arm: gap(down, arm, "rewarm") for arm in ("warmup_0", "warmup_2pct", "warmup_8pct")}
    yield Claim(
        "2308.04014, 4.1",
        "the length of the warmup does not matter for the final losses (0 to 2 % there)",
        "downstream, against 1 %: "
        + ", ".join(f"{name} {lengths[arm]}" for arm, name in zip(lengths, ("none", "2 %", "8 %"), strict=True))
        + f"; half of what the peak's quadrupling changes is {margin:.3f}",
        together(*(length.within(margin) for length in lengths.values())),
    )
    yield Claim(
        "2308.04014, 4.2",
        "the higher the peak, the lower the downstream loss",
        f"half the peak {steps[0]} above the same, the same {steps[1]} above double",
        together(*(step.positive() for step in steps)),
    )
    worse = [gap(up, "rewarm", "max_lr_1e-3"), gap(up, "max_lr_4e-3", "rewarm")]
    yield Claim(
        "2308.04014, 4.2",
        "and the higher the upstream loss",
        f"the same peak {worse[0]} above half, double {worse[1]} above the same",
        together(*(each.positive() for each in worse)),
    )
    (same,) = arms.paired(peak("upstream"), "same_data")
    (back,) = arms.paired(rise("upstream"), "same_data")
    risen = Difference.of(same)
    yield Claim(
        "2308.04014, 4.4",
        "re-warming raises the loss even on the same data",
        f"highest rise of the upstream loss {risen}; at the end {Difference.of(back)} from the start",
        risen.positive(),
    )
    for name, constant, rewarmed in (("strong", "constant", "rewarm"), ("weaker", "weak_constant", "weak_rewarm")):
        shares = (0.1, 0.2, 0.3, 0.5)
        early = {share: gap(at("downstream", share), rewarmed, constant) for share in shares}
        late = gap(down, constant, rewarmed)
        best = max(early.values(), key=lambda each: each.mean - each.half)
        yield Claim(
            "2308.04014, 4.2",
            f"the constant low rate is ahead early and behind late ({name} shift)",
            "downstream, re-warmed minus constant: "
            + ", ".join(f"after {share:.0%} {each}" for share, each in early.items())
            + f"; constant minus re-warmed at the end {late}",
            together(best.positive(), late.positive()),
        )
    ahead = {
        arm: gap(down, "from_scratch", arm)
        for arm in ("constant", "max_lr_1e-3", "rewarm", "max_lr_4e-3", "warmup_0", "warmup_8pct")
    }
    least = min(ahead, key=lambda arm: ahead[arm].mean)
    yield Claim(
        "2308.04014, 4.3",
        "every continued arm beats training from scratch on the new data",
        f"from scratch minus the worst of them ({least}): {ahead[least]}",
        together(*(each.positive() for each in ahead.values())),
    )
    later = {arm: gap(down, arm, "rewarm") for arm in ("early_7pct_1pct", "early_19pct_1pct")}
    yield Claim(
        "2308.04014, 4.5",
        "the latest checkpoint is the best start",
        f"downstream, above the latest: from 7 % of pre-training {later['early_7pct_1pct']}, 19 % {later['early_19pct_1pct']}",
        together(*(each.positive() for each in later.values())),
    )


def replaying(arms: Arms) -> Iterator[Claim]:
    """arXiv 2403.08763."""
    up, down = rise("upstream"), end("downstream")

    def removed(shift: str, fraction: str) -> tuple[Difference, Difference, float]:
        without, some = arms.paired(up, f"{shift}_0", f"{shift}_{fraction}")
        new, old = arms.paired(down, f"{shift}_{fraction}", f"{shift}_0")
        return Difference.of((without - some) / without), Difference.of(new - old), float(without.mean())

    for shift, fraction, share in (("weak", "0.05", "5 %"), ("strong", "0.25", "25 %")):
        saved, cost, forgotten = removed(shift, fraction)
        half = Difference(saved.mean - 0.5, saved.half, saved.seeds)
        gain = Difference(saved.mean * forgotten - cost.mean, cost.half + saved.half * forgotten, saved.seeds)
        yield Claim(
            "2403.08763, 6.1",
            f"{share} of replay under a {shift} shift removes most of the forgetting at little cost",
            f"of the forgetting {saved.percent} is gone ({forgotten:.3f} nats without replay); the "
            f"downstream loss is {cost} higher",
            together(half.positive(), gain.positive()),
        )
    saved, _, _ = removed("strong", "0.05")
    yield Claim(
        "2403.08763, 6.1",
        "already 1 and 5 % help under a strong shift",
        f"1 %: {removed('strong', '0.01')[0].mean:.0%} of the forgetting gone, 5 %: {saved.percent}",
        together(removed("strong", "0.01")[0].positive(), saved.positive()),
    )
    strong, weak = arms.paired(up, "strong_0.05", "weak_0.05")
    more = Difference.of(strong - weak)
    yield Claim(
        "2403.08763, 6.1",
        "a strong shift needs more replay than a weak one",
        f"with 5 % of replay the strong shift still forgets {more} more",
        more.positive(),
    )
    fractions = ("0.01", "0.05", "0.1", "0.25", "0.5")
    means = {each: arms.paired(mean_end, f"strong_{each}", "union") for each in fractions}
    best = min(means, key=lambda each: means[each][0].mean())
    against = Difference.of(means[best][0] - means[best][1])
    yield Claim(
        "2403.08763, 6.2",
        "re-warming with replay comes near to training on both data sets from scratch, for less compute",
        f"mean of both losses, best replay ({float(best):.0%}) minus union: {against}, for a fifth of the tokens (margin 0.1)",
        HOLDS if against.mean + against.half < 0.1 else FAILS if against.mean - against.half > 0.1 else OPEN,
    )
    for name, arm in (("cosine", "infinite_cosine"), ("inverse square root", "infinite_isqrt")):
        one, two = arms.paired(end("upstream"), f"{arm}-third", "rewarmed-third")
        behind = Difference.of(one - two)
        yield Claim(
            "2403.08763, 7.4",
            f"an infinite schedule ({name} cooldown) costs nothing against a re-warmed cosine for each of three data sets",
            f"after the third part {behind} (a loss no more than 0.03 higher counts as nothing)",
            HOLDS if behind.mean + behind.half < 0.03 else FAILS if behind.mean - behind.half > 0.03 else OPEN,
        )
    one, two = arms.paired(end("upstream"), "rewarmed-third", "one_cosine")
    yield Claim(
        "2403.08763, 7.4",
        "one schedule over all data, which must be known beforehand, is no more than a little better",
        f"re-warmed three times minus one cosine: {Difference.of(one - two)} (a margin of 0.1)",
        HOLDS if Difference.of(one - two).mean + Difference.of(one - two).half < 0.1 else OPEN,
    )


def table(claims: list[Claim]) -> str:
    """As Markdown."""
    lines = ["| paper, section | it says | the mini experiment shows | verdict |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {c.paper} | {c.says} | {c.shows} | **{c.verdict}** |" for c in claims])


PAPERS: dict[str, tuple[str, Callable[[Arms], Iterator[Claim]]]] = {
    "2308.04014": ("rewarm_2308_04014_mini", rewarming),
    "2403.08763": ("replay_2403_08763_mini", replaying),
}


def main() -> None:
    """Judge and print, or write the tables into a page, each between its paper's marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the experiments' folders are")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    page = arguments.write.read_text(encoding="utf-8") if arguments.write is not None else ""
    for paper, (name, claims) in PAPERS.items():
        folder = arguments.runs / name
        if not (folder / "experiment.json").is_file():
            print(f"{folder}: not carried out here; what the page says of {paper} stays", file=sys.stderr)
            continue
        arms = Arms(folder)
        measured = f"{arms.state}.\n\n{table(list(claims(arms)))}"
        if arguments.write is None:
            print(measured)
        else:
            page = put(page, paper, measured)
    if arguments.write is not None:
        arguments.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
