"""The time limit of a run, and when it has to stop so that its last save is within it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from megarewarm.config.reliability import Duration

_SAVE_SHARE, _SAVE_MOST = 0.05, 120.0  # of the limit, seconds: for a save while none has been timed


class TimeLimit:
    """``limit`` from ``began`` (``time.monotonic``) on, or from the beginning of the Slurm job that ``environment`` tells
    of."""

    def __init__(self, limit: Duration | None, began: float, environment: Mapping[str, str]) -> None:
        self._limit = None if limit is None else float(limit.seconds)
        start = environment.get("SLURM_JOB_START_TIME", "")
        if start.isdecimal():  # a restart within the job has the job's remaining time
            began = min(began, time.monotonic() - (time.time() - int(start)))
        self._began = began
        self._longest = 0.0
        self._save: float | None = None

    def step(self, seconds: float) -> None:
        """Record that a step with everything that followed it, evaluation and save, took ``seconds``."""
        self._longest = max(self._longest, seconds)

    def saved(self, seconds: float) -> None:
        """Record that a checkpoint took ``seconds``."""
        self._save = max(self._save or 0.0, seconds)

    @property
    def is_over(self) -> bool:
        """Whether another step and a save may exceed the limit."""
        if self._limit is None:
            return False
        save = self._save if self._save is not None else min(_SAVE_SHARE * self._limit, _SAVE_MOST)
        return time.monotonic() - self._began + self._longest + 1.5 * save > self._limit
