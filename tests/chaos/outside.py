"""Faults done to a running job from outside: signals, files that are removed, cut off or damaged, a disk that fills up."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from megarewarm.checkpoint.own.folder import checkpoints_in
from tests.chaos.faults import Fault


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def strike(fault: Fault, launcher: int, ranks: list[int], place: Path) -> None:
    """Do what ``fault`` says to a job: its launcher, its ranks, and the files in ``place``."""
    victim = ranks[fault.rank]
    match fault.kind:
        case "kill_rank" | "kill_in_save":
            send(victim, signal.SIGKILL)
        case "kill_launcher":
            send(launcher, signal.SIGKILL)
        case "term_rank" | "term_in_save":
            send(victim, signal.SIGTERM)
        case "term_launcher":
            send(launcher, signal.SIGTERM)
        case "usr1_all":
            for pid in ranks:
                send(pid, signal.SIGUSR1)
        case "straggler":
            send(victim, signal.SIGSTOP)
            time.sleep(float(fault.detail))
            send(victim, signal.SIGCONT)
        case "freeze" | "freeze_in_save":
            send(victim, signal.SIGSTOP)
        case "kill_in_start" | "corrupt":
            for pid in (launcher, *ranks):
                send(pid, signal.SIGKILL)
        case "disk_full":
            _fill(place / "filler")
        case "truncated":
            os.truncate(place / "new.bin", os.path.getsize(place / "new.bin") // 3)
        case "no_tensorboard":
            # at once, not file by file: the writer goes on writing meanwhile
            gone = place / "gone"
            (place / "run" / "tensorboard").rename(gone)
            shutil.rmtree(gone)
        case _:
            raise ValueError(f"{fault.kind} is not done from outside")


def between(fault: Fault, place: Path) -> None:
    """What happens to the files after the job has ended and before it is started again."""
    if fault.kind == "corrupt" and len(found := checkpoints_in(place / "run" / "checkpoints")) > 1:
        flip_a_byte(found[-1][1], random.Random(fault.detail))


def repair(fault: Fault, place: Path) -> None:
    """What somebody does who has read why the run stopped."""
    if fault.kind == "disk_full":
        (place / "filler").unlink(missing_ok=True)
    elif fault.kind == "truncated":
        # in place: ranks that still read see it whole
        whole = (place / "new.bin.copy").read_bytes()
        with open(place / "new.bin", "r+b") as file:
            file.write(whole)


def names(fault: Fault, line: str) -> bool:
    """Whether a line of what the ranks said names the cause and the place of ``fault``."""
    needed = {
        "disk_full": ("/run", "No space left"),
        "refused": ("/run", "No space left"),
        "reads_fail": ("/new.bin", os.strerror(errno.EIO)),
        "truncated": ("/new.",),
    }
    return all(word in line for word in needed[fault.kind])


def flip_a_byte(checkpoint: Path, dice: random.Random) -> None:
    """One bit of one byte of one file, as a bad disk does."""
    file = dice.choice(sorted(path for path in checkpoint.iterdir() if path.stat().st_size))
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def _fill(filler: Path) -> None:
    """Until nothing goes any more, to the byte."""
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
