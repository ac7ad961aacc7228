"""The training loop. Read this first: plan, build, then steps, each with what follows it, until the budget is spent."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from megarewarm.checkpoint.own.saver import Saver
from megarewarm.config.schema import RunConfig
from megarewarm.parallel.agreement import gather
from megarewarm.parallel.collective import collective
from megarewarm.parallel.ranks import Ranks
from megarewarm.process import freed_memory_kept
from megarewarm.spelling import duration_text, listed
from megarewarm.training.after_step.order import PARTS
from megarewarm.training.after_step.part import Context, Moment, Outcome
from megarewarm.training.after_step.progress import RunProgress
from megarewarm.training.after_step.signals import Lookout, StopAgreed, StopRequest
from megarewarm.training.after_step.time_limit import TimeLimit
from megarewarm.training.averaged import finish_average
from megarewarm.training.finish import export_run, is_trained, pending, untested
from megarewarm.training.interpolation import interpolate
from megarewarm.training.measuring import measure_moments
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.notes import logged_notes
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.output.voice import Voice
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.epochs import settle_epochs
from megarewarm.training.start.evaluation_cost import evaluation_cost, evaluation_note, tokens_held
from megarewarm.training.start.inputs import check_place, check_training
from megarewarm.training.start.memory import keeps_freed_memory
from megarewarm.training.start.own_replay import with_own_replay
from megarewarm.training.start.plan import Plan, make_plan
from megarewarm.training.start.saving import retention
from megarewarm.training.start.texts import settle_texts
from megarewarm.training.step import training_step
from megarewarm.training.summary import announce

Callback = Callable[[dict[str, Any]], object]

_NOTICEABLE_WAIT = 0.05  # of the time of a run, spent on waiting for data


@collective
def train(config: RunConfig, ranks: Ranks, console: Console, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train ``config`` to its end, from its own newest checkpoint if it has one. All ranks call it.

    ``callbacks`` are called on the main rank with each event of metrics.jsonl after 'start'; one that returns True ends the
    run after the step, saved.

    Raises ``UserError`` for bad input before anything is overwritten, ``TrainingDiverged`` where too many steps changed
    nothing, ``ReplicasDiffer`` where ranks that should hold the same weights don't.
    """
    config, lengths = settle_epochs(config)
    folder = check_place(config)
    with ExitStack() as opened:
        opened.callback(folder.close)
        folder.lock(main=ranks.is_main)
        plan = make_plan(config)
        if is_trained(plan):
            assert plan.source is not None and plan.source.training is not None
            console.print(f"[bold]{config.name}[/]: already complete in {folder.path}", highlight=False)
            if names := untested(plan):
                console.print(
                    f"{config.name}: note: evaluation.tasks has {listed(names)}, on which the run was not tested; "
                    f"'megarewarm evaluate {folder.path} --tasks FILE' tests its end",
                    style="yellow",
                    highlight=False,
                )
            _do_pending(config, plan, folder, ranks, console)
            return Outcome(folder.path, plan.position.step, plan.source.training.lineage.stages[-1].losses)
        check_training(plan)
        plan, written = with_own_replay(plan, ranks, console)
        with logged_notes() as logged:
            run = build(plan, ranks)
        opened.callback(run.batches.close)
        if keeps_freed_memory(run.model.parameters.values(), ranks.device, run.inputs.precision):
            opened.enter_context(freed_memory_kept())
        plan = run.plan
        run.notes += [*lengths, *written, *logged]
        limit = TimeLimit(config.reliability.max_wall_time, ranks.began, os.environ)
        voice = _open(run, config, folder, console, opened)
        evaluations = evaluation_cost(plan, tokens_held(run.validation), run.tasks.tokens)
        run.notes += evaluation_note(plan, evaluations)
        announce(run, voice, evaluations)
        asynchronous = plan.config.checkpoint.asynchronous
        saver = opened.enter_context(Saver(folder.checkpoints, retention(plan.config), asynchronous=asynchronous))
        saver.reserve(run.tensors())
        with StopRequest(console) as stop:
            voice.metrics.listeners += [functools.partial(_call, callback, stop) for callback in callbacks]
            run.between = Lookout(stop, ranks.world_size)
            progress = RunProgress(console, plan.config, plan.position.step, evaluations)
            lookout = Lookout(stop, ranks.world_size)
            outcome = _Loop(Context(run, folder, saver, voice.metrics, voice, progress, stop, lookout, limit)).train()
        if outcome.exit_code == 0:
            export_run(plan, run.inputs.texts, folder, ranks, voice.say)
    return outcome


def _call(callback: Callback, stop: StopRequest, event: dict[str, Any]) -> None:
    if callback(event) is True:
        stop.by_callback = True


