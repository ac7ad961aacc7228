"""From frozen to trained: the optimizer of a run with ``optimizer.train``, as it is at each step."""

from __future__ import annotations

from collections.abc import Iterable

from megarewarm.checkpoint.own.state import Thawed
from megarewarm.config.execution import OptimizerConfig
from megarewarm.model.trained import Trained
from megarewarm.optimizers.optimizer import Optimizer, make_optimizer
from megarewarm.optimizers.staggered import Late, Staggered, parts_of
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel


@collective
def optimizer_of(
    model: ParallelModel, config: OptimizerConfig, kind: str, what: Trained | None, thawed: Iterable[Thawed]
) -> Optimizer:
    """The optimizer of ``model`` that trains ``what``, its state zero. All ranks call it. ``thawed``: what began later."""
    if what is not None:
        model.train_only(what)
    trains = frozenset(model.shapes if what is None else what)  # of a start that had thawed more, those parameters stay out
    late = [(names, each.optimizer_step) for each in thawed if (names := trains & frozenset(each.names))]
    if not late:
        return make_optimizer(model, config, kind)
    first = make_optimizer(model, config, kind, lambda name: not any(name in names for names, _ in late))
    made = Staggered(first, [Late(names, make_optimizer(model, config, kind, names.__contains__)) for names, _ in late])
    for part, (_, steps) in zip(made.late, late, strict=True):
        part.optimizer.set_completed_steps(steps)
    return made


@collective
def thaw(model: ParallelModel, optimizer: Optimizer, config: OptimizerConfig, before: Trained) -> Optimizer:
    """The optimizer once everything trains and no more only ``before``. All ranks call it. What has trained wholly keeps its
    state; what thaws, and a matrix of which rows had trained, begins at zero."""
    model.train_only(None)
    whole = {name for name, rows in before.items() if rows is None}
    first, late = parts_of(optimizer)
    if len(whole) < len(before):
        held, first = first, make_optimizer(model, config, optimizer.kind, lambda name: name in whole)
        for key, tensor in first.state().items():
            tensor.copy_(held.state()[key])
        first.set_completed_steps(held.completed_steps)
    names = frozenset(model.shapes) - whole
    new = Late(names, make_optimizer(model, config, optimizer.kind, names.__contains__))
    return Staggered(first, [*late, new])


def thawed(optimizer: Optimizer) -> list[Thawed]:
    """What of it a checkpoint says of the parts that began later."""
    return [Thawed(names=sorted(late.names), optimizer_step=late.optimizer.completed_steps) for late in parts_of(optimizer)[1]]
