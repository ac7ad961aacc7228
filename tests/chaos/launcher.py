"""Starts the ranks of one try by fork, so that a try costs no imports, and ends them as real launchers do.

Two ways. ``agent``: as torchrun, whose agent holds the store and ends all others once one has failed. ``plain``: ranks that the
environment describes, whose main rank holds the store, and which end by themselves. The launcher is a process of its own, so
that it can be killed as well. Whoever forks must have no threads.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from tests.chaos.inside import arm

STACKS = signal.SIGUSR2  # asks a rank for the stacks of all its threads
_AGENTS_PATIENCE = 3.0  # torchrun gives ranks 30 s between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Job:
    """What is started: ``ranks`` ranks of ``command``, faults from ``control``, one log file for each rank in ``logs``."""

    command: tuple[str, ...]
    ranks: int
    control: Path
    logs: Path
    run: Path
    global_batch: int
    way: str


def in_child(action: Callable[[], int]) -> int:
    """Fork; the child ends with the code that ``action`` returns, 1 for an exception, without unwinding the parent's frames."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork: set OMP_NUM_THREADS=1"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = action()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    try:
        # as the interpreter's own end: first the threads, then what wants to be told
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def start(job: Job) -> int:
    """The process number of a launcher that has the ranks of ``job`` as children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job.logs.mkdir(parents=True)
    return in_child(lambda: _launch(job, port))


def pids_of(job: Job) -> list[int]:
    """The ranks' process numbers, [] before they are started."""
    path = job.logs / "pids.json"
    return json.loads(path.read_text()) if path.exists() else []


def codes_of(job: Job) -> dict[int, int]:
    """The exit codes of ranks, negative for a signal, as far as the launcher saw them end."""
    return {int(path.suffix[1:]): int(path.read_text()) for path in job.logs.glob("code.*")}


def said(job: Job) -> str:
    """What all ranks wrote to their error streams and outputs."""
    return "\n".join(path.read_text(errors="replace") for path in sorted(job.logs.glob("rank_*.txt")))


def _launch(job: Job, port: int) -> int:
    os.setsid()
    pids = [in_child(lambda rank=rank: _rank(job, rank, port)) for rank in range(job.ranks)]  # type: ignore[misc]

    codes: dict[int, int] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank, pid in enumerate(pids):
            if rank not in codes:  # its number may be another process's by now
                _signal(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    partial = job.logs / "pids.partial"
    partial.write_text(json.dumps(pids))
    partial.rename(job.logs / "pids.json")
    store = _serve(port, job.ranks) if job.way == "agent" else None
    failed_at: float | None = None
    while len(codes) < job.ranks:
        for rank, pid in enumerate(pids):
            if rank not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
                partial = job.logs / f"partial_code.{rank}"
                partial.write_text(str(codes[rank]))
                partial.rename(job.logs / f"code.{rank}")
        if failed_at is None and any(codes.values()):
            failed_at = time.monotonic()
            if job.way == "agent":
                pass_on(signal.SIGTERM, None)
        if failed_at is not None and job.way == "agent" and time.monotonic() - failed_at > _AGENTS_PATIENCE:
            for rank, pid in enumerate(pids):
                if rank not in codes:
                    _signal(pid, signal.SIGKILL)
        time.sleep(0.01)
    del store
    return next((code for code in codes.values() if code), 0) & 0xFF


def _serve(port: int, ranks: int) -> object:
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", port, ranks, True, timeout=timedelta(seconds=60), wait_for_workers=False)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _rank(job: Job, rank: int, port: int) -> int:
    log = os.open(job.logs / f"rank_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(STACKS, all_threads=True)
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "SLURM", "OMPI", "PMI"))]:
        del os.environ[name]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if job.way == "agent":
        os.environ |= {"TORCHELASTIC_RUN_ID": "chaos", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    arm(job.control, rank, job.run, job.global_batch)
    from megarewarm.main import main

    return main(job.command)


def alive(pids: Sequence[int]) -> list[int]:
    """Which of ``pids`` run, or are stopped; those that have ended and were not waited for do not count."""
    found = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            found.append(pid)
    return found
