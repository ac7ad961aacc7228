"""Muon: the matrices of the layers move along the nearest orthogonal matrix of their momentum; the rest by AdamW.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the decoupled weight decay and the scale of arXiv
2502.16982, 0.2 sqrt(max(m, n)) for a matrix (m, n): an update is as large as AdamW's, so that both share learning rate and
decay. Queries, keys and values are three matrices, gate and up two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarewarm.config.execution import OptimizerConfig
from megarewarm.model.optimizer_state import states_of
from megarewarm.model.parameters import Card
from megarewarm.optimizers.adamw import AdamW, rate_factors
from megarewarm.optimizers.sums import squares, without_formula
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.parallel.gradients import Gradients
from megarewarm.parallel.groups import new_groups
from megarewarm.parallel.mesh import ranks_along
from megarewarm.parallel.placement import TensorSlice

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TINY = 1e-7


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """The nearest orthogonal matrix of each of ``matrices`` (..., m, n), roughly: singular values between 0.7 and 1.2.
    ``steps`` of a quintic Newton-Schulz iteration (Jordan et al. 2024), computed in the dtype of ``matrices``."""
    a, b, c = _COEFFICIENTS
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True) + _TINY)
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    for _ in range(steps):
        product = wide @ wide.mT
        wide = a * wide + (b * product + c * product @ product) @ wide
    return wide.mT if x.shape[-2] > x.shape[-1] else wide


def _scaled(matrix: Tensor) -> Tensor:
    """(rows, columns) in fp32, as large as an update of AdamW (arXiv 2502.16982)."""
    return matrix.float() * (0.2 * math.sqrt(max(matrix.shape)))


def orthogonal_each(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Each of ``matrices`` (rows, columns) orthogonalised and scaled, in fp32; those of one shape in one batch."""
    moved: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        places = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
        batch = orthogonalised(torch.stack([matrices[i] for i in places]), steps)
        moved |= {i: _scaled(matrix) for i, matrix in zip(places, batch, strict=True)}
    return [moved[i] for i in range(len(matrices))]


class Muon:
    """Muon over those parameters that are matrices of a model's layers, AdamW over the rest. The momentum is laid out as its
    parameter.

    Each matrix is gathered on one of the ranks that have parts or copies of it, in turn, which orthogonalises it and sends
    it to the others: the ranks share the work.
    """

    @collective
    def __init__(
        self, model: ParallelModel, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, kind: str = "torch"
    ) -> None:
        """All ranks call it. ``parameters``: of ``model.trained``; ``kind``: of the AdamW."""
        self.kind, self.config, self.guarded = kind, config, False
        self._model = model
        self._matrices = [name for name, card in model.cards.items() if card.is_matrix and name in parameters]
        rest = {name: parameter for name, parameter in parameters.items() if not model.cards[name].is_matrix}
        self._rest = AdamW(rest, model.cards, config, kind, model.trained_copies)
        self._momentum = {name: torch.zeros_like(model.parameters[name]) for name in self._matrices}
        self._factors = rate_factors(model.cards, config.layer_decay)
        self._squares: dict[str, Tensor] = {}
        self._lr = 0.0
        mesh = model.mesh
        self._group = None
        if mesh.layout.data * mesh.layout.tensor > 1:
            self._group = new_groups(ranks_along(mesh.layout.grid, "replicate", "shard", "tensor"))
        self._ranks = 1 if self._group is None else self._group.size()
        self._rank = 0 if self._group is None else self._group.rank()

    def step(self, lr: float, gradients: Gradients | None = None, scale: float | Tensor = 1.0) -> None:
        assert not isinstance(scale, Tensor)
        with torch.no_grad():
            for first in range(0, len(self._matrices), self._ranks):
                self._update(self._matrices[first : first + self._ranks], lr, scale)
        self._rest.step(lr, gradients, scale)  # it may scale all gradients, so it comes last
        self._lr = lr

    def take_back(self) -> None:
        raise AssertionError("its steps are not guarded")

    def _update(self, names: list[str], lr: float, scale: float) -> None:
        """One matrix for each rank, or fewer."""
        moves = [self._gathered(name, self._direction(name, scale), owner) for owner, name in enumerate(names)]
        if self._rank < len(names):
            moves[self._rank] = self._orthogonalised(self._model.cards[names[self._rank]], moves[self._rank])
        for owner, (name, move) in enumerate(zip(names, moves, strict=True)):
            if self._group is not None:
                dist.broadcast(move, group_src=owner, group=self._group)
            parameter = self._model.parameters[name].detach()
            part = self._model.whole(name, parameter)
            mine, local = (part.of(move), part.local) if isinstance(part, TensorSlice) else (move, part)
            rate = lr * self._factors[name]
            change = mine * -rate - local * (rate * self.config.weight_decay)
            local.add_(change)
            self._squares[name] = squares(change)

    def _direction(self, name: str, scale: float) -> Tensor:
        """Nesterov's momentum, in this rank's layout of the parameter."""
        gradient, momentum, beta = self._model.parameters[name].grad, self._momentum[name], self.config.momentum
        assert gradient is not None, name
        gradient = gradient.float() * scale
        momentum.lerp_(gradient, 1 - beta)
        return gradient.lerp_(momentum, beta)

    def _gathered(self, name: str, local: Tensor, owner: int) -> Tensor:
        """The whole matrix on rank ``owner`` of the group, and an empty one on the others."""
        part = self._model.whole(name, local)
        if not isinstance(part, TensorSlice):
            return part.contiguous()
        whole = local.new_zeros(part.shape)
        if self._model.unique_shard(name, local) is not None:
            part.of(whole).copy_(part.local)
        dist.reduce(whole, group_dst=owner, group=self._group)  # each value is on one rank, the others add zero
        return whole

    def _orthogonalised(self, card: Card, direction: Tensor) -> Tensor:
        """(rows, columns), scaled."""
        exact = direction.device.type == "cpu"
        x = direction if exact else direction.bfloat16()
        if card.interleaved is None:
            x = _scaled(orthogonalised(x, self.config.orthogonal_steps))
        else:  # of queries, keys and values, and of gate and up, each is a matrix of its own
            x = card.interleaved.join(orthogonal_each(card.interleaved.split(x), self.config.orthogonal_steps))
        return x.contiguous()

    def set_lr(self, lr: float) -> None:
        self._rest.set_lr(lr)

    @property
    def lrs(self) -> list[float]:
        return self._rest.lrs

    def state(self) -> dict[tuple[str, str], Tensor]:
        held = {("momentum", name): tensor for name, tensor in self._momentum.items()} | self._rest.state()
        assert all(what in states_of("muon", self._model.cards[name]) for what, name in held)
        return held

    @property
    def completed_steps(self) -> int:
        return self._rest.completed_steps

    def set_completed_steps(self, steps: int) -> None:
        self._rest.set_completed_steps(steps)

    def influence(self, name: str, gradient: Tensor, scale: float, clip: float, direction: Tensor) -> Tensor:
        raise AssertionError("an orthogonalised update is no sum over rows; the configuration refuses 'valuation'")

    def sums(self, name: str, weights: Tensor, state: Mapping[str, Tensor], start: Tensor | None) -> Tensor:
        """As ``Optimizer.sums``; the effective rate of a matrix is that of the orthogonal one."""
        if name not in self._momentum:
            return self._rest.sums(name, weights, state, start)
        return without_formula(
            weights, self._squares[name], state["momentum"], start, self._lr * self._factors[name] * weights.numel()
        )
