"""A private Slurm on this machine: its own key, ports and folders, two virtual nodes of two tasks each."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

_DAEMONS = ("munged", "slurmctld", "slurmd")
_CONF = """\
ClusterName=megarewarm
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n.spool
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


class Cluster:
    """Slurm's daemons, started and stopped; ``environ`` makes its commands talk to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons. Skips the test, with the reason, where this machine can't run them."""
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        missing = [name for name in (*_DAEMONS, "sbatch", "srun", "scontrol") if shutil.which(name, path=path) is None]
        if missing:
            pytest.skip(f"no Slurm here ({', '.join(missing)} missing): apt-get install munge slurm-wlm")
        if os.getuid() != 0:
            pytest.skip("Slurm's daemons need root to start a job's steps")
        self.environ["PATH"] = path
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        self.folder.chmod(0o755)  # munge refuses to put its socket where others can't reach it
        for name in ("state", "n1.spool", "n2.spool"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(_CONF.format(host=host, user=user, folder=self.folder, ports=_free_ports(3)))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run_daemon(
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()),
        )
        self._run_daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._run_daemon("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 30
        while self.command("sinfo", "--noheader", "--format=%t %D", check=False).split() != ["idle", "2"]:
            if time.monotonic() > deadline:
                log = (self.folder / "slurmctld.log").read_text()[-500:]
                self.stop()
                pytest.skip(f"Slurm's daemons do not come up here: {log}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Cancel what runs and end the daemons."""
        self.command("scancel", "--user", getpass.getuser(), check=False)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()

    def command(self, *words: str, check: bool = True, cwd: Path | None = None) -> str:
        """Output of one of Slurm's commands."""
        result = subprocess.run(words, env=self.environ, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0 or not check, f"{' '.join(words)}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, *words: str, cwd: Path) -> str:
        """The number of the job that sbatch makes of ``words``."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd).strip()

    def state(self, job: str) -> str:
        """State of the job, such as RUNNING or COMPLETED."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One field of ``scontrol show job``."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *states: str, seconds: float = 90) -> str:
        """Wait until the job is in one of ``states``. A requeued job's waiting time of two minutes is cut short."""
        deadline = time.monotonic() + seconds
        hurried = False
        while (state := self.state(job)) not in states:
            if state == "PENDING" and self.field(job, "Reason") == "BeginTime" and not hurried:
                # not at once: the nodes have yet to forget that this job was killed
                self.command("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)
                hurried = True
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s, expected {' or '.join(states)}"
            time.sleep(0.5)
        return state

    def _run_daemon(self, *words: str) -> None:
        log = (self.folder / f"{words[0]}.out").open("ab")
        self._daemons.append(subprocess.Popen(words, env=self.environ, stdout=log, stderr=log))
        if words[0] == "munged":
            deadline = time.monotonic() + 10
            while not (self.folder / "munge.sock").exists() and time.monotonic() < deadline:
                time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
