"""Log-likelihoods of continuations, out of the states that predict their tokens, also where ranks share the vocabulary."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megarewarm.data.tasks.encode import RowBatch
from megarewarm.parallel.collectives import Group


def score_batch(
    hidden: Tensor, head: Tensor, batch: RowBatch, vocab_size: int, memory: int, group: Group | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(log-likelihood in nats (b,), whether each scored token is the most likely one (b,)) of the rows of ``batch``.

    ``hidden`` (b, s, h): states after the last norm; ``head`` (v, h), of which the rows from ``vocab_size`` on don't count;
    with ``group`` each of its ranks has equally many rows of it, and all of them call this and get the result. Logits are fp32
    sums whatever the dtype of states and head, ``memory`` bytes of them at a time.
    """
    device = hidden.device
    states = hidden.flatten(0, 1)[torch.from_numpy(batch.places).to(device)]
    targets = torch.from_numpy(batch.targets).to(device)
    chunk = max(1, memory // (4 * len(head)))
    with torch.autocast(device.type, enabled=False):
        matrix = head.float()
        parts = [
            _likelihoods(x.float(), matrix, wanted, vocab_size, group)
            for x, wanted in zip(states.split(chunk), targets.split(chunk), strict=True)
        ]
    found, likeliest = (torch.cat(each).cpu().numpy() for each in zip(*parts, strict=True))
    sums, missed = np.zeros(len(batch.numbers)), np.zeros(len(batch.numbers), np.int64)
    np.add.at(sums, batch.rows, found.astype(np.float64))
    np.add.at(missed, batch.rows, ~likeliest)
    return sums, missed == 0


def _likelihoods(states: Tensor, head: Tensor, targets: Tensor, vocab_size: int, group: Group | None) -> tuple[Tensor, Tensor]:
    """(log-likelihood (n,), whether it is the most likely token (n,)) of ``targets`` (n,); of equal logits the first token is
    the most likely one."""
    first = 0 if group is None else group.rank() * len(head)
    logits = F.linear(states, head[: max(0, min(len(head), vocab_size - first))])
    if logits.shape[1] == 0:  # padded rows only
        logits = logits.new_full((len(states), 1), -torch.inf)
    local = targets - first
    elsewhere = (local < 0) | (local >= logits.shape[1])
    target = logits.gather(1, local.masked_fill(elsewhere, 0)[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    highest, place = logits.max(1)
    if group is None:
        return target - torch.logsumexp(logits, 1), place == targets
    top = highest.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    place = (place + first).masked_fill(highest < top, torch.iinfo(torch.int64).max)
    dist.all_reduce(place, dist.ReduceOp.MIN, group=group)
    sums = torch.stack([(logits - top[:, None]).exp().sum(1), target])
    dist.all_reduce(sums, group=group)
    return sums[1] - top - sums[0].log(), place == targets
