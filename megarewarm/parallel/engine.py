"""The model as the trainer sees it: one global step in, loss and gradients out, whatever the layout of the ranks.

Nothing outside this room knows of groups, stages or shards. With one rank nothing is wrapped: the model is a NeoX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megarewarm_kernels import linear_cross_entropy, sharded_linear_cross_entropy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megarewarm.config.execution import ParallelConfig, TrainingConfig
from megarewarm.config.schema import ModelConfig
from megarewarm.model.documents import IGNORE, DocumentRules
from megarewarm.model.fused import Operations, fuse
from megarewarm.model.initialize import initial_value
from megarewarm.model.neox import LOSS_MEMORY, NeoX
from megarewarm.model.parameters import EMBEDDING, cards
from megarewarm.model.size import stage_costs
from megarewarm.parallel import pipeline, tensor
from megarewarm.parallel.agreement import Between, all_reduce_sums, nothing_between
from megarewarm.parallel.distillation import Teacher
from megarewarm.parallel.gradients import FlatGradients, Gradients, OwnGradients, ShardedGradients
from megarewarm.parallel.groups import new_groups
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.placement import TensorSlice, place
from megarewarm.parallel.recompute import recompute

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ParallelModel:
    """A NeoX laid out over the ranks of ``mesh``. Its parameters are empty until they are filled.

    ``parameters``: this rank's part of each parameter it holds, plain fp32 tensors by the names of the whole model; an
    optimizer updates them from their ``.grad``. ``shapes``: the whole model's parameters. ``gradients``: see there. ``tied``:
    parameters that the first and the last pipeline rank both hold.
    """

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
    ) -> None:
        self.config, self.mesh = config, mesh
        self._documents = documents
        operations = operations or Operations()
        self._loss_memory, self._loss_kernel = loss_memory, operations.loss
        self._micro_batch, self._sequence_length = training.micro_batch, sequence_length
        self._targets_per_step = training.global_batch * sequence_length
        self._dtype = DTYPES[precision]
        layout = mesh.layout
        with torch.device("meta"):
            model = NeoX(config)
        self.cards = cards(config)
        self.shapes = {name: card.shape for name, card in self.cards.items()}

        sequence = layout.tensor > 1 and parallel.sequence
        self._tensor: tensor.TensorRanks | None = None
        if mesh.tensor is not None:
            self._tensor = tensor.TensorRanks(mesh.tensor, sequence)
            tensor.shard(model, self._tensor)
        self.placements = {name: place(card, mesh.tensor_rank, layout.tensor, sequence) for name, card in self.cards.items()}

        fuse(model.layers, operations)

        numbers, count = [0], 1
        self._modules: list[nn.Module] = [model]
        if layout.pipeline > 1:
            per_rank = pipeline.stages_per_rank(parallel.schedule, parallel.stages_per_rank)
            count = layout.pipeline * per_rank
            cut = pipeline.balance(config.num_layers, count, *stage_costs(config, sequence_length))
            numbers = pipeline.my_stages(parallel.schedule, mesh.pipeline_rank, layout.pipeline, per_rank)
            self._modules = [pipeline.StageModule(model, cut[n], first=n == 0, last=n == count - 1) for n in numbers]
        self._has_last = count - 1 in numbers
        self._sharded = parallel.sharding != "none" and layout.data > 1
        self._head: nn.Module | None = None
        self._head_shard: nn.Parameter | None = None
        if config.tie_embeddings and count > 1 and 0 in numbers and self._has_last and self._sharded:
            # the two ends of a V share the matrix itself, but fully_shard can't divide one that two modules hold
            embedding = self._modules[0].get_parameter(EMBEDDING)
            self._head = self._modules[-1].embed_in = _Matrix(embedding)
        for module in self._modules:
            module.to_empty(device=mesh.device)
            for layer in _layers(module):
                recompute(layer, training.recompute)
                if compile_layers:
                    layer.compile()
        if config.tie_embeddings and count > 1 and 0 in numbers and self._has_last and self._head is None:
            self._modules[-1].embed_in = self._modules[0].embed_in  # the two ends of a V share the matrix itself
        self.tied: frozenset[str] = frozenset()
        copies, reduce_copies = self._tie(parallel.schedule)
        self._copies = copies

        self._keeps_gathered = parallel.sharding == "zero2"
        if self._sharded:
            self._shard(parallel, precision)
        else:
            self.parameters = self._named()
            self.gradients: Gradients = (
                OwnGradients(self.parameters)
                if mesh.ranks.world_size == 1
                else FlatGradients(self.parameters, self.placements, mesh, copies, reduce_copies)
            )
        for name, local in self.parameters.items():
            if self.placements[name].slice(local.detach(), *self._shard_of_all).local.numel() < local.numel():
                local.detach().zero_()  # loading a checkpoint leaves padding as it is
        self._autocast = torch.autocast(mesh.device.type, dtype=self._dtype, enabled=precision != "fp32" and not self._sharded)
        if self._sharded:
            self.gradients = ShardedGradients(self._named(), self.parameters, self.placements, mesh, copies, reduce_copies)
        # fully_shard takes the mean over data-parallel ranks, the trainer wants the sum
        self._factor = layout.data if self._sharded else 1
        self._loss_scale = 1.0

        self.teacher: Teacher | None = None
        self.distilled = 0.0
        """The teacher's term summed over this rank's targets of the newest ``forward_backward``, as its loss is."""
        self._pipeline: pipeline.Pipeline | None = None
        if mesh.pipeline is not None and mesh.reverse_group is not None:
            share = training.global_batch // layout.data
            self._pipeline = pipeline.Pipeline(
                self._modules,
                numbers,
                count,
                order=parallel.schedule,
                group=mesh.pipeline,
                reverse_group=mesh.reverse_group,
                device=mesh.device,
                micro_batches=pipeline.micro_batches(parallel, share, training.micro_batch),
                micro_batch=training.micro_batch,
                sequence_length=sequence_length,
                local_length=sequence_length // layout.tensor if sequence else sequence_length,
                hidden_size=config.hidden_size,
                dtype=self._dtype if self._sharded else torch.float32,
                loss=lambda hidden, targets: self._cross_entropy(hidden, targets)[0] * self._scale(),
            )

    # ---- parameters ------------------------------------------------------------------------------------------------

    def initialize(self, seed: int) -> None:
        """Draw the initial weights: those of the model on one device, whatever the layout."""
        for name in self.parameters:
            self.fill(name, initial_value(self.cards[name], self.config, seed))

    def fill(self, name: str, whole: Tensor) -> None:
        """Copy this rank's part of parameter ``name``, given whole, if it holds one."""
        if name not in self.parameters:
            return
        self.placements[name].fill(self.parameters[name], whole, *self._shard_of_all)

    def whole(self, name: str, local: Tensor) -> Tensor | TensorSlice:
        """What ``local``, a tensor laid out as parameter ``name``, is a part of: a slice, or ``local`` where it is all."""
        mine = self.placements[name].slice(local.detach(), *self._shard_of_all)
        return mine if mine.local.shape != mine.shape else mine.local

    def unique_shard(self, name: str, local: Tensor) -> Tensor | None:
        """What this rank counts of ``local``, a tensor laid out as parameter ``name``, flat: the parts that all ranks count are
        the whole, each value once, without padding. None where other ranks count all of it."""
        placement, mesh = self.placements[name], self.mesh
        replica = mesh.data_rank // mesh.layout.shard
        if replica or name in self._copies or (placement.dim is None and mesh.tensor_rank):
            return None
        return placement.slice(local.detach(), *self._shard_of_all).local.reshape(-1)

    @property
    def _shard_of_all(self) -> tuple[int, int]:
        """Which shard of this rank's part of a parameter it keeps, and of how many."""
        return (self.mesh.shard_rank, self.mesh.layout.shard) if self._sharded else (0, 1)

    def forget_gathered(self) -> None:
        """To be called after ``parameters`` were written outside of a step: an evaluation may have left whole ones gathered."""
        for module in self._modules:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def weights(self) -> dict[str, Tensor | TensorSlice]:
        """The parameters on this rank by name, each as ``whole`` shows it."""
        return {name: self.whole(name, parameter) for name, parameter in self.parameters.items()}

    def _named(self) -> dict[str, nn.Parameter]:
        named: dict[str, nn.Parameter] = {}
        for module in self._modules:
            for name, parameter in module.named_parameters():
                named.setdefault(name, parameter)  # the V's head that follows its embedding has the same name
        return named

    def _tie(self, order: pipeline.Order) -> tuple[frozenset[str], Callable[[], None] | None]:
        """Tied embeddings of a pipeline's two ends: which parameter is a copy, and how its gradients are added up."""
        layout = self.mesh.layout
        name = EMBEDDING
        if self._head is not None:
            return frozenset(), self._add_head_gradient
        if not self.config.tie_embeddings or layout.pipeline == 1 or order == "zero_bubble":
            return frozenset(), None
        self.tied = frozenset([name])
        per_stage = layout.data * layout.tensor
        group = new_groups([(i, (layout.pipeline - 1) * per_stage + i) for i in range(per_stage)])
        if group is None:
            return frozenset(), None

        def reduce() -> None:
            grad = self.parameters[name].grad
            assert grad is not None
            dist.all_reduce(grad, group=group)

        return self.tied if self._has_last else frozenset(), reduce

    def _add_head_gradient(self) -> None:
        """What the head that follows the embedding contributes to the gradient of both."""
        assert self._head_shard is not None
        gradient, total = self._head_shard.grad, self.parameters[EMBEDDING].grad
        assert isinstance(gradient, DTensor) and total is not None
        total.add_(gradient.to_local())
        self._head_shard.grad = None

    def _follow(self) -> None:
        """Before computing: the V's head takes over the embedding."""
        if self._head_shard is not None:
            assert isinstance(self._head_shard, DTensor)
            self._head_shard.to_local().detach().copy_(self.parameters[EMBEDDING].detach())

    def _shard(self, parallel: ParallelConfig, precision: str) -> None:
        low = None if precision == "fp32" else self._dtype
        # inputs are in the right type already, and the cosines of the positions must stay in fp32
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        axes = ("replicate", "shard") if self.mesh.layout.replicate > 1 else ("shard",)
        again = parallel.sharding == "zero3" and self.mesh.layout.pipeline == 1
        for module in self._modules:
            for layer in _layers(module):
                fully_shard(layer, mesh=self.mesh.submesh(*axes), mp_policy=policy, reshard_after_forward=again)
            fully_shard(module, mesh=self.mesh.submesh(*axes), mp_policy=policy, reshard_after_forward=False)
        # kept here: while it is gathered, the module has the whole one in its place
        self._head_shard = self._head.get_parameter("weight") if self._head is not None else None
        self.parameters = {
            name: nn.Parameter(parameter.to_local().detach())  # type: ignore[attr-defined]
            for name, parameter in self._named().items()
        }

    # ---- computing -------------------------------------------------------------------------------------------------

    def forward_backward(
        self, rows: npt.NDArray[np.int64], loss_scale: float = 1.0, between: Between = nothing_between
    ) -> tuple[float, float]:
        """Add the gradients of this rank's ``rows`` (B / data, s + 1) to ``gradients``, not yet reduced.

        They are those of the mean loss per target of the global batch, times ``loss_scale``. Returns the loss summed over
        this rank's targets, and their number; zeros on a rank whose loss another rank returns, so that the sums over all ranks
        are the batch's. All ranks call it. ``between``: of micro-batches; those of a pipeline are one piece of work.
        """
        self._loss_scale = loss_scale
        self._follow()
        tokens = torch.from_numpy(rows)
        count = self._count_targets(tokens)
        if self._pipeline is not None:
            inputs, targets, starts = self._padded(tokens)
            with self._autocast:
                losses = self._pipeline.train(inputs, targets, starts)
            return self._if_loss_owner(sum(float(loss) for loss in losses) / self._scale()), count
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        distilled = torch.zeros_like(total)
        parts = tokens.split(self._micro_batch)
        for i, part in enumerate(parts):
            if i:
                between(i, len(parts))
            part = part.to(self.mesh.device, non_blocking=True)
            if self._sharded:
                module = self._modules[0]
                assert isinstance(module, FSDPModule)
                last = i == len(parts) - 1
                module.set_requires_gradient_sync(last)
                module.set_is_last_backward(last)
                if self._keeps_gathered:
                    module.set_reshard_after_backward(last)
            with self._autocast:
                if self.teacher is None:
                    loss, _ = self._loss(part)
                    cross = loss.detach()
                else:
                    loss, cross, apart = self._distilled_loss(self.teacher, part)
                    distilled += apart
            (loss * self._scale()).backward()
            total += cross
        self.distilled = self._if_loss_owner(float(distilled))
        return self._if_loss_owner(float(total)), count

    def _count_targets(self, tokens: Tensor) -> float:
        """The targets of this rank's rows, as ``_if_loss_owner``. Where not every token is one, the batch's is agreed on."""
        count = self._if_loss_owner(float(tokens[:, 1:].numel()))
        if self._documents is None or not self._documents.mask_loss:
            return count
        targets = self._documents.targets(tokens[:, :-1], tokens[:, 1:])
        count = self._if_loss_owner(float((targets != IGNORE).sum()))
        self._targets_per_step = max(1, round(all_reduce_sums([count])[0]))
        return count

    def _loss(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """(loss summed, number of targets) of rows (b, s + 1) on the device, without a pipeline."""
        inputs, targets = part[:, :-1], part[:, 1:]
        rules = self._documents
        if rules is None:
            return self._cross_entropy(self._modules[0](inputs), targets)
        return self._cross_entropy(self._modules[0](inputs, rules.starts(inputs)), rules.targets(inputs, targets))

    def _distilled_loss(self, teacher: Teacher, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, its cross entropy and the teacher's term, summed, of rows (b, s + 1) on the device."""
        inputs, targets = part[:, :-1], part[:, 1:]
        rules = self._documents
        starts = None if rules is None else rules.starts(inputs)
        if rules is not None:
            targets = rules.targets(inputs, targets)
        hidden, head = self._modules[0](inputs, starts), self._modules[-1].head
        assert isinstance(head, Tensor)
        return teacher.loss(hidden, head, targets, teacher.hidden(inputs, starts), self._loss_memory, self._loss_kernel)

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
        total, count = 0.0, 0.0
        size = micro_batch if self._pipeline is None else self._pipeline.sequences
        portions = -(-most // size)
        parts = _regrouped(rows, size) if self._pipeline is not None else map(torch.from_numpy, rows)
        try:
            for module in self._modules:
                module.eval()
            for done in range(portions):
                between(done, portions)
                part = next(parts, None)
                if part is None and not self._sharded:
                    continue
                tokens = torch.zeros((1, self._sequence_length + 1), dtype=torch.int64) if part is None else part
                loss, seen = self._evaluate(tokens)
                if part is not None:
                    total += loss
                    count += seen
        finally:
            for module in self._modules:
                module.train()
        return self._if_loss_owner(total), self._if_loss_owner(count)

    def _evaluate(self, tokens: Tensor) -> tuple[float, float]:
        """(loss summed, tokens) of rows (b, s + 1), at most as many as are computed at once."""
        if self._pipeline is None:
            with self._autocast:
                loss, seen = self._loss(tokens.to(self.mesh.device))
            return float(loss), float(seen)
        inputs, targets, starts = self._padded(tokens)
        with self._autocast:
            losses = self._pipeline.evaluate(inputs, targets, starts)
        return sum(float(loss) for loss in losses) / self._scale(), float((targets != IGNORE).sum())

    def _scale(self) -> float:
        return self._loss_scale * self._factor / self._targets_per_step

    def _if_loss_owner(self, value: float) -> float:
        """``value`` on the one rank of a replica that speaks for its loss."""
        return value if self._has_last and self.mesh.tensor_rank == 0 else 0.0

    def _padded(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Inputs, targets and documents' starts (B, s) of what the pipeline takes at once; sequences that fill it up have no
        targets."""
        assert self._pipeline is not None
        missing = self._pipeline.sequences - tokens.shape[0]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self._documents is not None:
            targets = self._documents.targets(inputs, targets)
        if missing:
            inputs = torch.cat([inputs, inputs.new_zeros((missing, inputs.shape[1]))])
            targets = torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORE)])
        inputs, targets = inputs.contiguous().to(self.mesh.device), targets.contiguous().to(self.mesh.device)
        return inputs, targets, None if self._documents is None else self._documents.starts(inputs)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over (b, s) targets, and their number, from the hidden states after the last norm."""
        head = self._modules[-1].head
        assert isinstance(head, Tensor)
        if self._tensor is None:
            return linear_cross_entropy(
                hidden.flatten(0, 1),
                head,
                targets.flatten(),
                valid_rows=self.config.vocab_size,
                memory_budget=self._loss_memory,
                kernel=self._loss_kernel,
            )
        return sharded_linear_cross_entropy(
            self._tensor.enter(hidden).flatten(0, 1),
            head,
            targets.flatten(),
            group=self._tensor.group,
            vocab_size=self.config.vocab_size,
            memory_budget=self._loss_memory,
            kernel=self._loss_kernel,
        )


class _Matrix(nn.Module):
    """A parameter of the shape of ``like``, empty."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(like))


def _layers(module: nn.Module) -> list[nn.Module]:
    layers = module.layers
    return list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)  # type: ignore[arg-type]


def _regrouped(rows: Iterable[npt.NDArray[np.int64]], size: int) -> Iterator[Tensor]:
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
