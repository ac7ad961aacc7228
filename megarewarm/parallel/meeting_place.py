"""The files by which the ranks of one host find each other, or learn that one of them refuses to start. Without torch,
because a rank with contradictory variables reports here before anything is loaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from megarewarm.errors import UserError
from megarewarm.file_lock import identity, is_alive
from megarewarm.files import write_whole
from megarewarm.parallel.launchers import Launch, read_launcher

_PLACE = "/tmp"  # the same for all ranks of a host, which TMPDIR need not be  # noqa: S108 - the folder in it is private
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_RANK_KEYS = ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "RANK", "WORLD_SIZE")
_LATE = 5.0  # seconds between the first and the last rank of one start


class WillNotCome(UserError):
    """Another rank of this host refuses to start. Each waiting rank prints it, because the main rank may be the one."""


def launch_of_process(argv_local_rank: int | None = None) -> Launch:
    """``read_launcher`` of this process's environment; if it is refused, the other ranks of the host are notified. Raises
    ``UserError``."""
    try:
        return read_launcher(os.environ, argv_local_rank)
    except UserError as error:
        refuse(str(error))
        raise


def refuse(why: str) -> None:
    """Notify the waiting ranks of this host that this process will not start."""
    with contextlib.suppress(OSError, UserError):
        write_whole(_refusal_file(), json.dumps([time.time() - _age(), why]).encode())


def refusal() -> str | None:
    """Why a rank of this start, on this host, won't start; None without a notice."""
    with contextlib.suppress(OSError, UserError, ValueError, TypeError):
        began, why = json.loads(_refusal_file().read_text(encoding="utf-8"))
        if began > time.time() - _age() - _LATE:  # not a file of an earlier start under the same launcher
            return str(why)
    return None


def say_port(launch: Launch, port: int) -> None:
    """Publish the main rank's port on this host. Raises ``UserError`` if another main rank has done so already."""
    file = _meeting_point(launch)
    other = _read(file)
    if other is not None and other["process"] != os.getpid() and is_alive(other):
        why = (
            f"two processes under the same launcher are rank 0 of {launch.world_size}: {other['process']} and {os.getpid()}; "
            f"give each one its own RANK, or start the second job after the first has begun to train"
        )
        refuse(why)
        raise UserError(why)
    write_whole(file, json.dumps({**identity(os.getpid()), "port": port}).encode())


def forget_port(launch: Launch) -> None:
    """The main rank calls it when all have met."""
    _meeting_point(launch).unlink(missing_ok=True)


def wait_for_port(launch: Launch, timeout: timedelta) -> int:
    """The main rank's port. Raises ``WillNotCome`` if a rank refuses to start, ``TimeoutError`` if none is published."""
    file = _meeting_point(launch)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if why := refusal():
            raise WillNotCome(why)
        said = _read(file)
        with contextlib.suppress(OSError):
            if said is not None:
                socket.create_connection(("127.0.0.1", int(said["port"])), 5).close()  # not one of a killed run
                return int(said["port"])
        time.sleep(0.05)
    raise TimeoutError(
        f"the main rank did not publish its port in {file}: it was not started, not by the same launcher, or it sees another "
        f"{file.parent.parent}, as in a container of its own"
    )


def _meeting_point(launch: Launch) -> Path:
    """A file that all ranks of this job on this host agree on and no other job uses: named after the step of Slurm or the job
    of Open MPI, else after the process that launched them, which is their parent or that of scripts between."""
    named = launch.launcher in ("slurm", "openmpi")
    return _folder() / f"port-{(named_job() if named else None) or _parent_job()}-{launch.master_port}-{launch.world_size}"


def _refusal_file() -> Path:
    # not named after the ranks' own variables, which may contradict each other
    return _folder() / f"refused-{named_job() or _parent_job()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _folder() -> Path:
    """Private to the user. Raises ``UserError`` if there is no such place."""
    wrong = []
    for place in dict.fromkeys((_PLACE, tempfile.gettempdir())):
        folder = Path(place) / f"megarewarm-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError as error:
            wrong.append(f"{folder}: {error.strerror}")
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
        wrong.append(f"{folder}: is no folder, or others may write in it")
    raise UserError(f"{'; '.join(wrong)}; remove it or set TMPDIR to another folder for all ranks")


def _read(file: Path) -> dict[str, str | int] | None:
    with contextlib.suppress(OSError, ValueError):
        said = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(said, dict) and said.keys() >= {"port", *identity(os.getpid())}:
            return said
    return None


def named_job() -> str | None:
    """The name that Slurm or Open MPI gave the job step."""
    if "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return "-".join(["slurm", *(re.sub(r"\W", "_", os.environ.get(key, "0")) for key in _SLURM_STEP)])
    if os.environ.get("PMIX_NAMESPACE"):
        return "pmix-" + re.sub(r"\W", "_", os.environ["PMIX_NAMESPACE"])
    return None


def _parent_job() -> str:
    launcher = os.getppid()
    # processes between are scripts: they were started with this rank's variables, their launcher was not
    while (above := _parent(launcher)) and _is_of_this_rank(launcher):
        launcher = above
    return f"{launcher}-{identity(launcher)['born'] or 0}"


def _is_of_this_rank(process: int) -> bool:
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    mine = {f"{key}={os.environ[key]}".encode() for key in _RANK_KEYS if key in os.environ}
    return bool(mine) and mine <= set(words)


def _parent(process: int) -> int:
    """A process's parent; 0 if unknown, as above a container's first process."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _age() -> float:
    """Seconds since this process was started."""
    with contextlib.suppress(OSError, ValueError):
        born = int(identity(os.getpid())["born"]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born
    return 0.0
