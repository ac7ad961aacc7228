"""Signals: the first saves, a launcher's echo of it does nothing, a later one ends at once, even a rank that waits for
another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megarewarm.training.after_step import signals
from megarewarm.training.after_step.signals import StopRequest
from tests.support.tiny import printed, quiet

ROOT = Path(__file__).resolve().parents[2]


def wait_for(what: object, stop: StopRequest) -> None:
    deadline = time.monotonic() + 20
    while stop.received != what and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.received == what


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    console = quiet()
    with StopRequest(console) as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        wait_for(number, stop)
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher passes on within its grace
        time.sleep(0.2)
    assert signal.getsignal(number) is before
    assert "stopping and saving" in printed(console)


def test_many_requests_one_after_another_leave_no_file_open() -> None:
    count = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else None
    for _ in range(20):
        with StopRequest(quiet()):
            pass
    if count is not None:
        assert len(os.listdir("/proc/self/fd")) == count


def test_a_second_signal_ends_a_process_that_is_stuck_in_native_code() -> None:
    """The main thread never comes back to the interpreter, as in a collective whose other rank hangs."""
    script = f"""
        import ctypes, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
        from rich.console import Console
        from megarewarm.training.after_step.signals import StopRequest
        with StopRequest(Console()):
            print("ready", flush=True)
            stuck = ctypes.create_string_buffer(64)  # a pthread mutex, all zeros
            libc = ctypes.CDLL(None)
            libc.pthread_mutex_lock(stuck)
            libc.pthread_mutex_lock(stuck)  # with itself: waits for good, whatever the signals
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(signals._SAME_REQUEST + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"stopped at once" in error
