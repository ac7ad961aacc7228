"""Estimated needs of a layout: memory and traffic of each rank.

Memory is the peak, at the end of the forward passes in flight. Traffic is what a rank sends with ring collectives, the
minimum for any algorithm without in-network reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megarewarm.config.execution import ParallelConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.optimizer_state import states_of
from megarewarm.model.parameters import EMBEDDING, Card, cards
from megarewarm.model.size import activation_bytes, stage_costs
from megarewarm.model.trained import Trained, trained_values
from megarewarm.parallel.mesh import Layout
from megarewarm.parallel.pipeline import balance, my_stages, rank_of, stages_per_rank


@dataclass(frozen=True)
class Work:
    """The model and the batches of a rank. ``micro_batches``: of a rank per step; ``value_bytes``: size of the compute dtype;
    ``optimizer``: its kind; ``fused``: see ``activation_bytes``; ``valued``: whether rows are valued; ``teacher``: the frozen
    model of ``distill``; ``averaged``: whether an average of the weights is kept; ``trained``: what trains, None for everything
    (activations are counted as if everything did)."""

    model: ModelConfig
    sequence_length: int
    micro_batch: int
    micro_batches: int
    recompute: Literal["none", "selective", "full"] = "none"
    value_bytes: int = 4
    loss_memory: int = 64 * 2**20
    optimizer: str = "adamw"
    fused: bool = True
    valued: bool = False
    teacher: ModelConfig | None = None
    averaged: bool = False
    trained: Trained | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence_length


@dataclass(frozen=True)
class Part:
    """What one pipeline rank holds: the numbers of its stages, out of ``count``, and how many layers each has; ``held``: their
    numbers.

    ``sends``: activations or gradients of one micro-batch that the rank sends to other ranks, per micro-batch.
    """

    numbers: tuple[int, ...]
    layers: tuple[int, ...]
    count: int
    sends: int
    held: frozenset[int]

    @property
    def first(self) -> bool:
        """Whether it holds the embedding."""
        return 0 in self.numbers

    @property
    def last(self) -> bool:
        """Whether it holds the last norm and the head."""
        return self.count - 1 in self.numbers


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by purpose; ``weights`` are a teacher's and an average's too, ``activations`` also the states of a
    teacher that a pipeline keeps."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by the kind of parallelism."""

    tensor: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.tensor + self.pipeline + self.data


def parts(work: Work, parallel: ParallelConfig, layout: Layout) -> list[Part]:
    """What each pipeline rank holds. Raises ``UserError`` for more stages than layers."""
    model = work.model
    if layout.pipeline == 1:
        return [Part((0,), (model.num_layers,), 1, 0, frozenset(range(model.num_layers)))]
    per_rank = stages_per_rank(parallel.schedule, parallel.stages_per_rank)
    count = layout.pipeline * per_rank
    cut = balance(model.num_layers, count, *stage_costs(model, work.sequence_length))
    found = []
    for rank in range(layout.pipeline):
        numbers = my_stages(parallel.schedule, rank, layout.pipeline, per_rank)
        neighbours = [n for number in numbers for n in (number - 1, number + 1) if 0 <= n < count]
        sends = sum(rank_of(parallel.schedule, n, layout.pipeline) != rank for n in neighbours)
        held = frozenset(layer for n in numbers for layer in cut[n])
        found.append(Part(tuple(numbers), tuple(len(cut[n]) for n in numbers), count, sends, held))
    return found


def parameters_of(part: Part, model: ModelConfig, tensor: int) -> tuple[int, int]:
    """(parameters on a rank, how many of them are replicated on every tensor rank)."""
    in_layer = [card for card in cards(model).values() if card.layer == 0]
    divided = sum(card.numel for card in in_layer if card.divided is not None) // tensor
    whole = sum(card.numel for card in in_layer if card.divided is None)
    layers = sum(part.layers)
    last = _last_norm(model) if part.last else 0
    return layers * (divided + whole) + _outer(part, model, tensor), layers * whole + last


