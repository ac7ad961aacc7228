"""The model as the trainer sees it: one global step in, loss and gradients out, whatever the layout of the ranks. Code
outside this room does not handle groups, stages or shards. With one rank nothing is wrapped: the model is a Transformer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megarewarm.config.execution import ParallelConfig, TrainingConfig
from megarewarm.config.model import ModelConfig
from megarewarm.data.tasks.encode import RowBatch
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.model.fused import Operations
from megarewarm.model.parameters import EMBEDDING, HEAD
from megarewarm.model.trained import Trained
from megarewarm.model.transformer import LOSS_MEMORY
from megarewarm.parallel import pipeline
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.batch_losses import BatchLosses
from megarewarm.parallel.collective import collective
from megarewarm.parallel.continuations import Scored, Scorer
from megarewarm.parallel.cross_entropy import cross_entropy
from megarewarm.parallel.distillation import Teacher
from megarewarm.parallel.graph import MicroBatchGraph
from megarewarm.parallel.laid_out import LaidOutModel
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.position_sums import PositionSums


class ParallelModel(LaidOutModel):
    """A model laid out over ranks that computes losses and gradients. ``teacher``: of ``distill``, None without;
    ``micro_batch``: sequences of a micro-batch, which a pipeline can't change."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        parallel: ParallelConfig,
        training: TrainingConfig,
        sequence_length: int,
        precision: str,
        operations: Operations | None = None,
        compile_layers: bool = False,
        loss_memory: int = LOSS_MEMORY,
        documents: DocumentRules | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        operations = operations or Operations()
        super().__init__(config, mesh, parallel, training, sequence_length, precision, operations, compile_layers)
        self.teacher, self._documents = teacher, documents
        self.graph: MicroBatchGraph | None = None
        self._loss_memory, self._loss_kernel = loss_memory, operations.loss
        self.micro_batch, self._sequence_length = training.micro_batch_size, sequence_length
        self._targets_per_step = training.global_batch * sequence_length
        self._autocast = torch.autocast(mesh.device.type, dtype=self._dtype, enabled=precision != "fp32" and not self._sharded)
        # fully_shard averages over data-parallel ranks, the trainer needs the sum
        self._factor = mesh.layout.data if self._sharded else 1
        self._loss_scale = 1.0
        self._rows: list[Tensor] | None = None
        """BatchLosses of single rows, if requested."""
        self._by_position: PositionSums | None = None
        """Sums of single distances, if requested."""
        self._taught: deque[Tensor] | None = None
        """The teacher's states of a pipeline's micro-batches that are still to come, with a teacher."""
        self._distilled: list[tuple[Tensor, Tensor]] = []
        """(cross entropy, the teacher's term) of a pipeline's micro-batches that have been."""
        self._parallel, self._training = parallel, training
        self._pipeline = self._make_pipeline()

    @collective
    def train_only(self, what: Trained | None) -> None:
        """As ``LaidOutModel.train_only``. All ranks call it."""
        super().train_only(what)
        self._pipeline = self._make_pipeline()

    def _make_pipeline(self) -> pipeline.Pipeline | None:
        parallel, training = self._parallel, self._training
        mesh, length = self.mesh, self._sequence_length
        if mesh.pipeline is None or mesh.reverse_group is None:
            return None
        share = training.global_batch // mesh.layout.data
        sequence = mesh.layout.tensor > 1 and parallel.sequence
        return pipeline.Pipeline(
            self._modules,
            self._numbers,
            self._count,
            order=parallel.schedule,
            group=mesh.pipeline,
            reverse_group=mesh.reverse_group,
            device=mesh.device,
            micro_batches=pipeline.micro_batches(parallel, share, training.micro_batch_size),
            micro_batch=training.micro_batch_size,
            sequence_length=length,
            local_length=length // mesh.layout.tensor if sequence else length,
            hidden_size=self.config.hidden_size,
            dtype=self._stream_dtype,
            loss=self._pipeline_loss,
            trains=self._first_that_trains(),
        )

    @collective
    def forward_backward(
        self,
        rows: npt.NDArray[np.int64],
        loss_scale: float = 1.0,
        between: Between = nothing_between,
        *,
        per_row: bool = False,
    ) -> BatchLosses:
        """Add the gradients of this rank's ``rows`` (B / data, s + 1) to ``gradients``, not yet reduced. All ranks call it.

        They are those of the mean loss per target of the global batch, times ``loss_scale``. ``between``: of micro-batches;
        those of a pipeline are one piece of work. ``per_row``: the losses of the single rows as well, for which the head is
        computed row by row: other last bits.
        """
        self._loss_scale = loss_scale
        self._follow()
        tokens = torch.from_numpy(rows)
        count = self._count_targets(tokens)
        self._rows = [] if per_row else None
        try:
            if self._pipeline is not None:
                totals = self._pipelined(tokens, self.teacher)
            else:
                totals = self._accumulated(tokens, between, self.teacher)
            each = None if self._rows is None else [float(loss) for loss in self._rows[: len(rows)]] or [0.0] * len(rows)
        finally:
            self._rows = None
        rows_of_owner = None if each is None else [self._if_loss_owner(loss) for loss in each]
        return BatchLosses(self._if_totals_here(totals), count, rows_of_owner)

    @collective
    def add_mean_gradients(self, rows: npt.NDArray[np.int64], most: int, loss_scale: float = 1.0) -> BatchLosses:
        """Add to ``gradients`` those of the mean cross entropy over the targets of all ranks' rows, times ``loss_scale``, not
        yet reduced. All ranks call it.

        ``rows``: this rank's (n, s + 1); ``most``: the largest number that any rank has. A teacher has no part in it.
        """
        self._loss_scale = loss_scale
        self._follow()
        tokens = torch.from_numpy(rows)
        count, held = self._targets_here(tokens), self._targets_per_step
        self._targets_per_step = max(1, round(all_reduce_sums([count])[0]))
        try:
            if self._pipeline is None:
                totals = self._accumulated(tokens, nothing_between, None, -(-most // self.micro_batch))
            else:
                size, totals = self._pipeline.sequences, torch.zeros(2, dtype=torch.float64)
                for first in range(0, most, size):
                    totals += self._pipelined(tokens[first : first + size], None)
        finally:
            self._targets_per_step = held
        return BatchLosses(self._if_totals_here(totals), count)

    @property
    def targets_per_step(self) -> int:
        """Targets of the newest global batch of ``forward_backward``, over whose number its loss is a mean."""
        return self._targets_per_step

    def _pipelined(self, tokens: Tensor, teacher: Teacher | None) -> Tensor:
        assert self._pipeline is not None
        inputs, targets, starts = self._padded(tokens)
        with self._autocast:
            if teacher is None:
                losses = self._pipeline.train(inputs, targets, starts)
                return torch.tensor([sum(float(loss) for loss in losses) / self._scale(), 0.0], dtype=torch.float64)
            try:
                self._distilled, self._taught = [], teacher.hidden_of_batch(inputs, starts)
                self._pipeline.train(inputs, targets, starts)
            finally:
                self._taught = None
        each = [[float(cross), float(apart)] for cross, apart in self._distilled]
        return torch.tensor(each, dtype=torch.float64).view(-1, 2).sum(0)

    def _pipeline_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """What a pipeline differentiates of the next micro-batch, whose order its schedules keep."""
        if self.teacher is None or self._taught is None:
            scale = torch.full((), self._scale(), device=hidden.device)
            return self._cross_entropy(hidden, targets, scale)[0] * scale
        taught = self._taught.popleft()
        if not torch.is_grad_enabled():
            return self._rows_apart(self.teacher, hidden, targets, taught)
        loss, cross, apart = self._apart_from(self.teacher, hidden, targets, taught)
        self._distilled.append((cross, apart))
        return loss * self._scale()

    def _rows_apart(self, teacher: Teacher, hidden: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        """The sum of the losses of a micro-batch's rows, the teacher's term included; each goes to ``_rows``."""
        rows, self._rows = self._rows, None
        assert rows is not None
        for each in zip(hidden.split(1), targets.split(1), taught.split(1), strict=True):
            _, cross, apart = self._apart_from(teacher, *each)
            rows.append(cross + teacher.weight * apart)
        self._rows = rows
        return torch.stack(rows[-len(hidden) :]).sum()

    def _accumulated(self, tokens: Tensor, between: Between, teacher: Teacher | None, portions: int = 0) -> Tensor:
        """``BatchLosses.totals``. ``portions``: micro-batches of the rank that has most of those that share parameters."""
        graph = self.graph if teacher is None and self._rows is None and not self._row_parts else None
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if graph is not None:
            total = graph.begin(self._scale(), self.gradients, self.parameters.values())
        distilled = torch.zeros_like(total)
        if total.is_cuda:
            tokens = tokens.pin_memory()  # a copy out of other memory would wait for what the device has yet to do
        parts = list(tokens.split(self.micro_batch)) if len(tokens) else []
        own, scale = len(parts), torch.full((), self._scale(), device=self.mesh.device)
        if self._sharded:
            parts += [torch.zeros((1, self._sequence_length + 1), dtype=torch.int64)] * (portions - own)
        for i, part in enumerate(parts):
            if i:
                between(i, len(parts))
            if graph is not None and graph.run(part):
                continue
            part = part.to(self.mesh.device, non_blocking=True)
            self._expect_backward(last=i == len(parts) - 1)
            cross, apart = self.differentiate(part, scale if i < own else torch.zeros_like(scale), teacher)
            if len(parts) > 1:
                self.gradients.collect()
            if i < own:
                total += cross
            if apart is not None:
                distilled += apart
        return torch.stack([total, distilled])

    def differentiate(self, part: Tensor, scale: Tensor, teacher: Teacher | None) -> tuple[Tensor, Tensor | None]:
        """Add the gradients of ``scale``, () fp32, x the summed loss of rows (b, s + 1); (cross entropy, teacher's term)."""
        with self._autocast:
            if teacher is None:
                (loss, _), apart = self._loss(part, scale), None
                cross = loss.detach()
            else:
                loss, cross, apart = self._distilled_loss(teacher, part)
        (loss * scale).backward()
        return cross, apart

    def _count_targets(self, tokens: Tensor) -> float:
        """The targets of this rank's rows, as ``_if_loss_owner``. With masked tokens the ranks agree on the batch's number."""
        count = self._targets_here(tokens)
        if self._documents is not None and self._documents.drops_targets:
            self._targets_per_step = max(1, round(all_reduce_sums([count])[0]))
        return count

    def count_targets(self, rows: npt.NDArray[np.int64]) -> float:
        """The targets of this rank's ``rows`` (n, s + 1); 0 on a rank whose losses another rank returns."""
        return self._targets_here(torch.from_numpy(rows))

    def _targets_here(self, tokens: Tensor) -> float:
        if self._documents is None or not self._documents.drops_targets:
            return self._if_loss_owner(float(tokens[:, 1:].numel()))
        targets = self._documents.targets(tokens[:, :-1], tokens[:, 1:])
        return self._if_loss_owner(float((targets != IGNORE).sum()))

    def _loss(self, part: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss summed, targets) of rows (b, s + 1) without a pipeline. ``upstream``: the gradient that the loss will get."""
        ids, starts, targets = self._read(part)
        return self._cross_entropy(self._modules[0](ids, starts), targets, upstream)

    def _read(self, part: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids, documents' starts and targets, (b, s) each, of rows (b, s + 1)."""
        inputs, targets, rules = part[:, :-1], part[:, 1:], self._documents
        if rules is None:
            return inputs, None, targets
        return rules.ids(inputs), rules.starts(inputs), rules.targets(inputs, targets)

    def _distilled_loss(self, teacher: Teacher, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, its cross entropy and the teacher's term, summed, of rows (b, s + 1) on the device."""
        ids, starts, targets = self._read(part)
        return self._apart_from(teacher, self._modules[0](ids, starts), targets, teacher.hidden(ids, starts))

    def _apart_from(self, teacher: Teacher, hidden: Tensor, targets: Tensor, taught: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Teacher.loss``."""
        head = self._modules[-1].head
        assert isinstance(head, Tensor)
        if self._rows is not None:
            with torch.no_grad():
                self._cross_entropy(hidden, targets)
        return teacher.loss(hidden, head, targets, taught, self._loss_memory, self._loss_kernel)

    @torch.no_grad()
    def evaluate(
        self, rows: Iterable[npt.NDArray[np.int64]], most: int, micro_batch: int, between: Between = nothing_between
    ) -> tuple[float, float]:
        """(loss summed, tokens) over ``rows``, this rank's windows (b, s + 1) in portions of ``micro_batch``; as
        ``forward_backward``.

        ``most``: the largest number of windows that any rank has. Ranks that share parameters gather them together: who has
        fewer windows computes on nothing meanwhile. ``between``: before each portion.
        """
        self._follow()
        totals = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)  # read at the end: each look waits for the device
        size = micro_batch if self._pipeline is None else self._pipeline.sequences
        portions = -(-most // size)
        parts = pipeline.regrouped(rows, size) if self._pipeline is not None else map(torch.from_numpy, rows)
        with self.evaluating():
            for done in range(portions):
                between(done, portions)
                part = next(parts, None)
                if part is None and not self._sharded:
                    continue
                tokens = torch.zeros((1, self._sequence_length + 1), dtype=torch.int64) if part is None else part
                found = self._evaluate(tokens)
                if part is not None:
                    totals += torch.stack([value.double() for value in found])
                elif self._by_position is not None:
                    self._by_position.forget()  # computed on nothing
        total, count = totals.tolist()
        return self._if_loss_owner(total), self._if_loss_owner(count)

    @collective
    def evaluate_by_position(
        self,
        rows: Iterable[npt.NDArray[np.int64]],
        most: int,
        micro_batch: int,
        edges: Sequence[int],
        between: Between = nothing_between,
    ) -> npt.NDArray[np.float64]:
        """As ``evaluate``, apart for the positions [edges[i], edges[i + 1]) of the inputs: (edges - 1, 2), losses summed and
        tokens. All ranks call it. ``edges`` ascend from 0 to the length of the sequences."""
        self._by_position = sums = PositionSums(edges)
        try:
            self.evaluate(rows, most, micro_batch, between)
        finally:
            self._by_position = None
        return np.vectorize(self._if_loss_owner, otypes=[np.float64])(sums.total())

    @collective
    @torch.no_grad()
    def row_losses(self, rows: npt.NDArray[np.int64], most: int, micro_batch: int, *, taught: bool = True) -> list[float]:
        """The loss of each of this rank's ``rows`` (n, s + 1), summed over its targets, in fp32 from the parameters, whatever
        the precision of training. Zeros on a rank whose losses another rank returns. All ranks call it.

        ``taught``: as ``forward_backward`` differentiates it, a teacher's term included; else the cross entropy.

        ``most``: the largest number of rows that any rank has; ``micro_batch``: rows of a portion, without a pipeline.
        """
        self._follow()
        size = micro_batch if self._pipeline is None else self._pipeline.sequences
        tokens = torch.from_numpy(rows)
        teacher = self.teacher if taught else None
        found: list[float] = []
        try:
            with self.evaluating():
                for first in range(0, most, size):
                    part = tokens[first : first + size]
                    if len(part):
                        found += self._losses_each(part, teacher)
                    elif self._sharded:  # other ranks gather parameters with this one
                        self._losses_each(torch.zeros((1, self._sequence_length + 1), dtype=torch.int64), teacher)
                    elif self._pipeline is not None:
                        self._losses_each(part, teacher)
        finally:
            self._rows = None
        return [self._if_loss_owner(loss) for loss in found]

    @collective
    @torch.no_grad()
    def score_rows(self, batches: Sequence[RowBatch], most: int, between: Between = nothing_between) -> list[Scored]:
        """The scores of the rows of each of this rank's ``batches``; zeros on a rank whose losses another rank returns. All
        ranks call it.

        ``most``: the largest number of batches that any rank has. ``between``: before each portion.
        """
        self._follow()
        scorer = Scorer(self._modules, self.config.vocab_size, self._loss_memory, self.mesh, self._tensor, self._pipeline)
        with self.evaluating(), self._autocast:
            return scorer.score(batches, most, between, idle=self._sequence_length if self._sharded else None)

    def _losses_each(self, tokens: Tensor, teacher: Teacher | None) -> list[float]:
        """The losses of rows (b, s + 1), at most one portion; zeros where another rank has them."""
        if teacher is not None and self._pipeline is None:
            each = (self._distilled_loss(teacher, row[None]) for row in tokens.to(self.mesh.device))
            return [float(cross + teacher.weight * apart) for _, cross, apart in each]
        self._rows = []
        if self._pipeline is None:
            self._loss(tokens.to(self.mesh.device))
        else:
            inputs, targets, starts = self._padded(tokens)
            self._taught = None if teacher is None else teacher.hidden_of_batch(inputs, starts)
            try:
                self._pipeline.evaluate(inputs, targets, starts, torch.float32)
            finally:
                self._taught = None
        return [float(loss) for loss in self._rows[: len(tokens)]] or [0.0] * len(tokens)

    def _evaluate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(loss summed, tokens) of rows (b, s + 1), at most one portion; on the device."""
        if self._pipeline is None:
            with self._autocast:
                return self._loss(tokens.to(self.mesh.device))
        inputs, targets, starts = self._padded(tokens)
        with self._autocast:
            losses = self._pipeline.evaluate(inputs, targets, starts)
        total = torch.stack([loss.double() for loss in losses]).sum() if losses else torch.zeros((), device=targets.device)
        return total / self._scale(), (targets != IGNORE).sum()

    def _scale(self) -> float:
        return self._loss_scale * self._factor / self._targets_per_step

    def _if_totals_here(self, totals: Tensor) -> Tensor:
        """As ``_if_loss_owner``."""
        return totals if self._has_last and self.mesh.tensor_rank == 0 else torch.zeros_like(totals)

    def _if_loss_owner(self, value: float) -> float:
        """``value`` on the one rank of a replica that returns its loss, else 0."""
        return value if self._has_last and self.mesh.tensor_rank == 0 else 0.0

    def _padded(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and documents' starts (B, s) of one pipeline step; padding sequences have no targets."""
        assert self._pipeline is not None
        missing = self._pipeline.sequences - tokens.shape[0]
        inputs, targets, rules = tokens[:, :-1], tokens[:, 1:], self._documents
        if rules is not None:
            targets = rules.targets(inputs, targets)
        if missing:
            inputs = torch.cat([inputs, inputs.new_zeros((missing, inputs.shape[1]))])
            targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORE)])
        inputs, targets = inputs.contiguous().to(self.mesh.device), targets.contiguous().to(self.mesh.device)
        return (inputs, targets, None) if rules is None else (rules.ids(inputs), targets, rules.starts(inputs))

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss summed over (b, s) targets, and their number, from the hidden states after the last norm."""
        if self._rows is None:
            return self._summed(hidden, targets, upstream)
        each = [self._summed(hidden[i : i + 1], targets[i : i + 1], upstream) for i in range(len(hidden))]
        self._rows += [loss.detach() for loss, _ in each]
        return torch.stack([loss for loss, _ in each]).sum(), torch.stack([count for _, count in each]).sum()

    def _summed(self, hidden: Tensor, targets: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = hidden if self._tensor is None else self._tensor.enter(hidden)
        if self._by_position is None:
            return self._sum_of(whole, targets, upstream)
        return self._by_position.add(whole, targets, self._sum_of)

    def _sum_of(self, hidden: Tensor, targets: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As ``_cross_entropy``, of hidden states that each tensor rank has whole."""
        head, group = self._modules[-1].head, None if self._tensor is None else self._tensor.group
        assert isinstance(head, Tensor)
        copy = self.low.get(EMBEDDING if self.config.tie_embeddings else HEAD)
        low = copy.fresh() if copy is not None and torch.is_autocast_enabled(head.device.type) else None
        settings = self.config.vocab_size, self._loss_memory, self._loss_kernel, low
        return cross_entropy(hidden, head, targets, group, *settings, None if low is None else upstream)
