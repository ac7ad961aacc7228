"""The kinds of faults, and a schedule of them drawn from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megarewarm.config.schema import RunConfig


@dataclass(frozen=True)
class Kind:
    """``inside``: injected by patches within a rank, else done to it from outside. ``named``: the run may stop for it, if it
    says why, and is repaired. ``restarts``: it may end a process; else training must go on without one."""

    title: str
    inside: bool = False
    named: bool = False
    restarts: bool = True


KINDS = {
    "kill_rank": Kind("SIGKILL of a rank, in any step"),
    "kill_in_save": Kind("SIGKILL of a rank, during a save"),
    "kill_in_start": Kind("SIGKILL of all, and of a rank again while it resumes"),
    "kill_launcher": Kind("SIGKILL of the launcher"),
    "term_rank": Kind("SIGTERM to one rank"),
    "term_in_save": Kind("SIGTERM to one rank, during a save"),
    "term_launcher": Kind("SIGTERM to the launcher, which passes it on"),
    "usr1_all": Kind("SIGUSR1 to all ranks, as ahead of a time limit"),
    "straggler": Kind("SIGSTOP of a rank for up to 1.5 s", restarts=False),
    "freeze": Kind("SIGSTOP of a rank, permanent"),
    "freeze_in_save": Kind("SIGSTOP of a rank, permanent, during a save"),
    "disk_full": Kind("the disk is full (a real one)", named=True),
    "refused": Kind("one write fails with ENOSPC", inside=True, named=True),
    "read_error": Kind("one read of a token file fails with EIO", inside=True, restarts=False),
    "reads_fail": Kind("a rank's reads of token files fail with EIO", inside=True, named=True),
    "truncated": Kind("a token file is cut off", named=True),
    "corrupt": Kind("SIGKILL of all, and a byte flipped in the newest checkpoint"),
    "clock": Kind("the clock jumps by hours", inside=True, restarts=False),
    "no_tensorboard": Kind("the TensorBoard folder is removed", restarts=False),
    "nan": Kind("a gradient becomes NaN in one rank", inside=True, restarts=False),
    "bit_flip": Kind("a bit of a weight flips in one replica", inside=True),
}
REPLICATED_ONLY = {"bit_flip"}
MOMENT_OF = {"kill_in_save": "save", "term_in_save": "save", "freeze_in_save": "save"}
REFUSED_FILES = ("metrics.jsonl", "log.txt", "__", ".metadata", "state.json", "SHA256SUMS")


def supported() -> list[str]:
    """The kinds that this trainer can survive: two need what its ``reliability`` section brings."""
    later = set() if "reliability" in RunConfig.model_fields else {"nan", "bit_flip"}
    return [kind for kind in KINDS if kind not in later]


@dataclass(frozen=True)
class Fault:
    """``kind`` happens to ``rank`` once ``step`` was computed, ``delay`` seconds later, or in the next save after that.

    ``number`` is its place in the schedule, ``detail`` what the kind needs to know besides: a file, hours, a share.
    """

    number: int
    kind: str
    step: int
    rank: int
    delay: float
    detail: str = ""

    @property
    def moment(self) -> str:
        """``step`` or ``save``."""
        return MOMENT_OF.get(self.kind, "step")


def draw(kinds: Sequence[str], ranks: int, steps: int, dice: random.Random) -> list[Fault]:
    """One fault of each of ``kinds``, in their order, at ascending random steps of a run of ``steps``."""
    gap = max(2, (steps - 8) // max(1, len(kinds)))
    faults = []
    for number, kind in enumerate(kinds):
        # two checkpoints stand before one of them is damaged
        step = min(steps - 3, 9 + number * gap + dice.randrange(gap))
        rank = dice.randrange(ranks)
        delay = dice.uniform(0.0, 0.04 if kind in MOMENT_OF else 0.15)
        detail = ""
        if kind == "refused":
            detail = dice.choice(REFUSED_FILES)
            rank = rank if detail == "__" else 0
        elif kind == "clock":
            detail = str(dice.choice([-26.0, -3.0, -0.5, 0.5, 3.0, 26.0]))
        elif kind == "straggler":
            detail = f"{dice.uniform(0.2, 1.5):.2f}"
        elif kind in ("kill_in_start", "corrupt", "nan", "bit_flip"):
            detail = f"{dice.random():.4f}"
        faults.append(Fault(number, kind, step, rank, delay, detail))
    return faults


def write_schedule(folder: Path, faults: Sequence[Fault]) -> None:
    """Put down the schedule for the ranks, and forget what of an older one has happened."""
    (folder / "fired").mkdir(parents=True)
    (folder / "schedule.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    give_turn(folder, None)


def read_schedule(folder: Path) -> list[Fault]:
    """The faults of ``write_schedule``."""
    return [Fault(**fault) for fault in json.loads((folder / "schedule.json").read_text())]


def give_turn(folder: Path, fault: Fault | None) -> None:
    """Only one fault at a time may happen, so that it is known what ended a run."""
    partial = folder / "turn.partial"
    partial.write_text("" if fault is None else str(fault.number))
    partial.rename(folder / "turn")


def has_turn(folder: Path, fault: Fault) -> bool:
    """Whether it is this one."""
    return (folder / "turn").read_text() == str(fault.number)


def has_fired(folder: Path, fault: Fault) -> bool:
    """Whether it has happened, in this process or an earlier one."""
    return (folder / "fired" / str(fault.number)).exists()


def mark_fired(folder: Path, fault: Fault) -> bool:
    """Put down that it happens now. False where it has happened already, or may not yet: then the caller must do nothing."""
    if not has_turn(folder, fault):
        return False
    try:
        (folder / "fired" / str(fault.number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