def _last_norm(model: ModelConfig) -> int:
    """Parameters of the norm after the layers."""
    return sum(card.numel for card in cards(model).values() if card.layer is None and card.role == "norm")


def memory_of(part: Part, rank: int, work: Work, parallel: ParallelConfig, layout: Layout) -> Memory:
    """Memory of pipeline rank ``rank``, which holds ``part``."""
    model, tensor = work.model, layout.tensor
    count, _ = parameters_of(part, model, tensor)
    sharded = parallel.sharding != "none" and layout.shard > 1
    shard = layout.shard if sharded else 1
    held = count + (_follower(part, model, tensor) if sharded else 0)
    weights = 4.0 * (held + count * work.averaged) / shard
    if sharded and _keeps_gathered(parallel, layout):
        weights += work.value_bytes * held
    elif sharded:
        one_layer = (count - _outer(part, model, tensor)) / sum(part.layers)
        weights += work.value_bytes * (_outer(part, model, tensor) + 2 * one_layer)
    elif work.value_bytes < 4:
        weights += work.value_bytes * count  # copies of the weights in the compute dtype, or autocast's for a step
    stages = len(part.layers)
    if layout.pipeline == 1:
        in_flight = 1.0
    elif parallel.schedule == "1f1b":
        in_flight = min(work.micro_batches, layout.pipeline - rank)
    elif parallel.schedule == "interleaved":
        warmup = (stages - 1) * layout.pipeline + 2 * (layout.pipeline - rank - 1) + 1
        in_flight = min(stages * work.micro_batches, warmup) / stages
    else:
        in_flight = min(work.micro_batches, layout.pipeline)
    activations = activation_bytes(
        model,
        work.tokens,
        recompute=work.recompute,
        tensor=tensor,
        sequence=parallel.sequence,
        work_bytes=work.value_bytes,
        layers=sum(part.layers),
        last=part.last,
        fused=work.fused,
    )
    activations *= in_flight
    if work.recompute == "full":
        # one layer at a time is recomputed and keeps all its activations meanwhile
        activations += activation_bytes(
            model,
            work.tokens,
            tensor=tensor,
            sequence=parallel.sequence,
            work_bytes=work.value_bytes,
            layers=1,
            last=False,
            fused=work.fused,
            checkpointed=True,
        )
    taught_weights, taught_states = _teacher_bytes(rank, work, parallel, layout)
    logits = min(work.loss_memory, 4.0 * work.tokens * -(-model.vocab_size // tensor)) if part.last else 0.0
    states = 4.0 * _state_values(part, work, tensor) / shard
    gradients = 4.0 * _gradient_values(part, work, tensor, sharded=sharded, whole=True) / shard
    aside = 2 * gradients if work.valued else 0.0  # the batch's gradients, and the weights before they are moved
    return Memory(weights + taught_weights, gradients + aside, states, activations + taught_states, logits)


def _teacher_bytes(rank: int, work: Work, parallel: ParallelConfig, layout: Layout) -> tuple[float, float]:
    """(weights, states) of the teacher on a rank, which has its own layers of it, whole for every replica. A pipeline computes
    the teacher's states of a whole batch first; the ranks that pass them on keep them until the last ones have them."""
    if work.teacher is None:
        return 0.0, 0.0
    taught = _of_teacher(work, work.teacher)
    count, _ = parameters_of(parts(taught, parallel, layout)[rank], taught.model, layout.tensor)
    kept = work.micro_batches if layout.pipeline > 1 else 1
    return float(work.value_bytes * count), kept * _stream_bytes(taught) / (layout.tensor if parallel.sequence else 1)


def _of_teacher(work: Work, teacher: ModelConfig) -> Work:
    """``work`` with the teacher as the model; it has as many rows for ids."""
    return replace(work, model=teacher.model_copy(update={"vocab_size": work.model.vocab_size}), teacher=None)


def _stream_bytes(work: Work) -> float:
    """The residual stream of a micro-batch."""
    return float(work.tokens * work.model.hidden_size * work.value_bytes)


def _gradient_values(part: Part, work: Work, tensor: int, *, sharded: bool, whole: bool) -> float:
    """Values of gradients on a rank. ``whole``: with those of frozen rows beside rows that train, which the backward pass
    leaves and no rank sends, unless it is ``sharded``."""
    model = work.model
    if work.trained is None:
        count, _ = parameters_of(part, model, tensor)
        return count + (_follower(part, model, tensor) if sharded else 0)
    values = 0.0
    for card in _trained_on(part, work):
        of_rows = work.trained[card.name] is not None
        kept = 0 if of_rows and sharded else trained_values(card, work.trained)
        values += (kept + (card.numel if of_rows and (whole or sharded) else 0)) / (tensor if card.divided is not None else 1)
    return values + (_follower(part, model, tensor) if sharded and EMBEDDING in work.trained else 0)


def _trained_on(part: Part, work: Work) -> list[Card]:
    """The cards of the parameters on a rank of which something trains, of a work where something is frozen."""
    trained = work.trained or {}

    def here(card: Card) -> bool:
        if card.layer is not None:
            return card.layer in part.held
        return part.first if card.role == "embedding" and not (work.model.tie_embeddings and part.last) else part.last

    return [card for card in cards(work.model).values() if card.name in trained and here(card)]


def _state_values(part: Part, work: Work, tensor: int) -> float:
    """Values that the optimizer keeps for the parameters on a rank."""
    if work.trained is not None:
        return sum(
            len(states_of(work.optimizer, card))
            * trained_values(card, work.trained)
            / (tensor if card.divided is not None else 1)
            for card in _trained_on(part, work)
        )
    every = cards(work.model).values()
    matrices = sum(card.numel // tensor for card in every if card.layer == 0 and card.is_matrix) * sum(part.layers)
    per_matrix, per_other = (
        len(states_of(work.optimizer, next(card for card in every if card.is_matrix is wanted))) for wanted in (True, False)
    )
    count, _ = parameters_of(part, work.model, tensor)
    return per_matrix * matrices + per_other * (count - matrices)


def _keeps_gathered(parallel: ParallelConfig, layout: Layout) -> bool:
    """Whether sharded weights are gathered once per step: zero2, and every pipeline because its micro-batches overlap."""
    return parallel.sharding == "zero2" or layout.pipeline > 1


def _outer(part: Part, model: ModelConfig, tensor: int) -> int:
    """Parameters outside the layers: embedding, head and last norm."""
    matrices = int(part.first) + int(part.last and not (model.tie_embeddings and part.first))
    return matrices * _matrix(model, tensor) + (_last_norm(model) if part.last else 0)


def _follower(part: Part, model: ModelConfig, tensor: int) -> int:
    """Parameters of the tied head of a V-shaped pipeline under sharding: a copy with its own gradient and no moments, because
    two modules can't share a sharded matrix."""
    both = part.count > 1 and part.first and part.last
    return _matrix(model, tensor) if model.tie_embeddings and both else 0


def _matrix(model: ModelConfig, tensor: int) -> int:
    """Parameters of a tensor rank's rows of the embedding or head."""
    return -(-model.vocab_size // tensor) * model.hidden_size


def traffic_of(part: Part, work: Work, parallel: ParallelConfig, layout: Layout) -> Traffic:
    """What a rank that holds ``part`` sends in one step."""
    model, t, m = work.model, layout.tensor, work.micro_batches
    stream = _stream_bytes(work)
    count, whole = parameters_of(part, model, t)
    sharded = parallel.sharding != "none" and layout.shard > 1
    tensor = 0.0
    if t > 1:
        # an all-reduce, or its two halves, forward and backward in each layer (twice if sequential); embedding and head
        sums = 2 * sum(part.layers) * (1 if model.residual == "parallel" else 2) + int(part.first) + int(part.last)
        tensor = m * (sums + sum(part.layers) * _sums_again(work, parallel)) * _all_reduce(stream, t)
        tensor += m * int(part.last) * 12.0 * work.tokens * (t - 1)
        norms = sum(part.layers) * sum(c.numel for c in cards(model).values() if c.layer == 0 and c.feeds_share)
        if model.qk_norm == "width":  # sums of squares of queries and keys: forward, again if recomputed, backward
            times = 6 if work.recompute == "full" else 4
            tensor += m * sum(part.layers) * times * _all_reduce(4.0 * work.tokens, t)
        tensor += _all_reduce(4.0 * (whole if parallel.sequence else norms) / (layout.shard if sharded else 1), t)
    pipeline = m * part.sends * stream / (t if parallel.sequence else 1)
    if model.tie_embeddings and part.first != part.last:  # both ends sum the gradients of their copies
        pipeline += _all_reduce(4.0 * _matrix(model, t) / (layout.shard if sharded else 1), 2)
    if not sharded:
        data = _all_reduce(4.0 * _gradient_values(part, work, t, sharded=False, whole=False), layout.data)
    else:
        held = count + _follower(part, model, t)
        gathered = float(held)
        if not _keeps_gathered(parallel, layout):  # weights outside the layers stay gathered until the backward pass
            gathered = m * (2.0 * count - _outer(part, model, t))
        share = (layout.shard - 1) / layout.shard
        reduced = 4.0 * _gradient_values(part, work, t, sharded=True, whole=True)
        data = share * (gathered * work.value_bytes + reduced) + _all_reduce(reduced / layout.shard, layout.replicate)
    taught = _teacher_traffic(part, work, parallel, layout)
    return Traffic(tensor + taught.tensor, pipeline + taught.pipeline, data)


def _teacher_traffic(part: Part, work: Work, parallel: ParallelConfig, layout: Layout) -> Traffic:
    """What a rank sends for the forward pass of the teacher, and for the statistics of its logits (``kind: logits``)."""
    if work.teacher is None:
        return Traffic(0.0, 0.0, 0.0)
    taught, t, m = _of_teacher(work, work.teacher), layout.tensor, work.micro_batches
    model, stream = taught.model, _stream_bytes(taught)
    layers = next(sum(p.layers) for p in parts(taught, parallel, layout) if p.numbers == part.numbers)
    tensor = 0.0
    if t > 1:
        ends = 0.5 * (part.first + part.last) if parallel.sequence else float(part.first)
        tensor = m * (layers * (1 if model.residual == "parallel" else 2) + ends) * _all_reduce(stream, t)
        if model.qk_norm == "width":
            tensor += m * layers * 2 * _all_reduce(4.0 * work.tokens, t)
        tensor += m * part.last * 12.0 * work.tokens * (t - 1)
    ranks = [rank_of(parallel.schedule, number, layout.pipeline) for number in range(part.count)]
    onward = sum(ranks[number + 1] != ranks[number] for number in part.numbers if number + 1 < part.count)
    return Traffic(tensor, m * onward * stream / (t if parallel.sequence else 1), 0.0)


def _sums_again(work: Work, parallel: ParallelConfig) -> float:
    """All-reduces of the stream that full recomputation repeats in a layer, halves of them with sequence parallelism: all up
    to the last tensor that the backward pass needs, which is the MLP's last product's input or, where it is normed, its sum."""
    if work.recompute != "full":
        return 0.0
    if work.model.residual == "parallel":
        return 0.5 if parallel.sequence else 0.0
    if work.model.norm_place == "after":
        return 2.0
    return 1.5 if parallel.sequence else 1.0


def _all_reduce(size: float, ranks: int) -> float:
    """Bytes each rank sends to sum ``size`` bytes over ``ranks``: a reduce-scatter and an all-gather."""
    return 2 * size * (ranks - 1) / ranks
