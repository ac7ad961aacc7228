"""The training data of a planned run, opened and checked against its start checkpoint, and the samples it has read."""

from __future__ import annotations

from collections.abc import Sequence

from megarewarm.checkpoint.lineage import DataSeen
from megarewarm.config.schema import RunConfig
from megarewarm.data.files.library import TokenFiles
from megarewarm.data.mixture.batches import TrainingBatches, build_training_batches
from megarewarm.data.mixture.moving import MovingWindows
from megarewarm.data.mixture.validation import ValidationWindows, WindowSet
from megarewarm.errors import UserError
from megarewarm.rewarm.own_replay import writer_of
from megarewarm.rewarm.replay import check_apart
from megarewarm.rewarm.switches import training_phases
from megarewarm.training.start.plan import Plan


def open_data(plan: Plan, files: TokenFiles) -> TrainingBatches:
    """All samples of the run, replays among them, out of ``files``.

    Raises ``UserError`` for files that can't be read or hold too little, where the lineage doesn't say what is to be replayed,
    where the position in the data has no meaning in these, and where a held-out set is trained on.
    """
    config = plan.config
    old = plan.replayed()
    data = build_training_batches(
        files,
        training_phases(config, plan.schedule, plan.origin, old),
        total_samples=plan.samples(config.total_steps),
    )
    _check_position(plan, data)
    check_apart(files, old)
    return data


def _check_position(plan: Plan, data: TrainingBatches) -> None:
    if plan.policy.data != "continue" or plan.source is None or plan.source.training is None:
        return
    stored, ours = plan.source.training.data_fingerprint, data.fingerprint(before=plan.source.training.samples)
    if stored and stored != ours:  # other programs' checkpoints don't record what they read
        what = "the data files, their blend or their order changed" if plan.resumed else "it was trained on other data"
        remedy = "restore the old files" if plan.resumed else "set start.data to 'restart'"
        raise UserError(
            f"{plan.source.name}: its position in the data (sample {plan.source.training.samples:,}) does not apply here, "
            f"{what} (fingerprint {stored[:8]}, now {ours[:8]}); {remedy}"
        )
    for seen in plan.source.training.lineage.stages[-1].data:
        same = [file for file in data.files if file.fingerprint == seen.fingerprint]
        if seen.samples and same and not any(map(seen.file.agrees_with, same)):
            what = f"{same[0].path}: changed after {plan.source.name} had been trained on it ({same[0].differing(seen.file)})"
            raise UserError(f"{what}; {'restore the old file' if plan.resumed else 'set start.data to restart'}")


def check_held_out(plan: Plan, validation: Sequence[WindowSet]) -> None:
    """Raise ``UserError`` if a resumed run would measure its validation losses on other tokens than before."""
    if not plan.resumed or plan.source is None or plan.source.training is None:
        return
    for windows in validation:
        for before, now in zip(plan.source.training.held_out.get(windows.name, []), windows.files, strict=False):
            if (what := now.differing(before)) is not None:
                raise UserError(
                    f"{now.path}: changed since {plan.source.name} was saved ({what}), so the losses on validation set "
                    f"'{windows.name}' would be measured on other tokens; restore the old file, or continue in a new run with "
                    f"start.from"
                )


def data_seen(plan: Plan, data: TrainingBatches, step: int, left_out: Sequence[tuple[int, int]] = ()) -> list[DataSeen]:
    """What the run has read of each source once ``step`` steps are done, of which those ``left_out`` are not in the weights."""
    first, end = plan.samples(plan.origin.step), plan.samples(step)
    tokens = data.tokens_per_source(first, end - first)
    length = plan.config.data.sequence_length
    ranges, begin = [], first
    for lost, last in left_out:
        ranges.append((begin, plan.samples(lost - 1)))
        begin = plan.samples(last)
    ranges.append((begin, end))
    return [
        DataSeen(
            name=name,
            **file.model_dump(),
            samples=tokens[name] // length,
            tokens=tokens[name],
            read=read,
            left_out=tokens[name] // length - trained_on,
            generated_by=writer_of(plan.own_replay) if plan.own_replay is not None and plan.own_replay.name == name else None,
        )
        for name, file, (read, trained_on) in zip(data.names, data.files, data.samples_read(ranges), strict=True)
    ]


def open_validation(config: RunConfig, files: TokenFiles) -> tuple[list[WindowSet], list[str]]:
    """The validation sets of a run, and notes on those that are left out, or hold less than is asked for. Raises ``UserError``.

    A moving set whose split gives it no documents is left out, as GPT-NeoX does: its default split of 969, 30, 1 leaves
    small files without a test set.
    """
    if config.evaluation.windows == "fixed":
        fixed = [ValidationWindows(item, files) for item in files.data.validation]
        return [*fixed], [note for windows in fixed for note in windows.notes]
    evaluations = config.grid(config.evaluation.every).count(config.total_steps) + 1
    sets: list[WindowSet] = []
    notes = []
    for item in files.data.validation:
        empty = [source for source in item.sources if files.view(source).num_documents == 0]
        if empty:
            where = f"split '{empty[0].split}' gives its part of {empty[0].path} no documents"
            notes.append(f"validation set '{item.name}' is left out: {where}")
        else:
            moving = MovingWindows(item, files, evaluations)
            sets.append(moving)
            notes += moving.notes
    return sets, notes
