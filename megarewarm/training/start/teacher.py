"""The teacher of ``distill``: a checkpoint opened from its name, and checked against the model that it teaches."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from megarewarm.checkpoint.source import CheckpointSource, OpenedCheckpoint, OwnCheckpoint, open_checkpoint
from megarewarm.checkpoint.tokenizer_source import loaded
from megarewarm.config.model import ModelConfig
from megarewarm.config.schema import RunConfig
from megarewarm.errors import UserError
from megarewarm.record.config_yaml import read_settings
from megarewarm.record.layout import CHECKPOINTS


def open_teacher(config: RunConfig) -> OpenedCheckpoint:
    """The checkpoint that ``distill.from`` names, from headers alone. Raises ``UserError`` if there is none, or only that of a
    run that is still going on: its newest checkpoint would not be the same in a resumed run."""
    assert config.distill is not None and config.distill.from_ is not None
    name = config.distill.from_
    if Path(name).resolve().is_relative_to(Path(config.run_folder).resolve()):
        raise UserError(f"distill.from: {name} is this run itself; name the checkpoint of another one, or null for the start")
    try:
        opened = open_checkpoint(name)
    except UserError as error:
        raise UserError(f"distill.from: {error}") from error
    if isinstance(opened, OwnCheckpoint) and Path(name) != opened.folder and (total := _steps_of(opened)) is not None:
        step = opened.state.step
        if step < total:
            raise UserError(
                f"distill.from: {name} is a run in progress, at step {step:,} of {total:,}; let it end, or name one of its "
                f"checkpoints ({opened.folder})"
            )
    return opened


def _steps_of(opened: OwnCheckpoint) -> int | None:
    """Steps of the run that a checkpoint lies in; None where its folder doesn't say."""
    if opened.folder.parent.name != CHECKPOINTS:
        return None
    try:
        return RunConfig.model_validate(read_settings(opened.folder.parent.parent)).total_steps
    except (UserError, ValidationError):
        return None


def check_teacher(config: RunConfig, model: ModelConfig, teacher: CheckpointSource) -> None:
    """Raise ``UserError`` naming the key if ``teacher`` can't teach a run of ``model``: other ids, too few positions, and for
    hidden states another width."""
    assert config.distill is not None
    name, theirs, length = teacher.name, teacher.model_config, config.data.sequence_length
    if theirs.vocab_size != model.vocab_size:
        least, known = min(theirs.vocab_size, model.vocab_size), _ids_of(teacher)
        if known is None or known > least:
            why = (
                "it has no tokenizer that says how many of them are padding" if known is None else f"it uses {known:,} of them"
            )
            raise UserError(
                f"distill.from: {name} has a vocabulary of {theirs.vocab_size:,} ids, the model one of {model.vocab_size:,}, "
                f"and {why}; choose a teacher with the model's tokenizer"
            )
    if length > theirs.max_positions:
        raise UserError(
            f"distill.from: {name} has {theirs.max_positions:,} positions, data.sequence_length is {length:,}; choose a "
            f"teacher with as many, or shorter sequences"
        )
    if config.distill.kind == "hidden" and theirs.hidden_size != model.hidden_size:
        raise UserError(
            f"distill.kind: 'hidden' compares states of one width, and {name} has hidden_size {theirs.hidden_size:,}, the "
            f"model {model.hidden_size:,}; set it to 'logits', or choose a teacher of that width"
        )


def _ids_of(teacher: CheckpointSource) -> int | None:
    """The ids that the tokenizer of ``teacher`` gives; the rows beyond them are padding."""
    file = teacher.tokenizer.file
    return None if file is None else loaded(file).vocab_size
