"""Dynamics of the weights: norms, updates, effective learning rates and distances of each part of the model. Nothing is
copied before a step, because the optimizer can reconstruct its change (``Optimizer.sums``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megarewarm.config.schema import RunConfig
from megarewarm.optimizers.optimizer import Optimizer
from megarewarm.optimizers.sums import SUMS, without_formula
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.training.after_step.part import Context, Moment, Stateless

ALL = "all"

Groups = dict[str, dict[str, float]]


class Dynamics(Stateless):
    """Writes the event 'dynamics' after the steps that are measured."""

    def __init__(self, context: Context) -> None:
        self._run, self._metrics = context.run, context.metrics
        self._steps = dynamics_steps(context.run.plan.config, context.run.plan.origin.step)

    def after(self, moment: Moment) -> None:
        run = self._run
        if moment.result is None or not moment.result.changed or run.step not in self._steps:
            return
        groups = measure(run.model, run.optimizer, run.start_weights)
        self._metrics.event("dynamics", step=run.step, tokens=run.plan.tokens(run.step), groups=groups)


def dynamics_steps(config: RunConfig, first: int) -> set[int]:
    """The steps that are measured: every ``logging.dynamics`` from step ``first`` on, and the last."""
    if config.logging.dynamics is None:
        return set()
    points = config.grid(config.logging.dynamics).points(config.total_steps - first)
    return {*(first + point for point in points), config.total_steps}


@collective
def measure(model: ParallelModel, optimizer: Optimizer, start: Mapping[str, Tensor] | None) -> Groups:
    """The dynamics of the step that ``optimizer`` has just made, by ``Card.group``, and of 'all' of them.

    ``weight_norm``, ``first_moment_norm`` and ``second_moment_norm`` are 2-norms after the step, ``update_ratio`` the norm of
    the step's change over the weights', ``effective_lr`` the mean of lr / (sqrt(v) + eps) over the values, v corrected for its
    bias (0 where frozen), ``distance`` the norm of weights minus ``start`` (absent where that is None). Each value of the model
    counts once, whatever the layout; embeddings that are tied are 'embed_in'. All ranks call it, and get the same numbers.
    """
    names = list(dict.fromkeys(card.group for card in model.cards.values()))
    sums = torch.zeros(len(names), SUMS, dtype=torch.float64, device=model.mesh.device)
    held: dict[str, dict[str, Tensor]] = {}
    for (what, name), tensor in optimizer.state().items():
        held.setdefault(name, {})[what] = tensor
    for name, parameter in model.parameters.items():
        weights = model.unique_shard(name, parameter)
        if weights is None:
            continue
        group = sums[names.index(model.cards[name].group)]
        begun = model.unique_shard(name, start[name]) if start is not None else None
        trained = model.unique_trained(name, model.trained[name]) if name in model.trained else None
        if trained is None or len(trained) < len(weights):  # all or some of it is frozen
            nothing = weights.new_zeros((), dtype=torch.float64)
            group += without_formula(weights, nothing, weights[:0], begun, 0.0)
        if trained is not None and len(trained):
            state = {what: t for what, tensor in held[name].items() if (t := model.unique_trained(name, tensor)) is not None}
            moved = optimizer.sums(name, trained, state, begun if len(trained) == len(weights) else None)
            group += moved if len(trained) == len(weights) else moved * moved.new_tensor([0, 0, 1, 1, 1, 0, 1])
    total = torch.tensor(all_reduce_sums(sums.flatten().tolist()), dtype=torch.float64).view(-1, SUMS)
    rows = {**dict(zip(names, total, strict=True)), ALL: total.sum(0)}
    return {group: _numbers(row, start is not None) for group, row in rows.items()}


def _numbers(sums: Tensor, has_start: bool) -> dict[str, float]:
    count, rates = float(sums[0]), float(sums[6])
    weight, change, first, second, distance = sums[1:6].sqrt().tolist()
    numbers = {
        "weight_norm": weight,
        "update_ratio": change / weight if weight else float("nan"),
        "effective_lr": rates / count,
        "first_moment_norm": first,
        "second_moment_norm": second,
    }
    return numbers | ({"distance": distance} if has_start else {})
