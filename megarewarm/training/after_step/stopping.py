"""The end of a run that will continue later: after a signal, or at its time limit."""

from __future__ import annotations

from megarewarm.errors import EXIT_TIME_LIMIT
from megarewarm.parallel.agreement import all_reduce_maxima, all_reduce_sums
from megarewarm.training.after_step.part import Context, Moment, Outcome, Stateless


class AskStop(Stateless):
    """Asks all ranks whether the run stops here, and whether a save has failed on any of them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._began: float | None = None

    def after(self, moment: Moment) -> None:
        if moment.when == "stop":
            moment.stopping = True
        if moment.when not in ("step", "late"):
            return
        context, run = self._context, self._context.run
        if self._began is not None:
            context.limit.step(moment.began - self._began)
        self._began = moment.began
        mine = [context.stop.is_asked, context.limit.is_over and run.ranks.is_main, context.saver.failed]
        asked, out_of_time, failed = (count > 0 for count in all_reduce_sums(mine))
        if failed:
            context.saver.wait()  # which raises
        moment.stopping = asked or (out_of_time and run.step < run.plan.config.total_steps)


class EndStopped(Stateless):
    """Ends a run that stops: the event, the message, the exit code."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def after(self, moment: Moment) -> None:
        if not moment.stopping:
            return
        context, run = self._context, self._context.run
        config = run.plan.config
        # one decision for all: ranks may have received different signals, or none
        number = round(max(all_reduce_maxima([float(context.stop.received or 0)])))
        other = "a callback" if context.stop.by_callback else f"time limit of {config.reliability.max_wall_time}"
        reason = f"signal {number}" if number else other
        context.metrics.event("stop", step=run.step, reason=reason, **({"evaluated": False} if moment.unevaluated else {}))
        if moment.saved:
            what = f"saved{', not yet evaluated' * moment.unevaluated}; the same command continues from here"
        elif not moment.begun:
            what = "nothing to save yet; the same command starts over"
        else:
            what = "not saved, because the weights are not finite; the same command continues from the last checkpoint"
        context.voice.warn(f"stopped after step {run.step} of {config.total_steps} ({reason}), {what}")
        code = 128 + number if number else EXIT_TIME_LIMIT
        moment.outcome = Outcome(context.folder.path, run.step, run.state.losses, code)
