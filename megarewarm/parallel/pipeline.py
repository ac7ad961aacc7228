"""Pipeline parallelism: a model cut into stages of equal cost, and torch.distributed.pipelining's schedules to run them.

The only file that uses that library. It adds stages with a given shape (so that neither evaluation nor a change of mode
costs a probing micro-batch), contiguous gradients, and tied embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarewarm.config.execution import ParallelConfig
from megarewarm.errors import UserError
from megarewarm.model.positions import positions_of
from megarewarm.model.transformer import Transformer, add_deferred, last_normed
from megarewarm.parallel.forward_only import ForwardOnly

Order = Literal["1f1b", "interleaved", "zero_bubble"]


def balance(layers: int, stages: int, layer_cost: float, head_cost: float) -> list[range]:
    """The layers of each stage that minimise the cost of the most expensive stage, head included. Raises ``UserError`` for
    more stages than layers."""
    if stages > layers:
        raise UserError(
            f"parallel.pipeline: {stages} stages for {layers} layers; choose at most {layers} (ranks x stages per rank)"
        )
    counts = [1] * stages
    costs = [layer_cost] * (stages - 1) + [layer_cost + head_cost]
    for _ in range(layers - stages):
        # of equally expensive stages the last one, because the first also holds the most micro-batches' activations
        cheapest = max(range(stages), key=lambda stage: (-costs[stage], stage))
        counts[cheapest] += 1
        costs[cheapest] += layer_cost
    bounds = [sum(counts[:stage]) for stage in range(stages + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def stages_per_rank(order: Order, asked: int | None) -> int:
    """Stages on one rank: one for 1F1B, two for zero_bubble, ``asked`` (2 by default) for interleaved."""
    natural = {"1f1b": 1, "interleaved": 2, "zero_bubble": 2}[order]
    if asked is None:
        return natural
    if (order == "interleaved") != (asked > 1) and not (order == "zero_bubble" and asked == 2):
        needs = "at least 2" if order == "interleaved" else str(natural)
        raise UserError(f"parallel.stages_per_rank: {asked} with schedule '{order}', which needs {needs}")
    return asked


def micro_batches(parallel: ParallelConfig, share: int, micro_batch: int) -> int:
    """Micro-batches of a step: what a data-parallel rank's ``share`` of the batch fills, and as many empty ones as torch's
    pipeline schedule needs to run at all."""
    count, ranks = -(-share // micro_batch), parallel.pipeline
    if ranks > 1 and parallel.schedule == "1f1b":
        return max(count, ranks)
    if parallel.schedule == "zero_bubble" and parallel.sharding != "none":
        return max(count, 2)  # after one, gradients may be in two dtypes, which fully_shard refuses
    while parallel.schedule == "interleaved" and count % max(1, count // ranks):  # equal rounds of at least ``ranks``
        count += 1
    return count


def my_stages(order: Order, rank: int, ranks: int, per_rank: int) -> list[int]:
    """Numbers of the stages on pipeline rank ``rank``: strided, or for zero_bubble there and back (a V)."""
    if order == "zero_bubble":
        return [rank, 2 * ranks - 1 - rank]
    return [rank + i * ranks for i in range(per_rank)]


def rank_of(order: Order, number: int, ranks: int) -> int:
    """The pipeline rank that holds stage ``number``; the inverse of ``my_stages``."""
    if order == "zero_bubble" and number >= ranks:
        return 2 * ranks - 1 - number
    return number % ranks


class StageModule(nn.Module):
    """Some layers of a model under their names in the whole, with the embedding before or the last norm after them. Tied
    embeddings: the last stage holds a copy of the embedding as its head."""

    def __init__(self, model: Transformer, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config = model.config
        self.first, self.last = first, last
        if first or (last and model.embed_out is None):
            self.embed_in = model.embed_in
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in layers})
        if last:
            self.final_layer_norm = model.final_layer_norm
            if model.embed_out is not None:
                self.embed_out = model.embed_out

    @property
    def head(self) -> Tensor:
        """(v, h), this rank's rows of the head; only in the last stage."""
        return self.embed_out.weight if hasattr(self, "embed_out") else self.embed_in.weight

    def forward(self, x: Tensor, length: int, starts: Tensor | None = None) -> Tensor:
        """Tokens (b, s) in the first stage, else hidden states; to hidden states, normed in the last stage. ``starts``: as
        in Transformer."""
        x = self.embed_in(x) if self.first else _ContiguousGradient.apply(x)
        positions = positions_of(length, self.config, x, starts)
        for layer in self.layers.values():
            x = layer(x, positions)
        return last_normed(self.final_layer_norm, x) if self.last else add_deferred(x)


