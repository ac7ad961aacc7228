"""A model laid out over ranks: its stages, tensor-parallel parts and shards, and this rank's part of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megarewarm_kernels import no_triton
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megarewarm.config.execution import ParallelConfig, TrainingConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.fused import Operations, rounds_stream
from megarewarm.model.initialize import initial_value
from megarewarm.model.low_weights import LowCopy, keep_copies
from megarewarm.model.parameters import EMBEDDING
from megarewarm.model.trained import Rows, Trained
from megarewarm.parallel import pipeline
from megarewarm.parallel.collective import collective
from megarewarm.parallel.cut import Cut, cut
from megarewarm.parallel.direct_embedding import DirectEmbedding
from megarewarm.parallel.gradients import FlatGradients, Gradients, OwnGradients, RowsOf, ShardedGradients
from megarewarm.parallel.groups import new_groups
from megarewarm.parallel.mesh import Layout, Mesh
from megarewarm.parallel.placement import TensorSlice
from megarewarm.parallel.recompute import recompute

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LaidOutModel:
    """A model laid out over the ranks of ``mesh``. Its parameters are empty until they are filled.

    ``parameters``: this rank's part of each parameter it holds, plain fp32 tensors by the names of the whole model.
    ``trained``: what trains of them, by ``trains`` (see ``train_only``); an optimizer updates it from its ``.grad``.
    ``low``: copies of parameters in the dtype of products, by name, where there are some.
    ``shapes``: the whole model's parameters. ``gradients``: see there. ``tied``: parameters that the first and the last
    pipeline rank both hold.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        training: TrainingConfig,
        sequence_length: int,
        precision: str,
        operations: Operations,
        compile_layers: bool,
    ) -> None:
        self.config, self.mesh = config, mesh
        self._dtype = DTYPES[precision]
        self._sharded = parallel.sharding != "none" and mesh.layout.data > 1
        self._keeps_gathered = parallel.sharding == "zero2"
        self._take(cut(config, mesh, parallel, sequence_length, operations))
        self._join_ends()
        for module in self._modules:
            module.to_empty(device=mesh.device)
            for layer in _layers(module):
                recompute(layer, training.recompute)
                if compile_layers:
                    layer.compile()
        if self._head is None and self._ends_meet:
            self._modules[-1].embed_in = self._modules[0].embed_in  # the two ends of a V share the matrix itself
        self._copies, self._reduce_copies = self._tie(parallel.schedule)
        self.low: dict[str, LowCopy] = {}
        if not without_copies(precision, parallel, mesh.layout, compiled=compile_layers):
            self._keep_low()
        if self._sharded:
            self._shard(parallel, precision)
        else:
            self.parameters = self._named()
        self._clear_padding()
        self._train(None)

    def _take(self, cut: Cut) -> None:
        """The parts of the model that this rank computes: ``_modules``, one for each of its pipeline stages."""
        self.cards, self.placements = cut.cards, cut.placements
        self.shapes = {name: card.shape for name, card in self.cards.items()}
        self._tensor, self._modules = cut.tensor, cut.modules
        self._numbers, self._count, self._layers_of = cut.numbers, cut.count, cut.layers
        self._has_last, self._ends_meet = cut.has_last, cut.ends_meet
        device = self.mesh.device
        direct = self.config.tie_embeddings if device.type == "cpu" else not no_triton(device)
        if direct and self.mesh.layout.model == 1 and not self._sharded:
            embedding = self._modules[0].embed_in
            embedding.__class__ = DirectEmbedding
            assert isinstance(embedding, DirectEmbedding)
            embedding.rounds = rounds_stream(_layers(self._modules[0])[0])
        low = self._sharded or any(rounds_stream(layer) for module in self._modules for layer in _layers(module))
        self._stream_dtype = self._dtype if low else torch.float32

    def _join_ends(self) -> None:
        """Give the head its own matrix: both ends of a V share one, which fully_shard can't divide between two modules."""
        self._head: nn.Module | None = None
        self._head_shard: nn.Parameter | None = None
        if self._ends_meet and self._sharded:
            self._head = self._modules[-1].embed_in = _Matrix(self._modules[0].get_parameter(EMBEDDING))

    def _keep_low(self) -> None:
        """Copies of the weights in the dtype of products."""
        self.low = keep_copies(self._modules, self._dtype)
        if self._has_last and self.config.tie_embeddings:
            self.low[EMBEDDING] = LowCopy(self._modules[-1].get_parameter(EMBEDDING), self._dtype)

    def check_copies(self) -> None:
        """Raise AssertionError if a copy in the dtype of products is not that of its parameter."""
        for name, copy in self.low.items():
            assert copy.is_right(), f"{name}: the copy that products read is not that of the weights; please report this"

    @property
    def trained_copies(self) -> dict[str, Tensor]:
        """Of what trains, the copies in the dtype of products: an optimizer that writes them too saves a pass."""
        low = {name: self.low[name].fresh() for name in self.trained if name in self.low}
        return {name: self._row_parts[name].of(copy) if name in self._row_parts else copy for name, copy in low.items()}

    def _clear_padding(self) -> None:
        for name, local in self.parameters.items():
            if self.placements[name].slice(local.detach(), *self._shard_of_all).local.numel() < local.numel():
                local.detach().zero_()  # checkpoints don't change padding

    @collective
    def train_only(self, what: Trained | None) -> None:
        """Give gradients to ``what``, from now on and to nothing else; None: to everything. All ranks call it, and make the
        optimizer of ``trained`` afterwards."""
        self._train(what)
        for part in self._divided_modules():
            part.unshard()  # it is here that FSDP takes the dtype of a module's gradients from its parameters that have some
            part.reshard()

    def _train(self, what: Trained | None) -> None:
        self.forget_gathered()
        self.trains: Trained | None = what
        self._row_parts: dict[str, RowsOf] = {}
        self.trained: dict[str, nn.Parameter] = {}
        named = self._named()
        for name, parameter in self.parameters.items():
            trains = what is None or name in what
            for held in {parameter, named[name]}:
                held.grad = None
                held.requires_grad_(trains)
            rows = what[name] if what is not None and trains else None
            if rows is not None:
                self._row_parts[name] = RowsOf.make(parameter, *self._local_rows(name, rows))
            if trains:
                self.trained[name] = self._row_parts[name].rows if rows is not None else parameter
        if self._head is not None:  # a copy of the embedding
            self._head.requires_grad_(what is None or EMBEDDING in what)
        self.gradients = self._make_gradients(self._reduce_copies if EMBEDDING in self.trained else None)

    def _make_gradients(self, reduce_copies: Callable[[], None] | None) -> Gradients:
        if self._sharded:
            settings = self.placements, self.mesh, self._copies, reduce_copies
            return ShardedGradients(self._named(), self.trained, *settings, self._row_parts)
        rows = list(self._row_parts.values())
        if self.mesh.ranks.world_size == 1:
            return OwnGradients(self.trained, rows, launches=self.mesh.device.type == "cuda")
        return FlatGradients(self.trained, self.placements, self.mesh, self._copies, reduce_copies, rows)

    def _local_rows(self, name: str, rows: Rows) -> Rows:
        """Where ``rows`` of a parameter are in this rank's part of it; equal numbers where they are on other ranks."""
        mine = self.placements[name].slice(self.parameters[name].detach(), *self._shard_of_all)
        first, stop = (min(max(row - mine.offsets[0], 0), len(mine.local)) for row in rows)
        return first, stop

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
        """The slice of which ``local``, a tensor laid out as parameter ``name``, is a part, or ``local`` if it is whole."""
        mine = self.placements[name].slice(local.detach(), *self._shard_of_all)
        return mine if mine.local.shape != mine.shape else mine.local

    def whole_trained(self, name: str, local: Tensor) -> Tensor | TensorSlice:
        """As ``whole``, of ``local``, which is laid out as what trains of the parameter; the whole is all that trains of it."""
        if name not in self._row_parts:
            return self.whole(name, local)
        rows = None if self.trains is None else self.trains[name]
        assert rows is not None
        mine = self.placements[name].slice(self.parameters[name].detach(), *self._shard_of_all)
        count = rows[1] - rows[0]
        first = min(max(mine.offsets[0] + self._row_parts[name].first - rows[0], 0), count)
        if len(local) == count:
            return local.detach()
        return TensorSlice(local.detach(), (first, *mine.offsets[1:]), (count, *mine.shape[1:]))

    def unique_trained(self, name: str, local: Tensor) -> Tensor | None:
        """As ``unique_shard``, of ``local``, which is laid out as what trains of the parameter."""
        if name not in self._row_parts:
            return self.unique_shard(name, local)
        return local.detach().reshape(-1) if self._counts(name) else None

    def unique_shard(self, name: str, local: Tensor) -> Tensor | None:
        """What this rank counts of ``local``, a tensor laid out as parameter ``name``, flat: the parts that all ranks count are
        the whole, each value once, without padding. None where other ranks count all of it."""
        if not self._counts(name):
            return None
        return self.placements[name].slice(local.detach(), *self._shard_of_all).local.reshape(-1)

    def _counts(self, name: str) -> bool:
        """Whether this rank counts its part of the parameter, of which others may have copies."""
        mesh = self.mesh
        replica = mesh.data_rank // mesh.layout.shard
        return not (replica or name in self._copies or (self.placements[name].dim is None and mesh.tensor_rank))

    def _first_that_trains(self) -> int:
        """The first of all stages of the pipeline in which something trains."""
        trained = self.shapes if self.trains is None else self.trains
        if EMBEDDING in trained:
            return 0
        layers = {self.cards[name].layer for name in trained}
        return next((i for i, held in enumerate(self._layers_of) if layers & set(held)), self._count - 1)

    @property
    def _shard_of_all(self) -> tuple[int, int]:
        """Which shard of this rank's part of a parameter it keeps, and of how many."""
        return (self.mesh.shard_rank, self.mesh.layout.shard) if self._sharded else (0, 1)

    def forget_gathered(self) -> None:
        """Call it after ``parameters`` were written outside of a step: an evaluation may have left whole ones gathered."""
        for part in self._divided_modules():
            part.reshard()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Meanwhile the modules are as in evaluation."""
        try:
            for module in self._modules:
                module.eval()
            yield
        finally:
            for module in self._modules:
                module.train()

    def _divided_modules(self) -> list[FSDPModule]:
        return [part for module in self._modules for part in module.modules() if isinstance(part, FSDPModule)]

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
        """Tied embeddings of a pipeline's two ends: which parameter is a copy, and how their gradients are reduced."""
        layout = self.mesh.layout
        name = EMBEDDING
        self.tied: frozenset[str] = frozenset()
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
            grad = self.trained[name].grad
            assert grad is not None
            if grad.numel():  # none of the rows that train may be here
                dist.all_reduce(grad, group=group)

        return self.tied if self._has_last else frozenset(), reduce

    def _add_head_gradient(self) -> None:
        """What the head that follows the embedding contributes to the gradient of both."""
        assert self._head_shard is not None
        gradient, total = self._head_shard.grad, self.trained[EMBEDDING].grad
        assert isinstance(gradient, DTensor) and total is not None
        part = self._row_parts.get(EMBEDDING)
        total.add_(gradient.to_local() if part is None else part.of(gradient.to_local()))
        self._head_shard.grad = None

    def _follow(self) -> None:
        """Before computing: copy the embedding to the V's head, and what was written to the copies in the dtype of products."""
        for copy in self.low.values():
            copy.fresh()
        if self._head_shard is not None:
            assert isinstance(self._head_shard, DTensor)
            self._head_shard.to_local().detach().copy_(self.parameters[EMBEDDING].detach())

    def _expect_backward(self, *, last: bool) -> None:
        """Before each micro-batch: gradients are reduced after the ``last`` one, or during it."""
        if not self._sharded:
            if last:
                self.gradients.begin_last()
            return
        module = self._modules[0]
        assert isinstance(module, FSDPModule)
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
        if self._keeps_gathered:
            module.set_reshard_after_backward(last)

    def _shard(self, parallel: ParallelConfig, precision: str) -> None:
        low = None if precision == "fp32" else self._dtype
        # inputs have the right dtype already, and the cosines of the positions must stay fp32
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        axes = ("replicate", "shard") if self.mesh.layout.replicate > 1 else ("shard",)
        again = parallel.sharding == "zero3" and self.mesh.layout.pipeline == 1
        for module in self._modules:
            for layer in _layers(module):
                fully_shard(layer, mesh=self.mesh.submesh(*axes), mp_policy=policy, reshard_after_forward=again)
            module.register_forward_hook(_differentiable)
            fully_shard(module, mesh=self.mesh.submesh(*axes), mp_policy=policy, reshard_after_forward=False)
        # kept here, because while it is gathered the module holds the whole one
        self._head_shard = self._head.get_parameter("weight") if self._head is not None else None
        self.parameters = {
            name: nn.Parameter(parameter.to_local().detach())  # type: ignore[attr-defined]
            for name, parameter in self._named().items()
        }


def without_copies(precision: str, parallel: ParallelConfig, layout: Layout, *, compiled: bool) -> str:
    """Why a model laid out so has no copies of its weights in the dtype of products; empty where it has."""
    reasons = {
        "precision fp32 multiplies the weights themselves": precision == "fp32",
        "parallel.sharding casts what it gathers": parallel.sharding != "none" and layout.data > 1,
        "kernels.use: compile casts where its compiler sees it": compiled,
        "zero_bubble goes twice through a layer's backward pass": parallel.schedule == "zero_bubble" and layout.pipeline > 1,
    }
    return next((why for why, holds in reasons.items() if holds), "")


class _Matrix(nn.Module):
    """A parameter of the shape of ``like``, empty."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(like))


def _differentiable(module: nn.Module, given: object, result: Tensor) -> None:
    """fully_shard, whose hooks come after, reduces where the result's gradient is asked for, which a head alone doesn't do."""
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
        result.requires_grad_()


def _layers(module: nn.Module) -> list[nn.Module]:
    layers = module.layers
    return list(layers.values() if isinstance(layers, nn.ModuleDict) else layers)  # type: ignore[arg-type]
