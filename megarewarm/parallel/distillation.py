"""Distillation: a frozen teacher, which keeps the model's predictions or hidden states near its own. It is laid out over tensor
and pipeline ranks as the model is, and whole on each of its replicas, without gradients, in the dtype of the forward pass."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megarewarm_kernels import linear_distillation, sharded_linear_distillation
from torch import Tensor, nn

from megarewarm.config.execution import ParallelConfig
from megarewarm.config.forgetting import DistillConfig
from megarewarm.config.model import ModelConfig
from megarewarm.model.parameters import EMBEDDING, HEAD
from megarewarm.parallel.cross_entropy import cross_entropy
from megarewarm.parallel.cut import cut
from megarewarm.parallel.forward_only import ForwardOnly
from megarewarm.parallel.mesh import Mesh
from megarewarm.parallel.pipeline import rank_of

_SAMPLED = 64  # values of a parameter


class Teacher:
    """The frozen model, and the loss against it. Its parameters are empty until ``fill``.

    ``config``: its own shape; ``ids``: the model's vocabulary, of which the teacher knows the first ``config.vocab_size``
    (rows beyond it are not used). ``micro_batch``: sequences of a micro-batch, which a pipeline can't change. ``samples``: by
    parameter on this rank, what ``fill`` has seen of it; ``identity``: of all of them, once it is known.
    """

    def __init__(
        self,
        settings: DistillConfig,
        config: ModelConfig,
        ids: int,
        mesh: Mesh,
        *,
        parallel: ParallelConfig,
        sequence_length: int,
        micro_batch: int,
        dtype: torch.dtype,
    ) -> None:
        self._settings, self._dtype = settings, dtype
        self._ids, self._known = ids, min(ids, config.vocab_size)
        # with as many rows as the model's head has, ranks hold the same rows of both
        made = cut(config.model_copy(update={"vocab_size": ids}), mesh, parallel, sequence_length, None)
        self._placements, self._tensor, self._modules = made.placements, made.tensor, made.modules
        for module in self._modules:
            module.to(dtype).to_empty(device=mesh.device).eval().requires_grad_(False)
        if made.ends_meet:
            self._modules[-1].embed_in = self._modules[0].embed_in
        self._forward: ForwardOnly | None = None
        if mesh.pipeline is not None and mesh.reverse_group is not None:
            ranks = [rank_of(parallel.schedule, number, mesh.layout.pipeline) for number in range(made.count)]
            self._forward = ForwardOnly(
                dict(zip(made.numbers, self._modules, strict=True)),
                ranks,
                (mesh.pipeline, mesh.reverse_group),
                config.hidden_size,
                dtype,
                mesh.layout.tensor if made.tensor and made.tensor.sequence else 1,
            )
        self._micro_batch = micro_batch
        self.samples: dict[str, str] = {}
        self.identity = ""

    @property
    def weight(self) -> float:
        """Of the teacher's term beside the cross entropy."""
        return self._settings.weight

    @property
    def names(self) -> list[str]:
        """The parameters that this rank holds a part of."""
        return list(self._named())

    def fill(self, name: str, whole: Tensor) -> None:
        """Copy this rank's part of parameter ``name``, given whole as it is stored."""
        place, values = self._placements[name], whole
        if name in (EMBEDDING, HEAD) and len(whole) != place.shape[0]:
            values = whole.new_zeros(place.shape)
            values[: self._known] = whole[: self._known]
        for local in self._named()[name]:
            place.fill(local, values)
        self.samples[name] = _sample(whole)

    def _named(self) -> dict[str, list[nn.Parameter]]:
        """By name the parameters on this rank; a pipeline's last rank may have a copy of the embedding as its head."""
        found: dict[str, list[nn.Parameter]] = {}
        for module in self._modules:
            for name, parameter in module.named_parameters():
                found.setdefault(name, []).append(parameter)
        return found

    @torch.no_grad()
    def hidden(self, inputs: Tensor, starts: Tensor | None) -> Tensor:
        """(b, s) ids to the teacher's (b, s, g) states after the last norm; without a pipeline. With sequence parallelism this
        rank's (b, s / T, g)."""
        return self._modules[0](inputs, starts)

    def hidden_of_batch(self, inputs: Tensor, starts: Tensor | None) -> deque[Tensor]:
        """The same of a pipeline's whole batch (B, s), by micro-batch, on the ranks of the last stage; nothing on the others.
        All ranks of the pipeline call it."""
        assert self._forward is not None
        found: deque[Tensor] = deque()
        # the logits are computed in this dtype anyway; differences of states are taken of what the norm gives
        low = self._settings.kind == "logits"
        size = self._micro_batch
        begins = None if starts is None else starts.split(size)
        self._forward.run(inputs.split(size), begins, lambda _, hidden: found.append(hidden.to(self._dtype) if low else hidden))
        return found

    def loss(
        self, hidden: Tensor, head: Tensor, targets: Tensor, taught: Tensor, memory_budget: int, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, the cross entropy in it, and the teacher's term before its weight: sums over (b, s) targets,
        of the model's ``hidden`` (b, s, h) and the teacher's ``taught`` (b, s, g), both with sequence parallelism of this
        rank's positions.

        logits: KL(teacher || model) per token; hidden: the mean squared difference of the states per token (arXiv 2210.02871).
        """
        if self._settings.kind == "logits":
            return self._logits_loss(hidden, head, targets, taught, memory_budget)
        return self._hidden_loss(hidden, head, targets, taught, memory_budget, kernel)

    def _logits_loss(
        self, hidden: Tensor, head: Tensor, targets: Tensor, taught: Tensor, memory_budget: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        theirs = self._modules[-1].head
        assert isinstance(theirs, Tensor)
        share = self._settings.weight
        if self._tensor is None:
            total, parts, _ = linear_distillation(
                hidden.flatten(0, 1),
                head,
                targets.flatten(),
                taught.flatten(0, 1),
                theirs,
                share=share,
                valid_rows=self._ids,
                teacher_rows=self._known,
                memory_budget=memory_budget,
            )
        else:
            total, parts, _ = sharded_linear_distillation(
                self._tensor.enter(hidden).flatten(0, 1),
                head,
                targets.flatten(),
                self._tensor.enter(taught).flatten(0, 1),
                theirs,
                share=share,
                group=self._tensor.group,
                vocab_size=self._ids,
                teacher_rows=self._known,
                memory_budget=memory_budget,
            )
        return total, parts[0], parts[1]

    def _hidden_loss(
        self, hidden: Tensor, head: Tensor, targets: Tensor, taught: Tensor, memory_budget: int, kernel: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = None if self._tensor is None else self._tensor.group
        whole = hidden if self._tensor is None else self._tensor.enter(hidden)
        cross, _ = cross_entropy(whole, head, targets, group, self._ids, memory_budget, kernel)
        divided = self._tensor if self._tensor is not None and self._tensor.sequence else None
        mine = targets if divided is None else targets.chunk(divided.size, 1)[divided.rank]
        kept = (mine.flatten() >= 0)[:, None]
        apart = (hidden.flatten(0, 1).float() - taught.flatten(0, 1).float()).square().masked_fill(~kept, 0).mean(1).sum()
        # each rank differentiates the term of its positions, whose gradient for the stream is its own
        total, told = cross + self._settings.weight * apart, apart.detach()
        if divided is not None:
            told = told.clone()
            dist.all_reduce(told, group=divided.group)
        return total, cross.detach(), told


def identity_of(samples: Mapping[str, str]) -> str:
    """sha256 (hex) of the ``samples`` of all of a teacher's parameters, whatever the layout."""
    return hashlib.sha256(repr(sorted(samples.items())).encode()).hexdigest()


def _sample(whole: Tensor) -> str:
    """Shape and some values of a stored parameter, hashed."""
    values = whole.detach().reshape(-1)
    some = values[:: max(1, values.numel() // _SAMPLED)].to("cpu", torch.float64)
    return hashlib.sha256(repr(tuple(whole.shape)).encode() + some.numpy().tobytes()).hexdigest()
