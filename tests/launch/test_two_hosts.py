"""Two hosts: network namespaces of this machine, each with an address of its own and no other way to the other one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import events, mapping

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
pytestmark = pytest.mark.launch


class Hosts:
    """Two namespaces joined by a cable; ``start`` runs a command in one of them."""

    def __init__(self) -> None:
        self.names = [f"megarewarm{os.getpid()}{side}" for side in "ab"]
        self.started: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        """Make the namespaces. Skips the test, with the reason, where that isn't permitted."""
        if os.getuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and the ip command of iproute2")
        cables = [f"mw{os.getpid()}{side}" for side in "ab"]
        commands = [f"netns add {name}" for name in self.names]
        commands.append(f"link add {cables[0]} type veth peer name {cables[1]}")
        for name, cable, address in zip(self.names, cables, ADDRESSES, strict=True):
            commands.append(f"link set {cable} netns {name}")
            commands += [f"-n {name} addr add {address}/24 dev {cable}", f"-n {name} link set {cable} up"]
            commands.append(f"-n {name} link set lo up")
        for command in commands:
            result = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                self.remove()
                pytest.skip(f"no network namespaces here: ip {command}: {result.stderr.strip()}")

    def start(self, host: int, words: list[str], **environ: str) -> subprocess.Popen[str]:
        """The command running on host 0 or 1."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *words],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def remove(self) -> None:
        """End what runs there and take the namespaces away."""
        for process in self.started:
            with suppress(ProcessLookupError):
                process.kill()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    hosts.make()
    try:
        yield hosts
    finally:
        hosts.remove()


def write_config(place: Path, **changes: object) -> str:
    path = place / "run.yml"
    path.write_text(yaml.safe_dump(mapping(place, name="run", folder=str(place / "run"), training={"budget": 6}, **changes)))
    return str(path)


def finish(processes: list[subprocess.Popen[str]]) -> str:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n---- the other host ----\n".join(outputs)
    return "".join(outputs)


def assert_trained_by_two(place: Path) -> None:
    (start,) = events(place / "run", "start")
    assert start["ranks"] == 2 and len(events(place / "run", "train")) == 6


@pytest.mark.parametrize("rendezvous", [pytest.param("master", marks=pytest.mark.slow), "c10d"])
def test_torchrun(hosts: Hosts, tmp_path: Path, rendezvous: str) -> None:
    path = write_config(tmp_path)
    processes = []
    for host in (0, 1):
        where = {
            "master": ["--node-rank", str(host), "--master-addr", ADDRESSES[0], "--master-port", "29511"],
            "c10d": ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29511", "--rdzv-id", "7"],
        }[rendezvous]
        if rendezvous == "c10d":
            # namespaces share the machine's name, by which torchrun would know on which host it is
            where += ["--local-addr", ADDRESSES[host], "--rdzv-conf", f"is_host={int(host == 0)}"]
        processes.append(hosts.start(host, [str(BIN / "torchrun"), "--nnodes", "2", *where, "launch.sh", path]))
    output = finish(processes)
    assert output.count("(by torchrun)") == 1
    assert_trained_by_two(tmp_path)


@pytest.mark.slow
def test_deepspeed_started_on_each_host(hosts: Hosts, tmp_path: Path) -> None:
    path = write_config(tmp_path, parallel={"tensor": 2})
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    words = [str(_deepspeed()), "--hostfile", str(hostfile), "--no_ssh", "--master_addr", ADDRESSES[0]]
    output = finish([hosts.start(host, [*words, "--node_rank", str(host), "launch.sh", path]) for host in (0, 1)])
    assert output.count("(by deepspeed)") == 1
    assert_trained_by_two(tmp_path)


@pytest.mark.slow
def test_deepspeed_reaches_the_hosts_of_its_file_by_ssh(hosts: Hosts, tmp_path: Path) -> None:
    daemon = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/bin")
    missing = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None] + (["sshd"] if not daemon else [])
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install pdsh openssh-server")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {"HostKey": key, "AuthorizedKeysFile": f"{key}.pub", "StrictModes": "no", "UsePAM": "no", "PidFile": "none"}
    for host, address in enumerate(ADDRESSES):
        settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        hosts.start(host, [str(daemon), "-D", "-e", "-f", "/dev/null", "-o", f"ListenAddress={address}", *settings])
    time.sleep(1)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    path = write_config(tmp_path)
    words = [str(_deepspeed()), "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", ADDRESSES[0], "launch.sh", path]
    quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    output = finish([hosts.start(0, words, PDSH_SSH_ARGS_APPEND=f"-i {key} {quiet}")])
    assert output.count("(by deepspeed)") == 1
    assert_trained_by_two(tmp_path)


@pytest.mark.slow
def test_a_dead_master_is_named(hosts: Hosts, tmp_path: Path) -> None:
    path = write_config(tmp_path, parallel={"timeout_minutes": 0.05})
    rank = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    master = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}
    process = hosts.start(1, [sys.executable, "launch.sh", path], **rank, **master)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    assert f"master {ADDRESSES[0]}:29511" in output and "check that every rank was started" in output


def _deepspeed() -> Path:
    if not (BIN / "deepspeed").exists():
        pytest.skip(f"{BIN / 'deepspeed'} is not installed")
    return BIN / "deepspeed"
