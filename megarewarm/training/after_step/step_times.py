"""Steps that take much longer than the others, and ranks that the others always wait for."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megarewarm.config.reliability import ReliabilityConfig
from megarewarm.parallel.agreement import gather
from megarewarm.training.after_step.part import Context, Moment, Stateless

_WINDOW = 64  # steps whose median is the usual time
_FEWEST = 16  # steps before the first check
_NOTICEABLE = 1.0  # seconds more than usual: less is not worth a look, however short the steps
_IN_MOST = 0.8  # share of the steps in which a slow rank is last


@dataclass(frozen=True)
class SlowAlarm:
    """``kind``: "slow_step" or "slow_rank"."""

    kind: str
    message: str


class Times(Stateless):
    """Raises an alarm for each of them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._times = StepTimes(context.run.plan.config.reliability, gather(socket.gethostname()))

    def after(self, moment: Moment) -> None:
        if moment.result is None:
            return
        step = self._context.run.step
        for alarm in self._times.add(moment.seconds, moment.result.busy):
            line = f"step {step}: {alarm.message}"
            self._context.metrics.event("alarm", step=step, kind=alarm.kind, message=alarm.message)
            self._context.metrics.text(line)
            self._context.voice.warn(line)


class StepTimes:
    """Judges the times of steps and ranks. ``hosts``: of each rank. Ranks that compute one layer or one micro-batch together
    wait for each other within a step, so their times are nearly equal, and a slow one shows only in the step's time."""

    def __init__(self, settings: ReliabilityConfig, hosts: Sequence[str]) -> None:
        self._settings, self._hosts = settings, hosts
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._busy: deque[Sequence[float]] = deque(maxlen=_WINDOW)
        self._slow: set[int] = set()

    def add(self, seconds: float, busy: Sequence[float]) -> list[SlowAlarm]:
        """The alarm for a step of ``seconds``, of which rank i worked ``busy[i]``, or None."""
        found = [alarm for alarm in (self._slow_step(seconds, busy), self._slow_rank()) if alarm is not None]
        self._seconds.append(seconds)
        self._busy.append(busy)
        return found

    def _slow_step(self, seconds: float, busy: Sequence[float]) -> SlowAlarm | None:
        factor = self._settings.slow_step
        if factor is None or len(self._seconds) < _FEWEST:
            return None
        usual = median(self._seconds)
        if seconds < factor * usual or seconds - usual < _NOTICEABLE:
            return None
        said = f"took {seconds:.1f} s, {seconds / usual:.1f} times the median of {usual:.2f} s"
        if len(busy) > 1:
            last = max(range(len(busy)), key=busy.__getitem__)
            said += (
                f"; rank {last} on {self._hosts[last]} worked longest, {busy[last]:.1f} s (median rank {median(busy):.1f} s)"
            )
        return SlowAlarm("slow_step", said)

    def _slow_rank(self) -> SlowAlarm | None:
        """A rank that has become slow; it is named once, and again after it has recovered."""
        factor = self._settings.slow_rank
        if factor is None or len(self._hosts) == 1 or len(self._busy) < _WINDOW:
            return None
        ranks = range(len(self._hosts))
        last = [max(ranks, key=busy.__getitem__) for busy in self._busy]
        rank = max(ranks, key=last.count)
        mine = median(busy[rank] for busy in self._busy)
        others = median(median(busy[other] for busy in self._busy) for other in ranks if other != rank)
        if last.count(rank) < _IN_MOST * len(last) or mine < factor * others:
            self._slow.clear()
            return None
        if rank in self._slow:
            return None
        self._slow = {rank}
        return SlowAlarm(
            "slow_rank",
            f"rank {rank} on {self._hosts[rank]} is the last in {last.count(rank)} of {len(last)} steps: {mine:.3g} s, the "
            f"others {others:.3g} s; all wait for it",
        )