def _open(run: Run, config: RunConfig, folder: RunFolder, console: Console, opened: ExitStack) -> Voice:
    """Begin to write in the run's folder; ``opened`` closes what is then open."""
    # as it was given, but with the run's own rule for intervals, and the micro-batch that 'auto' has become
    training = config.training.model_copy(update={"micro_batch": run.plan.config.training.micro_batch})
    settled = {"intervals": run.plan.config.intervals, "training": training}
    folder.open(config.model_copy(update=settled), main=run.ranks.is_main)
    metrics = Metrics(folder.path, config.logging, config.name, writes=run.ranks.is_main)
    opened.callback(metrics.close)
    return Voice(console, config.name, metrics)


def _do_pending(config: RunConfig, plan: Plan, folder: RunFolder, ranks: Ranks, console: Console) -> None:
    """Do what the complete run of ``plan`` has yet to do. Raises ``UserError`` if its start can't be read any more."""
    left = gather(pending(plan))[0]  # one word for all: metrics are written by the main rank
    if left.export:
        texts = settle_texts(plan)
        for note in texts.notes:
            console.print(f"{config.name}: note: {note}", style="yellow", highlight=False)
        export_run(plan, texts, folder, ranks, lambda line: console.print(line, highlight=False))
    if left.alphas or left.average:
        run = build(plan, ranks)
        with ExitStack() as opened:
            opened.callback(run.batches.close)
            voice = _open(run, config, folder, console, opened)
            if left.average:
                saver = opened.enter_context(Saver(folder.checkpoints, retention(plan.config), asynchronous=False))
                finish_average(run, voice, saver, folder)
            if left.alphas:
                interpolate(run, voice, left.alphas)
            voice.metrics.event("stop", step=run.step, reason="complete")


class _Loop:
    """The steps of a run, and what follows each, until its end or a stop."""

    def __init__(self, context: Context) -> None:
        self.context = context
        context.parts += [make(context) for make in PARTS]
        self.started, self.waited = time.monotonic(), 0.0

    @collective
    def train(self) -> Outcome:
        """All steps that are left. All ranks call it."""
        run, plan = self.context.run, self.context.run.plan
        self.moment = Moment("start", begun=plan.resumed)
        try:
            with self.context.progress:
                ended = self._resume() if plan.resumed else self._begin()
                while ended is None and run.step < plan.config.total_steps:
                    ended = self._follow(self._step())
                if ended is None:
                    context = self.context
                    finish_average(run, context.voice, context.saver, context.folder, context.between)
                    interpolate(run, context.voice, show=context.between)
        except StopAgreed:
            stopped = Moment("stop", begun=self.moment.begun, went_back=self.moment.went_back)
            ended = self._follow(stopped)
        return ended or self._complete()

    def _begin(self) -> Outcome | None:
        """What comes before the first step; the moments are measured from the batches of the first steps, where they are."""
        context = self.context
        if batches := context.run.plan.measured_batches:
            began = time.monotonic()
            measure_moments(context.run, context.between("moments", "measures"))
            seconds = time.monotonic() - began
            context.progress.aside(seconds)
            context.metrics.event("moments", step=context.run.step, batches=batches, seconds=round(seconds, 3))
            context.voice.tell(f"moments measured from {batches:,} batches in {duration_text(seconds)}")
        return self._follow(self.moment)

    def _resume(self) -> Outcome | None:
        """Give the parts what the checkpoint kept of them; the evaluation that was broken off is the first thing to do."""
        source = self.context.run.plan.source
        assert source is not None and source.training is not None
        recent = source.training.recent_steps
        for part in self.context.parts:
            part.restore(recent.model_dump())
        return self._follow(Moment("late", began=time.perf_counter())) if recent.unevaluated else None

    def _step(self) -> Moment:
        run = self.context.run
        self.moment = Moment("step")  # what the one before passed on is done
        began = time.perf_counter()
        if run.thaw_if_due():
            self.context.metrics.event("thaw", step=run.step, tokens=run.plan.tokens(run.step))
            self.context.voice.say(f"{self.context.voice.name}: everything trains from step {run.step + 1:,} on")
        result = training_step(run, run.plan.lr(run.step + 1))
        self.waited += result.waited
        return Moment("step", result, began, time.perf_counter() - began - result.aside)

    def _follow(self, moment: Moment) -> Outcome | None:
        """What follows a step; how the run has ended, if it has."""
        self.moment = moment
        for part in self.context.parts:
            part.after(moment)
        return moment.outcome

    def _complete(self) -> Outcome:
        run, voice = self.context.run, self.context.voice
        losses = run.state.losses
        voice.metrics.event("stop", step=run.step, reason="complete")
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        seconds = time.monotonic() - self.started
        voice.say(f"[bold]{voice.name}[/]: complete in {duration_text(seconds)}{': ' + shown if shown else ''}")
        if self.waited > _NOTICEABLE_WAIT * seconds:
            voice.warn(
                f"{100 * self.waited / seconds:.0f} % of the time went into waiting for data; a faster disk, or a copy of the "
                f"token files on a local one, would avoid that"
            )
        return Outcome(self.context.folder.path, run.step, losses)
