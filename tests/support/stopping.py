"""A signal to this process, and the wait until the run has taken it."""

from __future__ import annotations

import os
import signal
import threading
from unittest.mock import patch

from megarewarm.training.after_step.signals import StopRequest


def send_and_wait(number: signal.Signals = signal.SIGTERM) -> None:
    """Without the wait, a small model on a busy machine finishes a step or more before the thread that counts signals runs."""
    taken, take = threading.Event(), StopRequest._take

    def take_and_tell(self: StopRequest, received: int) -> None:
        take(self, received)
        taken.set()

    with patch.object(StopRequest, "_take", take_and_tell):
        os.kill(os.getpid(), number)
        assert taken.wait(60), "no run has taken the signal"
