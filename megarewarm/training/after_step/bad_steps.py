"""Handling of steps that are not finite or spikes: report, record the batch, skip, roll back, or end the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.errors import UserError
from megarewarm.record.layout import step_name
from megarewarm.training.after_step.part import Context, Moment
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.run import Run
from megarewarm.training.step import StepResult, TrainingDiverged


class Judge:
    """Applies ``reliability`` to the step just made."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._unchanged = 0
        """The number of skipped steps in a row up to the newest."""

    def state(self) -> dict[str, Any]:
        return {"unchanged": self._unchanged}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._unchanged = state["unchanged"]

    def after(self, moment: Moment) -> None:
        """Raises ``TrainingDiverged`` if the run has to end, after the event is written."""
        if moment.result is not None:
            try:
                line = self._judge(moment.result, moment)
            except TrainingDiverged:
                self._context.metrics.event("stop", step=self._context.run.step, reason="diverged")
                raise
            if line is not None:
                line = f"step {self._context.run.step}: {line}"
                self._context.metrics.text(line)
                self._context.voice.warn(line)
        moment.sound = self._unchanged == 0

    def _judge(self, result: StepResult, moment: Moment) -> str | None:
        """The message about the step."""
        run, metrics = self._context.run, self._context.metrics
        settings, step = run.plan.config.reliability, run.step
        if not result.changed and result.fault in (None, "transient"):  # fp16's gradients overflowed
            run.state.leave_out(step, step)
        if result.fault is None:
            self._unchanged = 0
            return None
        metrics.event("alarm", step=step, kind=result.fault, message=result.words, loss=result.loss, grad_norm=result.norm)
        if result.fault == "transient":
            self._unchanged = 0
            return result.words
        record = write_place(run, result, self._context.folder)
        if result.changed:
            self._unchanged = 0
            return f"{result.words}; batch recorded in {record}"
        self._unchanged += 1
        ends = result.fault == "non_finite" and settings.non_finite == "stop"
        if ends or self._unchanged >= settings.give_up_after:
            many = f", as were the {self._unchanged - 1} before it" if self._unchanged > 1 and not ends else ""
            raise TrainingDiverged(
                f"step {step}: {result.words}{many}; the last checkpoint is untouched. A lower schedule.max_lr or a longer "
                f"warmup usually helps. The step's batch is recorded in {record}; look at it with megarewarm replay-step "
                f"{self._context.folder.path}"
            )
        too_young = ""
        if result.fault == "spike" and settings.spikes == "roll_back":
            back = _roll_back(run, self._context.folder, self._context.saver)
            if back is not None:
                self._unchanged, moment.went_back = 0, True
                metrics.event("alarm", step=step, kind="roll_back", message=f"rolled back to step {back}", to=back)
                return f"{result.words}; rolled back to step {back}, skipping the spike's data; batch recorded in {record}"
            too_young = f"; no checkpoint is {settings.roll_back_steps} steps old yet, so only this step is skipped"
        run.state.leave_out(step, step)
        return f"{result.words}{too_young}; step skipped; batch recorded in {record}"


def write_place(run: Run, result: StepResult, folder: RunFolder) -> str:
    """Write ``RUN/batches/step_N.json``, where the rows of the step come from, and return its path. The main rank writes.
    Raises ``UserError`` if the disk refuses."""
    path = folder.batches / f"{step_name(run.step)}.json"
    if run.ranks.is_main:
        plan = run.plan
        rows = run.data.places(plan.samples(run.step - 1), plan.config.training.global_batch)
        content = {
            "run": plan.config.name,
            "step": run.step,
            "what": result.words,
            "data_fingerprint": run.data.fingerprint(before=plan.samples(run.step)),
            "rows": [asdict(row) for row in rows],
        }
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror or error}); make room") from error
    return str(path)


def _roll_back(run: Run, folder: RunFolder, saver: Saver) -> int | None:
    """Load weights and optimizer of the newest checkpoint that is old enough; its step, or None without one.

    The step count, and with it data and schedule, stays. Checkpoints written at a stop don't count, because the
    uninterrupted run does not have them, nor do those of a course that was abandoned since.
    """
    saver.wait()
    oldest = run.step - run.plan.config.reliability.roll_back_steps
    found, _ = folder.newest_checkpoint(up_to=oldest, counts=lambda path: _is_behind(run, path))
    if found is None:
        return None
    source = OwnCheckpoint(found, verified=True)
    assert source.training is not None
    run.restore_from(source)
    run.state.leave_out(source.training.step + 1, run.step)
    if run.spikes is not None:
        run.spikes.clear()
    return source.training.step


def _is_behind(run: Run, checkpoint: Path) -> bool:
    """Whether the uninterrupted run has the checkpoint, too, and the run's weights continued from it: both lack the same
    steps."""
    try:
        state = read_state(checkpoint)
    except UserError:
        return True  # damage is reported with the others
    lacking = [(first, min(last, state.step)) for first, last in run.state.left_out if first <= state.step]
    return not state.interim and lacking == list(state.lineage.stages[-1].left_out)
