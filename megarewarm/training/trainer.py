"""The training loop. Read this first: plan, build, then batch, step, log, evaluate, save until the budget is spent."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.schema import RunConfig
from megarewarm.data.mixture.moving import MovingWindows
from megarewarm.data.mixture.validation import ValidationWindows
from megarewarm.errors import EXIT_TIME_LIMIT
from megarewarm.parallel.agreement import Between, all_reduce_maxima, all_reduce_sums, gather
from megarewarm.parallel.ranks import Ranks
from megarewarm.parallel.replicas import ReplicasDiffer, check_replicas
from megarewarm.spelling import duration_text
from megarewarm.training.after_step.bad_steps import answer
from megarewarm.training.after_step.dynamics import dynamics_steps, measure
from megarewarm.training.after_step.evaluate import evaluate
from megarewarm.training.after_step.progress import RunProgress, loss_line
from megarewarm.training.after_step.signals import Lookout, StopAgreed, StopRequest
from megarewarm.training.after_step.step_times import StepTimes
from megarewarm.training.after_step.time_limit import TimeLimit
from megarewarm.training.interpolation import interpolate
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.notes import logged_notes
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.owed import is_trained, owed
from megarewarm.training.run import Run
from megarewarm.training.setup import build
from megarewarm.training.start.evaluation_cost import EvaluationCost, evaluation_cost, evaluation_note, tokens_held
from megarewarm.training.start.evaluations import evaluation_steps, evaluations_at
from megarewarm.training.start.inputs import check_place, check_training
from megarewarm.training.start.plan import Plan, make_plan
from megarewarm.training.start.saving import extra_steps, is_saved, retention
from megarewarm.training.start.texts import Texts, settle_texts
from megarewarm.training.step import TrainingDiverged, training_step
from megarewarm.training.summary import print_reset_table, print_start

_NOTICEABLE_WAIT = 0.05  # of the time of a run, spent on waiting for data


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, completed steps, newest validation losses, and the exit code: 0 where it is complete,
    128 + the signal that stopped it, ``EXIT_TIME_LIMIT``."""

    folder: Path
    step: int
    losses: dict[str, float]
    exit_code: int = 0


def train(config: RunConfig, ranks: Ranks, console: Console) -> Outcome:
    """Train ``config`` to its end, from its own newest checkpoint if it has one. All ranks call it.

    Raises ``UserError`` for bad input before anything is overwritten, ``TrainingDiverged`` where too many steps changed
    nothing, ``ReplicasDiffer`` where ranks that should hold the same weights don't.
    """
    folder = check_place(config)
    with ExitStack() as opened:
        opened.callback(folder.close)
        folder.lock(main=ranks.is_main)
        plan = make_plan(config)
        if is_trained(plan):
            assert plan.source is not None and plan.source.training is not None
            console.print(f"[bold]{config.name}[/]: already complete in {folder.path}", highlight=False)
            _make_up(config, plan, folder, ranks, console)
            return Outcome(folder.path, plan.position.step, plan.source.training.lineage.stages[-1].losses)
        check_training(plan)
        with logged_notes() as logged:
            run = build(plan, ranks)
        run.notes += logged
        limit = TimeLimit(config.reliability.max_wall_time, ranks.began, os.environ)
        metrics = _open(run, _as_begun(config, plan), folder, opened)
        evaluations = evaluation_cost(plan, tokens_held(run.validation))
        run.notes += evaluation_note(plan, evaluations)
        _announce(run, metrics, console, evaluations)
        saver = opened.enter_context(
            Saver(folder.checkpoints, retention(plan.config), asynchronous=plan.config.checkpoint.asynchronous)
        )
        saver.reserve(run.tensors())
        with StopRequest(console) as stop:
            outcome = _Loop(run, folder, saver, metrics, console, stop, limit, evaluations).train()
        if outcome.exit_code == 0:
            _export(plan, run.texts, folder, ranks, console)
    return outcome


def _as_begun(config: RunConfig, plan: Plan) -> RunConfig:
    """``config`` as it is written down: with the run's own rule for intervals."""
    return config.model_copy(update={"intervals": plan.config.intervals})


