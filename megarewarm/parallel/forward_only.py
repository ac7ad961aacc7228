"""A pipeline's forward pass without a backward one. Not by torch's schedules, which for zero_bubble can't do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ForwardOnly:
    """This rank's ``stages`` by their numbers, out of those whose ranks ``rank_of`` lists.

    ``groups``: the pipeline's ranks, twice. ``hidden_size`` and ``dtype``: of what stages pass on. ``divided``: the ranks among
    which a stage's positions are divided.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        rank_of: Sequence[int],
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        hidden_size: int,
        dtype: torch.dtype,
        divided: int,
    ) -> None:
        self._stages, self._rank_of, self._groups = stages, rank_of, groups
        self._hidden_size, self._dtype, self._divided = hidden_size, dtype, divided

    @torch.no_grad()
    def run(
        self,
        inputs: Sequence[Tensor],
        starts: Sequence[Tensor] | None,
        finish: Callable[[int, Tensor], None],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Compute the micro-batches ``inputs``, (b, s) each; the rank of the last stage calls ``finish(i, hidden)`` for each of
        them. ``dtype``: of what stages pass on, where it is not the usual one.

        Each stage takes all micro-batches in turn and passes each one on at once. What goes to an earlier rank has a group of
        its own, so that no message waits behind one whose receiver waits for it.
        """
        here: list[Tensor] = []
        sent = []
        for number, stage in sorted(self._stages.items()):
            outputs: list[Tensor] = []
            for i, tokens in enumerate(inputs):
                sequences, length = tokens.shape
                if number == 0:
                    x = tokens
                elif number - 1 in self._stages:
                    x = here[i]
                else:
                    shape = (sequences, length // self._divided, self._hidden_size)
                    x = torch.empty(shape, dtype=dtype or self._dtype, device=tokens.device)
                    source = self._rank_of[number - 1]
                    dist.recv(x, group=self._way(source, self._rank_of[number]), group_src=source)
                x = stage(x, length=length, starts=None if starts is None else starts[i])
                if number == len(self._rank_of) - 1:
                    finish(i, x)
                elif number + 1 in self._stages:
                    outputs.append(x)
                else:
                    target, x = self._rank_of[number + 1], x.contiguous()
                    sent.append((dist.isend(x, group=self._way(self._rank_of[number], target), group_dst=target), x))
            here = outputs
        for work, _ in sent:
            if work is not None:
                work.wait()

    def _way(self, source: int, target: int) -> dist.ProcessGroup:
        return self._groups[target < source]
