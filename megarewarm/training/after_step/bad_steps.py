"""What a run does about a step that is not finite or a spike: say so, write down its data, leave it out, go back, or end."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megarewarm.checkpoint.own.saver import Saver
from megarewarm.checkpoint.own.state import read_state
from megarewarm.checkpoint.source import OwnCheckpoint
from megarewarm.errors import UserError
from megarewarm.training.output.metrics import Metrics
from megarewarm.training.output.run_folder import RunFolder
from megarewarm.training.run import Run, take_back
from megarewarm.training.step import StepResult, TrainingDiverged


@dataclass(frozen=True)
class Answer:
    """``lines`` that a person should read; ``went_back``: a checkpoint has to be written now, or a run that is killed would go
    on from the spike."""

    lines: list[str]
    went_back: bool = False


def answer(run: Run, result: StepResult, folder: RunFolder, saver: Saver, metrics: Metrics) -> Answer:
    """Do what ``reliability`` says about the step just made, ``run.step``.

    All ranks call it. Raises ``TrainingDiverged`` where the run has to end; the event is written then.
    """
    settings, step = run.plan.config.reliability, run.step
    if not result.changed and result.fault in (None, "transient"):  # fp16's gradients overflowed
        _leave_out(run, step, step)
    if result.fault is None:
        run.unchanged = 0
        return Answer([])
    metrics.event("alarm", step=step, kind=result.fault, message=result.words, loss=result.loss, grad_norm=result.norm)
    lines = [f"step {step}: {result.words}"]
    if result.fault == "transient":
        run.unchanged = 0
        return Answer(lines)
    record = write_place(run, result, folder)
    if result.changed:
        run.unchanged = 0
        return Answer([f"{lines[0]}; its data: {record}"])
    run.unchanged += 1
    ends = result.fault == "non_finite" and settings.non_finite == "stop"
    if ends or run.unchanged >= settings.give_up_after:
        many = f", as were the {run.unchanged - 1} before it" if run.unchanged > 1 and not ends else ""
        raise TrainingDiverged(
            f"step {step}: {result.words}{many}; the last checkpoint is untouched. A lower schedule.max_lr or a longer warmup "
            f"usually helps. The step's data are named in {record}; look at it with tools/replay_batch.py {folder.path}"
        )
    if result.fault == "spike" and settings.spikes == "roll_back":
        back = _roll_back(run, folder, saver)
        if back is not None:
            run.unchanged = 0
            metrics.event("alarm", step=step, kind="roll_back", message=f"back to the weights of step {back}", to=back)
            told = f"{lines[0]}; back to the weights of step {back}, and on behind the spike; its data: {record}"
            return Answer([told], went_back=True)
        lines[0] += f"; no checkpoint is {settings.roll_back_steps} steps old yet, so the step alone is left out"
    _leave_out(run, step, step)
    return Answer([f"{lines[0]}; it changes nothing, its data: {record}"])


def write_place(run: Run, result: StepResult, folder: RunFolder) -> str:
    """Write ``RUN/batches/step_N.json``, where the rows of the step come from, and return its path. The main rank writes.

    Raises ``UserError`` where the disk refuses.
    """
    path = folder.batches / f"step_{run.step}.json"
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
    """Weights and optimizer of the newest checkpoint that is old enough; its step, or None where there is none yet.

    The count of steps, and with it data and schedule, stay where they are. A checkpoint that only a stop has left does not
    count, for the undisturbed run has none there; nor does one of a course that has been given up since.
    """
    saver.wait()
    oldest = run.step - run.plan.config.reliability.roll_back_steps
    found, _ = folder.newest_checkpoint(up_to=oldest, counts=lambda path: _is_behind(run, path))
    if found is None:
        return None
    source = OwnCheckpoint(found, verified=True)
    assert source.training is not None
    take_back(run, source)
    _leave_out(run, source.training.step + 1, run.step)
    if run.spikes is not None:
        run.spikes.clear()
    return source.training.step


def _is_behind(run: Run, checkpoint: Path) -> bool:
    """Whether the undisturbed run has the checkpoint, too, and the run's weights went on from it: the steps up to it that they
    lack are those that it lacks."""
    try:
        state = read_state(checkpoint)
    except UserError:
        return True  # that it is damaged is found with the others
    lacking = [(first, min(last, state.step)) for first, last in run.left_out if first <= state.step]
    return not state.interim and lacking == list(state.lineage.stages[-1].left_out)


def _leave_out(run: Run, first: int, last: int) -> None:
    """Record that the steps from ``first`` to ``last`` are not in the weights, in disjoint ascending ranges."""
    kept = [(a, b) for a, b in run.left_out if b < first - 1]
    begin = min([first, *(a for a, b in run.left_out if b >= first - 1)])
    run.left_out = [*kept, (begin, last)]
