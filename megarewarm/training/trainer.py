"""The training loop. Read this first: plan, build, then batch, step, log, evaluate, save until the budget is spent."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megarewarm.checkpoint.export.huggingface import ModelWeights, export
from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.config.schema import RunConfig
from megarewarm.parallel.agreement import all_reduce_sums
from megarewarm.parallel.ranks import Ranks
from megarewarm.training.dynamics import dynamics_steps, log_dynamics, measure
from megarewarm.training.evaluate import evaluate, evaluation_steps, turns
from megarewarm.training.interpolation import interpolate
from megarewarm.training.metrics import Metrics, check_loggers
from megarewarm.training.plan import Plan, make_plan
from megarewarm.training.progress import RunProgress, duration
from megarewarm.training.run_folder import RunFolder
from megarewarm.training.saving import check_saving, extra_steps, is_saved, retention
from megarewarm.training.setup import Run, build
from megarewarm.training.signals import StopRequest
from megarewarm.training.summary import print_reset_table, print_start

_NOTICEABLE_WAIT = 0.05  # of the time of a run, spent on waiting for data


class TrainingDiverged(Exception):
    """The loss or the gradient is not a finite number any more; nothing of that step was saved."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, completed steps, newest validation losses, and the signal that stopped it, if any."""

    folder: Path
    step: int
    losses: dict[str, float]
    stopped_by: int | None = None


def train(config: RunConfig, ranks: Ranks, console: Console) -> Outcome:
    """Train ``config`` to its end, from its own newest checkpoint if it has one. All ranks call it.

    Raises ``UserError`` for bad input before anything is overwritten, ``TrainingDiverged`` for a non-finite step.
    """
    check_loggers(config.logging)
    folder = RunFolder(Path(config.run_folder))
    folder.check(config)
    plan = make_plan(config)
    if plan.resumed and plan.position.step >= plan.config.total_steps:
        assert plan.source is not None and plan.source.training is not None
        console.print(f"[bold]{config.name}[/]: already complete in {folder.path}", highlight=False)
        if not folder.export.exists():
            _export(plan, folder, ranks, console)
        return Outcome(folder.path, plan.position.step, plan.source.training.lineage.stages[-1].losses)
    check_saving(plan.config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps)
    run = build(plan, ranks)
    with ExitStack() as opened:
        opened.callback(run.batches.close)
        folder.open(config, main=ranks.is_main)
        opened.callback(folder.close)
        metrics = Metrics(folder.path, config.logging, config.name, writes=ranks.is_main)
        opened.callback(metrics.close)
        _announce(run, metrics, console)
        saver = opened.enter_context(
            Saver(folder.checkpoints, retention(plan.config), asynchronous=plan.config.checkpoint.asynchronous)
        )
        saver.reserve(run.tensors())
        with StopRequest(console) as stop:
            outcome = _loop(run, folder, saver, metrics, console, stop)
        if outcome.stopped_by is None:
            _export(plan, folder, ranks, console)
    return outcome


def _export(plan: Plan, folder: RunFolder, ranks: Ranks, console: Console) -> None:
    """Write what ``export`` asks for, from the newest checkpoint."""
    if not (plan.config.export.huggingface and ranks.is_main):
        return
    newest, _ = folder.newest_checkpoint(alone=True)
    assert newest is not None
    checkpoint = OwnCheckpoint(newest, verified=True)
    weights = ModelWeights(checkpoint.whole_model())
    export(weights, plan.model, folder.export, tokenizer=plan.config.data.tokenizer, lineage=checkpoint.lineage)
    console.print(f"{plan.config.name}: exported to {folder.export}", highlight=False)


