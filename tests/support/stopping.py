"""Signals to this process amid a step, and the wait until the run has taken them."""

from __future__ import annotations

import os
import signal
import threading
from unittest.mock import patch

import pytest

from megarewarm.training import trainer
from megarewarm.training.after_step.signals import StopRequest
from megarewarm.training.run import Run
from megarewarm.training.step import StepResult


def send_and_wait(number: signal.Signals = signal.SIGTERM) -> None:
    """Without the wait, a small model on a busy machine finishes a step or more before the thread that counts signals runs."""
    taken, take = threading.Event(), StopRequest._take

    def take_and_tell(self: StopRequest, received: int) -> None:
        take(self, received)
        taken.set()

    with patch.object(StopRequest, "_take", take_and_tell):
        os.kill(os.getpid(), number)
        assert taken.wait(60), "no run has taken the signal"


def stop_amid(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A signal amid each of ``steps``, once: the step before is saved."""
    original, left = trainer.training_step, set(steps)

    def step_and_stop(run: Run, lr: float) -> StepResult:
        if run.step + 1 in left:
            left.remove(run.step + 1)
            send_and_wait()
        return original(run, lr)

    monkeypatch.setattr(trainer, "training_step", step_and_stop)
