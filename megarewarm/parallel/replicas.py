"""Silent corruption: whether ranks that should hold the same weights still do. Each rank reads its weights and moments once
and sends 64-bit checksums; only if these differ does it send those of single parameters."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.mesh import Layout, ranks_along

_PIECE = 2**20  # values at a time: temporaries take some 32 MiB
_KINDS = ("replicated", "on tensor ranks", "tied")  # of parameters, by the ranks that hold them
_MIX = 0x9E3779B97F4A7C15 - 2**64  # odd, so that the multiplication is invertible modulo 2**64


class ReplicasDiffer(Exception):
    """Ranks that should hold the same weights don't; nothing of this state was saved."""


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


@collective
def check_replicas(model: ParallelModel, moments: Mapping[tuple[str, str], Tensor]) -> None:
    """Compare the weights, and the optimizer's ``moments`` by (moment, parameter), that several ranks hold. All ranks call it;
    raises ``ReplicasDiffer`` on all of them.

    Only what is equal bit for bit by construction is compared, parameters whose gradient is one sum that all these ranks
    receive: all among data-parallel replicas (with shards, of several groups: ``parallel.shard_ranks``), whole ones among
    tensor ranks that divide the sequence, and a tied embedding at both ends of a pipeline.
    """
    layout, ranks = model.mesh.layout, model.mesh.ranks.world_size
    there = {_kind(model, name) for name in model.shapes}
    shared = [kind for kind in _KINDS if kind in there and len(_holders(kind, layout)[0]) > 1]
    if not shared:
        return
    held = {name: (name, parameter.detach()) for name, parameter in model.parameters.items()}
    held |= {f"{moment} of {name}": (name, tensor) for (moment, name), tensor in moments.items()}
    sums: dict[str, dict[str, int]] = {kind: {} for kind in _KINDS}
    for label, (name, values) in held.items():
        sums[_kind(model, name)][label] = checksum(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([_combined(list(sums[kind].values())) for kind in shared], dtype=torch.int64, device=device)
    found = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(found, mine)
    everyone = [each.tolist() for each in found]
    if all(
        len({everyone[rank][place] for rank in group}) == 1
        for place, kind in enumerate(shared)
        for group in _holders(kind, layout)
    ):
        return
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, (socket.gethostname(), sums))
    groups = [(kind, group) for kind in shared for group in _holders(kind, layout)]
    raise ReplicasDiffer(_words([host for host, _ in told], [held for _, held in told], groups))


def _kind(model: ParallelModel, name: str) -> str:
    if name in model.tied:
        return "tied"
    return "on tensor ranks" if model.placements[name].partial else "replicated"


def _holders(kind: str, layout: Layout) -> list[list[int]]:
    """The ranks that hold the same parameters of a kind, group by group."""
    if kind == "tied":
        ends = layout.grid[[0, -1]] if layout.pipeline > 1 else layout.grid
        return ranks_along(ends, "pipeline", "replicate")
    return ranks_along(layout.grid, *(("replicate",) if kind == "replicated" else ("replicate", "tensor")))


def _words(
    hosts: Sequence[str], sums: Sequence[Mapping[str, Mapping[str, int]]], groups: Sequence[tuple[str, Sequence[int]]]
) -> str:
    """The ranks that differ from the majority, and in which parameters. Of two that differ neither is known to be right."""
    suspects: set[int] = set()
    names: dict[str, None] = {}
    for kind, ranks in groups:
        for name in sums[ranks[0]][kind]:
            votes = Counter(sums[rank][kind][name] for rank in ranks)
            if len(votes) == 1:
                continue
            names[name] = None
            usual, count = votes.most_common(1)[0]
            suspects.update(rank for rank in ranks if 2 * count <= len(ranks) or sums[rank][kind][name] != usual)
    shown = ", ".join(f"{rank} on {hosts[rank]}" for rank in sorted(suspects)[:8])
    first, *others = names
    more = f" and {len(others)} more" if others else ""
    if len(suspects) == 1:
        what = f"the weights of rank {shown} changed without a step: {first}{more} differs from the other replicas'"
    else:
        what = f"the weights of ranks {shown} should be equal and differ in {first}{more}: one of them changed without a step"
    return (
        f"{what}. Nothing of it was saved; the same command continues from the last checkpoint. A memory, a GPU or a link is "
        f"faulty: exclude the host if it recurs"
    )


def _combined(sums: Sequence[int]) -> int:
    total = 0
    for value in sums:
        total = (total * 0x100000001B3 + value) % 2**64
    return total - 2**64 if total >= 2**63 else total
