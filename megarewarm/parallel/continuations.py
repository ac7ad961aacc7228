"""Log-likelihoods of continuations, out of the states that predict their tokens, also where ranks share the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megarewarm.data.tasks.encode import RowBatch
from megarewarm.parallel.agreement import Between
from megarewarm.parallel.collectives import Group
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.pipeline import Pipeline
from megarewarm.parallel.tensor_ranks import TensorRanks

Scored = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]
"""(log-likelihood in nats of what is scored (b,), whether each scored token is the most likely one (b,)) of rows."""


@dataclass(frozen=True)
class Scorer:
    """A laid out model's parts on this rank, which scores with them: its ``modules``, ``tensor`` and ``pipeline`` ranks; ids
    from ``vocab_size`` on don't count, and ``memory`` bytes of logits are made at a time."""

    modules: Sequence[nn.Module]
    vocab_size: int
    memory: int
    mesh: Mesh
    tensor: TensorRanks | None
    pipeline: Pipeline | None

    def score(self, batches: Sequence[RowBatch], most: int, between: Between, idle: int | None) -> list[Scored]:
        """As ``ParallelModel.score_rows``. ``idle``: positions of the row that a rank without batches computes while others
        need its parameters; None where none do."""
        found: list[Scored] = []
        size = 1 if self.pipeline is None else 2 * self.mesh.layout.pipeline
        for first in range(0, most, size):
            between(first, most)
            portion = batches[first : first + size]
            found += self._score(portion, [] if idle is None else [idle] * (min(size, most - first) - len(portion)))
        return found

    def _score(self, portion: Sequence[RowBatch], idle: Sequence[int]) -> list[Scored]:
        """Of one portion; ``idle``: the positions of rows that are computed for other ranks' sake."""
        found = [(np.zeros(len(batch.numbers)), np.zeros(len(batch.numbers), np.bool_)) for batch in portion]
        group = None if self.tensor is None else self.tensor.group

        def finish(i: int, hidden: Tensor) -> None:
            if self.tensor is not None:
                hidden = self.tensor.enter(hidden)
            head = self.modules[-1].head
            assert isinstance(head, Tensor)
            if i < len(portion):
                scored = score_batch(hidden, head, portion[i], self.vocab_size, self.memory, group)
                found[i] = scored if self.mesh.tensor_rank == 0 else found[i]

        ids = [torch.from_numpy(batch.inputs).to(self.mesh.device) for batch in portion]
        ids += [torch.zeros((1, length), dtype=torch.int64, device=self.mesh.device) for length in idle]
        if self.pipeline is not None:
            self.pipeline.forward(ids, finish)
            return found
        for i, tokens in enumerate(ids):
            finish(i, self.modules[0](tokens))
        return found


def score_batch(
    hidden: Tensor, head: Tensor, batch: RowBatch, vocab_size: int, memory: int, group: Group | None = None
) -> Scored:
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
