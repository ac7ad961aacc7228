"""Carries one run through its faults: starts the command, strikes, starts it again as a batch system would, and keeps account.

The command is started again whatever ended it, except a stop with code 2: then the message must name what was broken, which
is repaired first. Anything else (a traceback, a crash, a hang, another cause named) is a failure of the product.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import launcher, outside
from tests.chaos.faults import KINDS, Fault, give_turn, has_fired, mark_fired, write_schedule
from tests.chaos.launcher import Job
from tests.chaos.ledger import MetricsTail, Outcome, difference, steps_lost

HANG = 60.0
"""Seconds without a new step, and without an end, that count as a hang: many times parallel.timeout_minutes."""
_POLL = 0.003
_UNNOTICED = 12  # steps after which a fault that ended nothing will end nothing
_BUSY = "another process is training in this folder"


@dataclass(frozen=True)
class Scenario:
    """``name`` of the layout, number of ``ranks``, configuration file, and the ``place`` that holds its data and ``run``."""

    name: str
    ranks: int
    config: Path
    place: Path
    global_batch: int

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.place / "run"

    @property
    def undisturbed(self) -> Path:
        """Where the run without faults was put."""
        return self.place / "undisturbed"


class Supervisor:
    """One run of ``scenario`` under ``faults``. ``logs``: a folder for what the ranks say."""

    def __init__(self, scenario: Scenario, faults: Sequence[Fault], logs: Path, dice: random.Random) -> None:
        self._scenario, self._logs, self._dice = scenario, logs, dice
        self._outcomes = {fault.number: Outcome(fault) for fault in faults}
        self._control = logs / "control"
        self._tail = MetricsTail(scenario.run / "metrics.jsonl")
        self._waiting = list(faults)
        self._blamed: Fault | None = None  # happened, and its consequences are not over
        self._blamed_at = 0
        self._struck_twice: set[int] = set()
        self._orphans: list[int] = []
        self._orphans_before: list[int] = []
        self.unprovoked: list[str] = []
        self.starts = 0
        write_schedule(self._control, faults)
        self._next()

    def carry_out(self) -> list[Outcome]:
        """Train to the end. The outcomes of the faults that came to happen."""
        try:
            while not self._attempt():
                pass
        finally:
            for fault in (outcome.fault for outcome in self._outcomes.values()):
                outside.repair(fault, self._scenario.place)
        found = [outcome for outcome in self._outcomes.values() if has_fired(self._control, outcome.fault)]
        for outcome in found:
            if outcome.fault.kind == "nan" and not outcome.failure and "transient" not in self._tail.alarms:
                outcome.failure = "no alarm tells of it"
        if not any(outcome.failure for outcome in found) and not self.unprovoked:
            self._compare(found)
        return found

    def _compare(self, found: list[Outcome]) -> None:
        run, undisturbed = self._scenario.run, self._scenario.undisturbed
        answer = self._logs / "difference.txt"
        child = launcher.in_child(lambda: (answer.write_text(difference(run, undisturbed) or ""), 0)[1])
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            self.unprovoked.append("the finished run could not be compared with the undisturbed one")
            return
        if why := answer.read_text():
            for outcome in found:
                outcome.failure = f"not the undisturbed run: {why}"
                outcome.lost = steps_lost(run, undisturbed)
            if not found:
                self.unprovoked.append(why)

    # ---- one start of the command ----------------------------------------------------------------------------------

    def _attempt(self) -> bool:
        """Start the command and see it end. Whether the run is over, complete or failed."""
        way = self._dice.choice(["agent", "plain"])
        scenario = self._scenario
        logs = self._logs / f"start_{self.starts}"
        job = Job((str(scenario.config),), scenario.ranks, self._control, logs, scenario.run, scenario.global_batch, way)
        self.starts += 1
        self._orphans_before = self._orphans
        hung = self._watch(job, launcher.start(job))
        self._follow()
        if hung:
            return self._fail(f"hung for {HANG:.0f} s ({way}): see {logs}")
        return self._judge(job)

    def _watch(self, job: Job, pid: int) -> bool:
        """Until the job has ended, striking when a fault is due. True where it hangs; then it is killed."""
        began = moved = time.monotonic()
        seen = -1
        while not os.waitpid(pid, os.WNOHANG)[0]:
            self._follow()
            now = time.monotonic()
            if self._tail.step != seen:
                seen, moved = self._tail.step, now
            if now - moved > HANG:
                self._kill_all(job, pid)
                return True
            if ranks := launcher.pids_of(job):
                self._strike(job, pid, ranks, now - began)
                self._end_frozen(job, ranks)
            time.sleep(_POLL)
        # ranks whose launcher was killed are ended by the batch system, or else the command is started beside them
        if self._dice.random() < 0.5:
            time.sleep(self._dice.uniform(0.0, 0.3))
            self._end_orphans(launcher.pids_of(job))
        self._orphans = launcher.pids_of(job)
        return False

    def _strike(self, job: Job, pid: int, ranks: list[int], seconds: float) -> None:
        """Do what is due ``seconds`` after the start."""
        blamed = self._blamed
        if blamed is not None:
            again = blamed.kind == "kill_in_start" and blamed.number not in self._struck_twice
            if again and self._outcomes[blamed.number].restarts and seconds > 1.2 * float(blamed.detail):
                self._struck_twice.add(blamed.number)
                self._blamed_at = self._tail.step
                outside.send(ranks[blamed.rank], signal.SIGKILL)
            return
        fault = self._waiting[0] if self._waiting else None
        if fault is None or KINDS[fault.kind].inside or self._tail.step < fault.step:
            return
        if fault.moment == "save" and not any((self._scenario.run / "checkpoints").glob("step_*.partial")):
            return
        time.sleep(fault.delay)
        if launcher.alive(ranks) == ranks and (fault.kind != "no_tensorboard" or self._has_board()):
            mark_fired(self._control, fault)
            self._follow()
            outside.strike(fault, pid, ranks, self._scenario.place)

    def _has_board(self) -> bool:
        return (self._scenario.run / "tensorboard").is_dir()

    def _end_frozen(self, job: Job, ranks: list[int]) -> None:
        """A node that answers no more is taken away by the batch system, once the other ranks have given up."""
        if self._blamed is not None and self._blamed.kind.startswith("freeze"):
            codes = launcher.codes_of(job)
            if len(codes) == len(ranks) - 1 and self._blamed.rank not in codes:
                outside.send(ranks[self._blamed.rank], signal.SIGKILL)

    def _end_orphans(self, pids: list[int]) -> None:
        for pid in pids:
            outside.send(pid, signal.SIGKILL)
        while launcher.alive(pids):
            time.sleep(_POLL)

    def _kill_all(self, job: Job, pid: int) -> None:
        for rank in launcher.alive(launcher.pids_of(job)):
            outside.send(rank, launcher.STACKS)
        time.sleep(0.5)
        for each in (pid, *launcher.pids_of(job)):
            outside.send(each, signal.SIGKILL)
        os.waitpid(pid, 0)

    # ---- what it means ---------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Notice what happened: a fault within a rank, steps taken back by a resume, the end of a fault's consequences."""
        self._tail.update()
        if self._blamed is None and self._waiting and has_fired(self._control, self._waiting[0]):
            self._blamed, self._blamed_at = self._waiting.pop(0), self._tail.step
        if self._blamed is None:
            self._tail.recomputed.clear()
            return
        outcome = self._outcomes[self._blamed.number]
        while self._tail.recomputed:
            outcome.recomputed += self._tail.recomputed.pop(0)
            self._blamed_at = self._tail.step
        beyond = self._tail.step - self._blamed_at
        needed = 2 if self._blamed.kind == "kill_in_start" else int(KINDS[self._blamed.kind].restarts)
        if self._blamed.kind == "kill_launcher" and launcher.alive(self._orphans_before):
            return  # the steps that go by are theirs
        if (beyond >= 2 and outcome.restarts >= needed) or beyond >= _UNNOTICED:
            self._next()

    def _next(self) -> None:
        """The turn of the next fault. What is left of the last one goes: the run may have gone on on a full disk."""
        if self._blamed is not None:
            outside.repair(self._blamed, self._scenario.place)
        self._blamed = None
        give_turn(self._control, self._waiting[0] if self._waiting else None)

    def _judge(self, job: Job) -> bool:
        codes, text, blamed = launcher.codes_of(job), launcher.said(job), self._blamed
        if len(codes) == job.ranks and not any(codes.values()):
            return True
        if any(code in (1, 3, -6, -11, -7, -8) for code in codes.values()):
            return self._fail(f"ended with codes {codes} ({job.way}): see {job.logs}")
        if _BUSY in text and self._orphans_before:
            self._end_orphans(self._orphans_before)  # refused, rightly
            return False
        if blamed is None:
            self.unprovoked.append(f"ended with codes {codes} without a fault ({job.way}): see {job.logs}")
            return True
        outcome = self._outcomes[blamed.number]
        outcome.restarts += 1
        if blamed.kind == "bit_flip" and 5 not in codes.values():
            return self._fail(f"the replicas' difference did not end it, codes {codes} did ({job.way}): see {job.logs}")
        if outcome.restarts == 1:
            outside.between(blamed, self._scenario.place)
        if 2 in codes.values() and not self._explained(job, text, outcome):
            return True
        if not KINDS[blamed.kind].restarts and not outcome.named:
            return self._fail(f"it ended the run, with codes {codes} ({job.way}): see {job.logs}")
        if outcome.restarts > 20:
            return self._fail(f"20 starts did not get past it: see {job.logs}")
        return False

    def _explained(self, job: Job, text: str, outcome: Outcome) -> bool:
        """Whether a stop with code 2 names its cause; then that is repaired."""
        fault = outcome.fault
        named = [line for line in text.splitlines() if KINDS[fault.kind].named and outside.names(fault, line)]
        if named:
            outcome.named = named[0].strip()
            outside.repair(fault, self._scenario.place)
            return True
        self._fail(f"stopped for another cause than {fault.kind} ({job.way}): see {job.logs}")
        return False

    def _fail(self, why: str) -> bool:
        if self._blamed is None:
            self.unprovoked.append(why)
        else:
            self._outcomes[self._blamed.number].failure = why
        return True


def carry_out_undisturbed(scenario: Scenario, logs: Path) -> None:
    """The run without faults, moved to where the others are compared with it. Raises ``RuntimeError`` where it fails."""
    shutil.rmtree(scenario.run, ignore_errors=True)
    write_schedule(logs / "control", [])
    job = Job(
        (str(scenario.config),),
        scenario.ranks,
        logs / "control",
        logs / "start_0",
        scenario.run,
        scenario.global_batch,
        "plain",
    )
    code = os.waitstatus_to_exitcode(os.waitpid(launcher.start(job), 0)[1])
    if code != 0:
        raise RuntimeError(f"the undisturbed run of {scenario.name} ended with code {code}: {launcher.said(job)}")
    scenario.run.rename(scenario.undisturbed)
