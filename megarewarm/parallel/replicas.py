"""Whether ranks that hold the same weights still do: a memory or a computation that went wrong in silence shows here.

Each rank reads its weights once and sends a 64-bit checksum; only where these differ are those of the single parameters sent.
"""

from __future__ import annotations

import socket
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Layout

_PIECE = 2**20  # values at a time: what is computed on the way takes some 32 MiB
_MIX = 0x9E3779B97F4A7C15 - 2**64  # odd, so that multiplying by it loses nothing modulo 2**64


class ReplicasDiffer(Exception):
    """Ranks that should hold the same weights don't; nothing of it was saved."""


def checksum(values: Tensor) -> int:
    """A 64-bit checksum of the bits of an fp32 tensor, the same on every device.

    The sum modulo 2**64 of the words, each by an odd number that depends on its place: one changed bit always changes it,
    several leave it unchanged with a probability of about 2**-64.
    """
    words = values.detach().contiguous().view(torch.int32).flatten()
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE].long()
        places = torch.arange(start, start + len(piece), device=words.device)
        total += (piece * ((places * _MIX) | 1)).sum()
    return int(total)


def check_replicas(model: ParallelModel) -> None:
    """Compare what data-parallel ranks hold more than once. All ranks call it; raises ``ReplicasDiffer`` on all of them.

    Their gradients are one sum that all receive, so their weights are equal bit for bit. Without replicas there is nothing to
    compare: with shards, only those of several groups (``parallel.shard_ranks``) are.
    """
    mesh = model.mesh
    if mesh.layout.replicate == 1:
        return
    sums = {name: checksum(parameter) for name, parameter in model.parameters.items()}
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([_combined(list(sums.values()))], dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(mesh.ranks.world_size)]
    dist.all_gather(found, mine)
    everyone = [int(each) for each in found]
    groups = _replicas(mesh.layout, mesh.ranks.world_size)
    if all(len({everyone[rank] for rank in ranks}) == 1 for ranks in groups):
        return
    told: list[Any] = [None] * mesh.ranks.world_size
    dist.all_gather_object(told, (socket.gethostname(), sums))
    raise ReplicasDiffer(_words([host for host, _ in told], [held for _, held in told], groups))


def _replicas(layout: Layout, world_size: int) -> list[list[int]]:
    """The ranks that hold the same, group by group."""
    same: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for rank in range(world_size):
        place = rank // layout.tensor
        same[rank % layout.tensor, place % layout.shard, place // layout.data].append(rank)
    return list(same.values())


def _words(hosts: Sequence[str], sums: Sequence[Mapping[str, int]], groups: Sequence[Sequence[int]]) -> str:
    """Which ranks are alone with their weights, and in which parameters. Of two that differ nobody knows which is right."""
    suspects: set[int] = set()
    names: dict[str, None] = {}
    for ranks in groups:
        for name in sums[ranks[0]]:
            votes = Counter(sums[rank][name] for rank in ranks)
            if len(votes) == 1:
                continue
            names[name] = None
            usual, count = votes.most_common(1)[0]
            suspects.update(rank for rank in ranks if 2 * count <= len(ranks) or sums[rank][name] != usual)
    shown = ", ".join(f"{rank} on {hosts[rank]}" for rank in sorted(suspects)[:8])
    first, *others = names
    more = f" and {len(others)} more" if others else ""
    if len(suspects) == 1:
        what = f"the weights of rank {shown} changed without a step: {first}{more} differs from the other replicas'"
    else:
        what = f"the weights of ranks {shown} should be equal and differ in {first}{more}: one of them changed without a step"
    return (
        f"{what}. Nothing of it was saved; the same command goes on from the last checkpoint. A memory, a GPU or a link is at "
        f"fault: leave the host out if it comes again"
    )


def _combined(sums: Sequence[int]) -> int:
    total = 0
    for value in sums:
        total = (total * 0x100000001B3 + value) % 2**64
    return total - 2**64 if total >= 2**63 else total