def _open(run: Run, config: RunConfig, folder: RunFolder, opened: ExitStack) -> Metrics:
    """Begin to write in the run's folder; ``opened`` closes what is then open."""
    opened.callback(run.batches.close)
    folder.open(config, main=run.ranks.is_main)
    metrics = Metrics(folder.path, config.logging, config.name, writes=run.ranks.is_main)
    opened.callback(metrics.close)
    return metrics


def _make_up(config: RunConfig, plan: Plan, folder: RunFolder, ranks: Ranks, console: Console) -> None:
    """Do what the complete run of ``plan`` still owes. Raises ``UserError`` where its start can't be had any more."""
    due = gather(owed(plan))[0]  # one word for all: metrics are written by the main rank
    if due.export:
        texts = settle_texts(plan)
        for note in texts.notes:
            console.print(f"{config.name}: note: {note}", style="yellow", highlight=False)
        _export(plan, texts, folder, ranks, console)
    if due.alphas:
        run = build(plan, ranks)
        with ExitStack() as opened:
            metrics = _open(run, _as_begun(config, plan), folder, opened)
            interpolate(run, metrics, console, due.alphas)
            metrics.event("stop", step=run.step, reason="complete")


def _export(plan: Plan, texts: Texts, folder: RunFolder, ranks: Ranks, console: Console) -> None:
    """Write what ``export`` asks for, from the newest checkpoint."""
    if not (plan.config.export.huggingface and ranks.is_main):
        return
    newest, _ = folder.newest_checkpoint(alone=True)
    assert newest is not None
    checkpoint = OwnCheckpoint(newest, verified=True)
    weights = ModelWeights(checkpoint.whole_model())
    export(weights, plan.model, folder.export, tokenizer=texts.exported, lineage=checkpoint.lineage)
    console.print(f"{plan.config.name}: exported to {folder.export}", highlight=False)