def _loop(run: Run, folder: RunFolder, saver: Saver, metrics: Metrics, console: Console, stop: StopRequest) -> Outcome:
    plan, config = run.plan, run.plan.config
    total, first = config.total_steps, plan.position.step
    sums = plan.learning_rate_sums()
    measure_after = dynamics_steps(config, plan.origin.step)
    evaluate_after = set(evaluation_steps(config, plan.origin.step, plan.origin.step + plan.schedule.warmup_steps))
    if not plan.resumed and first in evaluate_after:
        _evaluate_all(run, first, metrics, console, "at the start", number=0, last=False)
        run.start_losses = dict(run.losses)
    if not plan.resumed and first in extra_steps(config):
        saver.save(run.state(), run.tensors())
    with RunProgress(console, config.name, first, total, config.logging.every) as progress:
        for step in range(first + 1, total + 1):
            began, waited = time.perf_counter(), run.waited
            lr = plan.lr(step)
            try:
                loss, norm = training_step(run, lr)
            except TrainingDiverged:
                metrics.event("stop", step=step, reason="diverged")
                raise
            seconds = time.perf_counter() - began
            rate = config.tokens_per_step / seconds
            lr_sum, area = (float(column[step - plan.origin.step - 1]) for column in sums)
            run.step, run.last_lr, run.max_lr, run.measured = step, lr, max(run.max_lr, lr), {}
            metrics.event(
                "train",
                step=step,
                tokens=step * config.tokens_per_step,
                loss=loss,
                lr=lr,
                lr_sum=lr_sum,
                annealing_area=area,
                grad_norm=norm,
                tokens_per_second=round(rate, 1),
                data_wait=round(run.waited - waited, 4),
                **({"distill_loss": run.distilled} if run.model.teacher is not None else {}),
                **run.utilisation(rate),
            )
            metrics.scalars(step, {"train/loss": loss, "train/lr": lr, "train/grad_norm": norm, "train/tokens_per_s": rate})
            metrics.scalars(step, {"train/lr_sum": lr_sum, "train/annealing_area": area})
            if step in measure_after and math.isfinite(norm):  # in fp16 a step may have changed nothing
                groups = measure(run.model, run.optimizer, run.start_weights)
                log_dynamics(metrics, step, step * config.tokens_per_step, groups)
            if (line := progress.step(step, loss, lr, rate)) is not None:
                metrics.text(line)
            for number, last in turns(config, step) if step in evaluate_after else ():
                _evaluate_all(run, step, metrics, console, None, number=number, last=last)
            stopping, failed = (count > 0 for count in all_reduce_sums([stop.received is not None, saver.failed]))
            if failed:
                saver.wait()
            if stopping or is_saved(config, step):
                saver.save(run.state(), run.tensors())
            if stopping or step == total:
                saver.wait()
            _log_saved(saver, metrics)
            if stopping:
                signal_number = stop.received if stop.received is not None else 15
                metrics.event("stop", step=step, reason=f"signal {signal_number}")
                console.print(
                    f"{config.name}: stopped after step {step} of {total}, saved; the same command continues from here",
                    style="yellow",
                )
                return Outcome(folder.path, step, run.losses, signal_number)
    interpolate(run, metrics, console)
    metrics.event("stop", step=total, reason="complete")
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in run.losses.items())
    elapsed = duration(time.monotonic() - run.started)
    console.print(f"[bold]{config.name}[/]: complete in {elapsed}{': ' + shown if shown else ''}", highlight=False)
    if run.waited > _NOTICEABLE_WAIT * (time.monotonic() - run.started):
        share = 100 * run.waited / (time.monotonic() - run.started)
        console.print(
            f"{config.name}: {share:.0f} % of the time went into waiting for data; a faster disk, or a copy of the token files "
            f"on a local one, would save it",
            style="yellow",
        )
    return Outcome(folder.path, total, run.losses)


def _log_saved(saver: Saver, metrics: Metrics) -> None:
    for saved in saver.finished():
        metrics.event(
            "save", step=saved.step, path=str(saved.path), stall=round(saved.stall, 3), seconds=round(saved.seconds, 3)
        )


def training_step(run: Run, lr: float) -> tuple[float, float]:
    """One optimizer step on the next global batch. Returns the mean loss per target and the gradient norm before clipping.

    The loss of every micro-batch is a sum divided by the targets of the whole global batch, so gradients add up to
    those of one large batch, whatever the micro-batches and ranks. In fp16 a step whose gradients overflow changes nothing
    but the loss scale. Raises ``TrainingDiverged``.
    """
    config = run.plan.config
    began = time.perf_counter()
    first_sample, rows = next(run.batches)
    run.waited += time.perf_counter() - began
    assert first_sample == run.plan.samples(run.step), "the loader and the step counter have parted; please report this"
    gradients, scaler = run.model.gradients, run.scaler
    scale = scaler.scale if scaler is not None else 1.0
    gradients.zero()
    loss_sum, targets = run.model.forward_backward(rows, loss_scale=scale)
    run.ranks.report(run.step + 1)
    gradients.reduce()
    norm = gradients.norm() / scale
    loss_sum, targets, distilled = all_reduce_sums([loss_sum, targets, run.model.distilled])
    loss = loss_sum / targets if targets else math.nan
    run.distilled = distilled / targets if targets else math.nan
    if scaler is not None:
        scaler.update(math.isfinite(norm))
        if math.isfinite(loss) and not math.isfinite(norm):
            return loss, norm
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingDiverged(
            f"step {run.step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite (loss {loss}, gradient "
            f"norm {norm}); the last checkpoint is untouched. A lower schedule.max_lr or a longer warmup usually helps"
        )
    limit = config.optimizer.clip_norm
    factor = limit / (norm + 1e-6) if limit is not None and norm > limit else 1.0
    run.optimizer.step(lr, gradients, factor / scale)
    return loss, norm


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
        metrics.event(
            "eval", step=step, tokens=step * config.tokens_per_step, name=name, role=windows.role, loss=loss, over=tokens
        )
        metrics.scalars(step, {f"validation/{name}": loss})
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
