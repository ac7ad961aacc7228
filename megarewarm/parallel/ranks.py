"""This rank's view of the job, and the detection of lost and hanging ranks."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

_STORE_PATIENCE = 5.0  # seconds that the store may take to answer

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank's view of the job. ``began``: its start, by ``time.monotonic``."""

    rank: int
    world_size: int
    device: torch.device
    launcher: str = "none"
    store: dist.Store | None = None
    began: float = field(default_factory=time.monotonic)

    def report(self, step: int) -> None:
        """Record that this rank has computed its part of ``step``, so that the others can identify ranks that have not."""
        if self.store is not None:
            self.store.set(f"step/{self.rank}", str(step))

    def give_up(self, patience: float = 10.0) -> str:
        """Record that a collective has failed here, and return a description of the ranks it waited for.

        Ranks that are alive fail within seconds of each other and record the same: those that are silent after ``patience``
        seconds are dead or hang. If all have reported, the ones furthest behind are named.
        """
        if self.store is None:
            return "another rank"
        frozen = f"{_keeper()}, which holds the store and does not answer"
        return _within(patience + _STORE_PATIENCE, lambda: self._who_is_silent(patience), frozen)

    def _who_is_silent(self, patience: float) -> str:
        assert self.store is not None
        try:
            self.store.set(f"gave_up/{self.rank}", "")
            deadline = time.monotonic() + patience
            silent = [rank for rank in range(self.world_size) if rank != self.rank]
            while len(silent) > 1 and time.monotonic() < deadline:
                time.sleep(0.2)
                silent = [rank for rank in silent if not self.store.check([f"gave_up/{rank}"])]
            silent = [rank for rank in silent if not self.store.check([f"gave_up/{rank}"])]
            steps = {rank: self._last_step(rank) for rank in silent or range(self.world_size)}
        except RuntimeError:
            return f"{_keeper()}, which held the store and is gone"
        behind = silent or [rank for rank, step in steps.items() if step == min(steps.values())]
        if len(behind) == self.world_size:
            return "one of the other ranks"
        shown = ", ".join(map(str, behind[:8])) + (", ..." if len(behind) > 8 else "")
        return f"rank{'s' * (len(behind) > 1)} {shown} (last seen at step {max(0, min(steps.values()))})"

    def say_once(self, message: str, patience: float = 2.0) -> None:
        """Print on stderr ``message``, an error that ends this rank and that others may have as well. The main rank prints
        it if it has it within ``patience`` seconds, else the first of the others; each of them if the store does not answer."""
        # at once: a launcher may end this rank as soon as another one has ended
        if self.is_main or self.store is None:
            self._say(message)
        if self.store is None:
            return
        said = _within(patience + _STORE_PATIENCE, lambda: self._is_said(message, patience), False)
        if not (said or self.is_main):
            self._say(message)

    def _say(self, message: str) -> None:
        print(f"{'' if self.is_main else f'rank {self.rank}: '}{message}", file=sys.stderr, flush=True)

    def _is_said(self, message: str, patience: float) -> bool:
        assert self.store is not None
        key = f"error/{hashlib.sha256(message.encode()).hexdigest()}"
        deadline = time.monotonic() + patience
        said = self.is_main
        try:
            if self.is_main:
                self.store.set(f"{key}/main", "")
                # the store may end with this process: the others must have read that first
                while self.store.add(f"{key}/heard", 0) < self.world_size - 1 and time.monotonic() < deadline:
                    time.sleep(0.05)
                return said
            while not said and time.monotonic() < deadline:
                said = self.store.check([f"{key}/main"])
                time.sleep(0.05 * (not said))
            return self.store.add(f"{key}/{'heard' if said else 'first'}", 1) > 1 or said
        except RuntimeError:
            return said

    def _last_step(self, rank: int) -> int:
        assert self.store is not None
        return int(self.store.get(f"step/{rank}")) if self.store.check([f"step/{rank}"]) else -1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _within(seconds: float, ask: Callable[[], T], otherwise: T) -> T:
    """The result of ``ask``, or ``otherwise`` after a timeout, because a store whose rank is frozen never answers."""
    answer: list[T] = []
    asking = threading.Thread(target=lambda: answer.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0] if answer else otherwise


def _keeper() -> str:
    """The owner of the store: torchrun's agent, or else the main rank."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


_LOST = re.compile(r"connection (closed|reset|refused)|timed? ?out|broken pipe|nccl.*(error|abort)|peer", re.IGNORECASE)


def is_rank_loss(error: BaseException | None) -> bool:
    """Whether ``error`` came from a collective because another rank is dead or hangs. torch's pipelines wrap the error of a
    stage in their own, so its causes are checked as well."""
    while isinstance(error, RuntimeError):
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            return True
        error = error.__cause__
    return False