class _Loop:
    """The steps of a run, and what follows each: logs, evaluation, save; until its end, or a stop."""

    def __init__(
        self,
        run: Run,
        folder: RunFolder,
        saver: Saver,
        metrics: Metrics,
        console: Console,
        stop: StopRequest,
        limit: TimeLimit,
        evaluations: EvaluationCost | None,
    ) -> None:
        self.run, self.folder, self.saver, self.metrics, self.console = run, folder, saver, metrics, console
        self.stop, self.limit = stop, limit
        plan, config = run.plan, run.plan.config
        self.first, self.total = plan.position.step, config.total_steps
        self.sums = plan.learning_rate_sums()
        self.measured_after = dynamics_steps(config, plan.origin.step)
        self.evaluated_after = set(evaluation_steps(config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps))
        self.compared_after = set(replica_checks(config, self.first))
        self.times = StepTimes(config.reliability, gather(socket.gethostname()))
        self.progress = RunProgress(
            console, config.name, self.first, self.total, config.logging.every, config.tokens_per_step, evaluations
        )
        run.between = Lookout(stop, run.ranks.world_size)
        self.lookout = Lookout(stop, run.ranks.world_size)  # an evaluation's portions have a pace of their own
        self.stands: int | None = self.first if plan.resumed else None
        """The step of the checkpoint that holds the run as it is now; None where none does."""
        self.has_begun = False

    def train(self) -> Outcome:
        """All steps that are left. All ranks call it."""
        run, plan = self.run, self.run.plan
        try:
            with self.progress:
                if not plan.resumed and self.first in self.evaluated_after:
                    self._evaluate(self.first, "at the start")
                    run.start_losses = dict(run.losses)
                self.has_begun = True
                if not plan.resumed and self.first in extra_steps(plan.config):
                    self._save()
                if run.unevaluated and (ended := self._finish(self.first, time.perf_counter())) is not None:
                    return ended
                for step in range(self.first + 1, self.total + 1):
                    if (ended := self._step(step)) is not None:
                        return ended
                interpolate(run, self.metrics, self.console, show=self._between)
        except StopAgreed:
            return self._stopped_amid()
        self.metrics.event("stop", step=self.total, reason="complete")
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in run.losses.items())
        seconds = time.monotonic() - run.started
        self._say(f"[bold]{plan.config.name}[/]: complete in {duration_text(seconds)}{': ' + shown if shown else ''}")
        if run.waited > _NOTICEABLE_WAIT * seconds:
            self._warn(
                f"{100 * run.waited / seconds:.0f} % of the time went into waiting for data; a faster disk, or a copy of the "
                f"token files on a local one, would save it"
            )
        return Outcome(self.folder.path, self.total, run.losses)

    def _step(self, step: int) -> Outcome | None:
        """One step and what follows it; how the run ended where it did."""
        run, plan, config, metrics = self.run, self.run.plan, self.run.plan.config, self.metrics
        began, waited = time.perf_counter(), run.waited
        lr = plan.lr(step)
        result = training_step(run, lr)
        seconds = time.perf_counter() - began
        rate = config.tokens_per_step / seconds
        run.step, run.last_lr, run.max_lr, run.measured = step, lr, max(run.max_lr, lr), {}
        lr_sum, area = (float(column[step - plan.origin.step - 1]) for column in self.sums)
        metrics.event(
            "train",
            step=step,
            tokens=plan.tokens(step),
            loss=result.loss,
            lr=lr,
            lr_sum=lr_sum,
            annealing_area=area,
            grad_norm=result.norm,
            tokens_per_second=round(rate, 1),
            data_wait=round(run.waited - waited, 4),
            **({} if result.changed else {"changed": False}),
            **({"distill_loss": run.distilled} if run.model.teacher is not None else {}),
            **run.utilisation(rate),
        )
        try:
            answered = answer(run, result, self.folder, self.saver, metrics)
        except TrainingDiverged:
            metrics.event("stop", step=step, reason="diverged")
            raise
        slow = self.times.add(seconds, result.busy)
        for alarm in slow:
            metrics.event("alarm", step=step, kind=alarm.kind, message=alarm.message)
        for line in [*answered.lines, *(f"step {step}: {alarm.message}" for alarm in slow)]:
            metrics.text(line)
            self._warn(line)
        if step in self.measured_after and result.changed:
            groups = measure(run.model, run.optimizer, run.start_weights)
            metrics.event("dynamics", step=step, tokens=plan.tokens(step), groups=groups)
        if (logged := self.progress.step(step, result.loss, lr, rate)) is not None:
            metrics.text(logged)
        run.unevaluated = step in self.evaluated_after
        run.due |= answered.went_back
        return self._finish(step, began, at_once=answered.went_back)

    def _finish(self, step: int, began: float, *, at_once: bool = False) -> Outcome | None:
        """Evaluate and save after ``step`` what is due, and end where a stop is. ``at_once``: wait for the save."""
        run, config, saver = self.run, self.run.plan.config, self.saver
        if run.unevaluated:
            if step in self.evaluated_after:  # evaluation.every may have changed since the run was stopped here
                self._evaluate(step)
            run.unevaluated, self.stands = False, None
        told = [self.stop.received is not None, self.limit.is_over and run.ranks.is_main, saver.failed]
        stopping, out_of_time, failed = (count > 0 for count in all_reduce_sums(told))
        if failed:
            saver.wait()
        stopping |= out_of_time and step < self.total
        run.due |= is_saved(config, step)
        # not while steps fail one after another, if that may be the weights: it would take the place of an earlier one
        planned = step == self.total or (run.due and run.unchanged == 0)
        saving = planned or (stopping and (run.unchanged == 0 or run.is_finite()))
        if saving or step in self.compared_after:
            _compare_replicas(run, self.metrics)
        if planned:
            run.due = False
        if saving:
            self._save(interim=not planned)
        if stopping or at_once or step == self.total:
            saver.wait()
        self._log_saved()
        self.limit.step(time.perf_counter() - began)
        return self._stopped(saved=saving) if stopping else None

    def _save(self, *, interim: bool = False) -> None:
        self.saver.save(self.run.state(interim=interim), self.run.tensors())
        self.stands = self.run.step

    def _stopped_amid(self) -> Outcome:
        """The end of a run that all ranks broke off amid a step or an evaluation, which the next start makes again."""
        run = self.run
        self.saver.wait()
        saved = self.stands == run.step
        if not saved and self.has_begun and (run.unchanged == 0 or run.is_finite()):
            _compare_replicas(run, self.metrics)
            self._save(interim=True)
            self.saver.wait()
            saved = True
        self._log_saved()
        return self._stopped(saved=saved)

    def _stopped(self, *, saved: bool) -> Outcome:
        """The end of a run that is to go on another time."""
        run, config = self.run, self.run.plan.config
        # one word for all: ranks may have got different signals, or none
        number = round(max(all_reduce_maxima([float(self.stop.received or 0)])))
        reason = f"signal {number}" if number else f"time limit of {config.reliability.max_wall_time}"
        self.metrics.event("stop", step=run.step, reason=reason, **({"evaluated": False} if run.unevaluated else {}))
        if saved:
            what = f"saved{', not yet evaluated' * run.unevaluated}; the same command continues from here"
        elif not self.has_begun:
            what = "nothing to save yet; the same command begins again"
        else:
            what = "not saved, for the weights are not finite; the same command continues from the last checkpoint"
        self._warn(f"stopped after step {run.step} of {config.total_steps} ({reason}), {what}")
        code = 128 + number if number else EXIT_TIME_LIMIT
        return Outcome(self.folder.path, run.step, run.losses, code)

    def _log_saved(self) -> None:
        for saved in self.saver.finished():
            self.limit.saved(saved.seconds)
            stall, seconds = round(saved.stall, 3), round(saved.seconds, 3)
            self.metrics.event("save", step=saved.step, path=str(saved.path), stall=stall, seconds=seconds)
            self._tell(f"saved step {saved.step} ({saved.seconds:.1f} s)")

    def _evaluate(self, step: int, when: str | None = None) -> None:
        """Evaluate every set that is due. It is told of as a whole, or broken off and not told of at all."""
        run, config, metrics = self.run, self.run.plan.config, self.metrics
        micro_batch = config.evaluation.micro_batch or config.training.micro_batch
        began = time.monotonic()
        found: list[list[tuple[ValidationWindows | MovingWindows, float, int]]] = []
        for number, last in evaluations_at(config, step) if when is None else [(0, False)]:
            found.append([])
            for windows in run.validation:
                if windows.when == "end" and not last:
                    continue
                part = windows.slice(number if windows.when == "always" else 0)
                loss, tokens = evaluate(run.model, part, micro_batch, run.mesh, self._between(windows.name))
                found[-1].append((windows, loss, tokens))
        self.progress.evaluated(sum(tokens for turn in found for _, _, tokens in turn), time.monotonic() - began)
        for turn in found:
            for windows, loss, tokens in turn:
                name = windows.name
                run.losses[name] = run.measured[name] = loss
                metrics.event(
                    "eval", step=step, tokens=run.plan.tokens(step), name=name, role=windows.role, loss=loss, over=tokens
                )
            if turn:
                losses = {windows.name: loss for windows, loss, _ in turn}
                self._tell(loss_line(when or f"step {step}", losses, run.start_losses, self._width))

    def _between(self, what: str) -> Between:
        """What is done between the portions of an evaluation of ``what``."""

        def between(done: int, portions: int) -> None:
            self.lookout(done, portions)
            self.progress.evaluating(what, done, portions)

        return between

    @property
    def _width(self) -> int:
        return self.console.width - len(self.run.plan.config.name) - 2

    def _tell(self, line: str) -> None:
        """A line for people, on the console and in log.txt."""
        line = f"{self.run.plan.config.name}: {line}"
        self.metrics.text(line)
        self._say(escape(line))

    def _warn(self, line: str) -> None:
        self.console.print(f"{self.run.plan.config.name}: {line}", style="yellow", highlight=False, markup=False)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False)


def replica_checks(config: RunConfig, first: int) -> list[int]:
    """The steps after which replicas are compared, besides those that are saved."""
    every = config.reliability.check_replicas
    if every is None:
        return []
    return [step for step in config.grid(every).points(config.total_steps) if step > first]


def _compare_replicas(run: Run, metrics: Metrics) -> None:
    if run.plan.config.reliability.check_replicas is None:
        return
    try:
        check_replicas(run.model, run.optimizer.state())
    except ReplicasDiffer as error:
        metrics.event("alarm", step=run.step, kind="replicas", message=str(error))
        metrics.event("stop", step=run.step, reason="replicas differ")
        raise


def _announce(run: Run, metrics: Metrics, console: Console, evaluations: EvaluationCost | None) -> None:
    plan = run.plan
    if plan.resumed:
        metrics.event("resume", step=plan.position.step)
    else:
        if metrics.has_past:
            # killed before its first checkpoint: what was logged then is superseded as a whole
            metrics.event("resume", step=-1)
        metrics.event("start", **run.description())
    print_start(run, console, evaluations)
    if not plan.resumed:
        print_reset_table(run.table_rows, console, metrics.text)
