"""What a run with faults comes to: steps computed again, and whether it is the undisturbed run to the last bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megarewarm.checkpoint.own import store
from megarewarm.checkpoint.own.integrity import find_damage
from megarewarm.record.run import read_run
from tests.chaos.faults import Fault


@dataclass
class Outcome:
    """How one fault went. ``restarts``: starts of the command that it cost; ``recomputed``: steps computed again for it.

    ``named``: the line with which the run stopped and named the cause, None where it went on by itself. ``failure``: what
    was not as promised. ``lost``: steps of the undisturbed run that its own run lacks, or has otherwise.
    """

    fault: Fault
    restarts: int = 0
    recomputed: int = 0
    named: str | None = None
    failure: str | None = None
    lost: int = 0


@dataclass
class MetricsTail:
    """Follows a growing metrics.jsonl: ``step`` is the newest that counts; what a resume takes back goes to ``recomputed``.

    ``alarms``: their kinds.
    """

    path: Path
    step: int = 0
    recomputed: list[int] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    _offset: int = 0

    def update(self) -> None:
        """Read what was added."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole, newline, _ = content.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        for line in whole.split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            if event["event"] == "train":
                self.step = event["step"]
            elif event["event"] == "alarm":
                self.alarms.append(event["kind"])
            elif event["event"] == "resume":
                back_at = max(0, event["step"])
                self.recomputed.append(max(0, self.step - back_at))
                self.step = back_at


COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "lr_sum", "annealing_area")


def steps_lost(run: Path, undisturbed: Path) -> int:
    """Steps of ``undisturbed`` that the metrics of ``run`` lack, hold twice, or with any other number."""
    ours, theirs = read_run(run), read_run(undisturbed)
    mine = list(zip(*(ours.train[name].tolist() for name in COLUMNS), strict=True))
    whole = list(zip(*(theirs.train[name].tolist() for name in COLUMNS), strict=True))
    return max(len(set(whole) - set(mine)), len(mine) - len(set(whole) & set(mine)))


def difference(run: Path, undisturbed: Path) -> str | None:
    """The first thing in which the ends of two runs differ, None where there is nothing.

    Losses, rates and norms of every step, every evaluation, every tensor and every counter of the last checkpoint, and that
    each of ``run``'s checkpoints is whole.
    """
    if lost := steps_lost(run, undisturbed):
        return f"{lost} steps differ in metrics.jsonl"
    ours, theirs = ({(e.step, e.name): e.loss for e in read_run(folder).evaluations} for folder in (run, undisturbed))
    if ours != theirs:
        return f"evaluations differ: {sorted(set(ours.items()) ^ set(theirs.items()))[:3]}"
    last = max((undisturbed / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:])).name
    one, two = run / "checkpoints" / last, undisturbed / "checkpoints" / last
    for checkpoint in (run / "checkpoints").iterdir():
        if problem := find_damage(checkpoint, alone=True):
            return problem
    if (first := _tensors(one)).keys() != (second := _tensors(two)).keys():
        return f"tensors differ: {sorted(first.keys() ^ second.keys())}"
    for name, tensor in first.items():
        if not torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)):
            return f"{one}: {name} is another"
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, two)]
    for key in states[0].keys() | states[1].keys():
        if states[0].get(key) != states[1].get(key):
            return f"{one}: {key} is {states[0].get(key)}, undisturbed {states[1].get(key)}"
    return None


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    held = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in store.stored_tensors(checkpoint).items()}
    store.load(checkpoint, held, alone=True)
    return held


@dataclass
class Row:
    """The table's line of one kind of fault."""

    title: str
    outcomes: list[Outcome]

    def cells(self) -> list[Any]:
        """Injected, without a restart, by a restart, stopped with the cause named, steps again (median, max), data lost."""
        restarted = [outcome for outcome in self.outcomes if outcome.restarts and outcome.named is None]
        named = [outcome for outcome in self.outcomes if outcome.named is not None]
        again = sorted(outcome.recomputed for outcome in self.outcomes)
        untouched = len(self.outcomes) - len(restarted) - len(named)
        lost = sum(outcome.lost for outcome in self.outcomes)
        return [len(again), untouched, len(restarted), len(named), again[len(again) // 2], again[-1], lost]


def table(rows: list[Row]) -> str:
    """Markdown, a line for each kind and one for all."""
    lines = [
        "| fault | injected | went on without a restart | went on when started again | stopped, cause named, then went on | "
        "steps computed again: median | most | data lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    everything = Row("**all**", [outcome for row in rows for outcome in row.outcomes])
    for row in [*(row for row in rows if row.outcomes), everything]:
        lines.append("| " + " | ".join(map(str, [row.title, *row.cells()])) + " |")
    return "\n".join(lines)
