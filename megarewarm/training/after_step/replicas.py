"""The check that replicas hold the same weights, every ``reliability.check_replicas`` steps and before each save."""

from __future__ import annotations

from megarewarm.config.schema import RunConfig
from megarewarm.parallel.replicas import ReplicasDiffer, check_replicas
from megarewarm.training.after_step.part import Context, Moment, Stateless


class Replicas(Stateless):
    """Compares them. Raises ``ReplicasDiffer``, after the event is written."""

    def __init__(self, context: Context) -> None:
        self._run, self._metrics = context.run, context.metrics
        self._steps = set(replica_checks(context.run.plan.config, context.run.plan.position.step))

    def after(self, moment: Moment) -> None:
        run = self._run
        is_due = moment.when in ("step", "late") and run.step in self._steps
        if not (is_due or (moment.saving and moment.when != "start")) or run.plan.config.reliability.check_replicas is None:
            return
        try:
            check_replicas(run.model, run.optimizer.state())
        except ReplicasDiffer as error:
            self._metrics.event("alarm", step=run.step, kind="replicas", message=str(error))
            self._metrics.event("stop", step=run.step, reason="replicas differ")
            raise


def replica_checks(config: RunConfig, first: int) -> list[int]:
    """The steps after which replicas are compared, besides those that are saved."""
    every = config.reliability.check_replicas
    if every is None:
        return []
    return [step for step in config.grid(every).points(config.total_steps) if step > first]