class _ContiguousGradient(torch.autograd.Function):
    """Makes the gradient that a stage sends back contiguous, which a layer's gradient of its input need not be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Pipeline:
    """The stages on this rank, and the schedule that runs them with those of the other ranks.

    ``loss``: (hidden states (b, s, h), targets (b, s)) to a scalar, called in the last stage. A call handles exactly
    ``micro_batches`` x ``micro_batch`` sequences. ``trains``: the first stage in which something trains: those before it only
    compute forward, and get no gradients.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        numbers: Sequence[int],
        count: int,
        *,
        order: Order,
        group: dist.ProcessGroup,
        reverse_group: dist.ProcessGroup,
        device: torch.device,
        micro_batches: int,
        micro_batch: int,
        sequence_length: int,
        local_length: int,
        hidden_size: int,
        dtype: torch.dtype,
        loss: Callable[[Tensor, Tensor], Tensor],
        trains: int = 0,
    ) -> None:
        # imported here, because it loads the whole of PyTorch's compiler, a fifth of a process's start
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble

        self.sequences = micro_batches * micro_batch
        self._stages = dict(zip(numbers, stages, strict=True))
        self._last = count - 1
        self._length, self._micro_batch, self._loss = sequence_length, micro_batch, loss
        ranks = [rank_of(order, number, group.size()) for number in range(count)]
        divided = sequence_length // local_length
        self._forward = ForwardOnly(self._stages, ranks, (group, reverse_group), hidden_size, dtype, divided)
        tokens = torch.empty((micro_batch, sequence_length), dtype=torch.int64, device="meta")
        hidden = torch.empty((micro_batch, local_length, hidden_size), dtype=dtype, device="meta")
        if order == "zero_bubble":  # finds weights by the paths that lead to them from an input with a gradient
            trains = max(0, trains - 1)
        made = [
            PipelineStage(
                stage,
                number,
                count,
                device,
                input_args=(tokens if number == 0 else hidden.clone().requires_grad_(number > trains),),
                output_args=(hidden.clone().requires_grad_(number >= trains),),
                group=group,
            )
            for stage, number in zip(stages, numbers, strict=True)
        ]
        options: dict[str, Any] = {"loss_fn": loss, "scale_grads": False}
        if order == "1f1b":
            self._schedule: Any = Schedule1F1B(made[0], micro_batches, **options)
        else:
            kind = ScheduleInterleaved1F1B if order == "interleaved" else ScheduleZBVZeroBubble
            self._schedule = kind(made, micro_batches, **options)  # type: ignore[arg-type]

    def train(self, inputs: Tensor, targets: Tensor, starts: Tensor | None) -> list[Tensor]:
        """Forward and backward; the losses of the micro-batches on the rank of the last stage, else nothing."""
        losses: list[Tensor] = []
        self._schedule.step(
            *([inputs] if 0 in self._stages else []),
            length=self._length,
            **({} if starts is None else {"starts": starts}),
            **({"target": targets, "losses": losses} if self._last in self._stages else {}),
            return_outputs=False,
        )
        return [loss.detach() for loss in losses]

    def evaluate(
        self, inputs: Tensor, targets: Tensor, starts: Tensor | None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Forward only; the losses as in ``train``. ``dtype``: of what stages pass on, where it is not training's."""
        losses: list[Tensor] = []
        size = self._micro_batch
        wanted, begins = targets.split(size), None if starts is None else starts.split(size)
        finish: Callable[[int, Tensor], None] = lambda i, hidden: losses.append(self._loss(hidden, wanted[i]))  # noqa: E731
        self._forward.run(inputs.split(size), begins, finish, dtype)
        return losses

    def forward(self, micro_batches: Sequence[Tensor], finish: Callable[[int, Tensor], None]) -> None:
        """Forward only, of ids (b, s) of any shape; the rank of the last stage calls ``finish`` with the number of each
        micro-batch and its states."""
        self._forward.run(micro_batches, None, finish)


def regrouped(rows: Iterable[npt.NDArray[np.int64]], size: int) -> Iterator[Tensor]:
    """The same rows in groups of ``size``; the last may be smaller."""
    held: list[npt.NDArray[np.int64]] = []
    for batch in rows:
        held.append(batch)
        while sum(len(part) for part in held) >= size:
            whole = np.concatenate(held)
            yield torch.from_numpy(whole[:size])
            held = [whole[size:]]
    if sum(len(part) for part in held):
        yield torch.from_numpy(np.concatenate(held))
