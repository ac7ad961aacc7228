"""A copy of the run's first weights, for the distance it has gone and the weights between."""

from __future__ import annotations

from torch import Tensor

from megarewarm.checkpoint.source import CheckpointSource, open_checkpoint
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.parallel.agreement import on_all_ranks
from megarewarm.parallel.collective import collective
from megarewarm.parallel.engine import ParallelModel
from megarewarm.rewarm.reset import resolve
from megarewarm.training.start.plan import Plan

StartWeights = dict[str, Tensor]
"""This rank's parts of the start weights by the parameters' names, in host memory, laid out as the parameters."""


def keeps_start(config: RunConfig) -> bool:
    """Whether a run of ``config`` uses its start weights."""
    return config.logging.dynamics is not None and config.logging.start_distance


def copy_weights(model: ParallelModel) -> StartWeights:
    """Copies of the present parameters; of replicas, only the rank that counts a parameter makes one."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.parameters.items()
        if model.unique_shard(name, parameter) is not None
    }


@collective
def load_start(plan: Plan, model: ParallelModel) -> None:
    """Fill ``model`` with the run's first weights: drawn again from the seed, or read again from ``start.from``. All ranks
    call it. Raises ``UserError`` on all of them if they can't be restored."""
    source = start_source(plan)
    if source is None:
        model.initialize(plan.config.training.seed)
    else:
        on_all_ranks(lambda: source.load_weights(model), UserError)


@collective
def start_source(plan: Plan) -> CheckpointSource | None:
    """The checkpoint with the run's first weights, reopened if the run is resumed; None: they were drawn.

    All ranks call it. Raises ``UserError`` on all of them if it is gone or has another history than at the start, because a
    run folder means its newest checkpoint, and training may have continued there.
    """
    if not plan.resumed:
        return plan.source if plan.policy.weights == "load" else None
    return on_all_ranks(lambda: _reopened(plan), UserError)


def _reopened(plan: Plan) -> CheckpointSource | None:
    name = plan.config.start.from_
    if name is None:
        return None
    source = open_checkpoint(name)
    if resolve(plan.config.start, source).weights == "initialise":
        return None
    added_later = {"stages": {"__all__": {"optimizer"}}}  # to what a checkpoint says of itself when it is opened
    if source.lineage.model_dump(exclude=added_later) != plan.history.model_dump(exclude=added_later):
        raise UserError(
            f"start.from: {name} has another history than when {plan.config.name} started from it; name the "
            f"checkpoint itself (RUN/checkpoints/step_N) where a run goes on"
        )
    return source


def reload_start_weights(plan: Plan, model: ParallelModel) -> tuple[StartWeights | None, list[str]]:
    """The start weights of a resumed run, or None and a note that says why. Leaves ``model`` filled with anything."""
    try:
        load_start(plan, model)
    except UserError as error:
        return None, [f"the weights that the run began with can't be restored, so 'dynamics' has no 'distance' ({error})"]
    return copy_weights(model), []
