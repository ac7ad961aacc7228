"""Whether a run's ranks fit into the memory of this machine, and remedies if not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarewarm.config.schema import RunConfig
from megarewarm.layout.cluster import MEMORY_IN_USE
from megarewarm.parallel.launchers import Launch
from megarewarm.spelling import bytes_text

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_FEW = 100_000_000
"""Parameters: of 70 million a step in fp32 takes 0.97 of the time without page faults, of 135 million 0.99."""


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


def free_memory(device: torch.device, ranks: int) -> float:
    """Bytes that one of ``ranks`` has to itself: free on its GPU, or its share of this machine's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine_memory() / ranks


def keeps_freed_memory(parameters: Iterable[torch.Tensor], device: torch.device, precision: str) -> bool:
    """Whether a rank with these parameters keeps what a step frees for the next: on a CPU, in bf16 and fp16, and in fp32 if
    they are few. With many, page faults are 1 % of a step, and the memory is worth more."""
    few = sum(parameter.numel() for parameter in parameters) <= _FEW
    return device.type == "cpu" and (few or precision != "fp32")


def remedies(run: RunConfig) -> str:
    """Changes that make ``run`` need less memory."""
    training = run.training
    found = [f"lower training.micro_batch (now {training.micro_batch})"] if training.micro_batch != 1 else []
    found = ["set training.micro_batch to less than auto has chosen"] if training.micro_batch == "auto" else found
    found += ["set training.recompute to full"] if training.recompute != "full" else []
    return ", or ".join([*found, "divide the model with parallel.sharding, tensor or pipeline"])


@dataclass(frozen=True)
class Room:
    """Bytes that ``who`` would need, and that ``where`` has."""

    who: str
    needed: float
    where: str
    has: float

    def __str__(self) -> str:
        return f"{self.who} would need {bytes_text(self.needed)}, {self.where} has {bytes_text(self.has)}"


def room(needed: Sequence[float], launch: Launch, *, on_gpu: bool) -> Room | None:
    """What the ranks of a run that are on this machine need, and what it has. ``needed``: bytes of every rank, in their order.

    A launcher says which of them run here; without one all of them would. Nothing is known of GPUs where there are none.
    """
    if on_gpu and not torch.cuda.device_count():
        return None
    first = launch.rank - launch.local_rank
    here = needed[first : first + launch.local_world_size] if launch.world_size > 1 else needed
    if on_gpu:
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return Room("a rank", max(here), "a GPU of this machine", min(sizes))
    return Room("the run" if len(here) == 1 else f"{len(here)} ranks", sum(here), "this machine", machine_memory())


def memory_note(run: RunConfig, needed: Sequence[float], launch: Launch, *, on_gpu: bool) -> list[str]:
    """The line on ranks that need more than this machine has; see ``room``."""
    here = room(needed, launch, on_gpu=on_gpu)
    if here is None or here.needed <= MEMORY_IN_USE * here.has:
        return []
    return [f"memory: {here}; {remedies(run)}, or run it where there is more"]
