"""Whether a run's ranks fit into the memory of this machine, and remedies if not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megarewarm.config.schema import RunConfig
from megarewarm.layout.cluster import MEMORY_IN_USE
from megarewarm.parallel.launchers import Launch

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes of this machine's memory, or of the limit of its container or batch system."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, _LIMITS):
        try:
            text = limit.read_text(encoding="ascii").strip()
        except OSError:
            continue
        found += [int(text)] if text.isdecimal() else []  # 'max' is no limit
    return min(found)


def remedies(run: RunConfig) -> str:
    """Changes that make ``run`` need less memory."""
    training = run.training
    found = [f"lower training.micro_batch (now {training.micro_batch})"] if training.micro_batch > 1 else []
    found += ["set training.recompute to full"] if training.recompute != "full" else []
    return ", or ".join([*found, "divide the model with parallel.sharding, tensor or pipeline"])


def memory_note(run: RunConfig, needed: Sequence[float], launch: Launch, *, on_gpu: bool) -> list[str]:
    """The note on ranks that need more memory than this machine has. ``needed``: bytes of every rank of the run, in their
    order. A launcher determines which of them run here; without one all of them would. Without GPUs their memory is unknown."""
    if on_gpu and not torch.cuda.device_count():
        return []
    first = launch.rank - launch.local_rank
    here = needed[first : first + launch.local_world_size] if launch.world_size > 1 else needed
    if on_gpu:
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        most, has, where = max(here), min(sizes), "a GPU of this machine"
        who = "a rank"
    else:
        most, has, where = sum(here), machine_memory(), "this machine"
        who = "the run" if len(here) == 1 else f"{len(here)} ranks"
    if most <= MEMORY_IN_USE * has:
        return []
    return [
        f"memory: {who} would need {most / 2**30:.1f} GiB, {where} has {has / 2**30:.1f} GiB; {remedies(run)}, or run it where "
        f"there is more"
    ]
