"""The training loop. Read this first: plan, build, then batch, step, log, evaluate, save until the budget is spent."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.own.together import gather
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.schema import RunConfig
from megarewarm.errors import EXIT_TIME_LIMIT
from megarewarm.parallel.agreement import all_reduce_maxima, all_reduce_sums
from megarewarm.parallel.ranks import Ranks
from megarewarm.parallel.replicas import ReplicasDiffer, check_replicas
from megarewarm.report.words import duration_text
from megarewarm.training.bad_steps import answer
from megarewarm.training.dynamics import dynamics_steps, measure
from megarewarm.training.evaluate import evaluate, evaluation_steps, turns
from megarewarm.training.inputs import check_place, check_training
from megarewarm.training.interpolation import interpolate
from megarewarm.training.metrics import Metrics
from megarewarm.training.notes import logged_notes
from megarewarm.training.owed import is_trained, owed
from megarewarm.training.plan import Plan, make_plan
from megarewarm.training.progress import RunProgress
from megarewarm.training.run import Run
from megarewarm.training.run_folder import RunFolder
from megarewarm.training.saving import extra_steps, is_saved, retention
from megarewarm.training.setup import build
from megarewarm.training.signals import StopRequest
from megarewarm.training.step import TrainingDiverged, training_step
from megarewarm.training.step_times import StepTimes
from megarewarm.training.summary import print_reset_table, print_start
from megarewarm.training.texts import Texts, settle_texts
from megarewarm.training.time_limit import TimeLimit

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
        _announce(run, metrics, console)
        saver = opened.enter_context(
            Saver(folder.checkpoints, retention(plan.config), asynchronous=plan.config.checkpoint.asynchronous)
        )
        saver.reserve(run.tensors())
        with StopRequest(console) as stop:
            outcome = _loop(run, folder, saver, metrics, console, stop, limit)
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


def _loop(
    run: Run,
    folder: RunFolder,
    saver: Saver,
    metrics: Metrics,
    console: Console,
    stop: StopRequest,
    limit: TimeLimit,
) -> Outcome:
    plan, config = run.plan, run.plan.config
    total, first = config.total_steps, plan.position.step
    sums = plan.learning_rate_sums()
    measure_after = dynamics_steps(config, plan.origin.step)
    evaluate_after = set(evaluation_steps(config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps))
    compared_after = set(replica_checks(config, first))
    times = StepTimes(config.reliability, gather(socket.gethostname()))
    if not plan.resumed and first in evaluate_after:
        _evaluate_all(run, first, metrics, console, "at the start", number=0, last=False)
        run.start_losses = dict(run.losses)
    if not plan.resumed and first in extra_steps(config):
        saver.save(run.state(), run.tensors())
    with RunProgress(console, config.name, first, total, config.logging.every) as progress:
        for step in range(first + 1, total + 1):
            began, waited = time.perf_counter(), run.waited
            lr = plan.lr(step)
            result = training_step(run, lr)
            seconds = time.perf_counter() - began
            rate = config.tokens_per_step / seconds
            run.step, run.last_lr, run.max_lr, run.measured = step, lr, max(run.max_lr, lr), {}
            lr_sum, area = (float(column[step - plan.origin.step - 1]) for column in sums)
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
                answered = answer(run, result, folder, saver, metrics)
            except TrainingDiverged:
                metrics.event("stop", step=step, reason="diverged")
                raise
            slow = times.add(seconds, result.busy)
            for alarm in slow:
                metrics.event("alarm", step=step, kind=alarm.kind, message=alarm.message)
            for line in [*answered.lines, *(f"step {step}: {alarm.message}" for alarm in slow)]:
                metrics.text(line)
                console.print(f"{config.name}: {line}", style="yellow", highlight=False)
            if step in measure_after and result.changed:
                groups = measure(run.model, run.optimizer, run.start_weights)
                metrics.event("dynamics", step=step, tokens=plan.tokens(step), groups=groups)
            if (logged := progress.step(step, result.loss, lr, rate)) is not None:
                metrics.text(logged)
            for number, last in turns(config, step) if step in evaluate_after else ():
                _evaluate_all(run, step, metrics, console, None, number=number, last=last)
            told = [stop.received is not None, limit.is_over and run.ranks.is_main, saver.failed]
            stopping, out_of_time, failed = (count > 0 for count in all_reduce_sums(told))
            if failed:
                saver.wait()
            stopping |= out_of_time and step < total
            run.due |= is_saved(config, step)
            # not while steps fail one after another, if that may be the weights': it would take the place of an earlier one
            planned = answered.went_back or step == total or (run.due and run.unchanged == 0)
            saving = planned or (stopping and (run.unchanged == 0 or run.is_finite()))
            if saving or step in compared_after:
                _compare_replicas(run, metrics)
            if planned:
                run.due = False
            if saving:
                saver.save(run.state(interim=not planned), run.tensors())
            if stopping or answered.went_back or step == total:
                saver.wait()
            _log_saved(saver, metrics, limit)
            limit.step(time.perf_counter() - began)
            if stopping:
                return _stopped(run, folder, metrics, console, stop.received, saved=saving)
    interpolate(run, metrics, console)
    metrics.event("stop", step=total, reason="complete")
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in run.losses.items())
    elapsed = duration_text(time.monotonic() - run.started)
    console.print(f"[bold]{config.name}[/]: complete in {elapsed}{': ' + shown if shown else ''}", highlight=False)
    if run.waited > _NOTICEABLE_WAIT * (time.monotonic() - run.started):
        share = 100 * run.waited / (time.monotonic() - run.started)
        console.print(
            f"{config.name}: {share:.0f} % of the time went into waiting for data; a faster disk, or a copy of the token files "
            f"on a local one, would save it",
            style="yellow",
        )
    return Outcome(folder.path, total, run.losses)


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
        check_replicas(run.model, run.optimizer.moments())
    except ReplicasDiffer as error:
        metrics.event("alarm", step=run.step, kind="replicas", message=str(error))
        metrics.event("stop", step=run.step, reason="replicas differ")
        raise


def _stopped(run: Run, folder: RunFolder, metrics: Metrics, console: Console, received: int | None, *, saved: bool) -> Outcome:
    """The end of a run that is to go on another time. ``received``: the signal that this rank got, None where another got one,
    or where the time is over."""
    config = run.plan.config
    # one word for all: ranks may have got different signals, or none
    number = round(max(all_reduce_maxima([float(received or 0)])))
    reason = f"signal {number}" if number else f"time limit of {config.reliability.max_wall_time}"
    metrics.event("stop", step=run.step, reason=reason)
    what = (
        "saved; the same command continues from here"
        if saved
        else "not saved, for the weights are not finite; the same command continues from the last checkpoint"
    )
    console.print(
        f"{config.name}: stopped after step {run.step} of {config.total_steps} ({reason}), {what}",
        style="yellow",
    )
    return Outcome(folder.path, run.step, run.losses, 128 + number if number else EXIT_TIME_LIMIT)


def _log_saved(saver: Saver, metrics: Metrics, limit: TimeLimit) -> None:
    for saved in saver.finished():
        limit.saved(saved.seconds)
        metrics.event(
            "save", step=saved.step, path=str(saved.path), stall=round(saved.stall, 3), seconds=round(saved.seconds, 3)
        )


def _evaluate_all(
    run: Run, step: int, metrics: Metrics, console: Console, when: str | None, *, number: int, last: bool
) -> None:
    config = run.plan.config
    micro_batch = config.evaluation.micro_batch or config.training.micro_batch
    shown = []
    for windows in run.validation:
        if windows.when == "end" and not last:
            continue
        turn = number if windows.when == "always" else 0
        loss, tokens = evaluate(run.model, windows.slice(turn), micro_batch, run.mesh)
        name = windows.name
        run.losses[name] = run.measured[name] = loss
        metrics.event("eval", step=step, tokens=run.plan.tokens(step), name=name, role=windows.role, loss=loss, over=tokens)
        start = run.start_losses.get(name)
        shown.append(f"{name} {loss:.4f}" + (f" ({loss - start:+.4f})" if start is not None else ""))
    if shown:
        line = f"{config.name}: {when or f'step {step}'}: {', '.join(shown)}"
        metrics.text(line)
        if when is not None:
            console.print(line, highlight=False)


def _announce(run: Run, metrics: Metrics, console: Console) -> None:
    plan = run.plan
    if plan.resumed:
        metrics.event("resume", step=plan.position.step)
    else:
        if metrics.has_past:
            # killed before its first checkpoint: what was logged then is superseded as a whole
            metrics.event("resume", step=-1)
        metrics.event("start", **run.description())
    print_start(run, console)
    if not plan.resumed:
        print_reset_table(run.table_rows, console, metrics.text)
