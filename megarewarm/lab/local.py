"""An experiment's runs on this machine, several at a time, each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megarewarm.config.arms import Arm
from megarewarm.errors import UserError
from megarewarm.process import in_main_thread
from megarewarm.resources import CHECKOUT

LAUNCHER = [str(CHECKOUT / "launch.sh")] if CHECKOUT else ["-m", "megarewarm", "train"]
"""Arguments with which Python starts a run."""

_GRACE = 120.0  # seconds that a stopped run may take to save


@dataclass
class Job:
    """A run in its own process; its output goes to ``log``."""

    arm: Arm
    process: subprocess.Popen[bytes]
    log: Path
    device: int | None
    file: IO[bytes] = field(repr=False)
    told_to_stop: bool = False


@dataclass
class Result:
    """How the runs ended: names of complete runs, name -> reason of failed runs, names of runs skipped because of a failure."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stopped_by: int | None = None


def devices() -> list[int]:
    """The GPUs that this process may use."""
    import torch

    return list(range(torch.cuda.device_count()))


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_locally(
    arms: Sequence[Arm],
    words: Sequence[str],
    folder: Path,
    *,
    jobs: int,
    ranks: int = 1,
    tick: Callable[[Sequence[Job], Result], None] = lambda running, result: None,
    every: float = 0.5,
) -> Result:
    """Run ``arms``, ``jobs`` at a time, each as soon as the runs that it starts from are complete.

    ``words``: the experiment's config files, overrides and options for launch.sh. The runs' output goes to ``folder``/logs.
    ``ranks``: processes of each run. Each run gets its own GPUs and an equal share of the CPU cores. ``tick`` is called every
    ``every`` seconds. If a run fails, those that start from it are skipped and the others continue. On SIGINT or SIGTERM all
    runs save and exit.
    """
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{logs}: can't be written ({error}); set 'folder' to another place") from error
    gpus = devices()
    groups = [gpus[i * ranks : (i + 1) * ranks] for i in range(len(gpus) // ranks)] if gpus else []
    result = Result()
    waiting, running = list(arms), list[Job]()
    mine = {arm.name for arm in arms}
    received: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ()
    previous = {number: signal.signal(number, lambda n, _: received.append(n)) for number in watched}
    try:
        while waiting or running:
            if received:
                _stop(running)
                result.stopped_by = received[0]
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                job.file.close()
                _take(job, result)
            lost = {*result.failed, *result.skipped}
            for arm in [arm for arm in waiting if lost & set(arm.after)]:
                waiting.remove(arm)
                result.skipped.append(arm.name)
                lost.add(arm.name)
            while not received and len(running) < jobs and (ready := _next(waiting, result.done, mine)) is not None:
                waiting.remove(ready)
                free = [i for i in range(len(groups)) if i not in [job.device for job in running]]
                device = free[0] if free else None
                running.append(_begin(ready, words, logs, jobs, ranks, device, groups))
            if received and not running:
                break
            tick(running, result)
            if running:
                time.sleep(every)
    finally:
        _stop(running)
        for job in running:
            try:
                job.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(job.process.pid, signal.SIGKILL)
            job.file.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return result


def _next(waiting: Sequence[Arm], done: Sequence[str], mine: set[str]) -> Arm | None:
    """The first run whose predecessors are complete. Predecessors that are not run here count as complete."""
    return next((arm for arm in waiting if all(name in done or name not in mine for name in arm.after)), None)


def _begin(
    arm: Arm, words: Sequence[str], logs: Path, jobs: int, ranks: int, device: int | None, groups: list[list[int]]
) -> Job:
    threads = max(1, cores() // (jobs * ranks))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "COLUMNS": "120"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(groups[device]))
    start = [sys.executable, "-u"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    log = logs / f"{arm.name}.log"
    file = open(log, "ab")  # noqa: SIM115 - lives as long as the process
    command = [*start, *LAUNCHER, *words, "--only", arm.name]
    process = subprocess.Popen(  # noqa: S603 - megarewarm's own launcher with the arguments of this command line, no shell
        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    return Job(arm, process, log, device, file)


def _visible(numbers: Sequence[int]) -> list[str]:
    """The GPUs by their names in CUDA_VISIBLE_DEVICES, which may already select some of them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else None
    return [names[number] if names else str(number) for number in numbers]


def _take(job: Job, result: Result) -> None:
    code = job.process.returncode
    if code == 0:
        result.done.append(job.arm.name)
    elif code >= 128 and result.stopped_by is not None:
        pass  # it was stopped on request; the same command resumes it
    else:
        result.failed[job.arm.name] = f"exit code {code}: {_last_line(job.log)} ({job.log})"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def _stop(running: Sequence[Job]) -> None:
    for job in running:
        if job.process.poll() is None and not job.told_to_stop:
            job.told_to_stop = True
            os.killpg(job.process.pid, signal.SIGTERM)
